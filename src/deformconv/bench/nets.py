"""Whole nets: what a deformable layer costs where people use it, between other layers of PyTorch.

A net is built once with deformable layers and once with plain convolutions in their places. A library's layer is a predictor (a
plain convolution) and the library's operator; the weights are the same in all of them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, ClassVar, NamedTuple

from deformconv.bench.cases import named
from deformconv.bench.peers import Arrays, Peer

__all__ = ["NETS", "NET_PEERS", "QUICK_NETS", "Net", "net_named"]


class Net(NamedTuple):
    """A net and the images that it is measured on."""

    name: str
    batch: int
    size: tuple[int, int]
    blocks: int = 0  # channels of a net of two layers, each with BatchNorm and ReLU; 0 for a ResNet
    depth: int = 0  # of a ResNet: 18 or 50

    @property
    def shape(self) -> str:
        return "x".join(map(str, (self.batch, self.blocks or 3, *self.size)))

    @property
    def what(self) -> str:
        """The net in words."""
        if self.blocks:
            return f"2 x (layer {self.blocks} -> {self.blocks}, BatchNorm, ReLU)"
        return f"ResNet-{self.depth}, {DEFORMABLE[self.depth][1]} deformable layers"

    @property
    def tolerance(self) -> float:
        """How far float32 may be from float64: BatchNorm and many layers add up what rounding does to each."""
        return 1e-3 if self.blocks else 2e-2


# Where the DCNv2 paper has deformable layers: the 3x3 convolutions of conv5 in a small net, of conv3 to conv5 in a large one.
DEFORMABLE = {18: (("layer4",), 4), 50: (("layer2", "layer3", "layer4"), 13)}

NETS = (
    *(
        Net(f"block-{case.name}", case.batch, case.size, blocks=case.in_channels)  # type: ignore[arg-type]
        for case in map(named, ("c64-56", "c128-28", "c256-56", "c512-14", "c256-100"))
    ),
    Net("resnet18-224", 8, (224, 224), depth=18),
    Net("resnet50-224", 4, (224, 224), depth=50),
    Net("resnet18-800", 1, (800, 1333), depth=18),
    Net("resnet50-800", 1, (800, 1333), depth=50),
)
QUICK_NETS = ("block-c64-56", "block-c128-28")


def net_named(name: str) -> Net:
    return next(net for net in NETS if net.name == name)


def net_of(fields: dict[str, Any]) -> Net:
    """A net from its fields as JSON keeps them."""
    return Net(**{**fields, "size": tuple(fields["size"])})


class _NetPeer(Peer):
    """One library's layers in the nets."""

    packages: ClassVar[tuple[str, ...]] = ("torch", "torchvision")
    read = staticmethod(net_of)

    def __init__(self, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.torch = torch

    @classmethod
    def reason_against(cls, case: Any, direction: str) -> str | None:
        return None

    @classmethod
    def embeds(cls, case: Any) -> bool:
        return False

    @abstractmethod
    def layer(self, conv: Any) -> Any:
        """The layer in the place of a plain convolution, with its weights."""

    def prepare(self, case: Any) -> None:
        # glibc gives memory back to the system, and takes it again page by page, until a process has freed a large piece once.
        # Whether it did decides about a third of a small net's time, in one process so and in the next one otherwise.
        del_ = self.torch.empty(30 << 20, dtype=self.torch.uint8)
        del del_
        self.torch.manual_seed(0)
        net = _block(case.blocks) if case.blocks else _resnet(case.depth)
        predictors = self.torch.Generator().manual_seed(1)
        for place, name, conv in _places(net):
            setattr(place, name, self._replaced(conv, predictors))
        generator = self.torch.Generator().manual_seed(2)
        x = self.torch.randn(case.batch, case.blocks or 3, *case.size, generator=generator)
        # A block stands inside of a net, where its input has a gradient.
        self.net, self.x = self._as_wanted(net), self._as_wanted(x).requires_grad_(case.blocks > 0)
        shape = self.net(self.x).shape
        self.grad_output = self._as_wanted(self.torch.randn(shape, generator=generator))
        # The smallest of steps: it takes as long as any, and the net stays what it is.
        self.optimizer = self.torch.optim.SGD(self.net.parameters(), lr=1e-12, momentum=0.9)

    def _as_wanted(self, what: Any) -> Any:
        return what

    def _replaced(self, conv: Any, generator: Any) -> Any:
        layer = self.layer(conv)
        predictor = getattr(layer, "offset_conv", None)
        if predictor is not None:  # offsets of about a pixel, as a trained net has
            fan_in = predictor.weight[0].numel()
            weight = self.torch.randn(predictor.weight.shape, generator=generator) / fan_in**0.5
            predictor.load_state_dict({"weight": weight, "bias": self.torch.zeros(len(weight))})
        return layer

    def context(self, direction: str) -> AbstractContextManager[Any]:
        self.net.train(direction != "forward")
        return self.torch.inference_mode() if direction == "forward" else nullcontext()

    def call_of(self, direction: str) -> Callable[[], Any]:
        return self.forward if direction == "forward" else self.train

    def forward(self) -> Any:
        return self.net(self.x)

    def train(self) -> Any:
        self.optimizer.zero_grad()
        self.x.grad = None
        output = self.net(self.x)
        output.backward(self.grad_output)
        self.optimizer.step()
        return output

    def results(self, direction: str) -> Arrays:
        with self.context(direction):
            found: Arrays = {"output": self.call_of(direction)().detach().numpy()}
        if direction != "forward":
            parameters = {name: p for name, p in self.net.named_parameters() if p.grad is not None}
            for name in [*parameters][:: max(1, len(parameters) // 8)]:  # of some layers, the first one among them
                found[name] = parameters[name].grad.numpy()
        return found


def _block(channels: int) -> Any:
    from torch import nn

    def layer() -> list[Any]:
        return [nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]

    return nn.Sequential(*layer(), *layer())


def _resnet(depth: int) -> Any:
    from torchvision import models

    return getattr(models, f"resnet{depth}")()


def _places(net: Any) -> list[tuple[Any, str, Any]]:
    """The convolutions that deformable layers replace: the module and the attribute that hold each, and itself."""
    parts = [net] if not hasattr(net, "layer4") else [
        getattr(net, stage) for stage in DEFORMABLE[18 if len(net.layer3) == 2 else 50][0]
    ]  # fmt: skip
    return [
        (place, name, child)
        for part in parts
        for place in part.modules()
        for name, child in place.named_children()
        if getattr(child, "kernel_size", None) == (3, 3)
    ]


def _pack(operator: Callable[..., Any]) -> Callable[[Any], Any]:
    """A layer as users of such an operator write it: a plain convolution predicts offsets and mask."""
    import torch
    from torch import nn

    class Pack(nn.Module):
        def __init__(self, conv: Any) -> None:
            super().__init__()
            self.weight, self.stride, self.padding, self.dilation = conv.weight, conv.stride, conv.padding, conv.dilation
            self.offset_conv = nn.Conv2d(conv.in_channels, 27, 3, conv.stride, conv.padding, conv.dilation)

        def forward(self, input: Any) -> Any:
            offset, mask = self.offset_conv(input).split((18, 9), 1)
            mask = 2 * torch.sigmoid(mask)
            return operator(input, offset, self.weight, None, self.stride, self.padding, self.dilation, mask)

    return Pack


class DeformconvNet(_NetPeer):
    name, title = "deformconv-net", "deformconv"

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        import deformconv

        deformconv.set_num_threads(threads)

    def layer(self, conv: Any) -> Any:
        from deformconv.torch import DeformConv2d

        layer = DeformConv2d(
            conv.in_channels, conv.out_channels, 3, conv.stride, conv.padding, conv.dilation, bias=False
        )
        layer.load_state_dict(conv.state_dict(), strict=False)
        return layer


class TruthNet(_NetPeer):
    """What the results are compared with: array operations in float64."""

    name, title = "truth-net", "truth"

    def layer(self, conv: Any) -> Any:
        from deformconv.torch import deform_conv2d

        return _pack(partial(deform_conv2d, backend="portable"))(conv)

    def _as_wanted(self, what: Any) -> Any:
        return what.double()


class TorchvisionNet(_NetPeer):
    name, title = "torchvision-net", "torchvision"

    def layer(self, conv: Any) -> Any:
        from torchvision.ops import deform_conv2d

        return _pack(deform_conv2d)(conv)


class KorniaNet(_NetPeer):
    name, title = "kornia-net", "kornia"
    packages = ("torch", "torchvision", "kornia")

    def layer(self, conv: Any) -> Any:
        from kornia.feature.aliked.deform_conv2d import deform_conv2d

        return _pack(deform_conv2d)(conv)


class DenseNet(_NetPeer):
    """The net as it was, of plain convolutions."""

    name, title = "dense-net", "plain net"
    deforms = False

    def layer(self, conv: Any) -> Any:
        return conv


NET_PEERS: dict[str, type[_NetPeer]] = {
    peer.name: peer for peer in (DeformconvNet, TorchvisionNet, KorniaNet, DenseNet, TruthNet)
}
