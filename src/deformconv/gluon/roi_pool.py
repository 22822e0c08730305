"""Deformable RoI pooling on MXNet's arrays and symbols: deformconv's signature, with `data` first."""

from __future__ import annotations

from typing import Any, NoReturn

from deformconv.errors import ShapeError
from deformconv.gluon import calls
from deformconv.gluon.custom import Registered
from deformconv.ops.roi_pool import operator
from deformconv.ops.roi_pool.spec import check_order, group_size_of
from deformconv.ops.words import unexpected

__all__ = ["DEFORM_PSROI_POOL", "DEFORM_ROI_POOL", "deform_roi_pool"]


def _complete(shapes: dict[str, list[int]], parameters: dict[str, Any], kept: dict[str, Any]) -> None:
    """What is known of boxes by the number of them in offset or mask."""
    _, boxes, *_ = shapes  # their name: MXNet has another than deformconv
    rows = next((shape[0] for name, shape in shapes.items() if name != "data" and shape and shape[0] > 0), None)
    if rows is not None and not shapes[boxes]:
        shapes[boxes] = [rows, 5]


def _complete_as_promised(shapes: dict[str, list[int]], parameters: dict[str, Any], kept: dict[str, Any]) -> None:
    """The same, where MXNet's arguments promise a number of channels."""
    _complete(shapes, parameters, kept)
    data, channels = shapes["data"], kept["channels"]
    if len(data) == 4 and data[1] not in (0, -1, channels):
        raise ShapeError(
            f"`input` has {data[1]} channels, shape {tuple(data)}; expected output_dim * group_size^2 = {channels}."
        )


# MXNet's functions take no list of each image's boxes.
_ROWS = {"pass `list(boxes)`": "put each image's number in front of its rows, and join them"}

DEFORM_ROI_POOL = Registered(
    operator.DEFORM_ROI_POOL, "deformconv_roi_pool", _complete, words={"input": "data"}, sentences=_ROWS
)

# The same operator in the words of MXNet's, for `contrib`: its errors name what was passed. MXNet's has no mask; those who have
# one multiply what was pooled.
_MASKED = "MXNet's operator takes no mask: multiply its output by it, or pass it to `deformconv.gluon.deform_roi_pool`"
DEFORM_PSROI_POOL = Registered(
    operator.DEFORM_ROI_POOL,
    "deformconv_psroi_pool",
    _complete_as_promised,
    words={
        "input": "data", "boxes": "rois", "offset": "trans", "gamma": "trans_std", "output_size": "pooled_size",
        "sampling_ratio": "sample_per_part",
    },
    kept=("channels",),
    sentences=_ROWS | {
        "3 = 2 offsets + 1 mask: pass the last one as `mask`.": f"3 = 2 offsets + 1 mask. {_MASKED}.",
        "One number for each bin is a mask.": f"One number for each bin is a mask. {_MASKED}.",
    },
)  # fmt: skip


def deform_roi_pool(
    data: Any,
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
    name: str | None = None,
    **unknown: NoReturn,
) -> Any:
    """Pool the boxes of feature maps into bins, each of which is moved by `offset` and, in v2, weighed by `mask`.

    It is `deformconv.torch.deform_roi_pool`, which explains the arguments, with `data` for `input`. NDArrays give an NDArray,
    at once and under `mxnet.autograd.record` with its gradient; Symbols give a Symbol. The gradient of `boxes` is 0.

    Args:
        data: shape (N, C, H, W).
        boxes: shape (R, 5), rows (image, x1, y1, x2, y2), in pixels of the images.
        offset: shape (R, 2, PH, PW), x before y; None for RoI align.
        mask: shape (R, 1, PH, PW); None for v1.
        output_size, spatial_scale, sampling_ratio, convention, gamma, position_sensitive, part_size, backend: as there.
        name: the Symbol's name.

    Returns:
        The output, shape (R, C, PH, PW), of the kind that was passed.

    Raises:
        ShapeError, TypeError, ValueError, BackendError: as there; BackendError also for arrays on a GPU.
        MXNetError: all of these, when a graph of Symbols is bound or run; MXNet passes on no text, which is then on stderr.

    Example:
        >>> import mxnet as mx
        >>> from deformconv.gluon import deform_roi_pool
        >>> x, boxes = mx.nd.ones((1, 8, 20, 20)), mx.nd.array([[0, 16, 16, 160, 200]])
        >>> offset, mask = mx.nd.zeros((1, 2, 7, 7)), mx.nd.ones((1, 1, 7, 7))
        >>> deform_roi_pool(x, boxes, offset, mask, spatial_scale=1 / 16).shape
        (1, 8, 7, 7)

    Papers: v1, arXiv 1703.06211, equations 4 to 6; v2, arXiv 1811.11168, equation 2.
    """
    if unknown:
        raise unexpected(deform_roi_pool, unknown)
    check_order(offset)
    parameters = {
        "output_size": output_size,
        "spatial_scale": spatial_scale,
        "sampling_ratio": sampling_ratio,
        "convention": convention,
        "gamma": gamma,
        "group_size": group_size_of(position_sensitive, output_size),
        "part_size": part_size,
    }
    operands = {"data": data, "boxes": boxes, "offset": offset, "mask": mask}
    return calls.call(DEFORM_ROI_POOL, operands, parameters, backend, name, {})
