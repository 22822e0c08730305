"""What stands for this library's layer in a model for torchvision: plain modules, which `torch.jit.script` compiles."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.ops import DeformConv2d, deform_conv2d

__all__ = ["HalfConv2d", "HalfDeformConv2d", "PredictingDeformConv2d"]


class PredictingDeformConv2d(nn.Module):
    """torchvision's layer with what it lacks in front: padding of the input, and a predictor of offsets and masks.

    `deform_conv` is that layer, `offset_conv` the predictor and `pad` the padding; the last two may be None. The call is that
    of `deformconv.torch.DeformConv2d`, on a batch.
    """

    def __init__(
        self,
        pad: nn.Module | None,
        offset_conv: nn.Module | None,
        deform_conv: DeformConv2d,
        *,
        padding_mode: str,
        offset_channels: int,
        modulated: bool,
        mask_scale: float,
        max_offset: float | None,
    ) -> None:
        super().__init__()
        self.pad = pad
        self.register_module("offset_conv", offset_conv)  # None has its place too, before the layer's
        self.deform_conv = deform_conv
        self.padding_mode = padding_mode  # what `pad` pads with
        self.offset_channels, self.modulated = offset_channels, modulated
        self.mask_scale, self.max_offset = mask_scale, max_offset

    def forward(self, input: Tensor, offset: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Convolve with predicted offsets and masks, or with exactly those passed: without mask, v1."""
        if self.pad is not None:
            input = self.pad(input)
        if offset is None:
            offset, mask = self.predict(input)
        output: Tensor = self.deform_conv(input, offset, mask)
        return output

    def predict(self, input: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the offsets and, in v2, the mask for an input that has been padded."""
        mask: Tensor | None = None
        if self.offset_conv is None:
            raise TypeError("`offset` is missing and this layer predicts none; expected layer(input, offset).")
        else:  # torch.jit.script leaves out a branch, and not what follows one
            offset = self.offset_conv(input)  # type: ignore[operator]
        if self.modulated:
            mask = self.mask_scale * torch.sigmoid(offset[:, self.offset_channels :])
            offset = offset[:, : self.offset_channels]
        if self.max_offset is not None:
            offset = self.max_offset * torch.tanh(offset / self.max_offset)
        return offset, mask


class HalfConv2d(nn.Conv2d):
    """A convolution in float32 of what is stored in half precision: bfloat16 knows an offset of 20 pixels to 0.125 only."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(_wide(input), _wide(self.weight), _wide_or_none(self.bias))


class HalfDeformConv2d(DeformConv2d):
    """torchvision's layer, computed in float32 and rounded once: its kernels have no bfloat16, and one dtype for all inputs."""

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        output = deform_conv2d(
            _wide(input), _wide(offset), _wide(self.weight), _wide_or_none(self.bias),
            self.stride, self.padding, self.dilation, _wide_or_none(mask),
        )  # fmt: skip
        return output.to(input.dtype)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.float16 or tensor.dtype == torch.bfloat16 else tensor


def _wide_or_none(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else _wide(tensor)
