"""What the layers DCNv3 and DCNv4 share: arguments, checks, and the way from a projected map to what is added up of it."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deformconv.convert.internimage import Taps
from deformconv.errors import ShapeError
from deformconv.ops.window import count, positions_along
from deformconv.torch import modes
from deformconv.torch.aggregate.functional import deform_aggregate2d
from deformconv.torch.observed import Observed
from deformconv.torch.predictor import VectorPredictor

__all__ = ["Aggregate", "Grid"]


class Grid(NamedTuple):
    """A square kernel's taps, and the scale by which the authors multiply them as well as the offsets."""

    kernel_size: int
    dilation: int
    scale: float

    @property
    def reach(self) -> int:
        """From the first tap to the last, in pixels."""
        return self.dilation * (self.kernel_size - 1)

    @property
    def centre(self) -> int:
        """The pixel of a window that taps are scaled around: of two in the middle the first."""
        return self.reach // 2

    def scaled(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """A projection to the operator's offsets, from one to the authors', with rows (G*K*2, ...) in our order.

        Taps around the centre and offsets are scaled alike, scale*(tap + offset) = tap + [scale*offset + (scale - 1)*tap]. The
        bracket is the operator's offset, so that its own taps stay in whole pixels, and is linear in what is predicted.
        """
        if self.scale == 1:
            return weight, bias
        along = torch.arange(self.kernel_size, dtype=bias.dtype, device=bias.device) * self.dilation - self.centre
        taps = torch.stack(torch.meshgrid(along, along, indexing="ij"), -1).flatten()  # (K*2,)
        moved = bias.unflatten(0, (-1, taps.shape[0])) * self.scale + taps * (self.scale - 1)
        return weight * self.scale, moved.flatten()


class Aggregate(Observed, nn.Module):
    """A layer that adds up what it samples, weighed by masks, and has no weight for a tap."""

    center_feature_scale_proj_weight: nn.Parameter
    center_feature_scale_proj_bias: nn.Parameter

    def __init__(
        self,
        channels: Any,
        kernel_size: Any,
        dw_kernel_size: Any,
        stride: Any,
        pad: Any,
        dilation: Any,
        group: Any,
        offset_scale: Any,
        center_feature_scale: Any,
        remove_center: Any,
    ) -> None:
        super().__init__()
        self.channels, self.kernel_size = count("channels", channels), count("kernel_size", kernel_size)
        self.dw_kernel_size = None if dw_kernel_size is None else count("dw_kernel_size", dw_kernel_size)
        self.stride, self.pad, self.dilation = count("stride", stride), count("pad", pad, 0), count("dilation", dilation)
        self.group, self.offset_scale = count("group", group), _finite("offset_scale", offset_scale)
        self.center_feature_scale, self.remove_center = bool(center_feature_scale), bool(remove_center)
        self.grid = Grid(self.kernel_size, self.dilation, self.offset_scale)
        self.taps = Taps(self.group, self.kernel_size, self.remove_center)
        self._check_arguments()
        self.group_channels = self.channels // self.group

    def _check_arguments(self) -> None:
        """Say which arguments do not go together."""
        if self.channels % self.group:
            raise ShapeError(
                f"`group` is {self.group}; expected a divisor of channels = {self.channels}: every group has channels / group "
                "channels, and offsets and masks of its own."
            )
        if self.remove_center and (self.kernel_size % 2 == 0 or self.kernel_size == 1):
            raise ShapeError(
                f"`remove_center` is True and `kernel_size` is {self.kernel_size}; expected an odd kernel_size from 3 on, of "
                "which the tap in the middle is left out."
            )
        if self.dw_kernel_size is not None and self.dw_kernel_size % 2 == 0:
            raise ShapeError(
                f"`dw_kernel_size` is {self.dw_kernel_size}; expected an odd number, so that the depthwise convolution keeps "
                "the map's size."
            )
        if self.pad > self.grid.centre:
            raise ShapeError(
                f"`pad` is {self.pad}; expected at most dilation*(kernel_size - 1)//2 = {self.grid.centre}: offsets are "
                "predicted at the pixel under the window's centre, which must be one of the map's."
            )

    def _depthwise(self, kernel_size: int, placed: dict[str, Any]) -> nn.Conv2d:
        """A convolution of every channel by itself, which keeps the map's size."""
        channels = self.channels
        return nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels, **placed)

    def _make_center_scale(self, placed: dict[str, Any]) -> None:
        if self.center_feature_scale:
            self.center_feature_scale_proj_weight = nn.Parameter(torch.empty(self.group, self.channels, **placed))
            self.center_feature_scale_proj_bias = nn.Parameter(torch.empty(self.group, **placed))

    def reset_parameters(self) -> None:
        """Begin as the authors' layer: offsets 0, equal masks, Xavier's projections. A depthwise convolution stays."""
        for module in self.children():
            if isinstance(module, VectorPredictor):
                module.reset_parameters()
            elif isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.center_feature_scale:
            nn.init.zeros_(self.center_feature_scale_proj_weight)
            nn.init.zeros_(self.center_feature_scale_proj_bias)

    def _reset_parameters(self) -> None:
        """What the authors' nets call, of every layer, after they have filled the nn.Linear within."""
        self.reset_parameters()

    def _at_centres(self, map: Tensor) -> Tensor:
        """Of a map (N, H, W, C) the pixels under the windows' centres, (N, *O, C)."""
        if self.stride == 1 and 2 * self.pad == self.grid.reach:
            return map
        first = self.grid.centre - self.pad
        rows, columns = (
            slice(
                first,
                first + positions_along(size, self.kernel_size, self.stride, (self.pad,) * 2, self.dilation) * self.stride,
            )
            for size in map.shape[1:3]
        )
        return map[:, rows, columns][:, :: self.stride, :: self.stride]

    def _aggregate(self, input: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        """The operator where channels are last: (N, H, W, C), (N, *O, G*K*2) and (N, *O, G*K) to (N, *O, C)."""
        input, offset, mask = (tensor.permute(0, 3, 1, 2) for tensor in (input, offset, mask))
        window = self.kernel_size, self.stride, self.pad, self.dilation
        output = deform_aggregate2d(input, offset, mask, *window, offset_groups=self.group)
        if self._observers:
            self._show(input, offset, mask, output)
        return output.permute(0, 2, 3, 1)

    def _mixed(self, output: Tensor, input: Tensor, features: Tensor) -> Tensor:
        """Between the output and the input under the windows' centres: for each group a part that `features` say."""
        if not self.center_feature_scale:
            return output
        weight, bias = self.center_feature_scale_proj_weight, self.center_feature_scale_proj_bias
        part = F.linear(features, weight, bias).sigmoid().to(output.dtype)  # (N, *O, G)
        part = part.repeat_interleave(self.group_channels, -1)
        return output * (1 - part) + self._at_centres(input) * part

    def __prepare_scriptable__(self) -> NoReturn:
        """torch.jit.script asks every module of a net for this before it compiles."""
        modes.refuse_script(self)

    def extra_repr(self) -> str:
        parts = [f"{self.channels}, kernel_size={self.kernel_size}, stride={self.stride}, pad={self.pad}"]
        parts += [f"dilation={self.dilation}"] * (self.dilation != 1) + [f"group={self.group}"]
        parts += [f"offset_scale={self.offset_scale}"] * (self.offset_scale != 1)
        parts += [f"{name}=True" for name in ("center_feature_scale", "remove_center") if getattr(self, name)]
        return ", ".join(parts)


def _finite(name: str, value: Any) -> float:
    number = math.nan if isinstance(value, bool) or not isinstance(value, Real) else float(value)
    if not math.isfinite(number):
        raise ValueError(f"`{name}` is {value!r}; expected a finite number.")
    return number
