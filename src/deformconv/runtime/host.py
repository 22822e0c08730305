"""Which processor this is."""

from __future__ import annotations

import platform
from pathlib import Path

__all__ = ["CPUINFO", "arm_features", "processor_name"]

CPUINFO = Path("/proc/cpuinfo")


def processor_name(file: Path = CPUINFO) -> str:
    """The processor's name; its numbers too, where a virtual machine hides the name."""
    found = _first_processor(file)
    if found is None:
        return platform.processor() or platform.machine()
    name = found.get("model name", platform.machine())
    numbers = [f"{key} {found[key]}" for key in ("cpu family", "model") if key in found]
    return f"{name} ({', '.join(numbers)})" if numbers else name


def arm_features(file: Path = CPUINFO) -> frozenset[str]:
    """What Linux says that an Arm processor has, in its words; nothing on another system."""
    return frozenset((_first_processor(file) or {}).get("Features", "").split())


def _first_processor(file: Path) -> dict[str, str] | None:
    """What Linux says of the first processor; None on another system."""
    try:
        lines = [line.partition(":") for line in file.read_text().splitlines()]
    except OSError:
        return None
    found: dict[str, str] = {}
    for key, _, value in lines:
        found.setdefault(key.strip(), value.strip())
    return found
