"""How far compiling is, on a terminal: a bar, and the kernel that compiles now."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

__all__ = ["progress"]


@contextmanager
def progress(kernels: int) -> Iterator[bool]:
    """Show a bar from the first kernel on that has to be compiled, among about so many that are loaded or compiled.

    Yields whether there is a terminal to show it on: the standard error. The bar leaves nothing behind where there is none.
    """
    from deformconv.runtime.notices import log, notice, watchers

    if not sys.stderr.isatty():
        yield False
        return
    bar: Any = click.progressbar(
        length=kernels, label="Compiling", file=sys.stderr, item_show_func=_shown, show_eta=False, width=24, update_min_steps=0
    )
    ready = 0  # since the bar was drawn
    drawn = False

    def watch(event: str, kernel: Any) -> None:
        nonlocal ready, drawn
        if event == "compiling":
            bar.update(ready, kernel)
            ready, drawn = 0, True
        else:
            ready += 1

    def end_the_line(record: logging.LogRecord) -> bool:
        """A warning begins below the bar, which is then drawn again."""
        if drawn and record.levelno >= logging.WARNING:
            click.echo(err=True)
        return True

    told, notice.announce = notice.announce, None
    watchers.append(watch)
    log.addFilter(end_the_line)
    try:
        yield True
        if drawn:
            bar.finish()
            bar.render_progress()
    finally:
        watchers.remove(watch)
        log.removeFilter(end_the_line)
        notice.announce = told
        if drawn:
            bar.render_finish()  # ends the line


def _shown(kernel: Any) -> str | None:
    return None if kernel is None else str(kernel)
