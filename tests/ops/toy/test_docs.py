"""docs/extending.md quotes the toy: what it shows is what the tests run."""

from __future__ import annotations

import re
from pathlib import Path

from tests.documents import ROOT


def test_every_program_in_the_document_is_quoted_from_a_file_here() -> None:
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
    files = [file.read_text(encoding="utf-8") for file in Path(__file__).parent.glob("*.py")]
    assert len(quoted) == 5
    for program in quoted:
        assert any(program in file for file in files), program
