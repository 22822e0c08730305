"""The small trained net that the package ships, so that there is something to look at without a net of one's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from deformconv.torch import DeformConv2d
from deformconv.torch.loading import noted

__all__ = ["FILE", "STEP", "ExampleNet", "example_net", "save"]

FILE = Path(__file__).with_name("example.npz")
STEP = 4  # image pixels from cell to cell, of all maps but those of the first convolutions; cell (0, 0) lies at pixel (0, 0)
LAYERS = ("first", "second", "third")  # the deformable ones, by name
DILATION = 3  # the undeformed windows reach so many cells to each side
MAX_OFFSET = 6.0  # cells
_TAPS, _CHANNELS, _GUIDES = 9, 16, 32


class ExampleNet(nn.Module):
    """Paints a picture, coarsely, with the mean colour of what each place belongs to.

    Two paths begin at the picture. `guide`, some residual blocks, looks at the surroundings and predicts where the deformable
    layers sample, and how much each sample counts. `stem` carries colours: it blurs a little and makes the map smaller, with
    nothing but sums. Three deformable layers, `first`, `second` and `third`, then gather these colours, and `head` names the
    colour found. Nothing else reaches the output, so that what is painted is what was sampled.

    Args:
        deformable: False holds the offsets at zero: the same net without what it is to show, for comparison.

    The input are images (N, 3, H, W), float32 in 0 to 1, of any size; the output (N, 3, ceil(H/4), ceil(W/4)), whose cell
    (0, 0) is that of pixel (0, 0), with 4 pixels from cell to cell. The maps between have the same cells.
    """

    def __init__(self, *, deformable: bool = True) -> None:
        super().__init__()
        self.deformable = deformable
        self.stem = nn.Sequential(
            nn.Conv2d(3, _CHANNELS, 3, 2, padding=1, bias=False), nn.Conv2d(_CHANNELS, _CHANNELS, 3, 2, padding=1, bias=False)
        )
        self.guide = nn.Sequential(
            *_normalised(3, _GUIDES // 2, stride=2), nn.ReLU(), *_normalised(_GUIDES // 2, _GUIDES, stride=2), nn.ReLU(),
            *(_Block(_GUIDES, dilation) for dilation in (1, 2, 4, 2)),
        )  # fmt: skip
        self.predict = nn.ModuleList(nn.Conv2d(_GUIDES, 3 * _TAPS, 3, padding=1) for _ in LAYERS)
        for name in LAYERS:
            layer = DeformConv2d(_CHANNELS, _CHANNELS, 3, padding=DILATION, dilation=DILATION, predict_offsets=False)
            self.add_module(name, layer)
        self.head = nn.Conv2d(_CHANNELS, 3, 1)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Let the net begin as one that takes the mean of the colours in its undeformed windows."""
        blur = torch.tensor([0.25, 0.5, 0.25])
        colours, _ = torch.linalg.qr(torch.randn(_CHANNELS, 3))
        same = torch.eye(_CHANNELS)
        for convolution, mix in zip(self.stem, (colours, same), strict=True):
            convolution.get_parameter("weight").copy_(mix[:, :, None, None] * torch.outer(blur, blur))
        for name in LAYERS:
            layer = self.get_submodule(name)
            layer.get_parameter("weight").copy_((same / _TAPS)[:, :, None, None])
            layer.get_parameter("bias").zero_()
        self.head.weight.copy_(colours.T[:, :, None, None])
        for parameter in (*self.predict.parameters(), self.head.get_parameter("bias")):
            parameter.zero_()

    def forward(self, images: Tensor) -> Tensor:
        painted, _ = self.paint(images, images)
        return painted

    def paint(self, images: Tensor, coloured: Tensor) -> tuple[Tensor, list[Tensor]]:
        """What `forward` computes, with colours from other images (training spoils these), and each layer's offsets."""
        guides, values = self.guide(images), self.stem(coloured)
        offsets = []
        for name, predict in zip(LAYERS, self.predict, strict=True):
            offset, mask = predict(guides).split((2 * _TAPS, _TAPS), 1)
            offset = MAX_OFFSET * torch.tanh(offset / MAX_OFFSET) if self.deformable else torch.zeros_like(offset)
            values = self.get_submodule(name)(values, offset, 2 * torch.sigmoid(mask))
            offsets.append(offset)
        return self.head(values), offsets


def _normalised(in_channels: int, out_channels: int, *, stride: int = 1, dilation: int = 1) -> tuple[nn.Module, nn.Module]:
    convolution = nn.Conv2d(in_channels, out_channels, 3, stride, padding=dilation, dilation=dilation, bias=False)
    return convolution, nn.BatchNorm2d(out_channels)


class _Block(nn.Module):
    """Two convolutions, the first of them dilated, beside which the input passes."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_normalised(channels, channels, dilation=dilation), nn.ReLU(), *_normalised(channels, channels)
        )

    def forward(self, input: Tensor) -> Tensor:
        return torch.relu(input + self.body(input))


def save(net: ExampleNet, path: str | Path) -> None:
    """Write a net's parameters and buffers as NumPy's .npz: weights in float16, all else as it is."""
    arrays = {name: tensor.detach().cpu() for name, tensor in net.state_dict().items()}
    np.savez(path, **{name: (tensor.half() if tensor.ndim > 1 else tensor).numpy() for name, tensor in arrays.items()})


def example_net(path: str | Path = FILE) -> ExampleNet:
    """Return the trained net that the package ships, or another from a file of the same kind.

    It paints every place of a photograph with the mean colour of the object that the place belongs to. Its three deformable
    layers, `first`, `second` and `third`, have learned to sample within that object, which no undeformed window can do.
    `python -m deformconv.studies.regions` made it, from photographs inside the packages scikit-image and scikit-learn.

    Args:
        path: a file that `save` has written. Nothing in it is run: it holds arrays alone.

    Returns:
        An `ExampleNet` in evaluation mode: images (N, 3, H, W), float32 in 0 to 1, to colours (N, 3, ceil(H/4), ceil(W/4)).

    Example:
        >>> import torch
        >>> from deformconv.plots.example import example_net
        >>> net = example_net()
        >>> net(torch.rand(1, 3, 200, 301)).shape
        torch.Size([1, 3, 50, 76])
    """
    net = ExampleNet()
    with np.load(path, allow_pickle=False) as arrays:
        # Parameters are copied into the net's own, which are float32.
        net.load_state_dict(noted({name: torch.from_numpy(arrays[name]) for name in arrays.files}, net))
    return net.eval()
