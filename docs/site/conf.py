"""Sphinx' settings: `make docs` builds a site of the repository's Markdown, its notebooks and the docstrings."""

from __future__ import annotations

import sys
from pathlib import Path

from sphinx.ext.autodoc.mock import _MockObject

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT / "src")]

project = "deformconv"
author = copyright = "The deformconv authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
extensions += ["pages", "docstrings", "formulas"]  # which lie beside this file

# The repository itself is the source, so that its links between files are the site's.
root_doc = "README"
include_patterns = ["*.md", "benchmarks/*.md", "docs/**.md", "docs/**.ipynb"]
source_suffix = {".md": "markdown", ".ipynb": "notebook"}

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
highlight_language = "text"
copybutton_exclude = ".linenos, .gp, .go"

# Docstrings put code between single backticks, and have a section more than Google's.
default_role = "literal"
napoleon_custom_sections = ["Shape"]
napoleon_use_rtype = False
napoleon_use_param = False  # a line of Args may explain several arguments
autodoc_typehints = "none"
autodoc_mock_imports = ["mxnet", "jax", "jaxlib", "flax", "equinox", "optax", "keras", "tensorflow"]
# The rooms of JAX enter rules into its tables, and read a header of its, when they are imported.
_MockObject.__setitem__ = lambda self, key, value: None
_MockObject.__fspath__ = lambda self: "absent"
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 80
toc_object_entries_show_parents = "hide"
add_module_names = False

html_theme = "furo"
html_title = "deformconv"
html_math_renderer = "mathml"
html_static_path = [str(HERE / "style.css")]
html_css_files = ["style.css"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"top_of_page_buttons": []}
