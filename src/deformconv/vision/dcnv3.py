"""InternImage's layer."""

from __future__ import annotations

import math
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from deformconv.convert.internimage import Taps, mask_rows, offset_rows
from deformconv.errors import ShapeError
from deformconv.ops.words import unexpected
from deformconv.torch import modes
from deformconv.torch.predictor import VectorPredictor, check_dtype, project
from deformconv.vision.aggregates import Aggregate, Grid

__all__ = ["DCNv3"]

ACTIVATIONS = ("GELU", "SiLU", "ReLU")
NORMS = ("LN", "BN")


class _OffsetPredictor(VectorPredictor):
    """The projection to offsets: its rows have the authors' order, and its output has the operator's."""

    is_slow = True  # a tenth, in the authors' trainings of InternImage-L and larger ones too

    def __init__(self, channels: int, taps: Taps, grid: Grid, **placed: Any) -> None:
        super().__init__(channels, taps.offsets, **placed)
        self.taps, self.grid = taps, grid

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = offset_rows(self.weight, self.taps), offset_rows(self.bias, self.taps)
        return project(input, *self.grid.scaled(weight, bias))


class _MaskPredictor(VectorPredictor):
    """The projection to masks and their softmax, likewise. A tap that was removed is at minus infinity, and its mask 0."""

    def __init__(self, channels: int, taps: Taps, **placed: Any) -> None:
        super().__init__(channels, taps.masks, **placed)
        self.taps = taps

    def forward(self, input: Tensor) -> Tensor:
        raw = project(input, mask_rows(self.weight, self.taps), mask_rows(self.bias, self.taps, -math.inf))
        return raw.unflatten(-1, (self.taps.group, -1)).softmax(-1).flatten(-2)


class _ChannelsLast(nn.Module):
    """From (N, C, H, W) to (N, H, W, C). It has a place in the authors' numbering of modules."""

    def forward(self, input: Tensor) -> Tensor:
        return input.permute(0, 2, 3, 1)


class DCNv3(Aggregate):
    """InternImage's DCNv3: a layer that samples a projected map at predicted places and adds up, by masks of a softmax.

    A depthwise convolution of the input, normalised, predicts for each group and tap an offset and a mask; masks of a group add
    up to 1. `deform_aggregate2d` samples the projected input, and a second projection follows. Arguments, defaults, first
    values and the parameters' names, shapes and order are the authors', so that their state_dicts load, and are saved, as they
    are. In float32 it computes offsets and masks also under autocast and in half precision.

    Args:
        channels: those of the input, and of the output.
        kernel_size: the taps along either axis.
        dw_kernel_size: the depthwise convolution's kernel, an odd number; None takes `kernel_size`.
        stride, pad, dilation: the window's, in pixels. `pad` is at most dilation*(kernel_size - 1)//2: offsets are predicted
            where the window's centre is.
        group: groups of channels with offsets and masks of their own, a divisor of `channels`.
        offset_scale: a factor of the offsets and of the kernel's own grid, around its centre.
        act_layer: "GELU", "SiLU" or "ReLU", after the depthwise convolution.
        norm_layer: "LN" or "BN", before that.
        center_feature_scale: whether a predicted part of each group's output is the projected input itself.
        remove_center: whether the tap in the middle is left out; needs an odd `kernel_size` from 3 on.
        device, dtype: of the parameters.

    Shape:
        input (N, H, W, channels); output (N, *O, channels), with a padding that keeps the size (N, H, W, channels).

    Raises:
        ShapeError: a number is out of range, or numbers do not go together.
        ValueError: a norm or an activation is unknown.

    Example:
        >>> import torch
        >>> from deformconv.vision import DCNv3
        >>> layer = DCNv3(64, group=4)
        >>> layer(torch.rand(1, 56, 56, 64)).shape
        torch.Size([1, 56, 56, 64])

    Paper: InternImage, arXiv 2211.05778, equation 2.
    """

    def __init__(
        self,
        channels: int = 64,
        kernel_size: int = 3,
        dw_kernel_size: int | None = None,
        stride: int = 1,
        pad: int = 1,
        dilation: int = 1,
        group: int = 4,
        offset_scale: float = 1.0,
        act_layer: str = "GELU",
        norm_layer: str = "LN",
        center_feature_scale: bool = False,
        remove_center: bool = False,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **unknown: NoReturn,
    ) -> None:
        if unknown:
            raise unexpected(DCNv3.__init__, unknown, "DCNv3")
        super().__init__(
            channels, kernel_size, kernel_size if dw_kernel_size is None else dw_kernel_size, stride, pad, dilation, group,
            offset_scale, center_feature_scale, remove_center,
        )  # fmt: skip
        placed = {"device": device, "dtype": dtype}
        _check_name("norm_layer", norm_layer, NORMS)
        _check_name("act_layer", act_layer, ACTIVATIONS)
        if norm_layer == "BN":
            norm = nn.Sequential(nn.BatchNorm2d(self.channels, **placed), _ChannelsLast())
        else:
            norm = nn.Sequential(_ChannelsLast(), nn.LayerNorm(self.channels, eps=1e-6, **placed))
        act = nn.GELU() if act_layer == "GELU" else getattr(nn, act_layer)(inplace=True)
        self.dw_conv = nn.Sequential(self._depthwise(self.dw_kernel_size or self.kernel_size, placed), norm, act)
        self.offset = _OffsetPredictor(self.channels, self.taps, self.grid, **placed)
        self.mask = _MaskPredictor(self.channels, self.taps, **placed)
        self.input_proj = nn.Linear(self.channels, self.channels, **placed)
        self.output_proj = nn.Linear(self.channels, self.channels, **placed)
        self._make_center_scale(placed)
        self.reset_parameters()

    def forward(self, input: Tensor) -> Tensor:
        """Predict offsets and masks of a map (N, H, W, channels), and sample it there.

        Raises:
            ShapeError: the input has another shape.
            TypeError: it is no tensor, or has not the dtype of the layer's parameters.
        """
        self._check(input)
        value = self.input_proj(input)
        features = self._at_centres(self.dw_conv(input.permute(0, 3, 1, 2)))
        output = self._aggregate(value, self.offset(features), self.mask(features))
        output = self.output_proj(self._mixed(output, value, features))
        return output

    def _check(self, input: Any) -> None:
        """Say what is wrong with an input; where shapes are being traced there is nothing to compare."""
        check_dtype(self, "input", input)
        if not isinstance(input, Tensor) or modes.traced():
            return
        shape = tuple(input.shape)
        if len(shape) == 4 and shape[3] == self.channels:
            return
        text = f"`input` has shape {shape}; expected (N, H, W, {self.channels}), channels last, with this layer's channels"
        if len(shape) == 4 and shape[1] == self.channels:
            text += ": pass `input.permute(0, 2, 3, 1)`"
        if len(shape) == 3 and shape[2] == self.channels:
            text += ": pass one image as `input[None]`, and a row of pixels (N, H*W, C) as `input.unflatten(1, (H, W))`"
        raise ShapeError(text + ".")


def _check_name(argument: str, name: Any, names: tuple[str, ...]) -> None:
    if name not in names:
        raise ValueError(f"`{argument}` is {name!r}; expected one of {', '.join(map(repr, names))}.")
