"""Which processor this is."""

from __future__ import annotations

import platform
from pathlib import Path

__all__ = ["processor_name"]


def processor_name(file: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name; its numbers too, where a virtual machine hides the name."""
    try:
        lines = [line.partition(":") for line in file.read_text().splitlines()]
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    found: dict[str, str] = {}
    for key, _, value in lines:
        found.setdefault(key.strip(), value.strip())
    name = found.get("model name", platform.machine())
    numbers = [f"{key} {found[key]}" for key in ("cpu family", "model") if key in found]
    return f"{name} ({', '.join(numbers)})" if numbers else name
