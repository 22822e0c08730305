"""Deformable convolution on the CPU: a call's arrays, brought to the kernels of `cpu_kernels` as `cpu_plan` has cut the work.

The input is copied once with its channels last, in blocks, the weight once in panels for the matrix product; offsets, masks and
the output stay as they are. How the work is cut depends on shapes alone, and partial sums are added in a fixed order: a result
is the same bit for bit whatever the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cache, lru_cache, partial
from itertools import product
from math import prod
from typing import Any, Literal

import numpy as np

from deformconv.ops import cpu as on_cpu
from deformconv.ops.conv.spec import GRADIENTS, ConvSpec, Gradients, Operand, conv_spec
from deformconv.ops.operator import half_in_float32 as computes_in
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


def reasons_against(spec: ConvSpec, library: str, device: str, backward: bool) -> list[str]:
    """Why this backend cannot run a call, as sentences; none if it can."""
    return on_cpu.reasons_against(spec.dtype, library, device) + reasons_against_int32(spec)


def how(spec: ConvSpec, library: str, device: str) -> list[str]:
    """What there is to say of how a call is computed, as sentences."""
    return on_cpu.how(_multiplications(spec), library)


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
    return _plans().layer_plan(spec, channels, number, _multiplications(spec) + predictor)


@lru_cache(maxsize=256)
def _plan(spec: ConvSpec, number: int) -> Any:
    return _plans().plan(spec, number, _multiplications(spec))


@lru_cache(maxsize=256)
def _packed_cut(spec: ConvSpec, number: int) -> Any:
    """`_plan`'s forward pass, for a weight that is packed already."""
    cut = _plan(spec, number).forward
    return cut._replace(arguments=_prepack().without_panels(cut.arguments, (4,)))


@lru_cache(maxsize=256)
def _packed_layer_plan(spec: ConvSpec, channels: int, number: int) -> Any:
    """`_layer_plan`, for weights that are packed already."""
    plan = _layer_plan(spec, channels, number)
    return plan._replace(arguments=_prepack().without_panels(plan.arguments, (4, 6)))


def pack(spec: ConvSpec, weight: Any) -> np.ndarray:
    """What a forward pass makes of the weight first, for all calls with the same channels, groups and taps."""
    cut = _plan(spec, 1).forward
    return _prepack().packed_weight(weight, cut.arguments[2], cut.arguments[4], cut.weight_size)


def pack_predictor(spec: ConvSpec, channels: int, weight: Any) -> np.ndarray:
    """As `pack`, of the weight of a predictor with so many channels."""
    plan = _layer_plan(spec, channels, 1)
    return _prepack().packed_weight(weight, plan.arguments[5], plan.arguments[6], plan.predictor_size)


@lru_cache(maxsize=256)
def small(spec: ConvSpec) -> Callable[..., None] | None:
    """What computes a small call from the addresses of its contiguous arrays, the output's first, 0 for None.

    None where the call is large, so that it is worth to share it out.
    """
    if is_shared(_multiplications(spec)) or prod(spec.output_shape) == 0:
        return None
    plan = _plan(spec, 1)
    return _small().small_forward(spec, plan.forward, plan.x_size)


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
    output, flat_output, output_last = arrays.result_channels(spec.output_shape, spec.dtype, input_last, out)
    if output.size == 0:
        return output
    team = team_for(library)
    plan = _plan(spec, team.threads)
    cut, kernels = plan.forward if packed is None else _packed_cut(spec, team.threads), _kernels()
    offset, mask, *distances = _samples(spec, offset, mask)
    with arena(cut.bytes) as memory:
        x = memory.empty(plan.x_size, spec.dtype)
        panels = memory.empty(cut.weight_size, spec.dtype) if packed is None else packed
        given, weight_last = _forward_arrays(spec, (x, panels), input, offset, weight, bias, mask, flat_output)
        order = input_last, weight_last, output_last, *distances
        arguments = cut.arguments, order, given, *cut.share.scratch(memory, spec.dtype)
        run(kernels.forward, arguments, cut.share, team, (spec.dtype, spec.rank))
    return output


def _forward_arrays(
    spec: ConvSpec, own: Sequence[np.ndarray], input: Any, offset: Any, weight: Any, bias: Any, mask: Any, output: Any
) -> tuple[tuple[np.ndarray, ...], bool]:
    """A forward kernel's arrays, and whether the weight's channels come last.

    `own` is room for copies of input and weight; the latter's may be filled already, and the weight None.
    """
    none = arrays.none_of(spec.dtype)
    weight, weight_last = (none, False) if weight is None else arrays.flat_channels(weight)
    x, packed = own
    bias = none if bias is None else arrays.flat(bias)
    given = _kernels().ForwardArrays(
        input=input, x=x, offset=offset, mask=mask, weight=weight, packed=packed, bias=bias, output=output, empty=none
    )
    return tuple(given), weight_last


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
    output, flat_output = arrays.empty_channels(spec.output_shape, spec.dtype, input_last)
    if output.size == 0:
        return output
    team = team_for(library)
    channels, none, (mask_scale, max_offset) = len(predictor_weight), arrays.none_of(spec.dtype), activation
    plan = (_layer_plan if packed is None else _packed_layer_plan)(spec, channels, team.threads)
    image, offsets = channels * spec.positions, prod(spec.offset_shape[1:])
    with arena(plan.bytes) as memory:
        predicted, x = memory.empty(plan.predicted_size, spec.dtype), memory.empty(plan.x_size, spec.dtype)
        sizes = plan.weight_size, plan.predictor_size
        panels, predictor_panels = packed or (memory.empty(size, spec.dtype) for size in sizes)
        mask = predicted[offsets:] if spec.masked else none
        given, weight_last = _forward_arrays(spec, (x, panels), input, predicted, weight, bias, mask, flat_output)
        order = input_last, weight_last, input_last, image, image
        predictor_bias = none if predictor_bias is None else arrays.flat(predictor_bias)
        predictor = arrays.flat(predictor_weight), predictor_panels, predictor_bias
        squash = np.array((mask_scale, max_offset or 0), spec.dtype)
        scratch = plan.share.scratch(memory, spec.dtype)
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
    input, input_last = arrays.flat_channels(input)
    results, flat, d_input_last = _results(spec, wanted, input_last, out or {})
    if not results:
        return Gradients()
    if spec.batch * spec.positions * spec.in_channels * spec.out_channels * spec.pixels == 0:
        for result in results.values():
            result[...] = 0
        if "bias" in results and grad_output.size:
            results["bias"][...] = grad_output.reshape(spec.batch, spec.out_channels, -1).sum(axis=(0, 2))
        return Gradients(**results)

    team = team_for(library)
    plan = _plan(spec, team.threads)
    cut, kernels = plan.backward, _kernels()
    grad_output, output_last = arrays.flat_channels(grad_output)
    weight, weight_last = arrays.flat_channels(weight)
    offset, mask, image_offset, image_mask = _samples(spec, offset, mask)
    sizes = _backward_sizes(spec, plan, flat)
    with arena(sum(room(size, spec.dtype) for size in sizes.values()) + cut.share.bytes) as memory:
        own = {name: memory.empty(size, spec.dtype) for name, size in sizes.items()}
        own["d_output"][spec.batch * spec.positions * spec.out_channels :] = 0
        slots = {name: own[name] if cut.slots > 1 else flat[name] for name in ("offset", "mask")}
        if cut.slots > 1:  # an offset group may have fewer blocks than another
            own["offset"][...] = own["mask"][...] = 0
        given = kernels.BackwardArrays(
            grad_output=grad_output,
            d_output=own["d_output"],
            input=input,
            x=own["x"],
            offset=offset,
            mask=mask,
            weight=weight,
            packed=own["packed"],
            d_x=own["d_x"],
            d_offset=slots["offset"],
            d_mask=slots["mask"],
            d_weight=own["replicas"],
            d_bias=flat["bias"],
            empty=arrays.none_of(spec.dtype),
        )
        order = input_last, weight_last, output_last, image_offset, image_mask
        arguments = cut.arguments, order, tuple(given), *cut.share.scratch(memory, spec.dtype)
        shared = cut.share if results.keys() != {"bias"} else cut.share._replace(items=1)
        run(kernels.backward, arguments, shared, team, (spec.dtype, spec.rank))
        _collect(spec, plan, own, flat, d_input_last, team)
    return Gradients(**results)


def _samples(spec: ConvSpec, offset: Any, mask: Any) -> tuple[np.ndarray, np.ndarray, int, int]:
    """Offsets and masks as flat arrays, the latter empty for v1, and how many numbers apart their images are."""
    offset, image_offset = arrays.flat_images(offset)
    if mask is None:
        return offset, arrays.none_of(spec.dtype), image_offset, 0
    mask, image_mask = arrays.flat_images(mask)
    return offset, mask, image_offset, image_mask


def _results(
    spec: ConvSpec, wanted: Collection[str], input_last: bool, out: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], bool]:
    """The arrays for the wanted gradients, and all gradients' arrays flat, empty ones for those not wanted.

    And whether the channels of the input's gradient come last in memory.
    """
    results, flat, last = {}, dict.fromkeys(GRADIENTS, arrays.none_of(spec.dtype)), input_last
    if "input" in wanted:
        results["input"], flat["input"], last = arrays.result_channels(spec.input_shape, spec.dtype, last, out.get("input"))
    shapes = {"offset": spec.offset_shape, "weight": spec.weight_shape}
    shapes |= {"bias": (spec.out_channels,)} if spec.biased else {}
    shapes |= {"mask": spec.mask_shape} if spec.masked else {}
    results |= {name: arrays.result(shape, spec.dtype, out.get(name)) for name, shape in shapes.items() if name in wanted}
    return results, flat | {name: results[name].reshape(-1) for name in shapes if name in results}, last


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
    kernels, cut, none = _kernels(), plan.backward, arrays.none_of(spec.dtype)
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
    run(kernels.collect, arguments, share(items, team.threads, moved * COPY, spec.dtype), team, (spec.dtype, spec.rank))


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
    x, offset, depthwise, mask = (np.zeros(shape, dtype) for shape in shapes)
    for weight in (depthwise, np.zeros((2, 1, *ones), dtype)):
        x_, offset_, weight_, mask_ = (Operand(array.shape, dtype) for array in (x, offset, weight, mask))
        spec = conv_spec(x_, offset_, weight_, mask=mask_)
        y = forward(spec, x, offset, weight, None, mask)
        forward(spec, x, offset, None, None, mask, packed=pack(spec, weight))
        if (compute := small(spec)) is not None:
            compute(y.ctypes.data, x.ctypes.data, offset.ctypes.data, weight.ctypes.data, 0, mask.ctypes.data)
        backward(spec, y, x, offset, weight, mask, ("input", "offset", "weight", "mask"))
        predictor = np.zeros((rank + 1, 1, *ones), dtype)
        forward_layer(spec, x, weight, None, predictor, None, (1.0, None))
