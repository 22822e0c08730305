"""The README's programs run, print what it shows and raise what it quotes; what it links to exists."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


class Block(NamedTuple):
    """A Python block and the text block that directly follows it, what it prints or raises."""

    line: int
    source: str
    text: str | None


def blocks() -> list[Block]:
    found = re.finditer(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", README, re.M | re.S)
    return [Block(README.count("\n", 0, match.start()) + 2, match[1], match[2]) for match in found]


def test_there_are_blocks():
    assert len(blocks()) == README.count("```python") >= 8
    assert sum(block.text is not None for block in blocks()) == README.count("```text")


@pytest.mark.parametrize("block", blocks(), ids=lambda block: f"line {block.line}")
def test_block(block: Block):
    for library in ("torch", "torchvision", "mxnet"):
        if re.search(rf"^import {library}\b", block.source, re.M) and importlib.util.find_spec(library) is None:
            pytest.skip(f"needs {library}")
    code = compile("\n" * (block.line - 1) + block.source, "README.md", "exec")
    if block.text is not None and (error := re.match(r"(?:\w+\.)*(\w+Error): ", block.text)):
        with pytest.raises(Exception) as raised:
            run(code)
        assert f"{type(raised.value).__module__}.{type(raised.value).__qualname__}: " == error[0]
        # The README breaks long lines.
        assert str(raised.value).split() == block.text[error.end() :].split()
        return
    assert run(code) == (block.text or "")


def run(code: Any) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {"__name__": "__main__"})
    return printed.getvalue()


def test_links():
    targets = re.findall(r"\]\(([^)]+)\)", README)
    local = [target for target in targets if not target.startswith("https://")]
    assert {"docs/images/offset_order.png", "docs/images/sampling_points.png"} <= set(local)
    for target in local:
        assert (ROOT / target.partition("#")[0]).is_file(), target
    for image in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (ROOT / image).stat().st_size < 300_000, image


def test_named_commands_and_variables_exist():
    from deformconv.cli.main import deformconv

    assert set(re.findall(r"`deformconv (\w+)", README)) <= set(deformconv.commands)
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    for variable in set(re.findall(r"DEFORMCONV_\w+", README)):
        assert variable in sources


def test_make_has_the_targets_that_documents_name():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set(
        re.findall(r"(?:^|`|^#   )make (?:[A-Z]+=\S+ )*([a-z][\w-]*)", "\n".join([README, contributing, makefile]), re.M)
    )
    assert {"demo", "test", "test-fast", "test-other-kernels", "bench", "lint"} <= named
    assert named <= set(re.findall(r"^([\w-]+):", makefile, re.M))


def test_offset_order_is_drawn_by_its_script(tmp_path):
    """The script runs and draws a picture of the committed one's size; pixels depend on matplotlib's version."""
    pytest.importorskip("matplotlib")
    file = importlib.util.spec_from_file_location("draw_offsets", ROOT / "docs" / "draw_offsets.py")
    assert file is not None and file.loader is not None
    script = importlib.util.module_from_spec(file)
    file.loader.exec_module(script)
    script.draw(tmp_path / "picture.png")
    drawn = (tmp_path / "picture.png").read_bytes()
    committed = (ROOT / "docs" / "images" / "offset_order.png").read_bytes()
    assert drawn[16:24] == committed[16:24]  # width and height in PNG's first chunk
