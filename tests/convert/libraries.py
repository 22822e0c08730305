"""Other libraries' deformable layers as plain modules over torchvision's operator: their parameters, names and windows.

Each block has one layer, `conv2` as in a ResNet's block, and computes what the library computes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from deformconv.convert import to_torchvision
from deformconv.convert.layouts import LAYOUTS
from deformconv.torch import DeformConv2d, DeformRoIPool

CHANNELS, OUTPUTS, KERNEL = 4, 8, 3


class Geometry(NamedTuple):
    """A layer, as far as these tests vary it."""

    modulated: bool = True
    stride: int = 1
    padding: int = 1
    dilation: int = 1
    groups: int = 1
    offset_groups: int = 1
    bias: bool = True

    @property
    def predicted(self) -> int:
        return (2 + self.modulated) * self.offset_groups * KERNEL**2


class Holder(nn.Module):
    """What has a weight and a bias, and does not convolve by itself."""

    def __init__(self, geometry: Geometry, prefix: str = "") -> None:
        super().__init__()
        shape = OUTPUTS, CHANNELS // geometry.groups, KERNEL, KERNEL
        self.register_parameter(f"{prefix}weight", nn.Parameter(torch.empty(shape)))
        if geometry.bias:
            self.register_parameter(f"{prefix}bias", nn.Parameter(torch.empty(OUTPUTS)))


def predictor(geometry: Geometry, padding: int | None = None, dilation: int | None = None) -> nn.Conv2d:
    return nn.Conv2d(
        CHANNELS, geometry.predicted, KERNEL, geometry.stride,
        geometry.padding if padding is None else padding, geometry.dilation if dilation is None else dilation,
    )  # fmt: skip


def convolved(x: Tensor, raw: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, scale: float = 1.0) -> Tensor:
    """Deformable convolution of `x` by what a predictor gave: offsets, then what is the masks' before the sigmoid."""
    offset, mask = raw, None
    if geometry.modulated:  # the three parts, of which the first two are the offsets
        one, two, mask = torch.chunk(raw, 3, dim=1)
        offset, mask = torch.cat((one, two), dim=1), scale * torch.sigmoid(mask)
    return deform_conv2d(x, offset, weight, bias, geometry.stride, geometry.padding, geometry.dilation, mask)


class Pack(Holder):
    """DeformConv2dPack and ModulatedDeformConv2dPack of mmcv, DeformConvPack and ModulatedDeformConvPack of BasicSR."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__(geometry)
        self.geometry = geometry
        self.conv_offset = predictor(geometry)

    def forward(self, x: Tensor) -> Tensor:
        return convolved(x, self.conv_offset(x), self.weight, getattr(self, "bias", None), self.geometry)


class GuidedPack(Pack):
    """DCNv2Pack of BasicSR: offsets and masks from another feature."""

    def forward(self, x: Tensor, feature: Tensor) -> Tensor:
        return convolved(x, self.conv_offset(feature), self.weight, getattr(self, "bias", None), self.geometry)


class DCN(Holder):
    """DCN of CharlesShang's DCNv2: the predictor has no dilation."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__(geometry)
        self.geometry = geometry
        self.conv_offset_mask = predictor(geometry, dilation=1)

    def forward(self, x: Tensor) -> Tensor:
        return convolved(x, self.conv_offset_mask(x), self.weight, self.bias, self.geometry)


class DeformableConvV2(nn.Module):
    """Of PaddleDetection: the predictor has no dilation, and a padding of its own."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.geometry = geometry
        self.conv_offset = predictor(geometry, (KERNEL - 1) // 2, 1)
        self.conv_dcn = Holder(geometry)

    def forward(self, x: Tensor) -> Tensor:
        main = self.conv_dcn
        return convolved(x, self.conv_offset(x), main.weight, getattr(main, "bias", None), self.geometry)


class GluonBlock(Holder):
    """(Modulated)DeformableConvolution of MXNet's Gluon: a predictor with groups, masks of 2*sigmoid."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__(geometry, "deformable_conv_")
        self.geometry = geometry
        self.offset_weight = nn.Parameter(torch.empty(geometry.predicted, CHANNELS // geometry.groups, KERNEL, KERNEL))
        self.offset_bias = nn.Parameter(torch.empty(geometry.predicted))

    def forward(self, x: Tensor) -> Tensor:
        g = self.geometry
        raw = nn.functional.conv2d(x, self.offset_weight, self.offset_bias, g.stride, g.padding, g.dilation, g.groups)
        return convolved(x, raw, self.deformable_conv_weight, getattr(self, "deformable_conv_bias", None), g, 2.0)


class Block(nn.Module):
    """A block with the layer within, as mmcv, CharlesShang, Paddle and Gluon have it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.conv2 = layer

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.conv2(*inputs)


class SplitBlock(nn.Module):
    """DeformBottleneckBlock of detectron2, and mmdetection 1's Bottleneck: the predictor is the block's."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.geometry = geometry
        self.conv2_offset = predictor(geometry)
        self.conv2 = Holder(geometry)

    def forward(self, x: Tensor) -> Tensor:
        return convolved(x, self.conv2_offset(x), self.conv2.weight, getattr(self.conv2, "bias", None), self.geometry)


class Symbol(nn.Module):
    """The symbols of Deformable-ConvNets: names without points, masks of 2*sigmoid."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.geometry = geometry
        within = {"offset_": predictor(geometry), "": Holder(geometry)}
        for word, module in within.items():
            for name, parameter in module.named_parameters():
                self.register_parameter(f"arg:conv2_{word}{name}", parameter)

    def forward(self, x: Tensor) -> Tensor:
        g, named = self.geometry, dict(self.named_parameters())
        offset = named["arg:conv2_offset_weight"], named["arg:conv2_offset_bias"]
        raw = nn.functional.conv2d(x, *offset, g.stride, g.padding, g.dilation)
        return convolved(x, raw, named["arg:conv2_weight"], named.get("arg:conv2_bias"), g, 2.0)


class Guided(DeformConv2d):
    """This library's layer, with offsets and masks from another feature."""

    def forward(self, x: Tensor, feature: Tensor) -> Tensor:
        return super().forward(x, *self.offsets_and_mask(feature))


def ours(geometry: Geometry, kind: type[DeformConv2d] = DeformConv2d, **keywords: Any) -> Block:
    """This library's block."""
    g = geometry
    layer = kind(
        CHANNELS, OUTPUTS, KERNEL, g.stride, g.padding, g.dilation, g.groups, g.bias,
        modulated=g.modulated, offset_groups=g.offset_groups, **keywords,
    )  # fmt: skip
    return Block(layer)


BLOCKS = {
    "mmcv": lambda g: Block(Pack(g)),
    "mmdet1": SplitBlock,
    "detectron2": SplitBlock,
    "dcnv2": lambda g: Block(DCN(g)),
    "basicsr": lambda g: Block(GuidedPack(g)),
    "paddle": lambda g: Block(DeformableConvV2(g)),
    "mxnet": lambda g: Block(GluonBlock(g)),
    "mxnet_symbol": Symbol,
    "torchvision": lambda g: to_torchvision(ours(g)),
    "deformconv": ours,
}


def filled(block: nn.Module, seed: int = 0) -> nn.Module:
    """The block with random parameters, none of them near the least number of a half."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in block.parameters():
            size = torch.rand(parameter.shape, generator=generator) * 0.3 + 0.02
            sign = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
            parameter.copy_(size * sign)
    return block


SOURCES = tuple(BLOCKS)
V1 = set(SOURCES) - {"dcnv2", "basicsr", "paddle"}
NO_V1_WITH_BIAS = {"mmcv", "mmdet1", "detectron2"}
MATCHED = "<All keys matched successfully>"
POOLS: dict[str, dict[str, Any]] = {  # by source: what a pool must be
    "mmcv": {"trunk": "separate", "convention": "aligned", "mask_scale": 1.0},
    "mmdet1": {"trunk": "separate", "convention": "rounded", "mask_scale": 1.0},
    "dcnv2": {"trunk": "shared", "convention": "rounded", "mask_scale": 1.0},
    "torchvision": {},
    "deformconv": {},
}


def of(source, geometry=Geometry(), **keywords):  # noqa: B008
    """Our block for a source's: at the border MXNet computes v1 by another rule."""
    kind = Guided if source == "basicsr" else DeformConv2d
    return ours(geometry, kind, boundary=LAYOUTS[source].boundaries[geometry.modulated], **keywords)


def theirs(source, geometry=Geometry(), dtype=torch.float64, seed=0):  # noqa: B008
    return filled(BLOCKS[source](geometry), seed).to(dtype)


def assert_same(actual, expected):
    """The same names in the same order, and the same bits."""
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and actual[name].shape == tensor.shape, name
        assert torch.equal(actual[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


def inputs(source):
    generator = torch.Generator().manual_seed(1)
    number = 2 if source == "basicsr" else 1
    return [torch.rand(1, CHANNELS, 17, 15, generator=generator, dtype=torch.float64) for _ in range(number)]


def assert_equal_outputs(ours, theirs, source, geometry):
    with torch.no_grad():
        actual, expected = ours(*inputs(source)), theirs(*inputs(source))
    if LAYOUTS[source].boundaries[geometry.modulated] == "inside":
        # torchvision's operator has the other rule, which differs where a sample lies outside.
        actual, expected = actual[..., 3:-3, 3:-3], expected[..., 3:-3, 3:-3]
    assert expected.numel() and expected.abs().max() > 0.1
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


class Compiled(nn.Module):
    """Names as of what torch.compile returns."""

    def __init__(self, net):
        super().__init__()
        self._orig_mod = net


def pool_of(**keywords):
    return nn.ModuleDict({"pool": DeformRoIPool(2, 2, hidden=3, **keywords)})
