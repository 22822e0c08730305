"""Whether every text of a file of checks is reached by a test."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, ModuleType
from typing import Any


def missed(modules: tuple[ModuleType, ...], lines: set[tuple[str | None, int]]) -> list[str]:
    """Where a `raise`, or a sentence that is added to a text, is not among the lines that were run."""
    return [
        f"{module.__name__}:{node.lineno}"
        for module in modules
        for node in texts_of(module)
        if not lines & {(module.__file__, line) for line in range(node.lineno, (node.end_lineno or 0) + 1)}
    ]


def texts_of(module: ModuleType) -> Iterator[ast.stmt]:
    with open(str(module.__file__), encoding="utf-8") as file:
        for node in ast.walk(ast.parse(file.read())):
            if isinstance(node, ast.Raise | ast.AugAssign):
                yield node


@contextmanager
def lines_run_in(modules: tuple[ModuleType, ...]) -> Iterator[set[tuple[str | None, int]]]:
    files = {module.__file__ for module in modules}
    lines: set[tuple[str | None, int]] = set()

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename not in files:
            return None
        lines.add((frame.f_code.co_filename, frame.f_lineno))
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield lines
    finally:
        sys.settrace(before)
