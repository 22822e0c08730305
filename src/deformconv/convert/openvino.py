"""Rules by which OpenVINO reads this library's operators as its own, and ONNX's node as its own deformable convolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deformconv.errors import BackendError

__all__ = ["openvino_extensions"]


def openvino_extensions() -> list[Any]:
    """Return what `openvino.convert_model` needs to know of deformable operators, to be passed as its `extension`.

    OpenVINO has the operator, but two of its readers lack a rule for it: that of ONNX files for DeformConv, and that of
    PyTorch's modules and exported programs for `deformconv::deform_conv`. With these rules each is read as OpenVINO's
    DeformableConvolution-8, over 1 and 2 spatial axes, with boundary="zeros". What is beyond that raises, in words of
    OpenVINO's around ours. `deformconv::deform_attention` is read as a GridSample-9 for each level.

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
        pytorch.ConversionExtension("deformconv::deform_conv", _from_torch),  # as torch.jit names it
        pytorch.ConversionExtension("deformconv.deform_conv.default", _from_torch),  # as torch.export does
        pytorch.ConversionExtension("deformconv::deform_attention", _attention),
        pytorch.ConversionExtension("deformconv.deform_attention.default", _attention),
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

    def optional(number: int) -> Any:
        try:
            if node.get_values_from_const_input(number) is None:
                return None  # before 2025 get_input raises for what is None
        except Exception:  # OpenVINO's own, for what is no constant
            pass
        return node.get_input(number)

    try:
        boundary = node.get_values_from_const_input(10)
    except Exception:  # OpenVINO's own, for the text of an exported program, which is an array of its bytes
        boundary = bytes(node.get_input(10).get_node().get_data()).decode()
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
    return _convolution(input, offset, weight, optional(3), optional(4), window, groups)


def _convolution(
    input: Any, offset: Any, weight: Any, bias: Any, mask: Any, window: Sequence[Any], groups: Sequence[int]
) -> list[Any]:
    """The nodes' output; `window` is (stride, padding before, padding after, dilation)."""
    opset, rank, given = _opset(), len(window[0]), input
    if rank == 3:
        raise BackendError("A deformable convolution over 3 axes cannot be converted: OpenVINO's DeformableConvolution has 2.")
    half = any(value.get_element_type().get_type_name() in ("f16", "bf16") for value in (input, weight))
    if half:  # the offsets of such a layer are float32, and so is what it computes in
        input, offset, weight, bias, mask = (
            None if value is None else opset.convert(value, "f32") for value in (input, offset, weight, bias, mask)
        )  # fmt: skip
    if rank == 1:
        input, offset, weight, mask, window = _as_2d(opset, input, offset, weight, mask, window)
    stride, before, after, dilation = window
    # The last argument lets samples beyond the edge fade to zero, as they do here.
    output = opset.deformable_convolution(
        input, offset, weight, stride, before, after, dilation, mask, "EXPLICIT", *groups, True
    )  # fmt: skip
    if rank == 1:
        output = opset.squeeze(output, opset.constant([2]))
    if bias is not None:
        output = opset.add(output, opset.reshape(bias, opset.constant([1, -1] + [1] * rank), False))
    return [(opset.convert_like(output, given) if half else output).output(0)]


def _as_2d(opset: Any, input: Any, offset: Any, weight: Any, mask: Any, window: Sequence[Any]) -> tuple[Any, ...]:
    """A call over one axis as one over two, of which the first has size 1."""
    height = opset.constant([2])
    input, dx, weight = (opset.unsqueeze(value, height) for value in (input, offset, weight))
    mask = None if mask is None else opset.unsqueeze(mask, height)
    zero = opset.convert_like(opset.constant(0.0), offset)
    both = opset.pad(dx, opset.constant([0, 0, 1, 0]), opset.constant([0, 0, 0, 0]), "constant", zero)
    offset = opset.reshape(both, opset.constant([0, -1, 1, 0]), True)  # (N, offset_groups*K*2, 1, O), dy before dx
    return input, offset, weight, mask, [[first, *rest] for first, rest in zip((1, 0, 0, 1), window, strict=True)]


def _attention(node: Any) -> list[Any]:
    """The rule for multi-scale deformable attention, whose levels are constants; half precision is computed in float32."""
    opset, given = _opset(), node.get_input(0)
    constant, (value, locations, weights) = opset.constant, map(node.get_input, range(3))
    if any(tensor.get_element_type().get_type_name() in ("f16", "bf16") for tensor in (value, locations, weights)):
        value, locations, weights = (opset.convert(tensor, "f32") for tensor in (value, locations, weights))

    def size(tensor: Any, axis: int) -> Any:
        return opset.gather(opset.shape_of(tensor), constant([axis]), constant(0))

    def reshaped(tensor: Any, *sizes: Any) -> Any:
        whole = [constant([each]) if isinstance(each, int) else each for each in sizes]
        return opset.reshape(tensor, opset.concat(whole, 0), False)

    channels, queries, points = size(value, 3), size(weights, 1), size(weights, 4)
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
        pixels, places = reshaped(pixels, -1, channels, height, width), reshaped(places, -1, queries, points, 2)
        rule = {"align_corners": False, "mode": "bilinear", "padding_mode": "zeros"}
        samples = opset.grid_sample(pixels, places, rule)  # (N*heads, d, Q, points)
        summed = opset.reduce_sum(opset.multiply(samples, reshaped(shares, -1, 1, queries, points)), constant([3]), False)
        total = summed if total is None else opset.add(total, summed)
    output = opset.transpose(reshaped(total, size(value, 0), -1, queries), constant([0, 2, 1]))  # (N, Q, heads*d)
    return [opset.convert_like(output, given).output(0)]


def _opset() -> Any:
    try:
        from openvino import opset9
    except ImportError:  # before OpenVINO 2025
        from openvino.runtime import opset9
    return opset9
