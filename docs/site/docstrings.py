"""Docstrings are plain text for `help()`; the site reads them as reStructuredText, to which the `*` of a shape is emphasis."""

from __future__ import annotations

import re
from typing import Any

from sphinx.application import Sphinx

# (N, offset_groups*K*D, *O) and the like: brackets that begin with one capital, C_in or C_out, and have a comma or a star.
SHAPE = re.compile(r"\((?=[^()]*[,*])(?:[A-Z]|C_in|C_out)\b[^()]*(?:\([^()]*\)[^()]*)*\)")
CODE = re.compile(r"(`[^`]*`)")


def escape(app: Sphinx, kind: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Shapes become code, and a `*` outside of code, examples and formulas stays one."""
    example = False
    for number, line in enumerate(lines):
        example = line.lstrip().startswith(">>>") or (example and line.strip() != "")
        if not example and "  " not in line.strip():
            parts = CODE.split(line)
            parts[::2] = [_prose(part) for part in parts[::2]]
            lines[number] = "".join(parts)


def _prose(text: str) -> str:
    parts = CODE.split(SHAPE.sub(lambda shape: f"`{shape[0]}`", text))
    parts[::2] = [part.replace("*", r"\*") for part in parts[::2]]
    return "".join(parts)


def sign(app: Sphinx, kind: str, name: str, obj: Any, options: Any, signature: str | None, returns: str | None) -> Any:
    """`**unknown` is there to tell another library's word for an argument ours, and is no argument."""
    return signature and (signature.replace(", **unknown", ""), returns)


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("autodoc-process-docstring", escape, priority=100)  # before napoleon
    app.connect("autodoc-process-signature", sign)
    return {"parallel_read_safe": True}
