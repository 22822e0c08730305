"""Deformable RoI pooling on PyTorch tensors."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from deformconv.ops.roi_pool.spec import Gradients, check_list, check_order, group_size_of
from deformconv.ops.words import unexpected
from deformconv.torch import calls, modes
from deformconv.torch.roi_pool import DEFORM_ROI_POOL
from deformconv.torch.tensors import HALF

__all__ = ["deform_roi_pool", "deform_roi_pool_backward", "joined"]


def deform_roi_pool(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    offset: Tensor | None = None,
    mask: Tensor | None = None,
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
) -> Tensor:
    """Pool the boxes of feature maps into bins, each of which is moved by `offset` and, in v2, weighed by `mask`.

    `torchvision.ops.roi_align` whose bins can move. A bin's samples are interpolated and averaged; `offset` moves all samples
    of a bin together. Boxes have no gradient.

    Args:
        input: shape (N, C, H, W).
        boxes: shape (R, 5), rows (image, x1, y1, x2, y2), or a list of N tensors (r, 4), in pixels of the images that the maps
            were made of.
        offset: shape (R, 2, PH, PW), x before y, in `gamma` times the box's width and height; None for RoI align. With several
            classes of offsets, (R, 2*classes, *part_size): equal shares of the output's channels use one class each.
        mask: shape (R, 1, PH, PW), a factor for each bin; None for v1.
        output_size: the bins of a box, an int or (PH, PW).
        spatial_scale: pixels of `input` for a pixel of the boxes, 1/16 for a map of stride 16.
        sampling_ratio: samples of a bin along either axis; 0 takes one for each pixel of `input` that the bin is long.
        convention: where a box begins and where its samples lie. "aligned": as in mmcv and detectron2. "unaligned": as in
            torchvision's detectors. "rounded": as in MXNet and the papers' code. Weights that were trained by one convention
            see other values by another.
        gamma: what offsets are multiplied by.
        position_sensitive: whether each bin reads channels of its own: channel (c*PH + i)*PW + j of `input` gives channel c of
            the output in bin (i, j). Then the output has C / (PH*PW) channels.
        part_size: how many offsets a box has along its axes, an int or two, if not `output_size`: bins share them then.
        backend: "cpu", "gpu" or "portable"; None takes the first that can run the call.

    Returns:
        The output, shape (R, C, PH, PW), of the dtype and on the device of `input`.

    Raises:
        ShapeError: a shape or a parameter's value does not fit.
        TypeError: an argument is no tensor, or not of the common floating-point dtype; only beside an `input` in half precision
            the others may be float32.
        ValueError: a box is of no image; `convention` or `backend` is unknown; the tensors are on different devices.
        BackendError: the named backend cannot run the call.

    Example:
        >>> import torch
        >>> from deformconv.torch import deform_roi_pool
        >>> features = torch.rand(2, 256, 50, 84)                                 # of images of 800x1344, stride 16
        >>> boxes = [torch.tensor([[40.0, 60.0, 400.0, 300.0]]), torch.zeros(0, 4)]   # one in the first image
        >>> offset = torch.zeros(1, 2, 7, 7, requires_grad=True)
        >>> y = deform_roi_pool(features, boxes, offset, spatial_scale=1 / 16)    # v1
        >>> y.shape
        torch.Size([1, 256, 7, 7])
        >>> mask = torch.rand(1, 1, 7, 7)
        >>> y = deform_roi_pool(features, boxes, offset, mask, spatial_scale=1 / 16)      # v2
        >>> y.sum().backward()
        >>> offset.grad.shape
        torch.Size([1, 2, 7, 7])

    Papers: v1, arXiv 1703.06211, equations 4 to 6; v2, arXiv 1811.11168, equation 2.
    """
    if unknown:
        raise unexpected(deform_roi_pool, unknown)
    check_order(offset)
    rows: Tensor = joined(boxes, input)
    operands = (input, rows, offset, mask)
    if has_torch_function(operands):
        result: Tensor = handle_torch_function(
            deform_roi_pool, operands, *operands, output_size, spatial_scale, sampling_ratio,
            convention=convention, gamma=gamma, position_sensitive=position_sensitive, part_size=part_size, backend=backend,
        )  # fmt: skip
        return result
    parameters = _parameters(output_size, spatial_scale, sampling_ratio, convention, gamma, position_sensitive, part_size)
    return calls.call(DEFORM_ROI_POOL, None, backend, parameters, operands)


def deform_roi_pool_backward(
    grad_output: Tensor,
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    offset: Tensor | None = None,
    mask: Tensor | None = None,
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
) -> Gradients:
    """`deformconv.deform_roi_pool_backward` on tensors; its result has a gradient if a tensor requires one."""
    parameters = _parameters(output_size, spatial_scale, sampling_ratio, convention, gamma, position_sensitive, part_size)
    operands = (input, joined(boxes, input), offset, mask)
    found: Gradients = calls.backward(DEFORM_ROI_POOL, backend, parameters, grad_output, operands, wanted)
    return found


def joined(boxes: Any, input: Any) -> Any:
    """A list of each image's boxes (r, 4) as one tensor (R, 5), in float32 where half precision would not count the images.

    A compiler or tracer is not to take the batch's size for a constant, so that the list's length is not looked at then.
    """
    if not isinstance(boxes, (list, tuple)):
        return boxes
    has_images = isinstance(input, Tensor) and input.ndim == 4 and not (modes.compiling() or modes.traced())
    check_list(boxes, Tensor, "PyTorch tensor", input.shape[0] if has_images else None)
    boxes = [rows.float() if rows.dtype in HALF else rows for rows in boxes]
    return torch.cat([torch.cat([torch.full_like(rows[:, :1], image), rows], dim=1) for image, rows in enumerate(boxes)])


def _parameters(
    output_size: Any, spatial_scale: Any, sampling_ratio: Any, convention: Any, gamma: Any, position_sensitive: Any,
    part_size: Any,
) -> tuple[Any, ...]:  # fmt: skip
    """The operator's parameters, in its order."""
    group_size = group_size_of(position_sensitive, output_size)
    return output_size, spatial_scale, sampling_ratio, convention, gamma, group_size, part_size
