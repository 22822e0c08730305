"""The documentation site: it is built without a warning, and is whole without a network."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built as `make docs` builds it."""
    for library in ("sphinx", "furo", "myst_parser", "sphinx_copybutton", "latex2mathml", "torch"):
        pytest.importorskip(library)
    recipe = re.search(r"^docs:.*\n\t\$\(PY\) (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert recipe is not None
    folder = tmp_path_factory.mktemp("site")
    arguments = [str(folder / "doctrees") if a == "build/doctrees" else a for a in recipe[1].split()]
    assert "--fail-on-warning" in arguments and arguments[-1] == "site"
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}  # those of other libraries; Sphinx's own are no Python warnings
    done = subprocess.run(
        [sys.executable, *arguments[:-1], str(folder / "html")],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "html"


def pages(site: Path) -> dict[Path, str]:
    return {path: path.read_text(encoding="utf-8") for path in site.rglob("*.html")}


@pytest.mark.slow
class TestSite:
    def test_every_page_is_there(self, site):
        documents = [path for path in (ROOT / "docs").rglob("*") if path.suffix in (".md", ".ipynb")]
        assert len(documents) >= 20
        for document in documents:
            assert (site / document.relative_to(ROOT)).with_suffix(".html").is_file(), document
        assert (site / "index.html").read_bytes() == (site / "README.html").read_bytes()

    def test_links_lead_somewhere(self, site):
        found = pages(site)
        ids = {path: set(re.findall(r'\bid="([^"]+)"', text)) for path, text in found.items()}
        internal = 0
        for path, text in found.items():
            for target in map(unescape, re.findall(r'<(?:a|img|link|script)\b[^>]*?\b(?:href|src)="([^"]+)"', text)):
                if re.match(r"https?:|data:|mailto:", target):
                    continue
                file, _, anchor = target.partition("#")
                file = (path.parent / file.partition("?")[0]).resolve() if file else path
                assert file.is_file(), f"{path.name}: {target}"
                if anchor and file in ids:
                    assert anchor in ids[file], f"{path.name}: {target}"
                internal += 1
        assert internal > 1000

    def test_nothing_is_loaded_from_another_host(self, site):
        for path, text in pages(site).items():
            loaded = re.findall(r'<(?:img|script|iframe)\b[^>]*?\bsrc="([^"]+)"|<link\b[^>]*?\bhref="([^"]+)"', text)
            assert loaded
            for target in (one or other for one, other in loaded):
                assert not re.match(r"(https?:)?//", target), f"{path.name}: {target}"
        for sheet in site.rglob("*.css"):
            assert not re.search(r"url\(['\"]?(https?:)?//|@import ['\"]https?:", sheet.read_text(encoding="utf-8")), sheet

    def test_formulas_are_mathml(self, site):
        text = (site / "docs" / "mathematics.html").read_text(encoding="utf-8")
        source = (ROOT / "docs" / "mathematics.md").read_text(encoding="utf-8")
        assert text.count('display="block"') == source.count("$$") // 2 > 5
        assert "$" not in re.sub(r"<script.*?</script>", "", text, flags=re.S)

    def test_shapes_of_docstrings_are_code(self, site):
        text = (site / "docs" / "api" / "root.html").read_text(encoding="utf-8")
        plain = re.sub(r"<[^>]+>", "", text)
        assert "(N, offset_groups*K*D, *O)" in plain and "**unknown" not in plain
        assert re.search(r"<code[^>]*>(<span[^>]*>)?\(N,", text)
        for name in ("deform_conv", "deform_conv_backward", "explain", "Gradients", "set_num_threads"):
            assert f'id="deformconv.{name}"' in text

    def test_every_public_name_is_in_the_reference(self, site):
        reference = "".join(path.read_text(encoding="utf-8") for path in (site / "docs" / "api").glob("*.html"))
        names = 0
        rooms = ("torch", "jax", "flax", "flax/linen", "equinox", "keras", "gluon", "gluon/contrib", "convert", "plots")
        for module in ("__init__", *(room if "/" in room else f"{room}/__init__" for room in rooms)):
            source = (ROOT / "src" / "deformconv" / f"{module}.py").read_text(encoding="utf-8")
            listed = re.search(r"^__all__ = \[(.*?)\]", source, re.M | re.S)
            assert listed is not None, module
            for name in re.findall(r'"(\w+)"', listed[1]):
                assert name in ("__version__", "linen") or re.search(rf'\bid="deformconv[\w.]*\.{name}"', reference), f"{module}: {name}"
                names += 1
        assert names > 25
