"""The programs of the README and of the pages for beginners run, print what stands below them and raise what is quoted.

What these and all other pages link to exists.
"""

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


# The README, and the pages whose programs need no process of their own.
PAGES = [
    "README.md",
    "docs/checkpoints.md",
    "docs/choosing.md",
    "docs/family.md",
    "docs/first-steps.md",
    "docs/from-basicsr.md",
    "docs/from-dcnv2.md",
    "docs/from-detectron2.md",
    "docs/from-internimage.md",
    "docs/from-mmcv.md",
    "docs/from-mxnet.md",
    "docs/from-paddledetection.md",
    "docs/from-torchvision.md",
    "docs/from-transformers.md",
    "docs/gpu.md",
    "docs/looking.md",
    "docs/supported.md",
]


class Block(NamedTuple):
    """A Python block and the text block that directly follows it, what it prints or raises."""

    page: str
    line: int
    source: str
    text: str | None


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[Block]:
    text = text_of(page)
    found = re.finditer(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", text, re.M | re.S)
    return [Block(page, text.count("\n", 0, match.start()) + 2, match[1], match[2]) for match in found]


@pytest.mark.parametrize("page", PAGES)
def test_there_are_blocks(page: str):
    text = text_of(page)
    assert len(blocks(page)) == text.count("```python") >= 1
    assert sum(block.text is not None for block in blocks(page)) == text.count("```text")


LIBRARIES = ("torch", "torchvision", "transformers", "mxnet", "mmdet", "jax", "flax", "equinox", "optax", "keras", "tensorflow")
# What our rooms need, also where a program imports nothing else.
OF_ROOMS = {
    "torch": "torch",
    "vision": "torch",
    "gluon": "mxnet",
    "jax": "jax",
    "flax": "flax",
    "equinox": "equinox",
    "keras": "keras",
}


def needed(source: str) -> set[str]:
    """The libraries beside NumPy that a program imports, itself or through our rooms."""
    modules = set(re.findall(r"^(?:import|from) ([\w.]+)", source, re.M))
    rooms = {module.split(".")[1] for module in modules if module.startswith("deformconv.")}
    return {module.split(".")[0] for module in modules} & set(LIBRARIES) | {OF_ROOMS[room] for room in rooms & set(OF_ROOMS)}


@pytest.mark.parametrize("block", [block for page in PAGES for block in blocks(page)], ids=lambda b: f"{b.page} line {b.line}")
def test_block(block: Block):
    for library in sorted(needed(block.source)):
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"needs {library}")
    code = compile("\n" * (block.line - 1) + block.source, block.page, "exec")
    if block.text is not None and (error := re.match(r"(?:\w+\.)*(\w+Error): ", block.text)):
        with pytest.raises(Exception) as raised:
            run(code)
        assert f"{type(raised.value).__module__}.{type(raised.value).__qualname__}: " == error[0]
        # A page breaks long lines.
        assert str(raised.value).split() == block.text[error.end() :].split()
        return
    assert run(code) == (block.text or "")


def run(code: Any) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {"__name__": "__main__"})
    return printed.getvalue()


DOCUMENTS = [*sorted(path.name for path in ROOT.glob("*.md")), "benchmarks/README.md"]
DOCUMENTS += sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))


@pytest.mark.parametrize("page", DOCUMENTS)
def test_links(page: str):
    prose = re.sub(r"^```.*?^```$|`[^`\n]*`", "", text_of(page), flags=re.M | re.S)
    folder = (ROOT / page).parent
    for target in re.findall(r"\]\(([^)]+)\)", prose):
        path, _, anchor = target.partition("#")
        if path.startswith("https:"):
            continue
        assert not path or (folder / path).is_file(), target
        if anchor:
            assert anchor in anchors((folder / path) if path else ROOT / page), target


def anchors(page: Path) -> list[str]:
    """What links into a page may name: its headings, as GitHub and the site spell them."""
    headings = re.findall(r"^#+ (.*)", re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S), re.M)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("page", ["README.md", "docs/offsets.md"])
def test_images_are_small(page: str):
    images = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text_of(page))
    assert images
    for image in images:
        assert ((ROOT / page).parent / image).stat().st_size < 300_000, image


def test_the_readme_is_three_screens():
    """What, a picture, how to install, ten lines, a chart, links: the rest is on pages of their own."""
    assert len(README.splitlines()) <= 110 and len(README.split()) <= 800
    headings = re.findall(r"^#+ (.*)", README, re.M)
    assert {"Install", "Quickstart", "Speed", "Documentation"} <= set(headings)
    for page in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{page.name})" in README or page.name in NOT_FOR_THE_README, page.name


# What links to them is in CONTRIBUTING.md or on other pages.
NOT_FOR_THE_README = {"style.md", "gallery.md"}


def test_the_readme_renders_on_a_package_index():
    """An index renders GitHub's Markdown and drops what is unsafe: all text, both pictures and no raw HTML must be left."""
    markdown = pytest.importorskip("readme_renderer.markdown")
    page = markdown.render(README)
    assert page is not None
    assert page.count("<img") == README.count("![") == 2
    assert [len(re.findall(f"<h{level}", page)) for level in (1, 2)] == [1, len(re.findall(r"^## ", README, re.M))]
    assert "&lt;!--" not in page and "benchmark:begin" not in re.sub(r"<!--.*?-->", "", page)
    assert page.count("<pre") == README.count("```") // 2


def test_named_commands_and_variables_exist():
    from deformconv.cli.main import deformconv

    text = "".join(map(text_of, PAGES))
    assert {"doctor", "warmup"} <= set(re.findall(r"`deformconv (\w+)", text)) <= set(deformconv.commands)
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    variables = set(re.findall(r"DEFORMCONV_\w+", text))
    assert variables
    for variable in variables:
        assert variable in sources


def test_make_has_the_targets_that_documents_name():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set(
        re.findall(r"(?:^|`|^#   )make (?:[A-Z]+=\S+ )*([a-z][\w-]*)", "\n".join([README, contributing, makefile]), re.M)
    )
    assert {"demo", "docs", "test", "test-fast", "test-other-kernels", "bench", "lint"} <= named
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
