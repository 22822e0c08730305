"""`deformconv warmup`: compile the kernels ahead."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import click

from deformconv.cli.progress import progress
from deformconv.errors import BackendError
from deformconv.ops.operator import half_in_float32

__all__ = ["run", "run_on_gpus"]

EACH_DTYPE, EACH_RANK = 2, 6  # kernels: one that no rank matters to; three others; and for each what runs it on a team
EACH_ROIS = 6  # three of RoI pooling; and for each what runs it on a team
EACH_ATTENTION = 4  # two of attention; and for each what runs it on a team
EACH_AGGREGATE = 4  # two of aggregation for each rank; and for each what runs it on a team


def run(
    dtypes: Sequence[str],
    ranks: Sequence[int],
    cpu_name: str | None = None,
    rois: bool = False,
    attention: bool = False,
    aggregate: bool = False,
) -> int:
    """Compile for the CPU, say what was done, and return the exit code.

    `cpu_name` is the processor that it is for, if not the one that DEFORMCONV_CPU says.
    """
    if find_spec("numba") is None:
        raise click.ClickException("there is nothing to compile: Numba is not installed (pip install numba)")
    asked = os.environ.get("DEFORMCONV_CPU", "")
    if cpu_name is not None:
        os.environ["DEFORMCONV_CPU"] = cpu_name
    os.environ.pop("DEFORMCONV_REQUIRE_CACHE", None)  # an image may set it for all that comes after this
    try:
        from deformconv.ops.aggregate import cpu as aggregate_cpu
        from deformconv.ops.attention import cpu as attention_cpu
        from deformconv.ops.conv import cpu
        from deformconv.ops.roi_pool import cpu as roi_cpu
        from deformconv.runtime import cache, target
        from deformconv.runtime.notices import notice

        if target.chosen() != cache.LEVEL:
            raise click.ClickException(f"kernels for {cache.LEVEL or 'native'} are loaded already: use another process")
    except BackendError as error:
        text = str(error)
        raise click.ClickException(text if cpu_name is None else text.replace("DEFORMCONV_CPU is", "--cpu is")) from None

    notice.announce = None  # the lines below say it
    folder, before, started = cache.cache_folder(), len(cache.cached_files()), time.perf_counter()
    if folder is None and not before:
        return _nothing_is_kept()
    whole = list(dict.fromkeys(half_in_float32(dtype, "torch") for dtype in dtypes))  # all but convolution know no others
    kernels = len(dtypes) * (EACH_DTYPE + EACH_RANK * len(ranks))
    kernels += len(whole) * (EACH_AGGREGATE * aggregate * len(ranks) + EACH_ROIS * rois + EACH_ATTENTION * attention)
    with progress(kernels) as is_shown, _counted() as compiled:
        notify = None if is_shown else lambda line: click.echo(f"{line} ...")
        cpu.warmup(dtypes, ranks, notify=notify)
        if rois:
            roi_cpu.warmup(whole, notify=notify)
        if attention:
            attention_cpu.warmup(whole, notify=notify)
        if aggregate:
            aggregate_cpu.warmup(whole, ranks, notify=notify)
    seconds, files = time.perf_counter() - started, cache.cached_files()
    if not files or (folder is None and compiled):
        return _nothing_is_kept()
    done = f"{len(files) - before} kernels compiled in {seconds:.0f} s" if len(files) > before else "Nothing to compile"
    click.echo(f"{done}: {len(files)} kernels are in {folder or next(iter(files)).parents[1]}")
    if cache.LEVEL is not None and asked != cache.LEVEL:
        click.echo(f"Processes that have DEFORMCONV_CPU={cache.LEVEL} in their environment load those for {cache.LEVEL}.")
    return 0


def run_on_gpus(dtypes: Sequence[str], rois: bool = False, attention: bool = False, aggregate: bool = False) -> int:
    """Compile for each kind of GPU that is there, say what was done, and return the exit code."""
    if find_spec("torch") is None:
        raise click.ClickException("there is no GPU to compile for, since PyTorch, which finds them, is not installed")
    from deformconv.ops import gpu as on_gpu
    from deformconv.ops.aggregate import gpu as aggregate_gpu
    from deformconv.ops.attention import gpu as attention_gpu
    from deformconv.ops.conv import gpu
    from deformconv.ops.roi_pool import gpu as roi_gpu
    from deformconv.runtime import toolchain

    cards = on_gpu.cards()
    if not cards:
        raise click.ClickException("there is no GPU to compile for: PyTorch finds none, see `deformconv doctor`")
    started, done = time.perf_counter(), set()
    for device, card in cards.items():
        if card.architecture in done:
            continue
        if reasons := on_gpu.reasons_against(dtypes[0], "torch", device):
            click.echo(f"Nothing is compiled for {device}: {'; '.join(reasons)}", err=True)
            continue
        click.echo(f"{device}, {card}: {', '.join(dtypes)} ...")
        gpu.warmup(dtypes, device)
        for also, module in ((rois, roi_gpu), (attention, attention_gpu), (aggregate, aggregate_gpu)):
            if also:
                module.warmup(dtypes, device)
        done.add(card.architecture)
    if not done:
        return 1
    click.echo(f"Ready in {time.perf_counter() - started:.0f} s: the kernels are in {toolchain.kernel_folder()}")
    return 0


@contextmanager
def _counted() -> Iterator[list[Any]]:
    """Yields a list of the kernels that are compiled meanwhile."""
    from deformconv.runtime.notices import watchers

    compiled: list[Any] = []

    def watch(event: str, kernel: Any) -> None:
        if event == "compiled":
            compiled.append(kernel)

    watchers.append(watch)
    try:
        yield compiled
    finally:
        watchers.remove(watch)


def _nothing_is_kept() -> int:
    click.echo(
        "No folder can be written, so every process compiles anew: set DEFORMCONV_CACHE_DIR to one that can be written.",
        err=True,
    )
    return 1
