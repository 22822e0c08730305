"""Deformable convolution in OpenVINO's own nodes, for what reads a graph and for what writes one.

It sees nodes only through the operators that it is handed, so that it imports nothing of OpenVINO.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deformconv.errors import BackendError

__all__ = ["convolution"]


def convolution(
    opset: Any,
    input: Any,
    offset: Any,
    weight: Any,
    bias: Any,
    mask: Any,
    window: Sequence[Any],
    groups: Sequence[int],
    auto_pad: str = "EXPLICIT",
) -> list[Any]:
    """The nodes' output; `window` is (stride, padding before, padding after, dilation), channels are first."""
    rank, given = len(window[0]), input
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
        input, offset, weight, stride, before, after, dilation, mask, auto_pad, *groups, True
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
