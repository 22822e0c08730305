"""Multi-scale deformable attention on a GPU: a call's tensors, brought to the kernels of `gpu_kernels`.

One kernel samples and sums. The gradient of the value is collected, pixel by pixel, from samples that were sorted: nothing is
added by atomics, and results are the same bit for bit each time. No step waits for the GPU.

To sort takes some 60 bytes for each sample, of which an encoder's query has 128 (8 heads, 4 levels, 4 points): so it is done
for as many images at a time, or heads of one, as have four million. Each of these has pixels of its own, so that nothing is
added up from part to part, as it would be for parts of the queries.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import cache, lru_cache
from math import gcd, prod
from typing import Any, Literal, NamedTuple

from deformconv.ops import gpu as on_gpu
from deformconv.ops.attention.spec import AttentionSpec, Gradients, attention_spec
from deformconv.ops.backends import as_given as computes_in
from deformconv.ops.operator import Operand
from deformconv.runtime import tiles
from deformconv.sampling import lists

__all__ = ["DETERMINISTIC", "TAKES", "backward", "computes_in", "forward", "how", "reasons_against", "warmup"]

Tensor = Any

TAKES: Literal["native"] = "native"
DETERMINISTIC = True
_LIMIT = 2**31 - 2**12  # of what programs count in 32 bits, with room for the last block
_PIECE = 1 << 22  # samples at once of which the value's gradient is collected
# Products and sums are rounded apart where kernels do not say otherwise: where a sample lies depends on it.
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


class _Plan(NamedTuple):
    """What both kernels of a call need."""

    sizes: tuple[int, ...]  # of levels, packed
    constants: dict[str, Any]


def reasons_against(spec: AttentionSpec, library: str, device: str, backward: bool) -> list[str]:
    """Why this backend cannot run a call, as sentences; none if it can."""
    reasons = on_gpu.reasons_against(spec.dtype, library, device)
    if len(spec.levels) > lists.LEVELS:
        reasons.append(f"its kernels take at most {lists.LEVELS} levels, and there are {len(spec.levels)}")
    of_image = sum((height + 1) * (width + 1) for height, width in spec.levels)
    if max(of_image, spec.batch * spec.tokens) >= _LIMIT:
        reasons.append(f"{spec.batch} x {spec.tokens} pixels of all levels exceed its 32-bit pixel numbers")
    if spec.batch * spec.queries >= _LIMIT:
        reasons.append(f"a batch of {spec.batch * spec.queries} queries exceeds its 32-bit numbers")
    return reasons


def how(spec: AttentionSpec, library: str, device: str, backward: bool) -> list[str]:
    """What there is to say of how a call is computed, as sentences."""
    return ["one kernel samples and sums"]


@cache
def _kernels() -> Any:
    """The kernels' module, which loads Triton: the first call does it."""
    from deformconv.ops.attention import gpu_kernels

    return gpu_kernels


@lru_cache(maxsize=256)
def _plan(spec: AttentionSpec) -> _Plan:
    import triton.language as tl

    block = tiles.power(spec.channels)
    return _Plan(
        sizes=lists.packed(spec.levels),
        constants={
            "ACC": tl.float64 if spec.dtype == "float64" else tl.float32,
            "INDEX": tl.int32 if _largest(spec) < 2**31 else tl.int64,
            "SPAN": gcd(spec.channels, 16),
            "BR": max(1, min(128, 1024 // block)),
            "BC": block,
        },
    )


def _largest(spec: AttentionSpec) -> int:
    """The most numbers that an array of a call has, of those that kernels go through, or lists."""
    images, heads = _together(spec)
    of_samples = images * heads * spec.queries * _samples(spec) * 4
    arrays = map(prod, (spec.value_shape, spec.locations_shape, spec.output_shape))
    return max(*arrays, of_samples, _lists(spec, images, heads).number)


def _samples(spec: AttentionSpec) -> int:
    """The samples of a query in a head."""
    return len(spec.levels) * spec.points


def forward(spec: AttentionSpec, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """The output (N, Q, heads*d)."""
    output, rows = value.new_empty(spec.output_shape), spec.batch * spec.queries
    if output.numel():
        plan = _plan(spec)
        _kernels().attend[-(-rows // plan.constants["BR"]), spec.heads](
            value.contiguous(), locations.contiguous(), weights.contiguous(), output, rows, spec.queries, spec.tokens,
            spec.heads, spec.channels, len(spec.levels), spec.points, *plan.sizes, **plan.constants, **_OPTIONS,
        )  # fmt: skip
    return output


def backward(
    spec: AttentionSpec, grad_output: Tensor, value: Tensor, locations: Tensor, weights: Tensor, wanted: Collection[str]
) -> Gradients:
    """The wanted gradients; None for the others."""
    import torch

    given = {"value": value, "locations": locations, "weights": weights}
    found = {name: torch.empty_like(t, memory_format=torch.contiguous_format) for name, t in given.items() if name in wanted}
    if prod(spec.weights_shape) == 0:
        return Gradients(**{name: tensor.zero_() for name, tensor in found.items()})
    if found:
        grad = grad_output.contiguous().reshape(spec.batch, spec.queries, spec.heads, spec.channels)
        value, locations, weights = value.contiguous(), locations.contiguous(), weights.contiguous()
        d_locations, d_weights = found.get("locations"), found.get("weights")
        if not (d_locations is None and d_weights is None):  # one kernel writes both
            d_locations = torch.empty_like(locations) if d_locations is None else d_locations
            d_weights = torch.empty_like(weights) if d_weights is None else d_weights
        whole = _Part(value, locations, weights, grad, found.get("value"), d_locations, d_weights)
        for images, heads in _parts(spec):
            _backward_of(spec, _Part(*(None if tensor is None else tensor[images, :, heads] for tensor in whole)))
    return Gradients(**found)


class _Part(NamedTuple):
    """Some heads of some images in a backward pass: what it reads, and where results go."""

    value: Tensor  # (images, tokens, heads, d)
    locations: Tensor  # (images, Q, heads, levels, points, 2)
    weights: Tensor
    grad: Tensor  # (images, Q, heads, d)
    d_value: Tensor | None
    d_locations: Tensor | None
    d_weights: Tensor | None


def _parts(spec: AttentionSpec) -> Iterator[tuple[slice, slice]]:
    """Images and heads, as many at a time as bound the memory of lists."""
    images, heads = _together(spec)
    for image in range(0, spec.batch, images):
        for head in range(0, spec.heads, heads):
            yield slice(image, image + images), slice(head, head + heads)


def _together(spec: AttentionSpec) -> tuple[int, int]:
    """How many images and heads are computed at once in a backward pass: heads of one image alone, or all of some images."""
    of_head = max(1, spec.queries * _samples(spec))
    if spec.heads * of_head > _PIECE:
        return 1, max(1, _PIECE // of_head)
    return max(1, min(spec.batch, _PIECE // (spec.heads * of_head))), spec.heads


def _lists(spec: AttentionSpec, images: int, heads: int) -> lists.LevelLists:
    """The lists of samples, of which each head has its own."""
    return lists.LevelLists(images, spec.levels, heads, spec.channels)


def _backward_of(spec: AttentionSpec, part: _Part) -> None:
    """Write the part's gradients."""
    plan, (images, _, heads, _) = _plan(spec), part.value.shape
    rows, own, keys, shares = images * spec.queries, _lists(spec, images, heads), None, None
    if part.d_value is not None:
        keys, shares = lists.entries(own, rows * heads * _samples(spec), part.value)
    arrays = [part.value if tensor is None else tensor for tensor in (part.d_locations, part.d_weights, keys, shares)]
    _kernels().attend_backward[-(-rows // plan.constants["BR"]), len(spec.levels), heads](
        part.value, part.locations, part.weights, part.grad, *arrays, rows, spec.queries, spec.tokens, heads, spec.heads,
        spec.channels, len(spec.levels), spec.points, own.each, *plan.sizes, **plan.constants,
        POSITIONS=part.d_locations is not None, ENTRIES=keys is not None, **_OPTIONS,
    )  # fmt: skip
    if keys is not None:
        width = spec.heads * spec.channels
        of_rows = lists.Rows(spec.queries, heads, _samples(spec), width, 0, width, 0, plan.constants["SPAN"])
        lists.collect(own, of_rows, keys, shares, part.grad, part.d_value, plan.constants["INDEX"])


def warmup(dtypes: Collection[str], device: str) -> None:
    """Compile the kernels that Deformable DETR's calls take on a device, forward and backward; Triton keeps them on disk."""
    import torch

    for name in dtypes:
        dtype, precise = getattr(torch, name), torch.float64 if name == "float64" else torch.float32
        levels, shape = ((8, 12), (4, 6), (2, 3), (1, 2)), (1, 128, 8, 4, 4)
        value = torch.zeros(1, sum(height * width for height, width in levels), 8, 32, device=device, dtype=dtype)
        locations, weights = (torch.full(size, 0.5, device=device, dtype=precise) for size in ((*shape, 2), shape))
        operands = (Operand(tuple(tensor.shape), name) for tensor in (value, locations, weights))
        spec = attention_spec(*operands, spatial_shapes=levels)
        grad_output = forward(spec, value, locations, weights)
        backward(spec, grad_output, value, locations, weights, ("value", "locations", "weights"))
