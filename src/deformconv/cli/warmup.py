"""`deformconv warmup`: compile the CPU kernels ahead."""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib.util import find_spec

import click

__all__ = ["run"]


def run(dtypes: Sequence[str], ranks: Sequence[int]) -> int:
    """Compile, say what was done, and return the exit code."""
    if find_spec("numba") is None:
        raise click.ClickException("there is nothing to compile: Numba is not installed (pip install numba)")
    from deformconv.ops.conv import cpu
    from deformconv.runtime import cache

    cache.notice.announce = None  # the lines below say it
    before, started = len(cache.cached_files()), time.perf_counter()
    cpu.warmup(dtypes, ranks, notify=lambda line: click.echo(f"{line} ..."))
    seconds, after = time.perf_counter() - started, len(cache.cached_files())
    folder = cache.cache_folder()
    if not after:
        click.echo(
            "No folder can be written, so every process compiles anew: set DEFORMCONV_CACHE_DIR.",
            err=True,
        )
        return 1
    done = f"{after - before} kernels compiled in {seconds:.0f} s" if after > before else "Nothing to compile"
    click.echo(f"{done}: {after} kernels are in {folder}")
    return 0
