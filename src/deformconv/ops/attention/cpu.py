"""Deformable attention on the CPU: a call's arrays, brought to the kernels of `cpu_kernels`, and how the work is cut.

Forwards, threads share out blocks of queries. Backwards they do so for locations and weights; the gradient of the value is
added up, query by query in their order, by who has a head of an image, or some of its channels. Every number is a sum in an
order that shapes alone determine: a result is the same bit for bit whatever the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import cache, lru_cache, partial
from math import ceil, prod
from typing import Any, Literal, NamedTuple

import numpy as np

from deformconv.ops import cpu as on_cpu
from deformconv.ops.attention.spec import AttentionSpec, Gradients, attention_spec
from deformconv.ops.operator import Operand
from deformconv.ops.operator import half_in_float32 as computes_in
from deformconv.runtime import arrays, threads
from deformconv.runtime.memory import Arena, arena, room, up
from deformconv.runtime.openmp import team_for
from deformconv.runtime.work import Share, run, share

__all__ = ["DETERMINISTIC", "TAKES", "backward", "computes_in", "forward", "how", "reasons_against", "warmup"]

TAKES: Literal["numpy"] = "numpy"
DETERMINISTIC = True
_PIXELS = 2**30  # a table counts pixels in int32
_READS = 8  # of each pixel, from which on the value is copied
_TILE = 128  # samples that are placed at once
_BLOCK = 64  # queries of an item
_PER_SAMPLE = 40  # multiply-adds that take as long as placing a sample


def reasons_against(spec: AttentionSpec, library: str, device: str, backward: bool) -> list[str]:
    """Why this backend cannot run a call, as sentences; none if it can."""
    reasons = on_cpu.reasons_against(spec.dtype, library, device)
    if spec.tokens >= _PIXELS:
        reasons.append(f"levels of {spec.tokens} pixels exceed its 32-bit pixel numbers")
    return reasons


def how(spec: AttentionSpec, library: str, device: str, backward: bool) -> list[str]:
    """What there is to say of how a call is computed, as sentences."""
    return on_cpu.how(_multiplications(spec), library)


@cache
def _kernels() -> Any:
    """The kernels' module; it loads Numba, so the first call does it and not the import of this file."""
    with threads.importing:
        from deformconv.ops.attention import cpu_kernels
    return cpu_kernels


def _multiplications(spec: AttentionSpec) -> int:
    """Multiply-adds of a forward pass; to sample a corner counts as two."""
    return prod(spec.weights_shape) * (8 * spec.channels + _PER_SAMPLE)


class Plan(NamedTuple):
    """How a call is cut, in both directions."""

    arguments: tuple[Any, ...]  # the kernels' `plan`
    copy: int  # numbers of the value's copy, 0 if there is none
    forward: Share
    sums: tuple[int, int]  # items that add up the value's gradient, and the numbers of scratch memory that one needs
    others: int  # items that compute the other gradients
    scratch: tuple[int, int]
    number: int  # of threads

    def backward(self, spec: AttentionSpec, sums: bool, others: bool) -> Share:
        """How the work for the value's gradient is shared out, for the others, or for all."""
        integers, reals = self.scratch
        items, room = self.sums if sums else (0, 0)
        work = _multiplications(spec) * (sums + others)
        return share(items + others * self.others, self.number, work, spec.dtype, (integers, reals + room))


@lru_cache(maxsize=256)
def _plan(spec: AttentionSpec, number: int) -> Plan:
    with threads.importing:
        from deformconv.runtime.simd import VECTOR_BYTES

    kernels, heads, samples = _kernels(), spec.batch * spec.heads, len(spec.levels) * spec.points
    lanes = VECTOR_BYTES // np.dtype(spec.dtype).itemsize
    wanted = min(ceil(spec.channels / lanes), ceil(2 * number / heads))  # more items than threads, so that these end together
    width = min(spec.channels, up(ceil(spec.channels / wanted), lanes))
    copied = 4 * spec.queries * samples >= _READS * spec.tokens
    together = max(1, _TILE // max(1, samples))
    row = spec.channels if copied else spec.heads * spec.channels
    shape = kernels.Shape(
        images=spec.batch,
        tokens=spec.tokens,
        heads=spec.heads,
        channels=spec.channels,
        queries=spec.queries,
        samples=samples,
        copied=copied,
        row=row,
        image=spec.tokens * row,
        head=spec.batch * spec.tokens * spec.channels if copied else spec.channels,
        together=together,
        block=_BLOCK,
        blocks=ceil(spec.channels / width),
        width=width,
    )
    levels = np.array([(width, height, start) for (height, width), start in zip(spec.levels, spec.starts, strict=True)])
    geometry = np.repeat(levels.T.astype(np.float64), spec.points, axis=1)  # (3, levels*points)
    scratch = kernels.scratch_sizes(together * samples, spec.channels)
    queries = heads * ceil(spec.queries / _BLOCK)
    return Plan(
        arguments=(np.array(shape, np.int64), geometry.reshape(-1)),
        copy=prod(spec.value_shape) if copied else 0,
        forward=share(queries, number, _multiplications(spec), spec.dtype, scratch),
        sums=(heads * shape.blocks, spec.tokens * width if copied else 0),
        others=queries,
        scratch=scratch,
        number=number,
    )


def forward(spec: AttentionSpec, value: Any, locations: Any, weights: Any, library: str = "numpy") -> np.ndarray:
    """The output (N, Q, heads*d) for arrays that `spec` describes."""
    output = arrays.aligned_empty(spec.output_shape, spec.dtype)
    if output.size == 0:
        return output
    team = team_for(library)
    plan = _plan(spec, team.threads)
    with arena(room(plan.copy, spec.dtype) + plan.forward.bytes) as memory:
        given = _kernels().ForwardArrays(
            *_read_in(spec, memory, plan.copy, value),
            *map(arrays.flat, (locations, weights)),
            output=output.reshape(-1),
            empty=arrays.none_of(spec.dtype),
        )
        arguments = plan.arguments, tuple(given), *plan.forward.scratch(memory, spec.dtype)
        run(_kernels().forward, arguments, plan.forward, team, (spec.dtype,))
    return output


def backward(
    spec: AttentionSpec,
    grad_output: Any,
    value: Any,
    locations: Any,
    weights: Any,
    wanted: Collection[str],
    library: str = "numpy",
) -> Gradients:
    """The wanted gradients; None for the others."""
    shapes = {name: shape for name, shape in spec.shapes.items() if name in wanted}
    if not shapes:
        return Gradients()
    if prod(spec.weights_shape) == 0:
        return Gradients(**{name: np.zeros(shape, spec.dtype) for name, shape in shapes.items()})
    results = {name: arrays.aligned_empty(shape, spec.dtype) for name, shape in shapes.items()}
    none, team = arrays.none_of(spec.dtype), team_for(library)
    plan, others = _plan(spec, team.threads), bool({"locations", "weights"} & set(shapes))
    shared, size = plan.backward(spec, "value" in shapes, others), plan.copy if others else 0
    flat = {name: results[name].reshape(-1) if name in results else none for name in Gradients._fields}
    with arena(room(size, spec.dtype) + shared.bytes) as memory:
        given = _kernels().BackwardArrays(
            arrays.flat(grad_output),
            *_read_in(spec, memory, size, value),
            *map(arrays.flat, (locations, weights)),
            d_value=flat["value"],
            d_locations=flat["locations"],
            d_weights=flat["weights"],
            empty=none,
        )
        arguments = plan.arguments, tuple(given), *shared.scratch(memory, spec.dtype)
        run(_kernels().backward, arguments, shared, team, (spec.dtype,))
    return Gradients(**results)


def _read_in(spec: AttentionSpec, memory: Arena, size: int, value: Any) -> tuple[np.ndarray, np.ndarray]:
    """What kernels copy, if there is something to copy, and what they read: room for the copy, or the value itself."""
    given = arrays.flat(value)
    return (given, memory.empty(size, spec.dtype)) if size else (arrays.none_of(spec.dtype), given)


def warmup(dtypes: Iterable[str] = ("float32",), notify: Callable[[str], None] | None = None) -> None:
    """Compile, or load, every kernel that calls take, for the given dtypes; `notify` gets a line before each of them."""
    kernels = _kernels()
    calls = ((f"{dtype}, attention", partial(_warm, dtype)) for dtype in dtypes)
    on_cpu.warm(calls, (kernels.forward, kernels.backward), notify)


def _warm(dtype: str) -> None:
    """A call in both directions."""
    shapes = (1, 1, 1, 1), (1, 1, 1, 1, 1, 2), (1, 1, 1, 1, 1)
    value, locations, weights = (np.zeros(shape, dtype) for shape in shapes)
    operands = [Operand(shape, dtype) for shape in shapes]
    spec = attention_spec(*operands, spatial_shapes=((1, 1),))
    y = forward(spec, value, locations, weights)
    backward(spec, y, value, locations, weights, ("value", "locations", "weights"))
