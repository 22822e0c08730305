"""The programs in a document: Python blocks, and the text blocks that directly follow them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Program(NamedTuple):
    line: int
    source: str
    text: str  # what it prints, or the last line of its traceback

    def imports(self, library: str) -> bool:
        return re.search(rf"^(import|from) {library}\b", self.source, re.M) is not None


def programs(document: str) -> list[Program]:
    content = (ROOT / document).read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```\n", content, re.M | re.S)
    listed = [Program(content.count("\n", 0, match.start()) + 2, match[1], match[2]) for match in found]
    assert len(listed) == content.count("```python"), f"{document}: a program without what it prints"
    return listed


def check(program: Program, folder: Path, is_quiet: bool = True) -> None:
    """Run a program in a process and a folder of its own, and compare; one that is not quiet may warn."""
    # Not as in the tests: MXNet itself warns at its import.
    environment = {**os.environ, "PYTHONWARNINGS": "ignore::DeprecationWarning"}
    done = subprocess.run(
        [sys.executable, "-c", program.source],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    if re.match(r"[\w.]+Error: ", program.text):
        assert done.returncode == 1 and done.stderr.splitlines()[-1] == program.text.rstrip("\n"), done.stderr
    else:
        assert (done.returncode, done.stdout) == (0, program.text), done.stderr
        assert not (is_quiet and done.stderr), done.stderr
