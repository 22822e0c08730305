"""What the backends of compiled kernels answer alike, whatever the operator."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any

from deformconv.ops.operator import HALF, half_in_float32
from deformconv.runtime.openmp import team_for
from deformconv.runtime.work import is_shared

__all__ = ["DTYPES", "how", "reasons_against", "warm"]

DTYPES = ("float32", "float64")


def reasons_against(dtype: str, library: str, device: str, takes_half: bool = False) -> list[str]:
    """Why kernels cannot run a call on such arrays, as sentences; none if they can.

    `takes_half` says that they read and write half precision themselves.
    """
    reasons = []
    if find_spec("numba") is None:
        reasons.append("Numba is not installed")
    if device != "cpu":
        reasons.append(f"its kernels run on the CPU and the arrays are on {device}")
    if library not in ("numpy", "torch", "jax"):
        reasons.append(f"it reads NumPy arrays and what shares memory with them, not {library}'s")
    if half_in_float32(dtype, library) not in (*DTYPES, *(HALF if takes_half else ())):
        reasons.append(f"it computes in float32 and float64, not {dtype}")
    return reasons


def how(multiplications: int, library: str) -> list[str]:
    """What there is to say of how a call of so many multiply-adds is computed, as sentences."""
    if not is_shared(multiplications):
        return ["the caller's thread computes it alone, since it is small"]
    return [f"work is shared out to {team_for(library)}"]


def warm(calls: Iterable[tuple[str, Callable[[], None]]], kernels: Iterable[Any], notify: Callable[[str], None] | None) -> None:
    """Make calls that compile, or load, kernels, and have these for every team; `notify` gets each call's line before it."""
    from deformconv.runtime.launch import compile_for_teams
    from deformconv.runtime.notices import notice

    kernels = tuple(kernels)
    with notice.silent():
        for line, call in calls:
            if notify is not None:
                notify(line)
            call()
            for kernel in kernels:
                compile_for_teams(kernel)
