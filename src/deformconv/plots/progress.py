"""How far a long computation is, on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

__all__ = ["bar"]


@contextmanager
def bar(title: str, steps: int, *, shown: bool) -> Iterator[Callable[[], None]]:
    """A bar that each call of what is yielded advances; on a terminal, where rich is installed. It goes away in the end."""
    if not shown or not sys.stderr.isatty() or find_spec("rich") is None:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=steps)
        yield lambda: progress.advance(task)
