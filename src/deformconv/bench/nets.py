"""Whole nets: what a deformable layer costs where people use it, between other layers of PyTorch.

A net is built once with plain convolutions and once with each library's deformable layers in their places: a predictor, which
is a plain convolution, and the library's operator. The weights are the same in all of them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, ClassVar, NamedTuple

from deformconv.bench.cases import named
from deformconv.bench.peers import DIRECTIONS, Arrays, Peer

__all__ = ["NETS", "NET_PEERS", "QUICK_NETS", "Net", "net_of"]

FORWARD, TRAINING = DIRECTIONS


class Net(NamedTuple):
    """A net and the images that it is measured on."""

    name: str
    batch: int
    size: tuple[int, ...]
    channels: int = 3  # of the images
    depth: int = 0  # of a ResNet, 18 or 50; 0 for a block

    @property
    def shape(self) -> str:
        return "x".join(map(str, (self.batch, self.channels, *self.size)))

    @property
    def what(self) -> str:
        """The net in words."""
        if not self.depth:
            return f"2 x (layer {self.channels} -> {self.channels}, BatchNorm, ReLU)"
        return f"ResNet-{self.depth}, {STAGES[self.depth][1]} deformable layers"

    @property
    def tolerance(self) -> float:
        """How far a right library may be from the truth, both in float64."""
        return 1e-6

    @property
    def checked(self) -> Net:
        """The net on small images, for which it is compared with the truth."""
        return self._replace(batch=2, size=(96, 128) if self.depth else (12, 15))


# Where the papers have deformable layers: the 3x3 convolutions of conv5, and of conv3 to conv5; and how many that are.
STAGES = {18: (("layer4",), 4), 50: (("layer2", "layer3", "layer4"), 13)}

NETS = (
    *(
        Net(f"block-{case.name}", case.batch, case.size, case.in_channels)
        for case in map(named, ("c64-56", "c128-28", "c256-56", "c512-14", "c256-100"))
    ),
    Net("resnet18-224", 8, (224, 224), depth=18),
    Net("resnet50-224", 4, (224, 224), depth=50),
    Net("resnet18-800", 1, (800, 1333), depth=18),
    Net("resnet50-800", 1, (800, 1333), depth=50),
)
QUICK_NETS = ("block-c64-56", "block-c128-28")


def net_of(fields: dict[str, Any]) -> Net:
    """A net from its fields as JSON keeps them."""
    return Net(**{**fields, "size": tuple(fields["size"])})


class _Made(NamedTuple):
    """A net, and what it is run on."""

    net: Any
    x: Any
    grad_output: Any
    optimizer: Any


class NetPeer(Peer):
    """One library's layers in the nets."""

    packages: ClassVar[tuple[str, ...]] = ("torch", "torchvision")

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

    @staticmethod
    def read(fields: dict[str, Any]) -> Net:
        return net_of(fields)

    @abstractmethod
    def layer(self, conv: Any) -> Any:
        """The layer in the place of a plain convolution, with its weights."""

    def prepare(self, case: Any) -> None:
        self.case = case
        self.made: Any = None

    def make(self, case: Net, dtype: Any) -> _Made:
        """The net with layers of this library; the same weights in every library and process."""
        torch = self.torch
        # glibc gives memory back to the system after every operation, and takes it anew page by page, until a process has
        # freed a large piece once. Which of two equal processes did was a third of a small net's time.
        torch.empty(30 << 20, dtype=torch.uint8)
        torch.manual_seed(0)
        net = _resnet(case.depth) if case.depth else _block(case.channels)
        predictors = torch.Generator().manual_seed(1)
        for owner, name, conv in _replaceable(net, case.depth):
            setattr(owner, name, self._replaced(conv, predictors))
        net = net.to(dtype)
        generator = torch.Generator().manual_seed(2)
        x = torch.randn(case.batch, case.channels, *case.size, generator=generator).to(dtype)
        shape = (net.fc.out_features,) if case.depth else x.shape[1:]
        grad_output = torch.randn(case.batch, *shape, generator=generator).to(dtype)
        # So small a rate that the net stays as it is; the step takes as long as any other.
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-12, momentum=0.9)
        # A block stands inside of a net, where its input has a gradient; a ResNet's input is an image.
        return _Made(net, x.requires_grad_(not case.depth), grad_output, optimizer)

    def _replaced(self, conv: Any, generator: Any) -> Any:
        layer = self.layer(conv)
        predictor = getattr(layer, "offset_conv", None)
        if predictor is not None:  # offsets of about a pixel, as a trained net has them
            weight = self.torch.randn(predictor.weight.shape, generator=generator)
            weight /= predictor.weight[0].numel() ** 0.5
            predictor.load_state_dict({"weight": weight, "bias": self.torch.zeros(len(weight))})
        return layer

    def context(self, direction: str) -> AbstractContextManager[Any]:
        if self.made is None:
            self.made = self.make(self.case, self.torch.float32)
        self.made.net.train(direction == TRAINING)
        return nullcontext() if direction == TRAINING else self.torch.inference_mode()

    def call_of(self, direction: str) -> Callable[[], Any]:
        return partial(_step, *self.made) if direction == TRAINING else partial(self.made.net, self.made.x)

    def results(self, direction: str) -> Arrays:
        """The output, and after a step of training the gradients, of the small net in float64."""
        made = self.make(self.case.checked, self.torch.float64)
        made.net.train(direction == TRAINING)
        if direction != TRAINING:
            with self.torch.inference_mode():
                return {"output": made.net(made.x).numpy()}
        found: Arrays = {"output": _step(*made).detach().numpy()}
        return found | {name: parameter.grad.numpy() for name, parameter in made.net.named_parameters()}


def _step(net: Any, x: Any, grad_output: Any, optimizer: Any) -> Any:
    """A step of training."""
    optimizer.zero_grad()
    x.grad = None
    output = net(x)
    output.backward(grad_output)
    optimizer.step()
    return output


def _block(channels: int) -> Any:
    from torch import nn

    def layer() -> list[Any]:
        return [nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]

    return nn.Sequential(*layer(), *layer())


def _resnet(depth: int) -> Any:
    from torchvision import models

    return getattr(models, f"resnet{depth}")()


def _replaceable(net: Any, depth: int) -> list[tuple[Any, str, Any]]:
    """The convolutions that deformable layers replace: the module and the attribute that hold each, and itself."""
    stages = [getattr(net, stage) for stage in STAGES[depth][0]] if depth else [net]
    return [
        (owner, name, child)
        for stage in stages
        for owner in stage.modules()
        for name, child in owner.named_children()
        if getattr(child, "kernel_size", None) == (3, 3)
    ]


def _pack(operator: Callable[..., Any], conv: Any) -> Any:
    """A layer as users of an operator write it: a plain convolution predicts offsets and mask."""
    import torch
    from torch import nn

    class Pack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.window = conv.weight, (conv.stride, conv.padding, conv.dilation)
            self.offset_conv = nn.Conv2d(conv.in_channels, 27, 3, *self.window)

        def forward(self, input: Any) -> Any:
            offset, mask = self.offset_conv(input).split((18, 9), 1)
            return operator(input, offset, self.weight, None, *self.window, 2 * torch.sigmoid(mask))

    return Pack()


class DeformconvNet(NetPeer):
    name, title = "deformconv-net", "deformconv"

    def layer(self, conv: Any) -> Any:
        from deformconv.torch import DeformConv2d

        layer = DeformConv2d(conv.in_channels, conv.out_channels, 3, conv.stride, conv.padding, conv.dilation, bias=False)
        layer.load_state_dict(conv.state_dict(), strict=False)
        return layer


class TorchvisionNet(NetPeer):
    name, title = "torchvision-net", "torchvision"

    def layer(self, conv: Any) -> Any:
        from torchvision.ops import deform_conv2d

        return _pack(deform_conv2d, conv)


class KorniaNet(NetPeer):
    name, title = "kornia-net", "kornia"
    packages = ("torch", "torchvision", "kornia")

    def layer(self, conv: Any) -> Any:
        from kornia.feature.aliked.deform_conv2d import deform_conv2d

        return _pack(deform_conv2d, conv)


class DenseNet(NetPeer):
    """The net as it was, of plain convolutions."""

    name, title = "dense-net", "plain net"
    deforms = False

    def layer(self, conv: Any) -> Any:
        return conv


class TruthNet(NetPeer):
    """The net that results are compared with: deformable layers in array operations."""

    name, title = "truth-net", "truth"

    def layer(self, conv: Any) -> Any:
        from deformconv.torch import deform_conv2d

        return _pack(partial(deform_conv2d, backend="portable"), conv)


NET_PEERS: dict[str, type[NetPeer]] = {
    peer.name: peer for peer in (DeformconvNet, TorchvisionNet, KorniaNet, DenseNet, TruthNet)
}
