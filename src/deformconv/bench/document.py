"""The JSON file of a benchmark: the machine, and one section per report, which later runs may join."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from deformconv.runtime.host import processor_name

__all__ = ["join", "machine", "packages", "read", "section"]

PACKAGES = (
    "deformconv", "numpy", "numba", "torch", "torchvision", "kornia", "onnxruntime", "onnx", "openvino", "ncnn",
)  # fmt: skip
# LLVM's names for the features of a processor that are about vectors.
VECTORS = ("sse4.2", "avx", "amx", "fma", "f16c", "neon", "sve", "dotprod", "vsx")


def machine() -> dict[str, Any]:
    """What the figures depend on apart from the code."""
    from deformconv.runtime import processors, simd

    features = [name for name in sorted(simd.host_features()) if name.startswith(VECTORS)]
    return {
        "processor": processor_name(),
        "vector features": features,
        "cores": processors.available_processors(),
        "cores present": os.cpu_count(),
        "memory": f"{_memory()} GiB",
        "system": f"{platform.system()}, {platform.machine()}",
        "python": platform.python_version(),
        "packages": packages(PACKAGES),
    }


def _memory() -> int:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    except (AttributeError, OSError, ValueError):  # not a POSIX system
        return 0


def packages(names: Iterable[str]) -> dict[str, str]:
    """The versions of those packages that are installed."""
    return {name: found for name in names if (found := _version(name)) is not None}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def section(rows: list[dict[str, Any]], threads: int, blocks: int, seconds: float) -> dict[str, Any]:
    """A report's rows, with when and how they were measured."""
    return {"date": date.today().isoformat(), "threads": threads, "blocks": blocks, "seconds a block": seconds, "rows": rows}


def read(text: str) -> dict[str, Any]:
    """A document; ValueError if the text is none."""
    try:
        found = json.loads(text)
    except ValueError:
        raise ValueError("it is not JSON") from None
    if not isinstance(found, dict) or "machine" not in found:
        raise ValueError("no benchmark has written it")
    return found


def join(document: dict[str, Any] | None, found: dict[str, Any], name: str, part: dict[str, Any]) -> dict[str, Any]:
    """The document with a section added or replaced; ValueError if another machine wrote the rest of it."""
    if document is None:
        return {"machine": found, name: part}
    if document["machine"] != found:
        differing = sorted(key for key in {*found, *document["machine"]} if found.get(key) != document["machine"].get(key))
        raise ValueError(f"it was measured elsewhere, with another {', '.join(differing)}: choose a new file")
    return {**document, name: part}
