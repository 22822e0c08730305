"""FlashInternImage's layer."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from deformconv.convert.internimage import Taps, packed, unpacked
from deformconv.errors import ShapeError
from deformconv.ops.window import integers
from deformconv.ops.words import unexpected
from deformconv.torch import modes
from deformconv.torch.predictor import VectorPredictor, check_dtype, project
from deformconv.vision.aggregates import Aggregate, Grid

__all__ = ["DCNv4"]


class _OffsetMaskPredictor(VectorPredictor):
    """The projection to offsets and masks: its rows have the authors' order, and its two outputs have the operator's."""

    is_slow = True  # as DCNv3's offsets

    def __init__(self, channels: int, taps: Taps, grid: Grid, **placed: Any) -> None:
        super().__init__(channels, packed(taps), **placed)
        self.taps, self.grid = taps, grid

    def forward(self, input: Tensor) -> Any:
        (offset, mask), (offset_bias, mask_bias) = unpacked(self.weight, self.taps), unpacked(self.bias, self.taps)
        return project(input, *self.grid.scaled(offset, offset_bias)), project(input, mask, mask_bias)


class DCNv4(Aggregate):
    """FlashInternImage's DCNv4: a layer that samples a projected map at predicted places and adds up, by masks as they are.

    One projection predicts an offset and a mask for each group and tap, from the input or from a depthwise convolution of it.
    Masks are not bounded, and 0 in a fresh layer, whose output is its bias therefore. `deform_aggregate2d` samples the
    projected input, and a second projection follows. Arguments, defaults, first values and the parameters' names, shapes and
    order are the authors', so that their state_dicts load, and are saved, as they are. In float32 it computes offsets and
    masks also under autocast and in half precision.

    Args:
        channels: those of the input, and of the output. The authors' kernels need a multiple of 16 in each group; here any
            number will do.
        kernel_size, stride, pad, dilation, group, offset_scale, remove_center: as in `DCNv3`.
        dw_kernel_size: the kernel of a depthwise convolution before the offsets and masks, an odd number; None for none.
        center_feature_scale: whether a part of each group's output is the projected input itself; what has been added up
            predicts the part.
        output_bias: whether the second projection has a bias.
        without_pointwise: whether both projections are left out.
        act_layer, norm_layer: not used, as in the authors' layer, so that DCNv3's arguments can be passed.
        device, dtype: of the parameters.

    Shape:
        input (N, L, channels), the pixels of maps, row by row; output (N, L, channels), with a stride, or a padding that does
        not keep the size, as many pixels as the window has positions.

    Raises:
        ShapeError: a number is out of range, or numbers do not go together.

    Example:
        >>> import torch
        >>> from deformconv.vision import DCNv4
        >>> layer = DCNv4(64, group=4)
        >>> layer(torch.rand(1, 40 * 56, 64), shape=(40, 56)).shape
        torch.Size([1, 2240, 64])

    Paper: DCNv4, arXiv 2401.06197, section 3.
    """

    def __init__(
        self,
        channels: int = 64,
        kernel_size: int = 3,
        stride: int = 1,
        pad: int = 1,
        dilation: int = 1,
        group: int = 4,
        offset_scale: float = 1.0,
        dw_kernel_size: int | None = None,
        center_feature_scale: bool = False,
        remove_center: bool = False,
        output_bias: bool = True,
        without_pointwise: bool = False,
        *,
        act_layer: Any = None,
        norm_layer: Any = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **unknown: NoReturn,
    ) -> None:
        if unknown:
            raise unexpected(DCNv4.__init__, unknown, "DCNv4")
        super().__init__(
            channels, kernel_size, dw_kernel_size, stride, pad, dilation, group, offset_scale, center_feature_scale,
            remove_center,
        )  # fmt: skip
        placed = {"device": device, "dtype": dtype}
        self.without_pointwise = bool(without_pointwise)
        if self.dw_kernel_size is not None:
            self.offset_mask_dw = self._depthwise(self.dw_kernel_size, placed)
        self.offset_mask = _OffsetMaskPredictor(self.channels, self.taps, self.grid, **placed)
        if not self.without_pointwise:
            self.value_proj = nn.Linear(self.channels, self.channels, **placed)
            self.output_proj = nn.Linear(self.channels, self.channels, bias=output_bias, **placed)
        self._make_center_scale(placed)
        self.reset_parameters()

    def forward(self, input: Tensor, shape: tuple[int, int] | None = None) -> Tensor:
        """Predict offsets and masks of maps (N, H*W, channels), and sample them there.

        Args:
            input: shape (N, L, channels), pixels row by row.
            shape: the maps' height and width, whose product is L. None, for square maps, takes the root of L.

        Raises:
            ShapeError: the input has another shape, or not as many pixels.
            TypeError: it is no tensor, or has not the dtype of the layer's parameters; `shape` holds what are no integers.
        """
        self._check(input)
        map = input.unflatten(1, self._size(input, shape))  # (N, H, W, C)
        value = map if self.without_pointwise else self.value_proj(map)
        features = map if self.dw_kernel_size is None else self._convolved(map)
        output = self._aggregate(value, *self.offset_mask(self._at_centres(features)))
        output = self._mixed(output, value, output).flatten(1, 2)
        return output if self.without_pointwise else self.output_proj(output)

    def _convolved(self, map: Tensor) -> Tensor:
        convolved: Tensor = self.offset_mask_dw(map.permute(0, 3, 1, 2))
        return convolved.permute(0, 2, 3, 1)

    def _check(self, input: Any) -> None:
        """Say what is wrong with an input; where shapes are being traced there is nothing to compare."""
        check_dtype(self, "input", input)
        if not isinstance(input, Tensor) or modes.traced():
            return
        shape = tuple(input.shape)
        if len(shape) == 3 and shape[2] == self.channels:
            return
        text = f"`input` has shape {shape}; expected (N, H*W, {self.channels}), pixels with this layer's channels"
        if len(shape) == 4 and shape[3] == self.channels:
            text += f": pass `input.flatten(1, 2)` and shape={shape[1:3]}"
        elif len(shape) == 4 and shape[1] == self.channels:
            text += f": pass `input.flatten(2).transpose(1, 2)` and shape={shape[2:]}"
        elif len(shape) == 3 and shape[1] == self.channels:
            text += ": pass `input.transpose(1, 2)`"
        raise ShapeError(text + ".")

    @staticmethod
    def _size(input: Tensor, shape: Any) -> tuple[Any, Any]:
        """The maps' height and width."""
        pixels = input.shape[1]
        if shape is None:
            side = int(pixels**0.5)
            if not modes.traced() and side * side != pixels:
                raise ShapeError(
                    f"`input` has {pixels} pixels, shape {tuple(input.shape)}, which is no square; expected `shape`, the "
                    "height and width of the maps."
                )
            return side, side
        try:
            height, width = shape
        except (TypeError, ValueError):
            raise ShapeError(f"`shape` is {shape!r}; expected two integers, the height and width of the maps.") from None
        if modes.traced():
            return height, width
        if not modes.compiling():  # to ask a symbol for its number is to fix it
            height, width = integers("shape", (height, width), 2, 1)
        if height * width != pixels:
            raise ShapeError(
                f"`input` has {pixels} pixels, shape {tuple(input.shape)}; `shape` is {shape!r} and has {height}*{width} = "
                f"{height * width}."
            )
        return height, width
