"""How large the blocks are that programs of GPU kernels go through."""

from __future__ import annotations

__all__ = ["PROGRAMS", "power", "shared", "tile"]

PROGRAMS = 528  # four for each of a large card's 132 multiprocessors


def tile(channels: int) -> tuple[int, int]:
    """How many rows a program that samples goes through, and how many of a group's channels at a time."""
    block = min(64, power(channels))
    return min(128, 1024 // block), block


def shared(taps: int, programs: int) -> int:
    """How many of a window's taps a program goes through, where there are so many programs for each: few share out taps."""
    return -(-taps // min(taps, -(-PROGRAMS // programs)))


def power(number: int) -> int:
    """The least power of two that is not less."""
    return 1 << max(0, number - 1).bit_length()
