"""Which backend runs a call, and why the others did not.

Every backend is a module of that name in the operator's folder. It answers for itself, by `reasons_against`, and says by
`how` in which way it would compute a call. No exception of a backend is ever taken as an answer: that would hide a
kernel's fault behind a slower result.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

from deformconv.errors import BackendError

__all__ = ["BACKENDS", "Backend", "check_name", "choose", "explain", "load"]


class Backend(NamedTuple):
    """One line of the registry."""

    name: str
    by_name_only: bool = False


# The first one that can run a call runs it.
BACKENDS = (
    Backend("cpu"),
    Backend("portable"),
    Backend("reference", by_name_only=True),
)


def choose(spec: Any, library: str, device: str, backward: bool, requested: str | None = None) -> ModuleType:
    """Return the backend for a call; `requested` names it, None takes the first that can run it.

    Raises ValueError for an unknown name, BackendError if no backend, or not the requested one, can run it.
    """
    check_name(requested)  # before the cache, to which a list for a name would be a key without a hash
    return _choose(spec, library, device, backward, requested)


@lru_cache(maxsize=1024)
def _choose(spec: Any, library: str, device: str, backward: bool, requested: str | None) -> ModuleType:
    for backend in BACKENDS:
        if requested == backend.name or (requested is None and not backend.by_name_only):
            module = load(spec, backend.name)
            if not module.reasons_against(spec, library, device, backward):
                return module
    failed = "No backend can" if requested is None else f'backend="{requested}" cannot'
    reasons = "".join(f"\n  {line}" for _, line in _verdicts(spec, library, device, backward, requested))
    call = f"{_call(spec, library, device)}, {_direction(backward)}"
    raise BackendError(f"{failed} run this call: {call}.{reasons}")


def explain(spec: Any, library: str, device: str, requested: str | None = None) -> str:
    """Say for forward and backward which backend runs, and each other one's reason not to."""
    check_name(requested)
    lines = [_call(spec, library, device)]
    for backward in (False, True):
        verdicts = list(_verdicts(spec, library, device, backward, requested))
        runs = next((name for name, line in verdicts if not line), None)
        lines.append(f"{_direction(backward)}: {runs or 'no backend can run it'}")
        if runs is not None:
            lines += [f"  {runs}: {how}" for how in load(spec, runs).how(spec, library)]
        lines += [f"  {line}" for _, line in verdicts if line]
    return "\n".join(lines)


def load(spec: Any, name: str) -> ModuleType:
    """Import a backend of the operator that `spec` belongs to."""
    operator = type(spec).__module__.rpartition(".")[0]
    return import_module(f"{operator}.{name}")


def _verdicts(spec: Any, library: str, device: str, backward: bool, requested: str | None) -> Iterator[tuple[str, str]]:
    """Yield each backend's name and why it does not run the call; that of the one that does is empty."""
    chosen = ""
    for name, by_name_only in BACKENDS:
        found = load(spec, name).reasons_against(spec, library, device, backward)
        reasons = "; ".join(reason.rstrip(".") for reason in found)
        if not reasons and requested not in (None, name):
            reasons = f'can run it, but backend="{requested}" was asked for'
        elif not reasons and by_name_only and requested is None:
            reasons = f'can run it, but only when asked for by backend="{name}"'
        elif not reasons and chosen:
            reasons = f"can run it, but {chosen} comes first"
        elif not reasons:
            chosen = name
        yield name, f"{name}: {reasons}" if reasons else ""


def check_name(requested: Any) -> None:
    """Raise ValueError unless `requested` is None or a backend's name."""
    if requested is None:
        return
    if not isinstance(requested, str) or requested not in [backend.name for backend in BACKENDS]:
        names = ", ".join(f'"{backend.name}"' for backend in BACKENDS)
        raise ValueError(f"`backend` is {requested!r}; expected {names}, or None for the first that can run.")


def _direction(backward: bool) -> str:
    return "backward" if backward else "forward"


def _call(spec: Any, library: str, device: str) -> str:
    """Name a call's shapes, dtype, library and device."""
    names = [name for name in ("input", "offset", "weight", "mask") if name != "mask" or spec.masked]
    shapes = (f"{name} {shape}" for name in names if (shape := getattr(spec, f"{name}_shape", None)))
    return f"{', '.join(shapes)}; {spec.dtype}, {library} on {device}"
