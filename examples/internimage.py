"""InternImage and FlashInternImage for classification, whose published checkpoints load as they are.

Both are stages of residual layers, DCNv3 or DCNv4 in the place of attention, and then a perceptron. Modules have the authors'
names: `internimage_t().load_state_dict(torch.load("internimage_t_1k_224.pth")["model"])`. The sizes T to XL are these classes
with other numbers. Stochastic depth, which has no parameters, is left out.

Run: python examples/internimage.py
"""

from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from deformconv.vision import DCNv3, DCNv4


class Permute(nn.Module):
    def __init__(self, *axes: int) -> None:
        super().__init__()
        self.axes = axes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(self.axes)


def norm(channels: int, first_in: bool = False, first_out: bool = False) -> nn.Sequential:
    """A norm of each pixel. Channels are the last axis, unless they are the first one of what comes in or goes out."""
    before, after = [Permute(0, 2, 3, 1)] * first_in, [Permute(0, 3, 1, 2)] * first_out
    return nn.Sequential(*before, nn.LayerNorm(channels, eps=1e-6), *after)


class Stem(nn.Module):
    """An image (N, 3, H, W) as a map (N, H/4, W/4, C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels // 2, 3, stride=2, padding=1)
        self.norm1 = norm(channels // 2, first_in=True, first_out=True)
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(channels // 2, channels, 3, stride=2, padding=1)
        self.norm2 = norm(channels, first_in=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm2(self.conv2(self.act(self.norm1(self.conv1(x)))))


class Downsample(nn.Module):
    """A map (N, H, W, C) as one of half the size and twice the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1, bias=False)
        self.norm = norm(2 * channels, first_in=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x.permute(0, 3, 1, 2)))


class Perceptron(nn.Module):
    def __init__(self, channels: int, bias: bool) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Layer(nn.Module):
    """Two residual steps on a map (N, H, W, C), each scaled by a number for each channel where there is a `layer_scale`."""

    def __init__(
        self, channels: int, group: int, flash: bool, bias: bool, post_norm: bool, layer_scale: float | None, **dcn: Any
    ) -> None:
        super().__init__()
        self.norm1 = norm(channels)
        if flash:
            self.dcn = DCNv4(channels, group=group, output_bias=bias, **dcn)
        else:
            self.dcn = DCNv3(channels, group=group, **dcn)
        self.norm2, self.mlp = norm(channels), Perceptron(channels, bias)
        self.flash, self.post_norm, self.gamma1, self.gamma2 = flash, post_norm, 1.0, 1.0
        if layer_scale is not None:
            self.gamma1 = nn.Parameter(torch.full((channels,), layer_scale))
            self.gamma2 = nn.Parameter(torch.full((channels,), layer_scale))

    def sample(self, x: torch.Tensor) -> torch.Tensor:
        if not self.flash:
            return self.dcn(x)
        size = x.shape[1:3]
        return self.dcn(x.flatten(1, 2), size).unflatten(1, size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.post_norm:
            x = x + self.gamma1 * self.norm1(self.sample(x))
            return x + self.gamma2 * self.norm2(self.mlp(x))
        x = x + self.gamma1 * self.sample(self.norm1(x))
        return x + self.gamma2 * self.mlp(self.norm2(x))


class Stage(nn.Module):
    """Layers, and half the size for the next stage."""

    def __init__(self, channels: int, depth: int, is_last: bool, post_norm: bool, **layer: Any) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*[Layer(channels, post_norm=post_norm, **layer) for _ in range(depth)])
        self.norm = nn.Identity() if post_norm else norm(channels)
        self.downsample = nn.Identity() if is_last else Downsample(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.downsample(self.norm(self.blocks(x)))


class InternImage(nn.Module):
    """Images (N, 3, H, W) to scores (N, num_classes). `dcn` are arguments for DCNv3, or with `flash` for DCNv4."""

    def __init__(
        self,
        channels: int = 64,
        depths: tuple[int, ...] = (4, 4, 18, 4),
        groups: tuple[int, ...] = (4, 8, 16, 32),
        num_classes: int = 1000,
        *,
        flash: bool = False,
        bias: bool = True,
        post_norm: bool = False,
        layer_scale: float | None = None,
        **dcn: Any,
    ) -> None:
        super().__init__()
        layer = {"flash": flash, "bias": bias, "post_norm": post_norm, "layer_scale": layer_scale, **dcn}
        self.patch_embed = Stem(channels)
        self.levels = nn.Sequential(*[
            Stage(channels * 2**i, depth, i == len(depths) - 1, group=group, **layer)
            for i, (depth, group) in enumerate(zip(depths, groups, strict=True))
        ])  # fmt: skip
        wide = channels * 2 ** (len(depths) - 1)
        last = wide * 3 // 2
        self.conv_head = nn.Sequential(nn.Conv2d(wide, last, 1, bias=False), nn.Sequential(nn.BatchNorm2d(last)), nn.GELU())
        self.head = nn.Linear(last, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, DCNv3 | DCNv4):
                module.reset_parameters()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.levels(self.patch_embed(x))
        return self.head(self.conv_head(x.permute(0, 3, 1, 2)).mean((2, 3)))


def internimage_t(**arguments: Any) -> InternImage:
    return InternImage(**arguments)


def flash_internimage_t(**arguments: Any) -> InternImage:
    return InternImage(flash=True, bias=False, **arguments)


if __name__ == "__main__":
    torch.manual_seed(0)
    images, labels = torch.rand(2, 3, 64, 64), torch.tensor([3, 5])
    for make in (internimage_t, flash_internimage_t):
        net = make(num_classes=10)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
        scores = net(images)
        loss = cross_entropy(scores, labels)
        loss.backward()
        optimizer.step()
        millions = sum(parameter.numel() for parameter in net.parameters()) / 1e6
        print(f"{make.__name__}: {millions:.1f} million parameters, scores {tuple(scores.shape)}")
        print(f"loss {loss:.3f}, a step later {cross_entropy(net(images), labels):.3f}")
