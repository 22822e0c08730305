"""Deformable convolution in the functions of the array-API standard: any array library, any device.

Differentiable by the library itself, to any order. It holds the samples of all taps at once (and an automatic
derivative holds one copy for each of the 2**D corners): memory is the price of running everywhere.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from array_api_compat import array_namespace, is_numpy_array, is_torch_array
from array_api_compat import device as device_of

from deformconv.errors import BackendError
from deformconv.ops.conv.spec import ConvSpec, Gradients
from deformconv.sampling import gather

__all__ = ["deform_conv", "deform_conv_backward", "how", "reasons_against"]

Array = Any

HALF = ("float16", "bfloat16")
CHUNK = 1 << 24  # samples at once, where memory is to be bounded
# Those that have the standard's functions; NumPy and torch are tested.
LIBRARIES = ("cupy", "jax", "numpy", "torch")


def reasons_against(spec: ConvSpec, library: str, device: str, backward: bool) -> list[str]:
    """Why this backend cannot run the call; none if it can."""
    if library not in LIBRARIES:
        return [f"{library} has no array-API functions."]
    if backward and library == "numpy":
        return ["NumPy has no automatic derivative."]
    if backward and library != "torch":
        return [f"deform_conv_backward is for torch; differentiate deform_conv with {library} itself."]
    return []


def how(spec: ConvSpec, library: str) -> list[str]:
    """What there is to say of how a call is computed, as sentences."""
    if library != "torch":
        return []
    parts = sum(1 for _ in chunks(spec))
    way = "at once" if parts == 1 else f"in {parts} parts, one after the other, so that memory stays bounded"
    return [f"PyTorch's own operations compute the call {way}"]


def deform_conv(spec: ConvSpec, input: Array, offset: Array, weight: Array, bias: Array | None, mask: Array | None) -> Array:
    """The output (N, C_out, *O), by the library's own operations."""
    if is_numpy_array(input):
        # Infinities are data here: 0 * inf is NaN by definition, and nothing to warn of.
        with np.errstate(invalid="ignore", over="ignore"):
            return _deform_conv(spec, input, offset, weight, bias, mask)
    return _deform_conv(spec, input, offset, weight, bias, mask)


def deform_conv_backward(
    spec: ConvSpec,
    grad_output: Array,
    input: Array,
    offset: Array,
    weight: Array,
    mask: Array | None,
    wanted: Collection[str],
) -> Gradients:
    """The gradients of sum(grad_output * output), by the library's automatic derivative."""
    if not is_torch_array(input):
        library = type(input).__module__.partition(".")[0]
        reasons = reasons_against(spec, library, str(device_of(input)), backward=True)
        raise BackendError(f"The portable backend cannot run deform_conv_backward: {reasons[0]}")
    from torch.func import vjp

    given = {"input": input, "offset": offset, "weight": weight, "mask": mask}
    names = [name for name, array in given.items() if name in wanted and array is not None]

    def output(*arrays: Array) -> Array:
        call = given | dict(zip(names, arrays, strict=True))
        return deform_conv(spec, call["input"], call["offset"], call["weight"], None, call["mask"])

    gradients = {}
    if names:
        backward = vjp(output, *[given[name] for name in names])[1]
        gradients = dict(zip(names, backward(grad_output), strict=True))
    if spec.biased and "bias" in wanted:
        gradients["bias"] = grad_output.sum(dim=(0, *range(2, spec.rank + 2)))
    return Gradients(**gradients)


def second_backward(
    spec: ConvSpec, operands: Sequence[Any], wanted: Sequence[str], cotangents: Sequence[Array], needed: Sequence[int]
) -> dict[int, Array]:
    """The derivative of sum(cotangents * gradients) by some of grad_output, input, offset, weight and mask, on torch.

    `gradients` are the wanted ones of `deform_conv_backward`, which computes them from these operands.
    """
    from torch.func import vjp

    def gradients(*arrays: Array) -> tuple[Array, ...]:
        call = list(operands)
        for index, array in zip(needed, arrays, strict=True):
            call[index] = array
        found = deform_conv_backward(spec, *(*call, wanted))
        return tuple(gradient for gradient in found if gradient is not None)

    pull_back = vjp(gradients, *(operands[index] for index in needed))[1]
    return dict(zip(needed, pull_back(tuple(cotangents)), strict=True))


def deform_conv_in_chunks(
    spec: ConvSpec, input: Array, offset: Array, weight: Array, bias: Array | None, mask: Array | None
) -> Array:
    """`deform_conv` on torch tensors, without a derivative: a part of the output at a time, so that memory is bounded."""
    output = input.new_empty(spec.output_shape)
    for images, rows, part in chunks(spec):
        masks = None if mask is None else mask[images, :, rows]
        output[images, :, rows] = deform_conv(part, input[images], offset[images, :, rows], weight, bias, masks)
    return output


def deform_conv_backward_in_chunks(
    spec: ConvSpec,
    grad_output: Array,
    input: Array,
    offset: Array,
    weight: Array,
    mask: Array | None,
    wanted: Collection[str],
) -> Gradients:
    """`deform_conv_backward` on torch tensors, a part of the output at a time."""
    whole = {"input": input, "offset": offset, "weight": weight, "mask": mask}
    results = {name: array.new_zeros(array.shape) for name, array in whole.items() if name in wanted and array is not None}
    if spec.biased and "bias" in wanted:
        results["bias"] = weight.new_zeros(spec.out_channels)
    for images, rows, part in chunks(spec):
        masks = None if mask is None else mask[images, :, rows]
        gradients = deform_conv_backward(
            part, grad_output[images, :, rows], input[images], offset[images, :, rows], weight, masks, wanted
        )
        place = {"input": (images,), "offset": (images, slice(None), rows), "mask": (images, slice(None), rows)}
        for name, result in results.items():
            result[place.get(name, ())] += getattr(gradients, name)
    return Gradients(**results)


def images(spec: ConvSpec) -> Iterator[tuple[slice, ConvSpec]]:
    """Cut a call into images only, as many at a time as sample no more than CHUNK, but one at least."""
    most = max(1, CHUNK // max(1, spec.taps * spec.in_channels * spec.positions))
    for image in range(0, spec.batch, most):
        batch = min(most, spec.batch - image)
        yield slice(image, image + batch), replace(spec, batch=batch)


def chunks(spec: ConvSpec) -> Iterator[tuple[slice, slice, ConvSpec]]:
    """Cut a call into images, or an image into rows of the output's first axis: where, and the call that is left there.

    A part samples as much as fits CHUNK, but not less than its image has pixels: reading the image is work as well.
    """
    row = spec.taps * spec.in_channels * max(1, spec.positions // max(1, spec.output_size[0]))
    most = max(CHUNK, spec.in_channels * spec.pixels)
    length = min(spec.output_size[0], max(1, most // max(1, row)))
    images = max(1, most // max(1, row * spec.output_size[0])) if length == spec.output_size[0] else 1
    (before, after), *other_padding = spec.padding
    for image in range(0, spec.batch, images):
        batch = min(images, spec.batch - image)
        for start in range(0, spec.output_size[0], max(1, length)):
            count = min(length, spec.output_size[0] - start)
            part = replace(
                spec,
                batch=batch,
                output_size=(count, *spec.output_size[1:]),
                padding=((before - start * spec.stride[0], after), *other_padding),
            )
            yield slice(image, image + batch), slice(start, start + count), part


def _deform_conv(spec: ConvSpec, input: Array, offset: Array, weight: Array, bias: Array | None, mask: Array | None) -> Array:
    xp = array_namespace(input)
    N, C, K, P, D = spec.batch, spec.in_channels, spec.taps, spec.positions, spec.rank
    groups, G = spec.groups, spec.offset_groups
    dtype = input.dtype
    if spec.dtype in HALF:
        input, offset, weight, bias, mask = (
            None if array is None else xp.astype(array, xp.float32) for array in (input, offset, weight, bias, mask)
        )

    pixels = xp.reshape(input, (N * G, C // G, *spec.input_size))
    offset = xp.reshape(offset, (N * G, K, D, P))
    samples = gather.interpolate(
        pixels, _base(xp, spec, device_of(input)), [offset[:, :, axis] for axis in range(D)], spec.boundary
    )  # (N*G, K, P, C/G)
    if mask is not None:
        samples = samples * xp.reshape(mask, (N * G, K, P, 1))

    # Offset groups and groups cut the channels differently: together first, then apart.
    columns = xp.permute_dims(xp.reshape(samples, (N, G, K, P, C // G)), (0, 3, 2, 1, 4))
    columns = xp.reshape(columns, (N, P, K, groups, C // groups))
    columns = xp.permute_dims(columns, (0, 3, 2, 4, 1))
    columns = xp.reshape(columns, (N, groups, K * C // groups, P))
    matrix = xp.reshape(weight, (groups, spec.out_channels // groups, C // groups, K))
    matrix = xp.permute_dims(matrix, (0, 1, 3, 2))
    matrix = xp.reshape(matrix, (1, groups, spec.out_channels // groups, K * C // groups))
    output = xp.reshape(xp.matmul(matrix, columns), spec.output_shape)
    if bias is not None:
        output = output + xp.reshape(bias, (1, spec.out_channels) + (1,) * D)
    return xp.astype(output, dtype, copy=False)


def _base(xp: Any, spec: ConvSpec, device: Any) -> list[Array]:
    """For each axis p*stride - padding + k*dilation, as integers (K, P)."""
    D = spec.rank
    bases = []
    for axis in range(D):
        tap = xp.arange(spec.kernel_size[axis], device=device) * spec.dilation[axis]
        position = xp.arange(spec.output_size[axis], device=device) * spec.stride[axis]
        position = position - spec.padding[axis][0]
        ones = (1,) * (D - 1 - axis)
        tap = xp.reshape(tap, (spec.kernel_size[axis], *ones) + (1,) * D)
        position = xp.reshape(position, (spec.output_size[axis], *ones))
        base = xp.broadcast_to(tap + position, (*spec.kernel_size, *spec.output_size))
        bases.append(xp.reshape(base, (spec.taps, spec.positions)))
    return bases
