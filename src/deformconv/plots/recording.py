"""A forward pass recorded: every deformable layer's offsets and masks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from deformconv.plots.attending import attention_layers, observe_attention
from deformconv.plots.observe import check_plain, deformable_layers, kind_of, observe, seen_from_here
from deformconv.plots.trace import AttentionCall, Call, Trace
from deformconv.torch import surgery

__all__ = ["AttentionCall", "Call", "Trace", "record"]


@contextmanager
def record(model: nn.Module) -> Iterator[Trace]:
    """Record what every deformable layer of a model does, in the forward passes within a `with` block.

    Outputs and gradients stay what they are, bit for bit. Layers are this library's, DCNv3 and DCNv4 too, torchvision's,
    kornia's and mmcv's; of each call the offsets and masks are copied. Of deformable attention, which this library's
    `DeformAttention` is and layers of those of transformers' models that have a module `MultiScaleDeformableAttention`,
    locations and weights are. Without gradients a deformable convolution predicts in the same kernel in which it convolves, so
    that its offsets are computed once more for the recording.

    Args:
        model: any module with deformable layers, or a layer.

    Yields:
        A Trace, which grows with each call.

    Raises:
        TypeError: `model` is no torch.nn.Module.
        ValueError: it has no deformable layer, or it is compiled or a script, whose layers cannot be seen.

    Example:
        >>> import torch
        >>> from deformconv.plots import record
        >>> from deformconv.torch import DeformConv2d
        >>> stem = torch.nn.Conv2d(3, 8, 3, stride=2, padding=1)
        >>> net = torch.nn.Sequential(stem, DeformConv2d(8, 8, 3, padding=1))
        >>> with record(net) as trace:
        ...     y = net(torch.rand(1, 3, 32, 48))
        >>> trace["1"].offset.shape
        torch.Size([1, 18, 16, 24])
        >>> trace.geometry("1").step                                # image pixels between the cells of the layer's input
        (2.0, 2.0)
    """
    surgery.check_model(model)
    check_plain(model)
    layers = deformable_layers(model)
    attention = attention_layers(model)
    if not layers and not attention:
        raise ValueError(
            f"`model`, a {type(model).__name__}, has no deformable layer; expected one of deformconv.torch (DeformConv2d), "
            "torchvision.ops.DeformConv2d, kornia's DeformableConv2d or mmcv's, DCNv3 or DCNv4 of deformconv.vision, or "
            "deformable attention, DeformAttention or a module MultiScaleDeformableAttention of transformers. Calls of "
            "functions, as torchvision.ops.deform_conv2d, are not recorded; deformconv.vision.make_deformable puts layers into "
            "a model."
        )
    trace = Trace(model, {name: str(kind_of(layer)) for name, layer in layers.items()} | attention)
    seen = seen_from_here()

    def begin(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if seen():
            trace.begin(args, kwargs)

    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(begin, with_kwargs=True, prepend=True).remove)
        stack.enter_context(observe(model, trace.add))
        stack.enter_context(observe_attention(model, trace.add_attention))
        yield trace
