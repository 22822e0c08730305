"""The root's functions: NumPy arrays in, arrays out. PyTorch tensors and JAX arrays are handed on to their rooms."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from deformconv.numpy import run
from deformconv.ops.conv.operator import DEFORM_CONV
from deformconv.ops.conv.spec import Gradients
from deformconv.ops.words import unexpected

if TYPE_CHECKING:  # who imports deformconv for its convolution does not wait for these
    from deformconv.ops.aggregate.spec import Gradients as AggregateGradients
    from deformconv.ops.attention.spec import Gradients as AttentionGradients
    from deformconv.ops.roi_pool.spec import Gradients as RoiGradients

__all__ = [
    "deform_aggregate", "deform_aggregate_backward", "deform_attention", "deform_attention_backward", "deform_conv",
    "deform_conv_backward", "deform_roi_pool", "deform_roi_pool_backward", "explain",
]  # fmt: skip

_HALF_COUNTS_TO = 2**11  # float16's integers


def deform_conv(
    input: Any,
    offset: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    mask: Any = None,
    *,
    groups: int | None = None,
    offset_groups: int | None = None,
    boundary: str = "zeros",
    backend: str | None = None,
    **unknown: NoReturn,
) -> Any:
    """Convolve with a kernel whose taps are moved by `offset` and, in v2, weighed by `mask`.

    For every output position `p`, with D spatial axes and the K taps `k` of the kernel::

        q[k, p]    = p*stride - padding + k*dilation + offset[n, g, k, :, p]
        y[n, o, p] = bias[o] + sum over k, c of
                     weight[o, c, k] * mask[n, g, k, p] * interp(input[n, c], q[k, p])

    `interp` is multilinear. NumPy arrays, PyTorch tensors and JAX arrays are taken, all of one floating-point dtype;
    tensors give a tensor and JAX arrays a JAX array, with its gradient. The number of spatial axes, 1 to 3, is that of
    `weight`; axes go depth, height, width.

    Args:
        input: shape (N, C_in, *S).
        offset: shape (N, offset_groups*K*D, *O), in input pixels; group-major, then tap (row-major), then
            axis: a 3x3 kernel's 18 channels are dy, dx of the first tap, dy, dx of the second, and so on.
        weight: shape (C_out, C_in/groups, *kernel).
        bias: shape (C_out,), or None.
        stride: an int, or D ints, in input pixels.
        padding: an int, D ints, D pairs ((before, after), ...), "same" or "valid", in input pixels.
        dilation: the distance between taps: an int, or D ints, in input pixels.
        mask: shape (N, offset_groups*K, *O), a factor for every sample; None for v1.
        groups: verified when given, else inferred from `input` and `weight`.
        offset_groups: verified when given, else inferred from `offset`.
        boundary: what lies outside of the input. "zeros": a corner of the interpolation outside of it is 0.
            "inside": a sample is 0 unless 0 <= q < size on every axis, and then the last pixel continues.
        backend: "cpu", "gpu", "portable" or "reference"; None takes the first that can run the call (see
            `explain`).

    Returns:
        The output, shape (N, C_out, *O), where O is, along every axis,
        (size + padding before + padding after - dilation*(kernel - 1) - 1)//stride + 1.

    Raises:
        ShapeError: a shape or a parameter's value does not fit.
        TypeError: an argument is no array, or not of the common floating-point dtype.
        ValueError: `boundary` or `backend` is unknown, or tensors are on different devices.
        BackendError: no backend, or not the named one, can run the call.

    Example:
        With zero offsets it is the plain convolution; here every tap looks one pixel further down.

        >>> import numpy as np, deformconv
        >>> x = np.arange(16.0).reshape(1, 1, 4, 4)
        >>> offset = np.zeros((1, 18, 4, 4))
        >>> offset[:, 0::2] = 1                      # dy of all 9 taps
        >>> weight = np.zeros((1, 1, 3, 3))
        >>> weight[..., 1, 1] = 1                    # the centre tap alone
        >>> print(deformconv.deform_conv(x, offset, weight, padding=1)[0, 0])
        [[ 4.  5.  6.  7.]
         [ 8.  9. 10. 11.]
         [12. 13. 14. 15.]
         [ 0.  0.  0.  0.]]

    Papers: v1, arXiv 1703.06211, equations 2 and 3; v2, arXiv 1811.11168, equation 1.
    """
    if unknown:
        raise unexpected(deform_conv, unknown)
    operands = {"input": input, "offset": offset, "weight": weight, "bias": bias, "mask": mask}
    if run.any_torch(*operands.values()):
        from deformconv.torch.conv import functional as torch_room

        return torch_room.deform_conv(
            input, offset, weight, bias, stride, padding, dilation, mask,
            groups=groups, offset_groups=offset_groups, boundary=boundary, backend=backend,
        )  # fmt: skip
    if run.any_jax(*operands.values()):
        from deformconv.jax import functional as jax_room

        return jax_room.deform_conv(
            input, offset, weight, bias, stride, padding, dilation, mask,
            groups=groups, offset_groups=offset_groups, boundary=boundary, backend=backend,
        )  # fmt: skip
    parameters = _parameters(stride, padding, dilation, groups, offset_groups, boundary)
    return run.forward(DEFORM_CONV, operands, parameters, backend)


def deform_conv_backward(
    grad_output: Any,
    input: Any,
    offset: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    mask: Any = None,
    *,
    groups: int | None = None,
    offset_groups: int | None = None,
    boundary: str = "zeros",
    backend: str | None = None,
    wanted: Collection[str] | None = None,
    **unknown: NoReturn,
) -> Gradients:
    """Return the gradients of `deform_conv`: `grad_output` times the derivative by each argument.

    The arguments after `grad_output` are those of `deform_conv` and are explained there. At a kink of the
    interpolation (an integer position) the derivative is the one to the right.

    Args:
        grad_output: the loss's derivative by the output, shape (N, C_out, *O), of the arguments' dtype.
        wanted: the names of the gradients to compute, among "input", "offset", "weight", "bias" and "mask";
            None means all. What is not wanted costs nothing.

    Returns:
        Gradients, a named tuple with the fields input, offset, weight, bias and mask, each with the shape of
        its argument; None where it was not wanted or the argument was not given.

    Raises:
        ValueError: `wanted` names what is no argument, or one that was not given; else as `deform_conv`.

    Example:
        >>> import numpy as np, deformconv
        >>> x, weight = np.arange(16.0).reshape(1, 1, 4, 4), np.ones((1, 1, 1, 1))
        >>> offset = np.full((1, 2, 4, 4), 0.5)      # half a pixel down and to the right
        >>> grad_output = np.ones((1, 1, 4, 4))
        >>> g = deformconv.deform_conv_backward(grad_output, x, offset, weight, wanted=["input", "offset"])
        >>> g.offset.shape, g.weight is None
        ((1, 2, 4, 4), True)
        >>> print(g.offset[0, :, 0, 0])              # the image rises by 4 a row and by 1 a column
        [4. 1.]

    Papers: v1, arXiv 1703.06211, appendix A; v2, arXiv 1811.11168.
    """
    if unknown:
        raise unexpected(deform_conv_backward, unknown)
    operands = {"input": input, "offset": offset, "weight": weight, "bias": bias, "mask": mask}
    if run.any_torch(grad_output, *operands.values()):
        from deformconv.torch.conv import functional as torch_room

        return torch_room.deform_conv_backward(
            grad_output, input, offset, weight, bias, stride, padding, dilation, mask,
            groups=groups, offset_groups=offset_groups, boundary=boundary, backend=backend, wanted=wanted,
        )  # fmt: skip
    if run.any_jax(grad_output, *operands.values()):
        raise TypeError(
            "deform_conv_backward takes NumPy arrays and PyTorch tensors, and was given an array of JAX, which differentiates "
            "deform_conv itself: `output, pull_back = jax.vjp(deform_conv, input, offset, weight)`, then "
            "`pull_back(grad_output)`; or `jax.grad` of a loss."
        )
    parameters = _parameters(stride, padding, dilation, groups, offset_groups, boundary)
    found: Gradients = run.backward(DEFORM_CONV, grad_output, operands, parameters, backend, wanted)
    return found


def explain(
    input: Any,
    offset: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    mask: Any = None,
    *,
    groups: int | None = None,
    offset_groups: int | None = None,
    boundary: str = "zeros",
    backend: str | None = None,
    **unknown: NoReturn,
) -> str:
    """Say which backend runs a call of `deform_conv`, and each other one's reason not to, without running it.

    Args:
        input, offset, ...: the arguments of `deform_conv`, explained there.

    Returns:
        A text of a few lines, for `print`.

    Raises:
        ShapeError, TypeError, ValueError: as `deform_conv`; a backend that cannot run is told, not raised.

    Example:
        >>> import numpy as np, deformconv
        >>> x, offset, weight = np.ones((1, 3, 8, 8)), np.zeros((1, 18, 6, 6)), np.ones((4, 3, 3, 3))
        >>> print(deformconv.explain(x, offset, weight, backend="reference"))  # doctest: +ELLIPSIS
        input (1, 3, 8, 8), offset (1, 18, 6, 6), weight (4, 3, 3, 3); float64, numpy on cpu
        forward: reference
          cpu: can run it, but backend="reference" was asked for
        ...
    """
    if unknown:
        raise unexpected(explain, unknown)
    operands = {"input": input, "offset": offset, "weight": weight, "bias": bias, "mask": mask}
    if run.any_torch(*operands.values()):
        from deformconv.torch.conv import functional as torch_room

        return torch_room.explain(
            input, offset, weight, bias, stride, padding, dilation, mask,
            groups=groups, offset_groups=offset_groups, boundary=boundary, backend=backend,
        )  # fmt: skip
    if run.any_jax(*operands.values()):
        from deformconv.jax import functional as jax_room

        return jax_room.explain(
            input, offset, weight, bias, stride, padding, dilation, mask,
            groups=groups, offset_groups=offset_groups, boundary=boundary, backend=backend,
        )  # fmt: skip
    parameters = _parameters(stride, padding, dilation, groups, offset_groups, boundary)
    return run.explain(DEFORM_CONV, operands, parameters, backend)


def _parameters(*values: Any) -> dict[str, Any]:
    return dict(zip(DEFORM_CONV.parameter_names, values, strict=True))


def deform_roi_pool(
    input: Any,
    boxes: Any,
    offset: Any = None,
    mask: Any = None,
    output_size: Any = 7,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 2,
    *,
    convention: str = "aligned",
    gamma: float = 0.1,
    position_sensitive: bool = False,
    part_size: Any = None,
    backend: str | None = None,
    **unknown: NoReturn,
) -> Any:
    """Pool the boxes of feature maps into bins, each of which is moved by `offset` and, in v2, weighed by `mask`.

    NumPy arrays and PyTorch tensors are taken, all of one floating-point dtype; tensors give a tensor, with its gradient.
    `deformconv.torch.deform_roi_pool` explains the arguments.

    Args:
        input: shape (N, C, H, W).
        boxes: shape (R, 5), rows (image, x1, y1, x2, y2), or a list of N arrays (r, 4), in pixels of the images.
        offset: shape (R, 2, PH, PW), x before y, in `gamma` times the box's width and height; None for RoI align.
        mask: shape (R, 1, PH, PW), a factor for each bin; None for v1.
        output_size, spatial_scale, sampling_ratio, convention, gamma, position_sensitive, part_size: as there.
        backend: "cpu", "gpu", "portable" or "reference"; None takes the first that can run the call.

    Returns:
        The output, shape (R, C, PH, PW); with `position_sensitive` it has C / (PH*PW) channels.

    Raises:
        ShapeError: a shape or a parameter's value does not fit.
        TypeError: an argument is no array, or not of the common floating-point dtype.
        ValueError: a box is of no image; `convention` or `backend` is unknown; tensors are on different devices.
        BackendError: no backend, or not the named one, can run the call.

    Example:
        >>> import numpy as np, deformconv
        >>> x = np.arange(64.0).reshape(1, 1, 8, 8)                      # rises by 8 a row and by 1 a column
        >>> boxes = np.array([[0.0, 2.0, 2.0, 6.0, 6.0]])                # of image 0, 4 pixels wide and high
        >>> offset = np.zeros((1, 2, 2, 2))
        >>> print(deformconv.deform_roi_pool(x, boxes, offset, output_size=2)[0, 0])
        [[22.5 24.5]
         [38.5 40.5]]
        >>> offset[0, 0, 0, 0] = 1                                       # the first bin, by 0.1 * 4 pixels to the right
        >>> print(deformconv.deform_roi_pool(x, boxes, offset, output_size=2)[0, 0])
        [[22.9 24.5]
         [38.5 40.5]]

    Papers: v1, arXiv 1703.06211, equations 4 to 6; v2, arXiv 1811.11168, equation 2.
    """
    if unknown:
        raise unexpected(deform_roi_pool, unknown)
    if run.any_torch(input, boxes, offset, mask, *(boxes if isinstance(boxes, (list, tuple)) else ())):
        from deformconv.torch.roi_pool import functional as torch_room

        return torch_room.deform_roi_pool(
            input, boxes, offset, mask, output_size, spatial_scale, sampling_ratio,
            convention=convention, gamma=gamma, position_sensitive=position_sensitive, part_size=part_size, backend=backend,
        )  # fmt: skip
    from deformconv.ops.roi_pool.operator import DEFORM_ROI_POOL
    from deformconv.ops.roi_pool.spec import check_order

    check_order(offset)
    operands = {"input": input, "boxes": _joined(boxes, input), "offset": offset, "mask": mask}
    parameters = _roi_parameters(position_sensitive, output_size, spatial_scale, sampling_ratio, convention, gamma, part_size)
    return run.forward(DEFORM_ROI_POOL, operands, parameters, backend)


def deform_roi_pool_backward(
    grad_output: Any,
    input: Any,
    boxes: Any,
    offset: Any = None,
    mask: Any = None,
    output_size: Any = 7,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 2,
    *,
    convention: str = "aligned",
    gamma: float = 0.1,
    position_sensitive: bool = False,
    part_size: Any = None,
    backend: str | None = None,
    wanted: Collection[str] | None = None,
    **unknown: NoReturn,
) -> RoiGradients:
    """Return the gradients of `deform_roi_pool`: `grad_output` times the derivative by each argument but `boxes`.

    The arguments after `grad_output` are those of `deform_roi_pool` and are explained there.

    Args:
        grad_output: the loss's derivative by the output, shape (R, C, PH, PW), of the arguments' dtype.
        wanted: the names of the gradients to compute, among "input", "offset" and "mask"; None means all.

    Returns:
        A named tuple with the fields input, boxes, offset and mask, each with the shape of its argument; None where it was not
        wanted or the argument was not given, and for boxes.

    Raises:
        ValueError: `wanted` names what has no gradient, or was not given; else as `deform_roi_pool`.

    Example:
        >>> import numpy as np, deformconv
        >>> x = np.arange(64.0).reshape(1, 1, 8, 8)                      # rises by 8 a row and by 1 a column
        >>> boxes, offset = np.array([[0.0, 2.0, 2.0, 6.0, 6.0]]), np.zeros((1, 2, 2, 2))
        >>> g = deformconv.deform_roi_pool_backward(np.ones((1, 1, 2, 2)), x, boxes, offset, output_size=2)
        >>> print(g.offset[0, :, 0, 0].round(12))                        # x before y; an offset of 1 is 0.4 pixels
        [0.4 3.2]
        >>> g.input.shape, g.boxes is g.mask is None
        ((1, 1, 8, 8), True)
    """
    if unknown:
        raise unexpected(deform_roi_pool_backward, unknown)
    if run.any_torch(grad_output, input, boxes, offset, mask, *(boxes if isinstance(boxes, (list, tuple)) else ())):
        from deformconv.torch.roi_pool import functional as torch_room

        return torch_room.deform_roi_pool_backward(
            grad_output, input, boxes, offset, mask, output_size, spatial_scale, sampling_ratio,
            convention=convention, gamma=gamma, position_sensitive=position_sensitive, part_size=part_size, backend=backend,
            wanted=wanted,
        )  # fmt: skip
    from deformconv.ops.roi_pool.operator import DEFORM_ROI_POOL

    operands = {"input": input, "boxes": _joined(boxes, input), "offset": offset, "mask": mask}
    parameters = _roi_parameters(position_sensitive, output_size, spatial_scale, sampling_ratio, convention, gamma, part_size)
    found: RoiGradients = run.backward(DEFORM_ROI_POOL, grad_output, operands, parameters, backend, wanted)
    return found


def _roi_parameters(position_sensitive: Any, output_size: Any, *others: Any) -> dict[str, Any]:
    from deformconv.ops.roi_pool.spec import group_size_of

    *middle, part_size = others
    names = ("output_size", "spatial_scale", "sampling_ratio", "convention", "gamma", "group_size", "part_size")
    values = (output_size, *middle, group_size_of(position_sensitive, output_size), part_size)
    return dict(zip(names, values, strict=True))


def _joined(boxes: Any, input: Any) -> Any:
    """A list of each image's boxes (r, 4) as one array (R, 5)."""
    if not isinstance(boxes, (list, tuple)):
        return boxes
    from deformconv.ops.roi_pool.spec import check_list

    check_list(boxes, np.ndarray, "NumPy array", len(input) if isinstance(input, np.ndarray) and input.ndim == 4 else None)
    if len(boxes) > _HALF_COUNTS_TO and any(array.dtype == np.float16 for array in boxes):
        raise TypeError(
            f"`boxes` is a list of {len(boxes)} in float16, which counts images to {_HALF_COUNTS_TO}; expected float32 or "
            "float64, for all arrays."
        )
    rows = [np.concatenate([np.full((len(array), 1), image, array.dtype), array], axis=1) for image, array in enumerate(boxes)]
    return np.concatenate(rows)


def deform_attention(
    value: Any,
    spatial_shapes: Any,
    locations: Any,
    weights: Any,
    *,
    backend: str | None = None,
    **unknown: NoReturn,
) -> Any:
    """Attend to a few points in each level of a feature pyramid: for every query and head the weighted sum of their values.

    NumPy arrays and PyTorch tensors are taken, all of one floating-point dtype; tensors give a tensor, with its gradient.
    `deformconv.torch.deform_attention` explains the arguments.

    Args:
        value: shape (N, L, heads, d), the pixels of all levels, row by row, one level after the other.
        spatial_shapes: the levels' sizes (height, width), pairs of integers; the sum of the products is L.
        locations: shape (N, Q, heads, levels, points, 2), x before y, from 0 to 1 over a level's width and height.
        weights: shape (N, Q, heads, levels, points), the factor of each point.
        backend: "cpu", "portable" or "reference"; None takes the first that can run the call.

    Returns:
        The output, shape (N, Q, heads*d).

    Raises:
        ShapeError: a shape does not fit, or the levels have not L pixels.
        TypeError: an argument is no array, or not of the common floating-point dtype.
        ValueError: `backend` is unknown, or tensors are on different devices.
        BackendError: no backend, or not the named one, can run the call.

    Example:
        >>> import numpy as np, deformconv
        >>> value = np.arange(12.0).reshape(1, 12, 1, 1)                 # one level of 3x4 pixels, one head, one channel
        >>> locations = np.empty((1, 1, 1, 1, 2, 2))                     # one query, two points
        >>> locations[..., 0, :] = 0.5 / 4, 0.5 / 3                      # x and y: the middle of the first pixel
        >>> locations[..., 1, :] = 1.5 / 4, 2.0 / 3                      # the second column, between two rows
        >>> weights = np.array([0.25, 0.75]).reshape(1, 1, 1, 1, 2)
        >>> print(deformconv.deform_attention(value, [(3, 4)], locations, weights).round(12))   # 0.25 * 0 + 0.75 * 7
        [[[5.25]]]

    Paper: arXiv 2010.04159, equation 3.
    """
    if unknown:
        raise unexpected(deform_attention, unknown)
    if run.any_torch(value, locations, weights):
        from deformconv.torch.attention import functional as torch_room

        return torch_room.deform_attention(value, spatial_shapes, locations, weights, backend=backend)
    from deformconv.ops.attention.operator import DEFORM_ATTENTION

    operands = {"value": value, "locations": locations, "weights": weights}
    return run.forward(DEFORM_ATTENTION, operands, {"spatial_shapes": spatial_shapes}, backend)


def deform_attention_backward(
    grad_output: Any,
    value: Any,
    spatial_shapes: Any,
    locations: Any,
    weights: Any,
    *,
    backend: str | None = None,
    wanted: Collection[str] | None = None,
    **unknown: NoReturn,
) -> AttentionGradients:
    """Return the gradients of `deform_attention`: `grad_output` times the derivative by each array.

    The arguments after `grad_output` are those of `deform_attention` and are explained there.

    Args:
        grad_output: the loss's derivative by the output, shape (N, Q, heads*d), of the arguments' dtype.
        wanted: the names of the gradients to compute, among "value", "locations" and "weights"; None means all.

    Returns:
        A named tuple with the fields value, locations and weights, each with the shape of its argument; None where it was not
        wanted.

    Raises:
        ValueError: `wanted` names what is no argument; else as `deform_attention`.

    Example:
        >>> import numpy as np, deformconv
        >>> value = np.arange(12.0).reshape(1, 12, 1, 1)                 # rises by 4 a row and by 1 a column
        >>> locations, weights = np.full((1, 1, 1, 1, 1, 2), 0.5), np.ones((1, 1, 1, 1, 1))
        >>> g = deformconv.deform_attention_backward(np.ones((1, 1, 1)), value, [(3, 4)], locations, weights)
        >>> print(g.locations[0, 0, 0, 0, 0])                            # x: 4 columns of 1; y: 3 rows of 4
        [ 4. 12.]
        >>> print(g.weights.item())
        5.5
    """
    if unknown:
        raise unexpected(deform_attention_backward, unknown)
    if run.any_torch(grad_output, value, locations, weights):
        from deformconv.torch.attention import functional as torch_room

        return torch_room.deform_attention_backward(
            grad_output, value, spatial_shapes, locations, weights, backend=backend, wanted=wanted
        )
    from deformconv.ops.attention.operator import DEFORM_ATTENTION

    operands = {"value": value, "locations": locations, "weights": weights}
    parameters = {"spatial_shapes": spatial_shapes}
    found: AttentionGradients = run.backward(DEFORM_ATTENTION, grad_output, operands, parameters, backend, wanted)
    return found


def deform_aggregate(
    input: Any,
    offset: Any,
    mask: Any = None,
    kernel_size: Any = 3,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    *,
    offset_groups: int | None = None,
    boundary: str = "zeros",
    backend: str | None = None,
    **unknown: NoReturn,
) -> Any:
    """Add up, in each channel, the samples of a window whose taps are moved by `offset` and weighed by `mask`.

    This is deformable convolution without its weight: no channel is mixed with another, and the factors are the mask's. With
    `kernel_size`'s K taps `k`, for every output position `p`::

        q[k, p]    = p*stride - padding + k*dilation + offset[n, g, k, :, p]
        y[n, c, p] = sum over k of mask[n, g, k, p] * interp(input[n, c], q[k, p])

    with `g` the offset group of channel `c`. NumPy arrays and PyTorch tensors are taken, all of one floating-point dtype;
    tensors give a tensor, with its gradient. There are as many spatial axes, 1 to 3, as `input` has axes after its first two.

    Args:
        input: shape (N, C, *S).
        offset: shape (N, offset_groups*K*D, *O), in input pixels; group-major, then tap (row-major), then axis, as
            `deform_conv` takes it.
        mask: shape (N, offset_groups*K, *O), a factor for every sample; None for factors of 1.
        kernel_size: the number of taps along each axis, an int or D ints.
        stride, padding, dilation, offset_groups, boundary: as in `deform_conv`.
        backend: "cpu", "gpu", "portable" or "reference"; None takes the first that can run the call.

    Returns:
        The output, shape (N, C, *O), with O as in `deform_conv`.

    Raises:
        ShapeError: a shape or a parameter's value does not fit.
        TypeError: an argument is no array, or not of the common floating-point dtype.
        ValueError: `boundary` or `backend` is unknown, or tensors are on different devices.
        BackendError: no backend, or not the named one, can run the call.

    Example:
        >>> import numpy as np, deformconv
        >>> x = np.arange(16.0).reshape(1, 1, 4, 4)
        >>> offset = np.zeros((1, 18, 2, 2))             # a 3x3 window over 4x4 pixels
        >>> mask = np.full((1, 9, 2, 2), 1 / 9)          # the mean of the window
        >>> print(deformconv.deform_aggregate(x, offset, mask)[0, 0].round(12))
        [[ 5.  6.]
         [ 9. 10.]]
        >>> offset[:, 0::2] = 0.5                        # dy of all 9 taps: half a pixel further down
        >>> print(deformconv.deform_aggregate(x, offset, mask)[0, 0, 0].round(12))
        [7. 8.]

    Papers: DCNv3, arXiv 2211.05778, equation 2, with factors whose sum is 1; DCNv4, arXiv 2401.06197, with any factors.
    """
    if unknown:
        raise unexpected(deform_aggregate, unknown)
    operands = {"input": input, "offset": offset, "mask": mask}
    if run.any_torch(*operands.values()):
        from deformconv.torch.aggregate import functional as torch_room

        return torch_room.deform_aggregate(
            input, offset, mask, kernel_size, stride, padding, dilation,
            offset_groups=offset_groups, boundary=boundary, backend=backend,
        )  # fmt: skip
    from deformconv.ops.aggregate.operator import DEFORM_AGGREGATE

    values = (kernel_size, stride, padding, dilation, offset_groups, boundary)
    parameters = dict(zip(DEFORM_AGGREGATE.parameter_names, values, strict=True))
    return run.forward(DEFORM_AGGREGATE, operands, parameters, backend)


def deform_aggregate_backward(
    grad_output: Any,
    input: Any,
    offset: Any,
    mask: Any = None,
    kernel_size: Any = 3,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    *,
    offset_groups: int | None = None,
    boundary: str = "zeros",
    backend: str | None = None,
    wanted: Collection[str] | None = None,
    **unknown: NoReturn,
) -> AggregateGradients:
    """Return the gradients of `deform_aggregate`: `grad_output` times the derivative by each array.

    The arguments after `grad_output` are those of `deform_aggregate` and are explained there.

    Args:
        grad_output: the loss's derivative by the output, shape (N, C, *O), of the arguments' dtype.
        wanted: the names of the gradients to compute, among "input", "offset" and "mask"; None means all.

    Returns:
        A named tuple with the fields input, offset and mask, each with the shape of its argument; None where it was not wanted
        or the argument was not given.

    Raises:
        ValueError: `wanted` names what is no argument, or one that was not given; else as `deform_aggregate`.

    Example:
        >>> import numpy as np, deformconv
        >>> x = np.arange(16.0).reshape(1, 1, 4, 4)      # rises by 4 a row and by 1 a column
        >>> offset = np.full((1, 2, 4, 4), 0.5)          # one tap, half a pixel down and to the right
        >>> g = deformconv.deform_aggregate_backward(np.ones((1, 1, 4, 4)), x, offset, kernel_size=1)
        >>> print(g.offset[0, :, 0, 0], g.mask)
        [4. 1.] None
        >>> print(g.input[0, 0, 1, 1])                   # a quarter of each of four samples
        1.0
    """
    if unknown:
        raise unexpected(deform_aggregate_backward, unknown)
    operands = {"input": input, "offset": offset, "mask": mask}
    if run.any_torch(grad_output, *operands.values()):
        from deformconv.torch.aggregate import functional as torch_room

        return torch_room.deform_aggregate_backward(
            grad_output, input, offset, mask, kernel_size, stride, padding, dilation,
            offset_groups=offset_groups, boundary=boundary, backend=backend, wanted=wanted,
        )  # fmt: skip
    from deformconv.ops.aggregate.operator import DEFORM_AGGREGATE

    values = (kernel_size, stride, padding, dilation, offset_groups, boundary)
    parameters = dict(zip(DEFORM_AGGREGATE.parameter_names, values, strict=True))
    found: AggregateGradients = run.backward(DEFORM_AGGREGATE, grad_output, operands, parameters, backend, wanted)
    return found
