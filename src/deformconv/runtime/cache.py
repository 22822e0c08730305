"""Compile kernels with Numba and keep the machine code on disk.

Numba's own cache does not notice that a function *called by* a kernel changed, numbers its files in a way that two processes
starting cold can confuse, and refuses to import where no folder can be written. This one names every file after all that the
machine code depends on, so a file is either right or absent, and a folder that cannot be written only costs a compilation.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import pickle
import sys
import tempfile
from collections.abc import Callable, Collection
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import llvmlite
import numba
import numpy
from numba.core.caching import _Cache
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps


def _load_numba_without_scipy() -> None:
    """Import Numba's array functions, but not SciPy's linear algebra, which takes longer than all the rest.

    Numba imports it only to know whether it is there, and again where a function needs it.
    """
    if "numba.np.arraymath" in sys.modules or find_spec("scipy") is None:
        return
    from numba.np import linalg

    look_for_it = linalg.ensure_blas
    linalg.ensure_blas = lambda: None
    try:
        from numba.np import arraymath
    finally:
        linalg.ensure_blas = look_for_it
    arraymath.ensure_blas = look_for_it


_load_numba_without_scipy()

_PACKAGE = Path(__file__).resolve().parent.parent
_SOURCES = (
    "runtime/atomics.py", "runtime/blocks.py", "runtime/cache.py", "runtime/launch.py", "runtime/matmul.py",
    "runtime/simd.py", "runtime/threads.py", "sampling/corners.py", "sampling/windows.py", "ops/*/cpu*.py",
)  # fmt: skip
# Not "nnan" or "ninf": a kernel must see NaN and infinity. Not "arcp" or "afn": results would depend on the host.
FAST_MATH = {"contract", "reassoc", "nsz"}


@functools.cache
def digest() -> str:
    """A name for everything that machine code depends on apart from its signature and the host."""
    seen = hashlib.sha256()
    for part in (sys.version, numba.__version__, llvmlite.__version__, numpy.__version__):
        seen.update(part.encode() + b"\0")
    for path in sorted(path for pattern in _SOURCES for path in _PACKAGE.glob(pattern)):
        seen.update(path.relative_to(_PACKAGE).as_posix().encode() + b"\0" + path.read_bytes())
    return seen.hexdigest()[:16]


def _user_cache() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def _can_write(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


@functools.cache
def _folders() -> tuple[Path, ...]:
    """Where machine code of this digest may lie: `DEFORMCONV_CACHE_DIR`, or the package's own folder and the user's."""
    chosen = os.environ.get("DEFORMCONV_CACHE_DIR")
    # Never a shared temporary folder: what is loaded from here is executed.
    roots = [Path(chosen)] if chosen else [_PACKAGE / "__pycache__" / "kernels"]
    if not chosen:
        with contextlib.suppress(RuntimeError):  # no home folder
            roots.append(_user_cache() / "deformconv")
    return tuple(root / digest() for root in roots)


@functools.cache
def cache_folder() -> Path | None:
    """The first of the folders that can be written, to which new machine code goes; None if there is none."""
    return next((folder for folder in _folders() if _can_write(folder)), None)


def _announce() -> None:
    if sys.stderr is not None and sys.stderr.isatty():
        print(
            "deformconv: compiling kernels for this machine, once (about half a minute) ...",
            file=sys.stderr,
            flush=True,
        )


class _Notice:
    """Says once per process that a compilation has begun; `warmup` replaces it with its own."""

    def __init__(self) -> None:
        self.announce: Callable[[], None] | None = _announce

    def __call__(self) -> None:
        announce, self.announce = self.announce, None
        if announce is not None:
            announce()


notice = _Notice()


class DiskCache(_Cache):
    """One file per kernel, signature and host."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._enabled = True

    @property
    def cache_path(self) -> str:
        return str(cache_folder())

    def _name(self, signature: Any, codegen: Any) -> str:
        key = hashlib.sha256(repr((self._function.__qualname__, signature, codegen.magic_tuple())).encode()).hexdigest()
        return f"{self._function.__name__}-{key[:20]}.bin"

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        target_context.refresh()
        name = self._name(sig, target_context.codegen())
        # All of them: a container's image has the package's folder filled, and another user may not write there.
        for folder in _folders() if self._enabled else ():
            try:
                return CompileResult._rebuild(target_context, *pickle.loads((folder / name).read_bytes()))
            except (OSError, EOFError, pickle.UnpicklingError):
                continue  # absent, or cut short by a full disk
        notice()
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        folder = cache_folder() if self._enabled else None
        if folder is None:
            return
        # The disk may be full by now, or read-only: the kernel still runs, and is compiled again next time.
        with contextlib.suppress(OSError), tempfile.TemporaryDirectory(dir=folder, prefix="part-") as own:
            file = Path(own) / self._name(sig, data.codegen)
            file.write_bytes(dumps(data._reduce()))
            os.replace(file, folder / file.name)

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def flush(self) -> None:
        """Nothing to forget: a file's name says all that it depends on."""


# How every kernel is compiled. It allocates nothing, and its caller holds the arrays: so references to them are not counted.
OPTIONS = {"nogil": True, "error_model": "numpy", "fastmath": FAST_MATH, "no_cfunc_wrapper": True, "_nrt": False}


def device(function: Callable[..., Any]) -> Any:
    """Compile a function that kernels call."""
    return numba.njit(no_cpython_wrapper=True, **OPTIONS)(function)


def kernel(function: Callable[..., Any]) -> Any:
    """Compile a function that Python calls, once per machine; it runs without the GIL."""
    dispatcher = numba.njit(**OPTIONS)(function)
    dispatcher._cache = DiskCache(function)
    return dispatcher


def cached_files() -> Collection[Path]:
    """The files of machine code that this version has on disk."""
    return sorted(file for folder in _folders() for file in folder.glob("*.bin"))
