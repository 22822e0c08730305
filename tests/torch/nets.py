"""The nets that exporters and converters are tried with: layers unlike in every parameter, an input and a larger one."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from deformconv.torch import DeformAttention, DeformConv1d, DeformConv2d, DeformConv3d
from deformconv.torch.aggregate.functional import deform_aggregate

LAYERS = {1: DeformConv1d, 2: DeformConv2d, 3: DeformConv3d}
SIZES = {1: ((9,), (14,)), 2: ((8, 9), (12, 17)), 3: ((4, 5, 6), (5, 6, 8))}


def two_layers(rank: int, **how: Any) -> tuple[nn.Sequential, torch.Tensor, torch.Tensor]:
    """v2 and v1."""
    torch.manual_seed(0)
    return _with_offsets(rank, 0.3, _first_two(rank, how))


def four_layers(rank: int, **how: Any) -> tuple[nn.Sequential, torch.Tensor, torch.Tensor]:
    """The two, one whose offsets are bounded and one of defaults."""
    torch.manual_seed(0)
    layer, parts = LAYERS[rank], _first_two(rank, how)
    parts += [
        nn.ReLU(),
        layer(4, 4, 3, padding=2, dilation=2, max_offset=3.0, bias=False, **how),
        layer(4, 3, 3, padding=1, modulated=False, **how),
    ]
    return _with_offsets(rank, 0.5, parts)


def _first_two(rank: int, how: dict[str, Any]) -> list[nn.Module]:
    layer = LAYERS[rank]
    return [
        layer(4, 6, 3, padding=1, stride=2, offset_groups=2, **how),
        nn.ReLU(),
        layer(6, 4, 2, modulated=False, groups=2, padding=((0, 1),) * rank, bias=False, **how),
    ]


def _with_offsets(rank: int, std: float, parts: list[nn.Module]) -> tuple[nn.Sequential, torch.Tensor, torch.Tensor]:
    """The net, its predictors' weights drawn with this deviation, and its inputs."""
    for part in parts:
        if not isinstance(part, nn.ReLU):
            nn.init.normal_(part.offset_conv.weight, std=std)
    return nn.Sequential(*parts).eval(), *(torch.rand(batch, 4, *size) for batch, size in zip((2, 5), SIZES[rank], strict=True))


def any_size(x: torch.Tensor) -> tuple[dict[int, Any]]:
    """What `dynamic_shapes` takes for every axis of any size but the channels'."""
    return ({axis: torch.export.Dim.DYNAMIC for axis in range(x.ndim) if axis != 1},)


class Attention(nn.Module):
    """A layer of deformable attention whose predictors predict something, on maps of sizes that the net knows."""

    levels = ((5, 7), (3, 4))

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = DeformAttention(16, num_levels=2, num_heads=4, num_points=3)
        for parameter in self.attention.parameters():
            nn.init.normal_(parameter, std=0.4)

    def forward(self, query: torch.Tensor, reference_points: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.attention(query, reference_points, value, self.levels)
        return result


def attention() -> tuple[Attention, tuple[torch.Tensor, ...], tuple[torch.Tensor, ...], tuple[dict[int, Any], ...]]:
    """The net, its inputs, more images and queries, and what `dynamic_shapes` takes for these. Points lie outside as well."""
    net = Attention().eval()
    calls = ((torch.randn(n, q, 16), torch.rand(n, q, 2, 2) * 1.4 - 0.2, torch.randn(n, 47, 16)) for n, q in ((2, 6), (3, 9)))
    any_number = torch.export.Dim.DYNAMIC
    return net, *calls, ({0: any_number, 1: any_number}, {0: any_number, 1: any_number}, {0: any_number})


class Aggregate(nn.Module):
    """An aggregation of what a convolution predicts, unlike along every axis."""

    def __init__(self, rank: int, boundary: str, masked: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        kernel, stride, dilation = ((2, 3, 2)[:rank], (2, 1, 1)[:rank], (1, 1, 2)[-rank:])
        padding = ((1, 2), (1, 1), (0, 1))[:rank]
        self.how = {"kernel_size": kernel, "stride": stride, "padding": padding, "dilation": dilation, "boundary": boundary}
        self.offsets, self.masks = 2 * rank * math.prod(kernel), 2 * math.prod(kernel) * masked
        extents = (d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True))
        layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
        self.pad = [amount for pair in padding[::-1] for amount in pair]
        self.predictor = layer(4, self.offsets + self.masks, tuple(extents), stride=stride)
        nn.init.normal_(self.predictor.weight, std=0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        predicted = self.predictor(nn.functional.pad(x, self.pad))
        mask = predicted[:, self.offsets :] if self.masks else None
        result: torch.Tensor = deform_aggregate(x, predicted[:, : self.offsets], mask, **self.how)
        return result


def aggregate(rank: int, boundary: str = "zeros", masked: bool = True) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """The net, an input and a larger one."""
    sizes = zip((2, 5), SIZES[rank], strict=True)
    return Aggregate(rank, boundary, masked).eval(), *(torch.rand(batch, 4, *size) for batch, size in sizes)
