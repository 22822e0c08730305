"""The cases of the operator's suite as JAX's arrays, and the portable form alone, with which results are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.ops.conv.cases import ARGUMENTS, Case, make

from deformconv.jax import deform_conv
from deformconv.ops.conv import portable

SMALL = Case("2-D", (4, 3), (2, 1), batch=1, in_channels=4, out_channels=4, groups=2, offset_groups=2, padding=1)
TINY = SMALL.but(size=(3, 2), in_channels=2, out_channels=1, groups=1, offset_groups=1, padding=0)
RANKS = [
    Case("1-D", (7,), (3,), stride=2, padding=((2, 1),), groups=2, offset_groups=2),
    Case("2-D", (6, 5), (3, 2), stride=(2, 1), padding=1, dilation=(1, 2), groups=2),
    Case("3-D", (4, 3, 4), (2, 2, 3), padding=1, offset_groups=2),
]
CASES = [case.but(name=f"{case.name}, {b}", boundary=b) for case in RANKS for b in ("zeros", "inside")]


@pytest.fixture(autouse=True)
def x64() -> Iterator[None]:
    """Float64, in every thread."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


@pytest.fixture(autouse=True)
def quickly_compiled() -> Iterator[None]:
    """XLA takes half as long for programs that run once."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


class Call(NamedTuple):
    """A case's arrays, the operator as a function of them, and the portable form alone as another."""

    names: tuple[str, ...]
    arrays: tuple[Any, ...]
    ours: Callable[..., Any]
    alone: Callable[..., Any]
    spec: Any


def keywords(case: Case) -> dict[str, Any]:
    names = ("stride", "padding", "dilation", "groups", "offset_groups", "boundary")
    return {name: getattr(case, name) for name in names}


def call_of(case: Case, dtype: str = "float64", seed: int = 0, **more: Any) -> Call:
    made = make(case, dtype, away_from_kinks=True, seed=seed)
    given = {name: getattr(made, name) for name in ARGUMENTS if getattr(made, name) is not None}

    def ours(*arrays: Any) -> Any:
        return deform_conv(**dict(zip(given, arrays, strict=True)), **keywords(case), **more)

    def alone(*arrays: Any) -> Any:
        call = dict.fromkeys(ARGUMENTS) | dict(zip(given, arrays, strict=True))
        return portable.forward(made.spec, *call.values())

    return Call(tuple(given), tuple(map(jnp.asarray, given.values())), ours, alone, made.spec)


def loss_of(function: Callable[..., Any]) -> Callable[..., Any]:
    """A number, whose every derivative depends on the output."""

    def loss(*arrays: Any) -> Any:
        return (function(*arrays) ** 3).sum()

    return loss


def assert_same(found: Any, expected: Any, bound: float = 1e-9) -> None:
    """The same tree of arrays, within `bound` times the largest number of each."""
    found, structure = jax.tree.flatten(found)
    expected, theirs = jax.tree.flatten(expected)
    assert structure == theirs
    for ours, right in zip(found, expected, strict=True):
        assert ours.shape == right.shape and ours.dtype == right.dtype
        ours, right = np.asarray(ours, np.float64), np.asarray(right, np.float64)
        assert np.isfinite(ours).all() and np.abs(right).max(initial=0) > 0
        assert np.abs(ours - right).max() <= bound * np.abs(right).max()


def equations(jaxpr: Any, name: str) -> list[Any]:
    """Those of a jaxpr, and of all within it, that call a primitive."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    found = []
    for equation in jaxpr.eqns:
        found += [equation] if equation.primitive.name == name else []
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda value: hasattr(value, "eqns")):
            found += equations(value, name) if hasattr(getattr(value, "jaxpr", value), "eqns") else []
    return found


def counts(function: Callable[..., Any], *arrays: Any) -> tuple[int, int, int]:
    """How often a function calls the operator, its tangent and its backward pass."""
    jaxpr = jax.make_jaxpr(function)(*arrays)
    forward, tangent, backward = (len(equations(jaxpr, f"deform_conv{suffix}")) for suffix in ("", "_tangent", "_backward"))
    return forward, tangent, backward
