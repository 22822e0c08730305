"""What backends of one kind answer alike, whatever the operator."""

from __future__ import annotations

from typing import Any

from deformconv.sampling.gather import LIBRARIES

__all__ = ["as_given", "nothing_to_say", "reasons_against_arrays", "reasons_against_numpy_only"]


def reasons_against_numpy_only(spec: Any, library: str, device: str, backward: bool) -> list[str]:
    """Why a backend of NumPy's own operations, a reference, cannot run a call; none if it can."""
    reasons = []
    if library != "numpy":
        reasons.append(f"it takes NumPy arrays, not {library}'s.")
    if device != "cpu":
        reasons.append(f"it runs on the CPU, not on {device}.")
    return reasons


def as_given(dtype: str, library: str) -> str:
    """What a reference computes in: in float64 within, and it rounds once."""
    return dtype


def nothing_to_say(spec: Any, library: str, device: str, backward: bool) -> list[str]:
    """What there is to say of how a reference computes a call."""
    return []


def reasons_against_arrays(name: str, library: str, backward: bool) -> list[str]:
    """Why the portable form of the operator `name` cannot run a call; none if it can."""
    if library not in LIBRARIES:
        return [f"{library} has no array-API functions."]
    if backward and library == "numpy":
        return ["NumPy has no automatic derivative."]
    if backward and library not in ("torch", "jax"):
        return [f"{name}_backward is for torch; differentiate {name} with {library} itself."]
    return []
