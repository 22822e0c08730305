"""A state_dict in another library's names and conventions, made ours, and the other way."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from deformconv.convert.detectors import Origin

from deformconv.convert.layouts import LAYOUTS
from deformconv.convert.layouts.layout import Layout

__all__ = ["convert_state_dict"]


def convert_state_dict(
    state: Mapping[str, Any],
    *,
    model: nn.Module,
    source: str | None = None,
    to: str | None = None,
    channel_order: str | None = None,
    stride_in_1x1: bool | None = None,
) -> OrderedDict[str, Tensor]:
    """Convert a state_dict of another library into this one's, or back.

    The other libraries' masks are sigmoid, and this one's mask_scale*sigmoid, where mask_scale is 2 unless you say otherwise:
    weights whose keys were only renamed load, and have masks twice as large. Here the layer's weight makes up for it, by a
    multiplication with 0.5 or 2, which is exact; if the model's layers have mask_scale=1.0, by none.

    Where `model` is torchvision's, a whole detector (Faster R-CNN, Mask R-CNN, on a ResNet with a pyramid), its backbone or a
    ResNet, and the other side mmdetection or detectron2, all its parts are converted: their names, the background, which is
    class 0 in torchvision and the last one there, the order of the image's channels and of the anchors. For the same image
    the features, and the logits and deltas of the RPN and, for the same pooled boxes, of the heads are equal, within
    rounding. Detections are not: torchvision rounds its anchors, and its RoIAlign is not aligned and takes 2x2 samples.

    Args:
        state: tensors or NumPy arrays by name, as `load_checkpoint` returns them; for the way back, the model's state_dict.
        model: this library's side: the model that is to load the result, or whose state_dict it is. It is not changed.
        source: whose state_dict it is: "mmcv" (mmcv, and mmdetection from 2.0 on), "mmdet1" (mmdetection 1), "detectron2",
            "dcnv2" (CharlesShang's DCNv2, CenterNet), "basicsr", "paddle" (PaddleDetection), "mxnet" (Gluon's
            `save_parameters`), "mxnet_symbol" (Deformable-ConvNets), "torchvision" (what `to_torchvision` makes), or
            "deformconv", for a state_dict of this library that has lost its note of the masks on the way.
        to: whose state_dict to make of the model's; one of the same words.
        channel_order: "rgb" or "bgr", what the first convolution of the other side's ResNet takes; the one of `model` takes
            "rgb". By default "rgb" for mmdetection. For detectron2 what pixel_mean in the file tells; some files have none.
        stride_in_1x1: whether the other side's ResNet strides in the 1x1 convolutions of its blocks. No number tells: `model`
            must be built so. By default False for mmdetection (its style="pytorch"; True is "caffe", whose images are "bgr"
            and need `model.transform` set accordingly). For detectron2 what pixel_std in the file tells.

    Returns:
        The state_dict, in the order of `state`. Names that neither side knows stay as they are, so that
        `model.load_state_dict` tells of them; of detectron2 the buffers of pixels and anchors are compared with the model's
        and left out, and not written on the way back. Tensors that need no arithmetic are the very same objects. One
        regression of boxes for all classes becomes one for each, of the same numbers.

    Raises:
        ShapeError: a predictor does not have the channels that the model's layer has, or a head the model's classes.
        TypeError: `model` is no nn.Module, or `state` no mapping of names to tensors.
        ValueError: the two cannot compute the same, or `state` is another library's.

    Example:
        >>> import torch
        >>> from deformconv.convert import convert_state_dict
        >>> from deformconv.torch import DeformConv2d
        >>> theirs = {"weight": torch.rand(8, 4, 3, 3), "conv_offset.weight": torch.rand(27, 4, 3, 3),
        ...           "conv_offset.bias": torch.rand(27)}
        >>> layer = DeformConv2d(4, 8, 3, padding=1, bias=False)
        >>> ours = convert_state_dict(theirs, source="mmcv", model=layer)
        >>> layer.load_state_dict(ours)
        <All keys matched successfully>
        >>> torch.equal(layer.weight, theirs["weight"] / 2)                # since its masks are 2*sigmoid, and mmcv's sigmoid
        True
        >>> back = convert_state_dict(layer.state_dict(), to="mmcv", model=layer)
        >>> all(torch.equal(back[name], tensor) for name, tensor in theirs.items())
        True
    """
    import deformconv.torch  # noqa: F401  (it says what to install where PyTorch is missing)

    # isort: split
    from deformconv.convert import conversion
    from deformconv.torch import surgery

    layout = _layout(source, to)
    surgery.check_model(model)
    tensors = _tensors(state)
    origin = _origin(model, layout, channel_order, stride_in_1x1)
    convert = conversion.here if to is None else conversion.back
    return convert(tensors, layout, model, origin)


def _origin(model: nn.Module, layout: Layout, channel_order: Any, stride_in_1x1: Any) -> Origin:
    """What the caller says of the other side's ResNet."""
    from deformconv.convert.detectors import Origin, detector_of

    if channel_order not in (None, "rgb", "bgr"):
        raise ValueError(f"`channel_order` is {channel_order!r}; expected 'rgb' or 'bgr'.")
    if stride_in_1x1 not in (None, True, False):
        raise ValueError(f"`stride_in_1x1` is {stride_in_1x1!r}; expected True or False.")
    origin = Origin(channel_order, stride_in_1x1)
    if origin != Origin() and detector_of(model, layout) is None:
        given = "channel_order" if channel_order is not None else "stride_in_1x1"
        raise ValueError(
            f"`{given}` is for a ResNet of torchvision, alone or in a GeneralizedRCNN or BackboneWithFPN, and for 'mmcv', "
            f"'mmdet1' and 'detectron2'; `model` is a {type(model).__name__}, and the other side {layout.source!r}."
        )
    return origin


def _layout(source: str | None, to: str | None) -> Layout:
    if (source is None) == (to is None):
        given = "neither" if source is None else "both"
        raise ValueError(f"{given} of `source` and `to` is given; expected one: whose `state` is, or whose it is to be.")
    name, word = ("source", source) if to is None else ("to", to)
    if not isinstance(word, str) or word not in LAYOUTS:
        words = "; ".join(f"{source!r}, of {layout.library}" for source, layout in LAYOUTS.items())
        raise ValueError(f"`{name}` is {word!r}; expected one of: {words}.")
    return LAYOUTS[word]


def _tensors(state: Any) -> OrderedDict[str, Tensor]:
    """The tensors by name, and the metadata that the state_dict has."""
    import numpy as np
    import torch

    if not isinstance(state, Mapping):
        raise TypeError(
            f"`state` is a {type(state).__name__}; expected names and tensors, as load_checkpoint(path) or "
            "model.state_dict() return them."
        )
    found: Any = OrderedDict()
    for name, value in state.items():
        if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "fiub":
            value = torch.from_numpy(np.array(value, value.dtype.newbyteorder("=")))
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise TypeError(
                f"`state` has a {type(value).__name__} under {name!r}; expected a tensor under every name. A training "
                "program's checkpoint has the state_dict inside: load_checkpoint(path) finds it."
            )
        if value.is_meta:
            raise ValueError(
                f"`state` has a tensor on the meta device under {name!r}, without numbers; expected one with numbers."
            )
        found[name] = value
    found._metadata = getattr(state, "_metadata", {})
    tensors: OrderedDict[str, Tensor] = found
    return tensors
