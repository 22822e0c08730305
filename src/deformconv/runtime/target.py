"""Which processor machine code is made for: this one, or any that has what a named level asks for (`DEFORMCONV_CPU`).

Numba makes code for the processor that it runs on, and code that another one has made may use instructions that this one lacks:
so what a container's build keeps is found again only on processors of the same kind. A level is what many kinds share.
"""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Collection
from typing import NamedTuple

import llvmlite.binding as llvm
from numba.core import config
from numba.core.registry import cpu_target

from deformconv.runtime.host import arm_features, processor_name

__all__ = ["Level", "VARIABLE", "chosen", "highest", "lacks", "levels", "use"]

VARIABLE = "DEFORMCONV_CPU"

_log = logging.getLogger("deformconv")


class Level(NamedTuple):
    """A name of LLVM's for a processor."""

    features: tuple[str, ...]  # what LLVM may use, in its words
    needs: tuple[str, ...]  # what a processor must have, in the words of `_present`


_V2 = ("cx16", "popcnt", "sahf", "sse3", "sse4.1", "sse4.2", "ssse3")  # x86-64 itself, with sse2, is on every such processor
_V3 = (*_V2, "avx", "avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe", "xsave")
_V4 = (*_V3, "avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl")
# The levels of the psABI for x86-64, in LLVM's words.
_X86_64 = {name: Level(needs, needs) for name, needs in (("x86-64-v2", _V2), ("x86-64-v3", _V3), ("x86-64-v4", _V4))}

_N1 = ("asimd", "crc32", "atomics", "asimdrdm", "fphp", "asimdhp", "asimddp", "lrcpc")
_V1 = (*_N1, "jscvt", "fcma", "ilrcpc", "flagm", "sve", "bf16", "i8mm")
_N2 = (*_V1, "flagm2", "frint", "sve2")
# In Linux' words (`arm_features`): LLVM's own search finds a few of them only.
_ARM_NEEDS = {
    "generic": ("asimd",),
    "cortex-a72": ("asimd", "crc32"),
    "cortex-a76": _N1,
    "neoverse-n1": _N1,
    "neoverse-v1": _V1,
    "neoverse-n2": _N2,
    "neoverse-v2": _N2,
}
_AARCH64 = {name: Level(("fp-armv8", "neon"), needs) for name, needs in _ARM_NEEDS.items()}


def levels() -> dict[str, Level]:
    """The names for processors of this machine's architecture, the lower before the higher."""
    machine = platform.machine().lower()
    if machine in ("x86_64", "amd64"):
        return _X86_64
    return _AARCH64 if machine in ("aarch64", "arm64") else {}


def _present() -> frozenset[str]:
    """What this processor has."""
    if levels() is _X86_64:
        return frozenset(name for name, on in llvm.get_host_cpu_features().items() if on)
    return arm_features()


def lacks(name: str) -> Collection[str]:
    """What a level asks for and this processor does not have."""
    present = _present()
    return sorted(need for need in levels()[name].needs if need not in present)


def highest() -> str | None:
    """The last of the levels that this processor can run."""
    return next((name for name in reversed(levels()) if not lacks(name)), None)


def chosen() -> str | None:
    """The level that `DEFORMCONV_CPU` names; None for this processor itself. Raises BackendError if it cannot run here."""
    from deformconv.errors import BackendError  # here, so that no kernel depends on that file

    name = os.environ.get(VARIABLE, "")
    if name in ("", "native"):
        return None
    if name not in levels():
        known = ", ".join([*levels(), "native"])
        raise BackendError(
            f"{VARIABLE} is {name!r}; expected a name for processors like this one ({platform.machine()}): {known}"
        )
    missing = lacks(name)
    if missing:
        other = highest()
        instead = f"choose {other}, the highest level that it can run, or native" if other else "choose native"
        raise BackendError(
            f"{VARIABLE} is {name!r}, and this processor, {processor_name()}, lacks {', '.join(missing)}, which that code"
            f" may use: {instead}"
        )
    return name


def use(name: str | None) -> str | None:
    """Have Numba make code for a level, and return it: None if it is too late, since Numba has made code for another one."""
    if name is None:
        return None
    features = ",".join(f"+{feature}" for feature in levels()[name].features)
    before = config.CPU_NAME, config.CPU_FEATURES
    config.CPU_NAME, config.CPU_FEATURES = name, features
    made = cpu_target.target_context.codegen().magic_tuple()[2]
    if made == features:
        return name
    config.CPU_NAME, config.CPU_FEATURES = before
    _log.warning(
        "%s=%s comes too late: Numba has compiled something for this very processor before deformconv's kernels were loaded,"
        " and in one process it makes code for one kind of processor. So kernels for this one are loaded or compiled. To have"
        " all of Numba's code made for %s, set NUMBA_CPU_NAME=%s and NUMBA_CPU_FEATURES=%s as well.",
        VARIABLE, name, name, name, features,
    )  # fmt: skip
    return None
