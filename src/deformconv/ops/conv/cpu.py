"""Deformable convolution on the CPU: a call's arrays, brought to the kernels of `cpu_kernels` as `cpu_plan` has cut the work.

The input is copied once with its channels last, in blocks, the weight once in panels for the matrix product; offsets, masks and
the output stay as they are. Half precision is read and written as it is, by the copies: all between is float32, as offsets and
masks are. How the work is cut depends on shapes alone, and partial sums are added in a fixed order: a result
is the same bit for bit whatever the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache, lru_cache, partial
from itertools import product
from math import prod
from typing import Any, Literal

import numpy as np

from deformconv.ops import cpu as on_cpu
from deformconv.ops.conv.spec import GRADIENTS, ConvSpec, Gradients, Operand, conv_spec
from deformconv.ops.operator import HALF, half_in_float32
from deformconv.ops.taps.reach import reasons_against_int32
from deformconv.runtime import arrays, threads
from deformconv.runtime.memory import arena, room
from deformconv.runtime.openmp import team_for
from deformconv.runtime.work import COPY, run, share

__all__ = [
    "DETERMINISTIC", "TAKES", "backward", "computes_in", "forward", "forward_layer", "how", "reasons_against",
    "warmup",
]  # fmt: skip

TAKES: Literal["numpy"] = "numpy"
DETERMINISTIC = True


def reasons_against(spec: ConvSpec, library: str, device: str, backward: bool) -> list[str]:
    """Why this backend cannot run a call, as sentences; none if it can."""
    return on_cpu.reasons_against(spec.dtype, library, device, takes_half=True) + reasons_against_int32(spec)


def computes_in(dtype: str, library: str) -> str:
    """The dtype of the arrays that are taken. JAX's are brought to float32, since XLA's own casts cost no pass of their own."""
    return half_in_float32(dtype, library) if library == "jax" else dtype


def how(spec: ConvSpec, library: str, device: str) -> list[str]:
    """What there is to say of how a call is computed, as sentences."""
    halves = [f"it reads and writes {spec.dtype}, and computes in float32"] if computes_in(spec.dtype, library) in HALF else []
    return [*on_cpu.how(_multiplications(spec), library), *halves]


def _inner(dtype: str) -> str:
    """The dtype of everything but the caller's arrays."""
    return "float32" if dtype in HALF else dtype


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
def _layer_kernel() -> Any:
    with threads.importing:
        from deformconv.ops.conv import cpu_layer
    return cpu_layer.forward


@lru_cache(maxsize=256)
def _layer_plan(spec: ConvSpec, channels: int, number: int) -> Any:
    predictor = spec.batch * spec.positions * spec.taps * spec.in_channels * channels
    return _plans().layer_plan(_planned(spec), channels, number, _multiplications(spec) + predictor)


@lru_cache(maxsize=256)
def _plan(spec: ConvSpec, number: int) -> Any:
    return _plans().plan(_planned(spec), number, _multiplications(spec))


def _multiplications(spec: ConvSpec) -> int:
    """Multiply-adds of a forward pass; to sample a corner counts as four."""
    return spec.batch * spec.positions * spec.taps * spec.in_channels * (spec.out_channels // spec.groups + 4 * 2**spec.rank)


def forward(
    spec: ConvSpec, input: Any, offset: Any, weight: Any, bias: Any, mask: Any, library: str = "numpy", out: Any = None
) -> np.ndarray:
    """The output (N, C_out, *O) for arrays that `spec` describes; in memory its channels come last if the input's do.

    `library` is where the arrays came from: its threads, if it lends them, do the work. The output is written into `out`, if
    that is given, and this returned: an array of its own memory, with its channels second or last in it.
    """
    input, input_last = arrays.flat_channels(input)
    output, flat_output, output_last = arrays.result_channels(spec.output_shape, input.dtype, input_last, out)
    if output.size == 0:
        return output
    team, inner = team_for(library), _inner(spec.dtype)
    plan = _plan(spec, team.threads)
    cut, kernels = plan.forward, _kernels()
    offset, mask, *distances = _samples(inner, offset, mask)
    with arena(cut.bytes) as memory:
        own = memory.empty(plan.x_size, inner), memory.empty(cut.weight_size, inner)
        given, weight_last = _forward_arrays(spec, own, input, offset, weight, bias, mask, flat_output)
        order = input_last, weight_last, output_last, *distances
        arguments = cut.arguments, order, given, *cut.share.scratch(memory, inner)
        run(kernels.forward, arguments, cut.share, team, (spec.dtype, spec.rank))
    return output


def _forward_arrays(
    spec: ConvSpec, own: Sequence[np.ndarray], input: Any, offset: Any, weight: Any, bias: Any, mask: Any, output: Any
) -> tuple[tuple[np.ndarray, ...], bool]:
    """A forward kernel's arrays, and whether the weight's channels come last; `own` is room for copies of input and weight."""
    weight, weight_last = arrays.flat_channels(weight)
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
) -> np.ndarray:
    """The output of a layer that predicts its offsets and, if the call is masked, its masks.

    The predictor is a convolution over the same window of the input: weight (channels, C_in, *kernel), and a bias or None.
    `activation` are the scale of masks, and the bound of offsets or None.
    """
    input, input_last = arrays.flat_channels(input)
    output, flat_output = arrays.empty_channels(spec.output_shape, input.dtype, input_last)
    if output.size == 0:
        return output
    team, inner = team_for(library), _inner(spec.dtype)
    channels, (mask_scale, max_offset) = len(predictor_weight), activation
    plan = _layer_plan(spec, channels, team.threads)
    image, offsets = channels * spec.positions, prod(spec.offset_shape[1:])
    with arena(plan.bytes) as memory:
        predicted, *own, packed = (
            memory.empty(size, inner) for size in (plan.predicted_size, plan.x_size, plan.weight_size, plan.predictor_size)
        )
        mask = predicted[offsets:] if spec.masked else arrays.none_of(inner)
        given, weight_last = _forward_arrays(spec, own, input, predicted, weight, bias, mask, flat_output)
        order = input_last, weight_last, input_last, image, image
        predictor_bias = arrays.bits(_bias(predictor_bias, input.dtype))
        predictor = arrays.bits(arrays.flat(predictor_weight)), packed, predictor_bias
        squash = np.array((mask_scale, max_offset or 0), inner)
        scratch = plan.share.scratch(memory, inner)
        arguments = plan.arguments, order, (given, predictor), squash, *scratch
        run(_layer_kernel(), arguments, plan.share, team, (spec.dtype, spec.rank))
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
    plan = _plan(spec, team.threads)
    cut, kernels = plan.backward, _kernels()
    grad_output, output_last = arrays.flat_channels(grad_output)
    weight, weight_last = arrays.flat_channels(weight)
    offset, mask, image_offset, image_mask = _samples(inner, offset, mask)
    sizes = _backward_sizes(spec, plan, flat)
    with arena(sum(room(size, inner) for size in sizes.values()) + cut.share.bytes) as memory:
        own = {name: memory.empty(size, inner) for name, size in sizes.items()}
        own["d_output"][spec.batch * spec.positions * spec.out_channels :] = 0
        slots = {name: own[name] if cut.slots > 1 else flat[name] for name in ("offset", "mask")}
        if cut.slots > 1:  # an offset group may have fewer blocks than another
            own["offset"][...] = own["mask"][...] = 0
        given = kernels.BackwardArrays(
            grad_output=arrays.bits(grad_output),
            d_output=own["d_output"],
            input=arrays.bits(input),
            x=own["x"],
            offset=offset,
            mask=mask,
            weight=arrays.bits(weight),
            packed=own["packed"],
            d_x=own["d_x"],
            d_offset=slots["offset"],
            d_mask=slots["mask"],
            d_weight=own["replicas"],
            d_bias=flat["bias"],
            empty=arrays.none_of(inner),
        )
        order = input_last, weight_last, output_last, image_offset, image_mask
        arguments = cut.arguments, order, tuple(given), *cut.share.scratch(memory, inner)
        shared = cut.share if results.keys() != {"bias"} else cut.share._replace(items=1)
        run(kernels.backward, arguments, shared, team, (spec.dtype, spec.rank))
        _collect(spec, plan, own, flat, d_input_last, team)
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


def _backward_sizes(spec: ConvSpec, plan: Any, flat: dict[str, np.ndarray]) -> dict[str, int]:
    """How many numbers each array takes that a backward pass needs for itself."""
    cut = plan.backward
    return {
        "x": plan.x_size,
        "packed": cut.weight_size,
        "d_output": cut.output_size,
        "d_x": cut.parts * plan.x_size if flat["input"].size else 0,
        "replicas": cut.replicas * cut.replica_size if flat["weight"].size else 0,
        # Where a gradient that blocks of channels share is summed, if there are several.
        "offset": cut.slots * flat["offset"].size if cut.slots > 1 else 0,
        "mask": cut.slots * flat["mask"].size if cut.slots > 1 else 0,
    }


def _collect(spec: ConvSpec, plan: Any, own: dict[str, np.ndarray], flat: dict[str, np.ndarray], last: bool, team: Any) -> None:
    """Bring what a backward pass has left in its own arrays into the flat results.

    `last` says whether the channels of the input's gradient come last in memory.
    """
    inner = _inner(spec.dtype)
    kernels, cut, none = _kernels(), plan.backward, arrays.none_of(inner)
    shared = cut.slots > 1
    given = kernels.CollectArrays(
        d_x=own["d_x"],
        d_input=flat["input"],
        replicas=own["replicas"],
        d_weight=flat["weight"],
        offset_slots=own["offset"],
        d_offset=flat["offset"] if shared else none,
        mask_slots=own["mask"],
        d_mask=flat["mask"] if shared else none,
        empty=none,
    )
    items = _plans().collect_items(spec, given.d_input.size, given.d_weight.size, given.d_offset.size, given.d_mask.size)
    moved = given.d_x.size + given.replicas.size + given.offset_slots.size + given.mask_slots.size
    arguments = cut.arguments[2:], last, tuple(given)
    run(kernels.collect, arguments, share(items, team.threads, moved * COPY, inner), team, (spec.dtype, spec.rank))


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
    shapes = [(1, 1, *ones), (1, rank, *ones), (1, 1, *ones), (1, 1, *ones)]
    held = "uint16" if dtype == "bfloat16" else dtype  # as NumPy holds it
    x, offset, depthwise, mask = (np.zeros(shape, held) for shape in shapes)
    for weight in (depthwise, np.zeros((2, 1, *ones), held)):
        x_, offset_, weight_, mask_ = (Operand(array.shape, dtype) for array in (x, offset, weight, mask))
        spec = conv_spec(x_, offset_, weight_, mask=mask_)
        y = forward(spec, x, offset, weight, None, mask)
        backward(spec, y, x, offset, weight, mask, ("input", "offset", "weight", "mask"))
        predictor = np.zeros((rank + 1, 1, *ones), held)
        forward_layer(spec, x, weight, None, predictor, None, (1.0, None))
