"""What kernels in Triton need on this machine, and what to install where it is missing.

Triton compiles kernels without a CUDA toolkit. But what launches them is a small library in C, which it has a C compiler build,
with Python's headers, at the first launch. All of this is looked up once in a process, and nothing here loads Triton.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import sysconfig
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

__all__ = [
    "OLDEST", "compiler", "headers", "is_interpreted", "kernel_folder", "triton_version", "without_compiler", "without_headers",
    "without_triton",
]  # fmt: skip

OLDEST = (3, 3)
# The packages that bring the module; PyTorch's builds have names of their own.
_PACKAGES = ("triton", "triton-windows", "triton-rocm", "pytorch-triton-rocm", "pytorch-triton")


@cache
def is_interpreted() -> bool:
    """Whether Triton runs kernels as Python on the CPU, for tests; it asks for the variable when kernels are defined."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


@cache
def triton_version() -> str | None:
    """Triton's version; None where it is not installed, "unknown" where no package brought it."""
    if find_spec("triton") is None:
        return None
    for package in _PACKAGES:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    others = metadata.packages_distributions().get("triton")
    return metadata.version(others[0]) if others else "unknown"


@cache
def without_triton() -> str | None:
    """What to do about Triton, as a sentence; None if it is there."""
    version = triton_version()
    if version is None:
        if sys.platform == "darwin":
            return "its kernels are written in Triton, which there is none of for macOS"
        if sys.platform == "win32":
            return "Triton is not installed: pip install triton-windows"
        return "Triton is not installed, which PyTorch's packages for GPUs bring on Linux: pip install triton"
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or (int(numbers[1]), int(numbers[2])) >= OLDEST:
        return None
    how = "pip install --upgrade triton-windows" if sys.platform == "win32" else "PyTorch 2.7 and newer bring it"
    return f"Triton is {version}, and its kernels need {'.'.join(map(str, OLDEST))} or newer: {how}"


@cache
def compiler() -> str | None:
    """The C compiler that Triton calls."""
    named = os.environ.get("CC")
    if named is not None:
        return shutil.which(named)
    if sys.platform == "win32":
        return "the one within triton-windows"
    return shutil.which("gcc") or shutil.which("clang")


@cache
def without_compiler() -> str | None:
    """What to do about a C compiler, as a sentence; None if Triton finds one."""
    if compiler() is not None:
        return None
    named, other = os.environ.get("CC"), shutil.which("cc")
    if named is not None:
        return f"CC is {named!r}, and Triton, which calls it as a C compiler, needs the name or path of a program there"
    found = f"set CC={other}" if other else "install one (apt-get install gcc), or set CC to one"
    return f"Triton has a C compiler build what launches kernels, and finds neither gcc nor clang: {found}"


@cache
def headers() -> Path:
    """The folder in which Triton looks for Python.h."""
    scheme = sysconfig.get_default_scheme()
    # Debian's own scheme, which is for what is installed by hand, has no headers.
    return Path(sysconfig.get_path("include", "posix_prefix" if scheme == "posix_local" else scheme))


@cache
def without_headers() -> str | None:
    """What to do about Python's headers, as a sentence; None if Triton finds them."""
    if (headers() / "Python.h").is_file():
        return None
    if sys.platform == "win32":
        how = "an embeddable Python has none, python.org's installer brings them"
    else:
        how = f"install those of this Python (apt-get install python{sys.version_info[0]}.{sys.version_info[1]}-dev)"
    return f"Triton builds what launches kernels with Python.h, which is not in {headers()}: {how}"


def kernel_folder() -> Path:
    """Where Triton keeps machine code between processes."""
    own = os.environ.get("TRITON_CACHE_DIR")
    return Path(own) if own else Path(os.environ.get("TRITON_HOME") or Path.home(), ".triton", "cache")
