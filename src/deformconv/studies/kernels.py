"""Kernels that a study needs, compiled before it begins."""

from __future__ import annotations

from rich.console import Console

from deformconv.ops.conv import cpu
from deformconv.ops.roi_pool import cpu as roi_cpu
from deformconv.runtime import cache
from deformconv.runtime.notices import notice

__all__ = ["compiled"]


def compiled(console: Console, *, rois: bool = False) -> None:
    """Compile or load the kernels for float32 and two axes, and say so where none is kept for this machine."""
    notice.announce = None  # said here instead
    if not cache.processors()[cache.own_processor()]:
        console.print("Compiling the kernels for this machine, once (about half a minute) ...")
    cpu.warmup(["float32"], [2])
    if rois:
        roi_cpu.warmup(["float32"])
