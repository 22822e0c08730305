"""Which backend runs a call, and why the others did not.

Every backend is a module of that name in the operator's folder. It answers for itself, by `reasons_against`, and says by
`how` in which way it would compute a call. No exception of a backend is ever taken as an answer: that would hide a
kernel's fault behind a slower result.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from importlib import import_module
from typing import Any, NamedTuple

from deformconv.errors import BackendError
from deformconv.ops.operator import Operator

__all__ = ["Verdict", "check_name", "choose", "explain", "load", "verdicts"]


class Verdict(NamedTuple):
    """What is said of one backend and one call."""

    backend: str
    runs: bool
    sentences: tuple[str, ...]  # how it computes the call, or why it does not

    def __str__(self) -> str:
        return f"{self.backend}: {'; '.join(self.sentences)}"


def choose(operator: Operator, spec: Any, library: str, device: str, backward: bool, requested: str | None = None) -> Any:
    """Return the backend for a call; `requested` names it, None takes the first that can run it.

    Raises ValueError for an unknown name, BackendError if no backend, or not the requested one, can run it.
    """
    check_name(operator, requested)  # before the cache, to which a list for a name would be a key without a hash
    return _choose(operator, spec, library, device, backward, requested)


@lru_cache(maxsize=1024)
def _choose(operator: Operator, spec: Any, library: str, device: str, backward: bool, requested: str | None) -> Any:
    for line in operator.backends:
        if requested == line.name or (requested is None and not line.by_name_only):
            module = load(operator, line.name)
            if not module.reasons_against(spec, library, device, backward):
                return module
    failed = "No backend can" if requested is None else f'backend="{requested}" cannot'
    reasons = "".join(f"\n  {verdict}" for verdict in verdicts(operator, spec, library, device, backward, requested))
    call = f"{operator.described(spec)}; {spec.dtype}, {library} on {device}, {_direction(backward)}"
    raise BackendError(f"{failed} run this call: {call}.{reasons}")


def verdicts(
    operator: Operator, spec: Any, library: str, device: str, backward: bool, requested: str | None = None
) -> list[Verdict]:
    """What there is to say of each backend of the operator; one at most runs the call."""
    check_name(operator, requested)
    return list(_verdicts(operator, spec, library, device, backward, requested))


def _verdicts(
    operator: Operator, spec: Any, library: str, device: str, backward: bool, requested: str | None
) -> Iterator[Verdict]:
    chosen = ""
    for name, by_name_only in operator.backends:
        module = load(operator, name)
        reasons = [reason.rstrip(".") for reason in module.reasons_against(spec, library, device, backward)]
        if not reasons and requested not in (None, name):
            reasons = [f'can run it, but backend="{requested}" was asked for']
        elif not reasons and by_name_only and requested is None:
            reasons = [f'can run it, but only when asked for by backend="{name}"']
        elif not reasons and chosen:
            reasons = [f"can run it, but {chosen} comes first"]
        if reasons:
            yield Verdict(name, False, tuple(reasons))
        else:
            chosen = name
            yield Verdict(name, True, tuple(module.how(spec, library)))


def explain(operator: Operator, spec: Any, library: str, device: str, requested: str | None = None) -> str:
    """Say for forward and backward which backend runs, and each other one's reason not to."""
    lines = []
    dtype = spec.dtype
    for backward in (False, True):
        found = verdicts(operator, spec, library, device, backward, requested)
        runs = next((verdict for verdict in found if verdict.runs), None)
        lines.append(f"{_direction(backward)}: {'no backend can run it' if runs is None else runs.backend}")
        if runs is not None:
            lines += [f"  {runs.backend}: {sentence}" for sentence in runs.sentences]
            inner = load(operator, runs.backend).computes_in(spec.dtype, library)
            dtype = dtype if inner == spec.dtype else f"{spec.dtype} computed in {inner}"
        lines += [f"  {verdict}" for verdict in found if not verdict.runs]
    return "\n".join([f"{operator.described(spec)}; {dtype}, {library} on {device}", *lines])


def load(operator: Operator, name: str) -> Any:
    """Import a backend of an operator."""
    return import_module(f"{operator.package}.{name}")


def check_name(operator: Operator, requested: Any) -> None:
    """Raise ValueError unless `requested` is None or a backend's name."""
    if requested is None:
        return
    if not isinstance(requested, str) or requested not in [line.name for line in operator.backends]:
        names = ", ".join(f'"{line.name}"' for line in operator.backends)
        raise ValueError(f"`backend` is {requested!r}; expected {names}, or None for the first that can run.")


def _direction(backward: bool) -> str:
    return "backward" if backward else "forward"
