"""Which backend runs a call, and why the others did not.

Every backend is a module of that name in the operator's folder. It answers for itself, by `reasons_against`, and says by
`how` in which way it would compute a call. No exception of a backend is ever taken as an answer: that would hide a
kernel's fault behind a slower result.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from typing import Any, NamedTuple

from deformconv.errors import BackendError
from deformconv.ops.operator import Operator, Spec

__all__ = ["Deterministic", "Verdict", "check_name", "choose", "explain", "load", "verdicts"]


class Deterministic(NamedTuple):
    """A setting of the caller's library by which results are to be the same bit for bit each time."""

    setting: str  # as a user writes it
    warn_only: bool = False  # whether a backend that is not deterministic may run, if no other can


class Verdict(NamedTuple):
    """What is said of one backend and one call."""

    backend: str
    runs: bool
    sentences: tuple[str, ...]  # how it computes the call, or why it does not

    def __str__(self) -> str:
        return f"{self.backend}: {'; '.join(self.sentences)}"


def choose(
    operator: Operator, spec: Spec, library: str, device: str, backward: bool, requested: str | None = None,
    deterministic: Deterministic | None = None,
) -> Any:  # fmt: skip
    """Return the backend for a call; `requested` names it, None takes the first that can run it.

    Where `deterministic` asks for a warning only, the caller gives it, if the backend is not deterministic.
    Raises ValueError for an unknown name, BackendError if no backend, or not the requested one, can run it.
    """
    check_name(operator, requested)  # before the cache, to which a list for a name would be a key without a hash
    found = _cached_first(operator, spec, library, device, backward, requested, deterministic)
    if found is not None:
        return found[1]
    failed = "No backend can" if requested is None else f'backend="{requested}" cannot'
    others = verdicts(operator, spec, library, device, backward, requested, deterministic)
    reasons = "".join(f"\n  {verdict}" for verdict in others)
    call = f"{operator.described(spec)}; {spec.dtype}, {library} on {device}, {_direction(backward)}"
    raise BackendError(f"{failed} run this call: {call}.{reasons}")


def _first(
    operator: Operator, spec: Spec, library: str, device: str, backward: bool, requested: str | None,
    deterministic: Deterministic | None,
) -> tuple[str, Any] | None:  # fmt: skip
    """The name and the module of the backend that runs a call."""
    other = None
    for line in operator.backends:
        if requested == line.name or (requested is None and not line.by_name_only):
            module = load(operator, line.name)
            if not module.reasons_against(spec, library, device, backward):
                if deterministic is None or module.DETERMINISTIC:
                    return line.name, module
                other = other or (line.name, module)
    return other if deterministic is not None and deterministic.warn_only else None


_cached_first = lru_cache(maxsize=1024)(_first)


def verdicts(
    operator: Operator, spec: Spec, library: str, device: str, backward: bool, requested: str | None = None,
    deterministic: Deterministic | None = None,
) -> list[Verdict]:  # fmt: skip
    """What there is to say of each backend of the operator; one at most runs the call."""
    check_name(operator, requested)
    first = _first(operator, spec, library, device, backward, requested, deterministic)
    chosen = "" if first is None else first[0]
    found = []
    for name, by_name_only in operator.backends:
        module = load(operator, name)
        reasons = [reason.rstrip(".") for reason in module.reasons_against(spec, library, device, backward)]
        if not reasons and requested not in (None, name):
            reasons = [f'can run it, but backend="{requested}" was asked for']
        elif not reasons and by_name_only and requested is None:
            reasons = [f'can run it, but only when asked for by backend="{name}"']
        elif not reasons and deterministic is not None and not module.DETERMINISTIC:
            reasons = [f"its results differ in their last bits each time, and {deterministic.setting} is set"]
        elif not reasons and name != chosen:
            reasons = [f"can run it, but {chosen} comes first"]
        runs = name == chosen
        found.append(Verdict(name, runs, (*module.how(spec, library, device, backward), *reasons) if runs else tuple(reasons)))
    return found


def explain(
    operator: Operator, spec: Spec, library: str, device: str, requested: str | None = None,
    deterministic: Deterministic | None = None,
) -> str:  # fmt: skip
    """Say for forward and backward which backend runs, and each other one's reason not to."""
    lines = []
    dtype = spec.dtype
    for backward in (False, True):
        found = verdicts(operator, spec, library, device, backward, requested, deterministic)
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
