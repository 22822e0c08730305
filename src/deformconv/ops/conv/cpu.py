"""Deformable convolution on the CPU: a call's arrays, brought to the kernels of `cpu_kernels` as `cpu_plan` has cut the work.

The input is copied once with its channels last, in blocks, the weight once in panels for the matrix product; offsets, masks and
the output stay as they are. Half precision is read and written as it is, by the copies: all between is float32, as offsets and
masks are, but the factors of products where the processor multiplies pairs of bfloat16 (`runtime.pairs`). How the work is cut
depends on shapes alone, and partial sums are added in a fixed order: a result is the same bit for bit whatever the number of
threads.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache, lru_cache, partial
from itertools import product
from math import ceil, prod
from typing import Any, Literal, NamedTuple

import numpy as np

from deformconv.ops import cpu as on_cpu
from deformconv.ops.conv.spec import GRADIENTS, ConvSpec, Gradients, Operand, conv_spec
from deformconv.ops.operator import HALF, half_in_float32
from deformconv.ops.taps.reach import reasons_against_int32
from deformconv.runtime import arrays, threads
from deformconv.runtime.memory import arena, room
from deformconv.runtime.openmp import team_for
from deformconv.runtime.work import COPY, is_shared, run, share

__all__ = [
    "DETERMINISTIC", "TAKES", "backward", "computes_in", "forward", "forward_layer", "how", "pack", "pack_predictor",
    "reasons_against", "small", "warmup",
]  # fmt: skip

TAKES: Literal["numpy"] = "numpy"
DETERMINISTIC = True
_WORDS = (np.dtype(np.uint32), np.dtype(np.int32))  # of pairs


def reasons_against(spec: ConvSpec, library: str, device: str, backward: bool) -> list[str]:
    """Why this backend cannot run a call, as sentences; none if it can."""
    return on_cpu.reasons_against(spec.dtype, library, device, takes_half=True) + reasons_against_int32(spec)


def computes_in(dtype: str, library: str) -> str:
    """The dtype of the arrays that are taken. JAX's half precision is brought to float32 by XLA."""
    return half_in_float32(dtype, library) if library == "jax" else dtype


def how(spec: ConvSpec, library: str, device: str, backward: bool) -> list[str]:
    """What there is to say of how a call is computed, as sentences."""
    return [
        *on_cpu.how(_multiplications(spec), library),
        *([_how_half(spec, backward)] if computes_in(spec.dtype, library) in HALF else []),
    ]


def _how_half(spec: ConvSpec, backward: bool) -> str:
    """What there is to say of half precision, as a sentence."""
    pairs = "rounds samples to it, and adds up their products in float32"
    return f"it reads and writes {spec.dtype}, {pairs if _in_pairs(spec)[backward] else 'and computes in float32'}"


def _inner(dtype: str) -> str:
    """The dtype of everything but the caller's arrays."""
    return "float32" if dtype in HALF else dtype


def _in_pairs(spec: ConvSpec) -> tuple[bool, bool]:
    """Whether the products of the forward and the backward pass are of pairs of bfloat16."""
    if spec.dtype != "bfloat16" or _plans().words() is None:
        return False, False
    found: tuple[bool, bool] = _plans().in_pairs(_planned(spec))
    return found


def _packed_in(spec: ConvSpec, pairs: bool) -> str:
    """The dtype of the packed weight, for products that are of pairs or not."""
    return _plans().words() if pairs else _inner(spec.dtype)


def _kind(spec: ConvSpec, pairs: bool) -> tuple[Any, ...]:
    """What the types of a kernel's arguments follow from."""
    return spec.dtype, spec.rank, _packed_in(spec, pairs)


def _planned(spec: ConvSpec) -> ConvSpec:
    """The call whose work is cut: its copies are of the dtype that is computed in."""
    return replace(spec, dtype=_inner(spec.dtype))


@cache
def _kernels() -> Any:
    """The kernels' module; it loads Numba, so the first call does it and not the import of this file."""
    with threads.importing:
        from deformconv.ops.conv import cpu_kernels
    return cpu_kernels


@cache
def _plans() -> Any:
    """The plans' module, which loads Numba likewise."""
    with threads.importing:
        from deformconv.ops.conv import cpu_plan
    return cpu_plan


@cache
def _prepack() -> Any:
    with threads.importing:
        from deformconv.ops.conv import cpu_prepack
    return cpu_prepack


@cache
def _small() -> Any:
    with threads.importing:
        from deformconv.ops.conv import cpu_small
    return cpu_small


@cache
def _layer_kernel() -> Any:
    with threads.importing:
        from deformconv.ops.conv import cpu_layer
    return cpu_layer.forward


@lru_cache(maxsize=256)
def _layer_plan(spec: ConvSpec, channels: int, number: int) -> Any:
    predictor = spec.batch * spec.positions * spec.taps * spec.in_channels * channels
    return _plans().layer_plan(_planned(spec), channels, number, _multiplications(spec) + predictor, _in_pairs(spec)[0])


@lru_cache(maxsize=256)
def _forward_plan(spec: ConvSpec, number: int) -> Any:
    return _plans().forward_plan(_planned(spec), number, _multiplications(spec), _in_pairs(spec)[0])


@lru_cache(maxsize=256)
def _backward_plans(spec: ConvSpec, number: int) -> list[tuple[int, int, Any]]:
    """A batch in parts: the first image, the end, and the plan of each."""
    spec, (_, pairs) = _planned(spec), _in_pairs(spec)
    at_once = _plans().images_at_once(spec, number)
    ends = [(first, min(first + at_once, spec.batch)) for first in range(0, spec.batch, at_once)]
    specs = [replace(spec, batch=end - first) for first, end in ends]
    plans = [_plans().backward_plan(part, spec.batch, number, _multiplications(part), pairs) for part in specs]
    return [(*pair, plan) for pair, plan in zip(ends, plans, strict=True)]


@lru_cache(maxsize=256)
def _packed_plan(spec: ConvSpec, number: int) -> Any:
    """`_forward_plan`, for a weight that is packed already."""
    cut = _forward_plan(spec, number)
    return cut._replace(arguments=_prepack().without_panels(cut.arguments, (4,)))


@lru_cache(maxsize=256)
def _packed_layer_plan(spec: ConvSpec, channels: int, number: int) -> Any:
    """`_layer_plan`, for weights that are packed already."""
    plan = _layer_plan(spec, channels, number)
    return plan._replace(arguments=_prepack().without_panels(plan.arguments, (4, 6)))


def pack(spec: ConvSpec, weight: Any) -> np.ndarray:
    """What a forward pass makes of the weight first, for all calls with the same channels, groups and taps."""
    cut = _forward_plan(spec, 1)
    panels = arrays.aligned_empty((cut.weight_size,), _packed_in(spec, cut.pairs))
    return _prepack().pack(weight, panels, _inner(spec.dtype), cut.arguments[2], cut.arguments[4])


def pack_predictor(spec: ConvSpec, channels: int, weight: Any) -> np.ndarray:
    """As `pack`, of the weight of a predictor with so many channels."""
    plan, inner = _layer_plan(spec, channels, 1), _inner(spec.dtype)
    panels = arrays.aligned_empty((plan.predictor_size,), inner)
    return _prepack().pack(weight, panels, inner, plan.arguments[5], plan.arguments[6])


@lru_cache(maxsize=256)
def small(spec: ConvSpec) -> Callable[..., None] | None:
    """What computes a small call from the addresses of its contiguous arrays, the output's first, 0 for None.

    None where the call is large, so that it is worth to share it out, and in half precision.
    """
    if is_shared(_multiplications(spec)) or prod(spec.output_shape) == 0 or spec.dtype in HALF:
        return None
    return _small().small_forward(spec, _forward_plan(spec, 1))


def _multiplications(spec: ConvSpec) -> int:
    """Multiply-adds of a forward pass; to sample a corner counts as four."""
    return spec.batch * spec.positions * spec.taps * spec.in_channels * (spec.out_channels // spec.groups + 4 * 2**spec.rank)


def forward(
    spec: ConvSpec,
    input: Any,
    offset: Any,
    weight: Any,
    bias: Any,
    mask: Any,
    library: str = "numpy",
    out: Any = None,
    packed: np.ndarray | None = None,
) -> np.ndarray:
    """The output (N, C_out, *O) for arrays that `spec` describes; in memory its channels come last if the input's do.

    `library` is where the arrays came from: its threads, if it lends them, do the work. The output is written into `out`, if
    that is given, and this returned: an array of its own memory, with its channels second or last in it. `packed` is what
    `pack` has made of the weight, which is not read then.
    """
    input, input_last = arrays.flat_channels(input)
    output, flat_output, output_last = arrays.result_channels(spec.output_shape, input.dtype, input_last, out)
    if output.size == 0:
        return output
    team, inner = team_for(library), _inner(spec.dtype)
    cut, kernels = (_forward_plan if packed is None else _packed_plan)(spec, team.threads), _kernels()
    offset, mask, *distances = _samples(inner, offset, mask)
    with arena(cut.bytes) as memory:
        x = memory.empty(cut.x_size, inner)
        panels = memory.empty(cut.weight_size, _packed_in(spec, cut.pairs)) if packed is None else packed
        given, weight_last = _forward_arrays(spec, (x, panels), input, offset, weight, bias, mask, flat_output)
        order = input_last, weight_last, output_last, *distances
        arguments = cut.arguments, order, given, *cut.share.scratch(memory, inner)
        run(kernels.forward, arguments, cut.share, team, _kind(spec, cut.pairs))
    return output


def _forward_arrays(
    spec: ConvSpec, own: Sequence[np.ndarray], input: Any, offset: Any, weight: Any, bias: Any, mask: Any, output: Any
) -> tuple[tuple[np.ndarray, ...], bool]:
    """A forward kernel's arrays, and whether the weight's channels come last.

    `own` is room for copies of input and weight; the latter's may be filled already, and the weight None.
    """
    weight, weight_last = (arrays.none_of(input.dtype), False) if weight is None else arrays.flat_channels(weight)
    x, packed = own
    given = _kernels().ForwardArrays(
        input=arrays.bits(input),
        x=x,
        offset=offset,
        mask=mask,
        weight=arrays.bits(weight),
        packed=packed,
        bias=arrays.bits(_bias(bias, input.dtype)),
        output=arrays.bits(output),
        samples=arrays.none_of("uint16" if packed.dtype in _WORDS else _inner(spec.dtype)),
        empty=arrays.none_of(_inner(spec.dtype)),
    )
    return tuple(given), weight_last


def _bias(bias: Any, dtype: np.dtype) -> np.ndarray:
    """A bias as a flat array, an empty one if there is none."""
    return arrays.none_of(dtype) if bias is None else arrays.flat(bias)


def forward_layer(
    spec: ConvSpec,
    input: Any,
    weight: Any,
    bias: Any,
    predictor_weight: Any,
    predictor_bias: Any,
    activation: tuple[float, float | None],
    library: str = "numpy",
    packed: tuple[np.ndarray, np.ndarray] | None = None,
) -> np.ndarray:
    """The output of a layer that predicts its offsets and, if the call is masked, its masks.

    The predictor is a convolution over the same window of the input: weight (channels, C_in, *kernel), and a bias or None.
    `activation` are the scale of masks, and the bound of offsets or None. `packed` is what `pack` has made of the weight and
    `pack_predictor` of the predictor's, which are not read then.
    """
    input, input_last = arrays.flat_channels(input)
    output, flat_output = arrays.empty_channels(spec.output_shape, input.dtype, input_last)
    if output.size == 0:
        return output
    team, inner = team_for(library), _inner(spec.dtype)
    channels, (mask_scale, max_offset) = len(predictor_weight), activation
    plan = (_layer_plan if packed is None else _packed_layer_plan)(spec, channels, team.threads)
    image, offsets = channels * spec.positions, prod(spec.offset_shape[1:])
    with arena(plan.bytes) as memory:
        predicted, x = memory.empty(plan.predicted_size, inner), memory.empty(plan.x_size, inner)
        sizes = (plan.weight_size, _packed_in(spec, plan.pairs)), (plan.predictor_size, inner)
        panels, predictor_panels = packed or (memory.empty(*size) for size in sizes)
        mask = predicted[offsets:] if spec.masked else arrays.none_of(inner)
        given, weight_last = _forward_arrays(spec, (x, panels), input, predicted, weight, bias, mask, flat_output)
        order = input_last, weight_last, input_last, image, image
        predictor_bias = arrays.bits(_bias(predictor_bias, input.dtype))
        predictor = arrays.bits(arrays.flat(predictor_weight)), predictor_panels, predictor_bias
        squash = np.array((mask_scale, max_offset or 0), inner)
        scratch = plan.share.scratch(memory, inner)
        arguments = plan.arguments, order, (given, predictor), squash, *scratch
        run(_layer_kernel(), arguments, plan.share, team, _kind(spec, plan.pairs))
    return output


def backward(
    spec: ConvSpec,
    grad_output: Any,
    input: Any,
    offset: Any,
    weight: Any,
    mask: Any,
    wanted: Collection[str],
    library: str = "numpy",
    out: Mapping[str, np.ndarray] | None = None,
) -> Gradients:
    """The wanted gradients; None for the others. That of the input has its channels last in memory if the input does.

    A gradient is written into the array that `out` has for it, if any, as in `forward`; only the input's may have its channels
    last there.
    """
    if spec.dtype in HALF and 2 in {array.itemsize for array in (offset, mask) if array is not None}:
        return _backward_of_half_places(spec, grad_output, input, offset, weight, mask, wanted, library, out or {})
    input, input_last = arrays.flat_channels(input)
    results, flat, d_input_last = _results(spec, wanted, input, input_last, out or {})
    if not results:
        return Gradients()
    if spec.batch * spec.positions * spec.in_channels * spec.out_channels * spec.pixels == 0:
        for result in results.values():
            result[...] = 0
        if "bias" in results and grad_output.size:
            total = arrays.widened(grad_output).reshape(spec.batch, spec.out_channels, -1).sum(axis=(0, 2))
            results["bias"][...] = arrays.narrowed(total, grad_output.dtype)
        return Gradients(**results)

    team, inner = team_for(library), _inner(spec.dtype)
    parts = _backward_plans(spec, team.threads)
    grad_output, output_last = arrays.flat_channels(grad_output)
    weight, weight_last = arrays.flat_channels(weight)
    offset, mask, image_offset, image_mask = _samples(inner, offset, mask)
    sizes = _backward_sizes(spec, parts, flat)
    with arena(sum(room(*size) for size in sizes.values()) + parts[0][2].share.bytes) as memory:
        own = {name: memory.empty(*size) for name, size in sizes.items()}
        scratch = parts[0][2].share.scratch(memory, inner)
        grad_output = arrays.bits(grad_output)
        factor, distances = _factor(spec, parts[0][2].pairs, grad_output, output_last)
        order = input_last, weight_last, output_last, image_offset, image_mask
        given = _Given(grad_output, arrays.bits(input), offset, arrays.bits(weight), mask, factor)
        for part in parts:
            _backward_part(spec, part, given, (*order, part[0], d_input_last, *distances), own, flat, scratch, team)
    return Gradients(**results)


def _backward_of_half_places(
    spec: ConvSpec, grad_output: Any, input: Any, offset: Any, weight: Any, mask: Any, wanted: Collection[str], library: str,
    out: Mapping[str, np.ndarray],
) -> Gradients:  # fmt: skip
    """As `backward`, of offsets or masks in half precision: they are brought to float32, and their gradients back."""
    places = {name: array for name, array in (("offset", offset), ("mask", mask)) if array is not None}
    whole = {"mask": None} | {name: arrays.widened(array) for name, array in places.items()}
    others = {name: array for name, array in out.items() if name not in places}
    found = backward(
        spec, grad_output, input, whole["offset"], weight, whole["mask"], wanted, library=library, out=others
    )  # fmt: skip
    rounded = {name: arrays.narrowed(getattr(found, name), places[name].dtype) for name in places if name in wanted}
    for name in rounded.keys() & out.keys():
        out[name][...] = rounded[name]
        rounded[name] = out[name]
    return found._replace(**rounded)


class _Given(NamedTuple):
    """What a backward pass is given, flat."""

    grad_output: np.ndarray
    input: np.ndarray
    offset: np.ndarray
    weight: np.ndarray
    mask: np.ndarray
    factor: np.ndarray | None  # of the weight's gradient: grad_output, if it is multiplied from that itself


def _factor(spec: ConvSpec, pairs: bool, grad_output: np.ndarray, last: bool) -> tuple[np.ndarray | None, tuple[int, ...]]:
    """The output's gradient as the caller has it, if the weight's can be multiplied from it, and the numbers of BackwardOrder.

    An output's positions are a row of it then, whose numbers follow each other. In a copy with its channels last they are as
    far apart as there are outputs, and where that is a power of two they share a few sets of the cache.
    """
    outputs, positions = spec.out_channels, spec.positions
    # The product reads rows beyond those of the last group.
    whole = not last and outputs // spec.groups % _kernels().FEW_ROWS == 0
    if pairs:
        own = whole and positions % 2 == 0 and grad_output.ctypes.data % 4 == 0
        count = ceil(positions / 2)
        return grad_output.view(_packed_in(spec, pairs)) if own else None, (outputs * count, 1, count, not own)
    if whole and spec.dtype not in HALF:
        return grad_output, (outputs * positions, 1, positions, False)
    return None, (outputs * positions, outputs, 1, False)


def _backward_part(
    spec: ConvSpec,
    part: tuple[int, int, Any],
    given: _Given,
    order: tuple[int, ...],
    own: dict[str, np.ndarray],
    flat: dict[str, np.ndarray],
    scratch: tuple[np.ndarray, np.ndarray],
    team: Any,
) -> None:
    """Go backwards through some images: write their gradients, and add to the sums over the batch, or finish these."""
    (first, end, cut), kernels, none, nothing = part, _kernels(), arrays.none_of(_inner(spec.dtype)), given.input[:0]
    own["d_output"][(end - first) * spec.positions * spec.out_channels :] = 0
    own["d_output_pairs"][(end - first) * spec.out_channels * ceil(spec.positions / 2) :] = 0
    # Results of these images; each image has the same share of a result's array.
    ours = {name: _images(flat[name], spec, first, end) for name in ("input", "offset", "mask")}
    slots = {name: own[name][: cut.slots * ours[name].size] if cut.slots > 1 else ours[name] for name in ("offset", "mask")}
    if cut.slots > 1:  # an offset group may have fewer blocks than another
        slots["offset"][...] = slots["mask"][...] = 0
    own["turns"][...] = 0
    grad_output = given.grad_output[first * spec.positions * spec.out_channels :]
    copied = own["d_output_pairs" if cut.pairs else "d_output"]
    arguments = kernels.BackwardArrays(
        grad_output=grad_output,
        d_output=own["d_output"],
        d_output_factor=copied if given.factor is None else _images(given.factor, spec, first, end),
        input=given.input[first * spec.pixels * spec.in_channels :],
        x=own["x"],
        offset=given.offset[first * order[3] :],
        mask=given.mask[first * order[4] :],
        weight=given.weight,
        packed=own["packed"],
        d_x=own["d_x"][: cut.gradient_size],
        turns=own["turns"],
        d_input=ours["input"],
        d_offset=slots["offset"],
        d_mask=slots["mask"],
        d_weight=own["replicas"],
        d_bias=nothing if first else flat["bias"],
        empty=none,
    )
    wanted = any(flat[name].size for name in GRADIENTS if name != "bias")
    shared = cut.share if wanted else cut.share._replace(items=1)
    run(kernels.backward, (cut.arguments, order, tuple(arguments), *scratch), shared, team, _kind(spec, cut.pairs))
    last, apart = end == spec.batch, cut.turns > 0
    collected = kernels.CollectArrays(
        d_x=own["d_x"] if apart else none,
        d_input=ours["input"] if apart else nothing,
        replicas=own["replicas"] if last else none,
        d_weight=flat["weight"] if last else nothing,
        offset_slots=slots["offset"] if cut.slots > 1 else none,
        d_offset=ours["offset"] if cut.slots > 1 else none,
        mask_slots=slots["mask"] if cut.slots > 1 else none,
        d_mask=ours["mask"] if cut.slots > 1 else none,
        empty=none,
    )
    _collect(spec, end - first, cut, collected, order[6], team)


def _images(result: np.ndarray, spec: ConvSpec, first: int, end: int) -> np.ndarray:
    """The numbers of some images in a flat result, which may be empty."""
    image = result.size // spec.batch
    return result[first * image : end * image]


def _samples(inner: str, offset: Any, mask: Any) -> tuple[np.ndarray, np.ndarray, int, int]:
    """Offsets and masks as flat arrays, the latter empty for v1, and how many numbers apart their images are."""
    offset, image_offset = arrays.flat_images(arrays.widened(offset))
    if mask is None:
        return offset, arrays.none_of(inner), image_offset, 0
    mask, image_mask = arrays.flat_images(arrays.widened(mask))
    return offset, mask, image_offset, image_mask


def _results(
    spec: ConvSpec, wanted: Collection[str], input: np.ndarray, input_last: bool, out: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], bool]:
    """The arrays for the wanted gradients, and all gradients' arrays flat, empty ones for those not wanted.

    And whether the channels of the input's gradient come last in memory. All are of the input's dtype, but those of offset and
    mask of that which is computed in.
    """
    places, last = np.dtype(_inner(spec.dtype)), input_last
    dtypes = dict.fromkeys(GRADIENTS, input.dtype) | {"offset": places, "mask": places}
    results, flat = {}, {name: arrays.none_of(dtype) for name, dtype in dtypes.items()}
    if "input" in wanted:
        results["input"], flat["input"], last = arrays.result_channels(spec.input_shape, input.dtype, last, out.get("input"))
    shapes = {"offset": spec.offset_shape, "weight": spec.weight_shape}
    shapes |= {"bias": (spec.out_channels,)} if spec.biased else {}
    shapes |= {"mask": spec.mask_shape} if spec.masked else {}
    results |= {name: arrays.result(shape, dtypes[name], out.get(name)) for name, shape in shapes.items() if name in wanted}
    flat |= {name: results[name].reshape(-1) for name in shapes if name in results}
    return results, {name: arrays.bits(array) for name, array in flat.items()}, last


def _backward_sizes(
    spec: ConvSpec, parts: list[tuple[int, int, Any]], flat: dict[str, np.ndarray]
) -> dict[str, tuple[int, str]]:
    """How many numbers each array takes that a backward pass needs for itself, and of which dtype."""
    first, end, cut = parts[0]  # of no part there are more images
    sizes = {
        "x": cut.x_size,
        "packed": cut.weight_size,
        "d_output": cut.output_size,
        "d_output_pairs": cut.output_pairs_size,
        "d_x": max(part.gradient_size for *_, part in parts) if flat["input"].size else 0,
        "turns": cut.turns if flat["input"].size else 0,
        "replicas": cut.replicas * cut.replica_size if flat["weight"].size else 0,
        # Where a gradient that blocks of channels share is summed, if there are several.
        "offset": cut.slots * _images(flat["offset"], spec, first, end).size if cut.slots > 1 else 0,
        "mask": cut.slots * _images(flat["mask"], spec, first, end).size if cut.slots > 1 else 0,
    }
    dtypes = dict.fromkeys(sizes, _inner(spec.dtype)) | {"turns": "int64"}
    if cut.pairs:
        dtypes |= dict.fromkeys(("packed", "d_output_pairs"), _packed_in(spec, True)) | {"d_output": "uint16"}
    return {name: (size, dtypes[name]) for name, size in sizes.items()}


def _collect(spec: ConvSpec, images: int, cut: Any, given: Any, last: int, team: Any) -> None:
    """Bring what a backward pass has left in its own arrays into the flat results.

    `last` says whether the channels of the input's gradient come last in memory.
    """
    sizes = given.d_input.size, given.d_weight.size, given.d_offset.size, given.d_mask.size
    items = _plans().collect_items(spec, images, *sizes)
    if not items:
        return
    moved = given.d_input.size + given.replicas.size + given.offset_slots.size + given.mask_slots.size
    arguments = cut.arguments[2:], last, tuple(given)
    shared = share(items, team.threads, moved * COPY, _inner(spec.dtype))
    run(_kernels().collect, arguments, shared, team, (spec.dtype, spec.rank))


def warmup(
    dtypes: Iterable[str] = ("float32",),
    ranks: Iterable[int] = (1, 2, 3),
    notify: Callable[[str], None] | None = None,
) -> None:
    """Compile, or load, every kernel that an operator's calls and a layer's take, for the given dtypes and ranks.

    `notify` is called with a line before each of them.
    """
    kernels = _kernels()
    calls = ((f"{dtype}, {rank}-D", partial(_warm, dtype, rank)) for dtype, rank in product(dtypes, ranks))
    on_cpu.warm(calls, (kernels.forward, kernels.backward, kernels.collect, _layer_kernel()), notify)


def _warm(dtype: str, rank: int) -> None:
    """Calls of an operator, in both directions, and of a layer."""
    ones = (1,) * rank
    held = "uint16" if dtype == "bfloat16" else dtype  # as NumPy holds it
    # Depthwise, in float32, and in pairs of bfloat16 where the processor has them.
    for outputs, channels in ((1, 1), (2, 1), (2, 2)):
        shapes = [(1, channels, *ones), (1, rank, *ones), (outputs, channels, *ones), (1, 1, *ones)]
        x, offset, weight, mask = (np.zeros(shape, held) for shape in shapes)
        x_, offset_, weight_, mask_ = (Operand(shape, dtype) for shape in shapes)
        spec = conv_spec(x_, offset_, weight_, mask=mask_)
        if channels == 2 and not _in_pairs(spec)[0]:
            continue
        y = forward(spec, x, offset, weight, None, mask)
        forward(spec, x, offset, None, None, mask, packed=pack(spec, weight))
        if (compute := small(spec)) is not None:
            compute(y.ctypes.data, x.ctypes.data, offset.ctypes.data, weight.ctypes.data, 0, mask.ctypes.data)
        backward(spec, y, x, offset, weight, mask, ("input", "offset", "weight", "mask"))
        predictor = np.zeros((rank + 1, channels, *ones), held)
        forward_layer(spec, x, weight, None, predictor, None, (1.0, None))
