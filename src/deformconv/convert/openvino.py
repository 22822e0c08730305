"""Rules by which OpenVINO reads this library's operators as its own, and ONNX's node as its own deformable convolution."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from deformconv.errors import BackendError
from deformconv.ops.conv.openvino import convolution

__all__ = ["openvino_extensions"]

GRID = {"align_corners": False, "mode": "bilinear"}  # whose places are from -1 to 1


def openvino_extensions() -> list[Any]:
    """Return what `openvino.convert_model` needs to know of deformable operators, to be passed as its `extension`.

    OpenVINO has the operator, but two of its readers lack a rule for it: that of ONNX files for DeformConv, and that of
    PyTorch's modules and exported programs for `deformconv::deform_conv`. With these rules each is read as OpenVINO's
    DeformableConvolution-8, over 1 and 2 spatial axes, with boundary="zeros". What is beyond that raises, in words of
    OpenVINO's around ours. `deformconv::deform_attention` is read as a GridSample-9 for each level, and
    `deformconv::deform_aggregate` as one over 1 and 2 spatial axes, and over 3 as a Gather-8 for each corner.

    The converted model needs neither this library nor the rules: `openvino.save_model` writes OpenVINO's own operators alone.

    Returns:
        The rules, for `openvino.convert_model(..., extension=openvino_extensions())` or, one by one, for
        `openvino.Core().add_extension`.

    Raises:
        ModuleNotFoundError: OpenVINO is not installed.

    Example:
        >>> import openvino, torch
        >>> from deformconv.convert import openvino_extensions
        >>> from deformconv.torch import DeformConv2d
        >>> layer, x = DeformConv2d(3, 8, 3, padding=1).eval(), torch.rand(2, 3, 9, 9)
        >>> model = openvino.convert_model(layer, example_input=x, extension=openvino_extensions())
        >>> found = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(x.numpy())[0]
        >>> torch.allclose(torch.from_numpy(found), layer(x), atol=1e-5)
        True
    """
    try:
        from openvino.frontend import onnx, pytorch
    except ModuleNotFoundError as error:
        if error.name != "openvino":
            raise
        raise ModuleNotFoundError(
            "openvino_extensions needs OpenVINO, which is not installed: pip install 'openvino>=2024.4'", name="openvino"
        ) from None
    return [
        onnx.ConversionExtension("DeformConv", _from_onnx),
        *(
            pytorch.ConversionExtension(name, rule)
            for operator, rule in (("conv", _from_torch), ("attention", _attention), ("aggregate", _aggregate))
            for name in (
                f"deformconv::deform_{operator}",
                f"deformconv.deform_{operator}.default",
            )  # torch.jit's, torch.export's
        ),
    ]


def _from_onnx(node: Any) -> list[Any]:
    """The rule for ONNX's DeformConv: inputs X, W, offset, B and mask, the last two of which may be missing."""

    def attribute(name: str, default: Any) -> Any:
        return node.get_attribute(name) if node.has_attribute(name) else default

    def optional(number: int) -> Any:
        found = node.get_input(number) if number < node.get_input_size() else None
        return None if found is None or found.get_node().get_type_name() == "NullNode" else found

    weight = node.get_input(1)
    rank = weight.get_partial_shape().rank.get_length() - 2
    pads = attribute("pads", [0] * 2 * rank)
    window = attribute("strides", [1] * rank), pads[:rank], pads[rank:], attribute("dilations", [1] * rank)
    groups = attribute("group", 1), attribute("offset_group", 1)
    return _convolution(node.get_input(0), node.get_input(2), weight, optional(3), optional(4), window, groups)


def _from_torch(node: Any) -> list[Any]:
    """The rule for this library's operator, whose arguments are in the order in which it is registered."""

    boundary = _text(node, 10)
    if boundary != "zeros":
        raise BackendError(
            f'boundary="{boundary}" cannot be converted: OpenVINO\'s DeformableConvolution knows boundary="zeros" only.'
        )
    stride, padding, dilation, *groups = (node.get_values_from_const_input(number) for number in range(5, 10))
    if None in groups:
        raise BackendError(
            "A call without `groups` or `offset_groups` cannot be converted, since OpenVINO does not know the tensors' "
            "shapes yet; expected deform_conv2d(..., groups=..., offset_groups=...)."
        )
    input, offset, weight = (node.get_input(number) for number in range(3))
    window = stride, padding[::2], padding[1::2], dilation
    return _convolution(input, offset, weight, _optional(node, 3), _optional(node, 4), window, groups)


def _optional(node: Any, number: int) -> Any:
    """An argument of an operator of PyTorch's, or None."""
    try:
        if node.get_values_from_const_input(number) is None:
            return None  # before 2025 get_input raises for what is None
    except Exception:  # OpenVINO's own, for what is no constant
        pass
    return node.get_input(number)


def _text(node: Any, number: int) -> str:
    """An argument that is a text."""
    try:
        found: str = node.get_values_from_const_input(number)
    except Exception:  # OpenVINO's own, for the text of an exported program, which is an array of its bytes
        found = bytes(node.get_input(number).get_node().get_data()).decode()
    return found


def _convolution(
    input: Any, offset: Any, weight: Any, bias: Any, mask: Any, window: Sequence[Any], groups: Sequence[int]
) -> list[Any]:
    return convolution(_opset(), input, offset, weight, bias, mask, window, groups)


def _attention(node: Any) -> list[Any]:
    """The rule for multi-scale deformable attention, whose levels are constants; half precision is computed in float32."""
    opset, given = _opset(), node.get_input(0)
    constant, (value, locations, weights) = opset.constant, map(node.get_input, range(3))
    if any(tensor.get_element_type().get_type_name() in ("f16", "bf16") for tensor in (value, locations, weights)):
        value, locations, weights = (opset.convert(tensor, "f32") for tensor in (value, locations, weights))
    channels, queries, points = _size(value, 3), _size(weights, 1), _size(weights, 4)
    values = opset.transpose(value, constant([0, 2, 3, 1]))  # (N, heads, d, L)
    two, one = (opset.convert_like(constant(number), locations) for number in (2.0, 1.0))
    grid = opset.subtract(opset.multiply(opset.transpose(locations, constant([3, 0, 2, 1, 4, 5])), two), one)
    factors = opset.transpose(weights, constant([3, 0, 2, 1, 4]))  # (levels, N, heads, Q, points)
    sizes = node.get_values_from_const_input(3)
    start, total = 0, None
    for level, (height, width) in enumerate(zip(sizes[::2], sizes[1::2], strict=True)):
        begin, start = start, start + height * width
        pixels = opset.slice(values, constant([begin]), constant([start]), constant([1]), constant([3]))
        places, shares = (opset.gather(each, constant(level), constant(0)) for each in (grid, factors))
        pixels, places = _reshaped(pixels, -1, channels, height, width), _reshaped(places, -1, queries, points, 2)
        samples = opset.grid_sample(pixels, places, GRID | {"padding_mode": "zeros"})  # (N*heads, d, Q, points)
        summed = opset.reduce_sum(opset.multiply(samples, _reshaped(shares, -1, 1, queries, points)), constant([3]), False)
        total = summed if total is None else opset.add(total, summed)
    output = opset.transpose(_reshaped(total, _size(value, 0), -1, queries), constant([0, 2, 1]))  # (N, Q, heads*d)
    return [opset.convert_like(output, given).output(0)]


def _aggregate(node: Any) -> list[Any]:
    """The rule for deformable aggregation, of any sizes; half precision is computed in float32."""
    opset, given, offset, mask = _opset(), node.get_input(0), node.get_input(1), _optional(node, 2)
    kernel_size, *window, groups = (node.get_values_from_const_input(number) for number in range(3, 8))
    rank, taps, constant, boundary = len(kernel_size), math.prod(kernel_size), opset.constant, _text(node, 8)
    input, offset, mask = (None if tensor is None else opset.convert(tensor, "f32") for tensor in (given, offset, mask))
    sizes, places = ([_size(tensor, axis) for axis in range(2, 2 + rank)] for tensor in (input, offset))
    groups = opset.divide(_size(offset, 1), constant([rank * taps])) if groups is None else constant([groups])
    images, channels = opset.multiply(_size(input, 0), groups), opset.divide(_size(input, 1), groups)
    split = _reshaped(offset, images, taps, rank, *places)
    moves = [opset.gather(split, constant(axis), constant(2)) for axis in range(rank)]  # (N*offset_groups, K, *O) each
    bases = [_base(axis, kernel_size, window, places[axis]) for axis in range(rank)]
    sample = _by_gather if rank == 3 else _by_grid_sample
    samples = sample(_reshaped(input, images, channels, *sizes), sizes, bases, moves, boundary)
    factors = [] if mask is None else [_reshaped(mask, images, 1, taps, *places)]
    samples = functools.reduce(opset.multiply, factors, _reshaped(samples, images, channels, taps, *places))
    output = _reshaped(opset.reduce_sum(samples, constant([2]), False), _size(input, 0), _size(input, 1), *places)
    return [opset.convert_like(output, given).output(0)]


def _by_grid_sample(pixels: Any, sizes: Sequence[Any], bases: Sequence[Any], moves: Sequence[Any], boundary: str) -> Any:
    """Samples (N, C, K, *O) of a map of 1 or 2 axes, of which 1-D is 2-D of height 1."""
    opset, rank, sizes = _opset(), len(sizes), [_opset().convert(size, "f32") for size in sizes]
    channels, taps_and_places = _size(pixels, 1), [_size(moves[0], axis) for axis in range(1, 2 + rank)]
    if rank == 1:
        pixels = opset.unsqueeze(pixels, opset.constant([2]))
    grid = [_normal(opset.add(*place), size) for *place, size in zip(bases, moves, sizes, strict=True)]
    grid = grid[::-1] if rank == 2 else [*grid, opset.multiply(grid[0], _number(0))]  # x first
    grid = _reshaped(opset.concat(grid, -1), _size(pixels, 0), -1, taps_and_places[-1], 2)
    samples = opset.grid_sample(pixels, grid, GRID | {"padding_mode": {"zeros": "zeros", "inside": "border"}[boundary]})
    samples = _reshaped(samples, _size(pixels, 0), channels, *taps_and_places)
    if boundary == "zeros":
        return samples
    lows = (opset.add(base, opset.floor(move)) for base, move in zip(bases, moves, strict=True))
    is_within = functools.reduce(opset.logical_and, map(_within, lows, sizes))
    return opset.multiply(samples, opset.unsqueeze(opset.convert(is_within, "f32"), opset.constant([1])))


def _by_gather(pixels: Any, sizes: Sequence[Any], bases: Sequence[Any], moves: Sequence[Any], boundary: str) -> Any:
    """Samples (N, C, K*O) of a map of any number of axes, corner by corner; there is no GridSample over 3."""
    opset, zero = _opset(), _number(0)
    lasts = [opset.subtract(opset.convert(size, "f32"), _number(1)) for size in sizes]
    ends = [opset.add(last, _number(1)) for last in lasts]
    # Beyond there every sample is outside, however far.
    moves = [
        opset.minimum(opset.maximum(move, opset.subtract(_number(-2), base)), opset.subtract(end, base))
        for base, move, end in zip(bases, moves, ends, strict=True)
    ]
    wholes = [opset.floor(move) for move in moves]
    parts = [opset.subtract(*pair) for pair in zip(moves, wholes, strict=True)]
    lows = [opset.add(*pair) for pair in zip(bases, wholes, strict=True)]
    flat = _reshaped(pixels, _size(pixels, 0), _size(pixels, 1), -1)
    outside = _size(flat, 2)  # the number of a pixel of zeros, behind all others
    flat = opset.pad(flat, opset.constant([0, 0, 0]), opset.constant([0, 0, 1]), "constant", zero)
    total = None
    for corner in itertools.product((0, 1), repeat=len(sizes)):
        pixel = [opset.add(low, _number(bit)) for low, bit in zip(lows, corner, strict=True)]
        is_there = functools.reduce(opset.logical_and, map(_within, pixel if boundary == "zeros" else lows, ends))
        shares = (part if bit else opset.subtract(_number(1), part) for part, bit in zip(parts, corner, strict=True))
        weight, index = functools.reduce(opset.multiply, shares), opset.constant(np.int64(0))
        for place, size, last in zip(pixel, sizes, lasts, strict=True):
            nearest = opset.convert(opset.minimum(opset.maximum(place, zero), last), "i64")
            index = opset.add(opset.multiply(index, size), nearest)
        index = opset.select(is_there, index, outside)
        index, weight = _reshaped(index, _size(pixels, 0), -1), _reshaped(weight, _size(pixels, 0), 1, -1)
        term = opset.multiply(opset.gather(flat, index, opset.constant(2), 1), weight)
        total = term if total is None else opset.add(total, term)
    return total


def _base(axis: int, kernel_size: Sequence[int], window: Sequence[Sequence[int]], places: Any) -> Any:
    """p*stride - padding + k*dilation along an axis, (K, *O) with 1 for the other axes."""
    opset, rank, (stride, padding, dilation) = _opset(), len(kernel_size), window
    indices = np.indices(kernel_size)[axis].reshape(-1, *(1,) * rank)
    taps = opset.constant((indices * dilation[axis] - padding[2 * axis]).astype(np.float32))
    numbers = opset.range(opset.constant(0), opset.squeeze(places, opset.constant([0])), opset.constant(1))
    positions = opset.convert(opset.multiply(numbers, opset.constant(stride[axis])), "f32")
    return opset.add(taps, _reshaped(positions, -1, *[1] * (rank - 1 - axis)))


def _normal(position: Any, size: Any) -> Any:
    """A position in pixels from -1 to 1 along an axis, with an axis behind; all that is farther outside is 1.5 pixels away."""
    opset = _opset()
    position = opset.minimum(opset.maximum(position, _number(-2)), opset.add(size, _number(1)))
    double = opset.add(opset.multiply(position, _number(2)), _number(1))
    return opset.unsqueeze(opset.subtract(opset.divide(double, size), _number(1)), opset.constant([-1]))


def _within(pixel: Any, size: Any) -> Any:
    """Whether there is such a pixel along an axis."""
    opset = _opset()
    return opset.logical_and(opset.greater_equal(pixel, _number(0)), opset.less(pixel, size))


def _number(value: float) -> Any:
    return _opset().constant(np.float32(value))


def _size(tensor: Any, axis: int) -> Any:
    opset = _opset()
    return opset.gather(opset.shape_of(tensor), opset.constant([axis]), opset.constant(0))


def _reshaped(tensor: Any, *sizes: Any) -> Any:
    opset = _opset()
    whole = [opset.constant([each]) if isinstance(each, int) else each for each in sizes]
    return opset.reshape(tensor, opset.concat(whole, 0), False)


def _opset() -> Any:
    try:
        from openvino import opset9
    except ImportError:  # before OpenVINO 2025
        from openvino.runtime import opset9
    return opset9
