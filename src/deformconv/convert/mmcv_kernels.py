"""What mmcv's extension computes, computed by our operators: its entries, each with its arguments and the tensors it writes to.

An entry writes as mmcv's own does: an output and the gradients of offsets and masks take the place of what was there, and other
gradients are added to it. Its scratch tensors (`columns`, `ones`) and the number of images that it takes at once are not used.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from deformconv.torch import run
from deformconv.torch.attention import DEFORM_ATTENTION
from deformconv.torch.conv.functional import DEFORM_CONV
from deformconv.torch.roi_pool import DEFORM_ROI_POOL
from deformconv.torch.run import Plan
from deformconv.torch.tensors import HALF, described, device_of

__all__ = ["DEFORMABLE", "OTHERS", "on_cpu"]

_Pair = tuple[int, int]


def on_cpu(ours: Callable[..., Any], theirs: Callable[..., Any]) -> Callable[..., Any]:
    """An entry that is ours for tensors on a CPU and theirs for others."""

    def entry(*arguments: Any, **keywords: Any) -> Any:
        first = next(value for value in (*arguments, *keywords.values()) if isinstance(value, Tensor))
        return (ours if first.is_cpu else theirs)(*arguments, **keywords)

    return entry


def _plan(operator: Any, operands: tuple[Tensor | None, ...], *values: Any) -> Plan:
    """The checked call of an operator of ours, with its parameters in its order."""
    names = operator.operator.parameter_names
    tensors = described(operator.operator, operands)
    spec = run.spec_of(operator.operator, tensors, dict(zip(names, values, strict=True)), 2)
    first: Any = operands[0]
    return run.plan_for(operator, spec, device_of(first), True, None)


def _conv(
    input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None,
    stride: _Pair, padding: _Pair, dilation: _Pair, groups: int, offset_groups: int,
) -> Plan:  # fmt: skip
    operands = input, offset, weight, bias, mask
    return _plan(DEFORM_CONV, operands, stride, padding, dilation, groups, offset_groups, "zeros")


def deform_conv_forward(
    input: Tensor, weight: Tensor, offset: Tensor, output: Tensor, columns: Tensor, ones: Tensor,
    kW: int, kH: int, dW: int, dH: int, padW: int, padH: int, dilationW: int, dilationH: int,
    group: int, deformable_group: int, im2col_step: int,
) -> None:  # fmt: skip
    """DCN v1, into `output`."""
    plan = _conv(
        input, offset, weight, None, None, (dH, dW), (padH, padW), (dilationH, dilationW), group, deformable_group
    )  # fmt: skip
    output.copy_(run.forward(plan, input, offset, weight, None, None))


def deform_conv_backward_input(
    input: Tensor, offset: Tensor, gradOutput: Tensor, gradInput: Tensor, gradOffset: Tensor, weight: Tensor, columns: Tensor,
    kW: int, kH: int, dW: int, dH: int, padW: int, padH: int, dilationW: int, dilationH: int,
    group: int, deformable_group: int, im2col_step: int,
) -> None:  # fmt: skip
    """The gradients of DCN v1's input and offsets."""
    plan = _conv(
        input, offset, weight, None, None, (dH, dW), (padH, padW), (dilationH, dilationW), group, deformable_group
    )  # fmt: skip
    found = run.backward(plan, gradOutput, (input, offset, weight, None), ("input", "offset"))
    gradInput.add_(found.input)
    gradOffset.copy_(found.offset)


def deform_conv_backward_parameters(
    input: Tensor, offset: Tensor, gradOutput: Tensor, gradWeight: Tensor, columns: Tensor, ones: Tensor,
    kW: int, kH: int, dW: int, dH: int, padW: int, padH: int, dilationW: int, dilationH: int,
    group: int, deformable_group: int, scale: float, im2col_step: int,
) -> None:  # fmt: skip
    """`scale` times the gradient of DCN v1's weight, for which no value of the weight is needed."""
    plan = _conv(
        input, offset, gradWeight, None, None, (dH, dW), (padH, padW), (dilationH, dilationW), group, deformable_group
    )  # fmt: skip
    found = run.backward(plan, gradOutput, (input, offset, gradWeight, None), ("weight",))
    gradWeight.add_(found.weight, alpha=scale)


def modulated_deform_conv_forward(
    input: Tensor, weight: Tensor, bias: Tensor, ones: Tensor, offset: Tensor, mask: Tensor, output: Tensor, columns: Tensor,
    kernel_h: int, kernel_w: int, stride_h: int, stride_w: int, pad_h: int, pad_w: int, dilation_h: int, dilation_w: int,
    group: int, deformable_group: int, with_bias: bool,
) -> None:  # fmt: skip
    """DCN v2, into `output`."""
    given = bias if with_bias else None
    plan = _conv(
        input, offset, weight, given, mask, (stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w),
        group, deformable_group,
    )  # fmt: skip
    output.copy_(run.forward(plan, input, offset, weight, given, mask))


def modulated_deform_conv_backward(
    input: Tensor, weight: Tensor, bias: Tensor, ones: Tensor, offset: Tensor, mask: Tensor, columns: Tensor,
    grad_input: Tensor, grad_weight: Tensor, grad_bias: Tensor, grad_offset: Tensor, grad_mask: Tensor, grad_output: Tensor,
    kernel_h: int, kernel_w: int, stride_h: int, stride_w: int, pad_h: int, pad_w: int, dilation_h: int, dilation_w: int,
    group: int, deformable_group: int, with_bias: bool,
) -> None:  # fmt: skip
    """Every gradient of DCN v2."""
    given = bias if with_bias else None
    plan = _conv(
        input, offset, weight, given, mask, (stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w),
        group, deformable_group,
    )  # fmt: skip
    found = run.backward(plan, grad_output, (input, offset, weight, mask), tuple(plan.spec.shapes))
    grad_input.add_(found.input)
    grad_weight.add_(found.weight)
    grad_offset.copy_(found.offset)
    grad_mask.copy_(found.mask)
    if with_bias:
        grad_bias.add_(found.bias)


def _pooling(
    input: Tensor, rois: Tensor, offset: Tensor | None, size: _Pair, scale: float, ratio: int, convention: str, gamma: float
) -> Plan:
    return _plan(DEFORM_ROI_POOL, (input, rois, offset, None), size, scale, max(ratio, 0), convention, gamma, 1, None)


def deform_roi_pool_forward(
    input: Tensor, rois: Tensor, offset: Tensor, output: Tensor,
    pooled_height: int, pooled_width: int, spatial_scale: float, sampling_ratio: int, gamma: float,
) -> None:  # fmt: skip
    """Deformable RoI pooling, or RoI align where there are no offsets, into `output`."""
    given, size = offset if offset.numel() else None, (pooled_height, pooled_width)
    plan = _pooling(input, rois, given, size, spatial_scale, sampling_ratio, "aligned", gamma)
    output.copy_(run.forward(plan, input, rois, given, None))


def deform_roi_pool_backward(
    grad_output: Tensor, input: Tensor, rois: Tensor, offset: Tensor, grad_input: Tensor, grad_offset: Tensor,
    pooled_height: int, pooled_width: int, spatial_scale: float, sampling_ratio: int, gamma: float,
) -> None:  # fmt: skip
    """The gradients of a deformable RoI pooling's input and offsets."""
    given, size = offset if offset.numel() else None, (pooled_height, pooled_width)
    plan = _pooling(input, rois, given, size, spatial_scale, sampling_ratio, "aligned", gamma)
    wanted: Collection[str] = ("input",) if given is None else ("input", "offset")
    found = run.backward(plan, grad_output, (input, rois, given, None), wanted)
    grad_input.add_(found.input)
    if given is not None:
        grad_offset.add_(found.offset)


def ms_deform_attn_forward(
    value: Tensor, spatial_shapes: Tensor, level_start_index: Tensor, sampling_loc: Tensor, attn_weight: Tensor,
    im2col_step: int,
) -> Tensor:  # fmt: skip
    """Multi-scale deformable attention; the levels follow each other, so that their sizes say where each starts."""
    plan = _plan(DEFORM_ATTENTION, (value, sampling_loc, attn_weight), spatial_shapes)
    return run.forward(plan, value, sampling_loc, attn_weight)


def ms_deform_attn_backward(
    value: Tensor, spatial_shapes: Tensor, level_start_index: Tensor, sampling_loc: Tensor, attn_weight: Tensor,
    grad_output: Tensor, grad_value: Tensor, grad_sampling_loc: Tensor, grad_attn_weight: Tensor, im2col_step: int,
) -> None:  # fmt: skip
    """The gradients of a multi-scale deformable attention."""
    operands = value, sampling_loc, attn_weight
    plan = _plan(DEFORM_ATTENTION, operands, spatial_shapes)
    found = run.backward(plan, grad_output, operands, tuple(plan.spec.shapes))
    grad_value.add_(found.value)
    grad_sampling_loc.copy_(found.locations)
    grad_attn_weight.copy_(found.weights)


def roi_align_forward(
    input: Tensor, rois: Tensor, output: Tensor, argmax_y: Tensor, argmax_x: Tensor, aligned_height: int, aligned_width: int,
    spatial_scale: float, sampling_ratio: int, pool_mode: int, aligned: bool,
) -> None:  # fmt: skip
    """RoI align, into `output`."""
    size = aligned_height, aligned_width
    plan = _pooling(input, rois, None, size, spatial_scale, sampling_ratio, _convention(pool_mode, aligned), 0.0)
    output.copy_(run.forward(plan, input, rois, None, None))


def roi_align_backward(
    grad_output: Tensor, rois: Tensor, argmax_y: Tensor, argmax_x: Tensor, grad_input: Tensor,
    aligned_height: int, aligned_width: int, spatial_scale: float, sampling_ratio: int, pool_mode: int, aligned: bool,
) -> None:  # fmt: skip
    """The gradient of RoI align's input, for which no value of the input is needed."""
    size = aligned_height, aligned_width
    plan = _pooling(grad_input, rois, None, size, spatial_scale, sampling_ratio, _convention(pool_mode, aligned), 0.0)
    grad_input.add_(run.backward(plan, grad_output, (grad_input, rois, None, None), ("input",)).input)


def _convention(pool_mode: int, aligned: bool) -> str:
    if pool_mode != 1:
        raise NotImplementedError(
            'mmcv\'s RoI align has pool_mode="max" here, which needs mmcv\'s compiled extension; expected pool_mode="avg".'
        )
    return "aligned" if aligned else "unaligned"


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """The boxes that are kept, best first, by torchvision; with `offset` 1 a box reaches a pixel further."""
    from torchvision.ops import nms as kept

    boxes, scores = _wide(boxes.detach()), _wide(scores.detach())
    if offset:
        boxes = torch.cat([boxes[:, :2], boxes[:, 2:] + offset], dim=1)
    found: Tensor = kept(boxes, scores.to(boxes.dtype), iou_threshold)
    return found


def softnms(
    boxes: Tensor, scores: Tensor, dets: Tensor, iou_threshold: float, sigma: float, min_score: float, method: int, offset: int
) -> Tensor:
    """The boxes that are left, best first, when each lowers the scores of those that it overlaps; and `dets` filled with them.

    The method is 0 (naive), 1 (linear) or 2 (Gaussian). Of equal scores the first box goes first.
    """
    from torchvision.ops import box_iou

    boxes, scores = boxes.detach(), scores.detach().clone()
    reach = torch.cat([boxes[:, :2], boxes[:, 2:] + offset], dim=1)
    left, kept = torch.arange(len(boxes), device=boxes.device), list[Tensor]()
    while len(left):
        best = left[scores[left].argmax()]
        dets[len(kept)] = torch.cat([boxes[best], scores[best, None]])
        kept.append(best)
        left = left[left != best]
        overlap = box_iou(reach[best, None], reach[left])[0]
        factor = (-overlap.square() / sigma).exp() if method == 2 else 1 - overlap if method == 1 else torch.zeros_like(overlap)
        scores[left] *= factor if method == 2 else torch.where(overlap >= iou_threshold, factor, 1.0)
        left = left[scores[left] >= min_score]
    return torch.stack(kept) if kept else left


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """The focal loss of every class of a row by itself, into `output`; a target beyond the classes is the background."""
    log_p, log_q = functional.logsigmoid(input), functional.logsigmoid(-input)
    foreground, background = log_q.exp() ** gamma * log_p, log_p.exp() ** gamma * log_q
    output.copy_(_focal(input, target, weight, alpha, foreground, background))


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """The derivative of each of the focal losses, into `grad_input`."""
    log_p, log_q = functional.logsigmoid(input), functional.logsigmoid(-input)
    p, q = log_p.exp(), log_q.exp()
    foreground, background = q**gamma * (q - gamma * p * log_p), p**gamma * (gamma * q * log_q - p)
    grad_input.copy_(_focal(input, target, weight, alpha, foreground, background))


def _focal(input: Tensor, target: Tensor, weight: Tensor, alpha: float, foreground: Tensor, background: Tensor) -> Tensor:
    """What a target's own class has, and what all others have, weighed."""
    own = target[:, None] == torch.arange(input.shape[1], device=input.device)
    found = -torch.where(own, alpha * foreground, (1 - alpha) * background)
    return found * weight[target][:, None] if weight.numel() else found


def get_compiler_version() -> str:
    """What mmcv's report of an environment says of its compiler."""
    return "n/a (deformconv's entries)"


def get_compiling_cuda_version() -> str:
    """What mmcv's report of an environment says of its CUDA toolkit."""
    return "n/a (deformconv's entries)"


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in HALF else tensor


# What a compiled extension has no CPU kernel for, or a slower one.
DEFORMABLE: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        deform_conv_forward, deform_conv_backward_input, deform_conv_backward_parameters,
        modulated_deform_conv_forward, modulated_deform_conv_backward, deform_roi_pool_forward, deform_roi_pool_backward,
        ms_deform_attn_forward, ms_deform_attn_backward,
    )
}  # fmt: skip
# What detectors ask of an extension besides.
OTHERS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        nms, softnms, roi_align_forward, roi_align_backward, sigmoid_focal_loss_forward, sigmoid_focal_loss_backward,
        get_compiler_version, get_compiling_cuda_version,
    )
}  # fmt: skip
