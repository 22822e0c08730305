"""Swap the last convolution of a trained net for a deformable one, and train on.

The net tells upright bars from lying ones, at random angles around both. The swapped layer takes the convolution's
weights, so that the net computes at first what it computed before.

Run: python examples/swap_and_train.py
"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from deformconv.torch import DeformConv2d, parameter_groups


def bars(count: int, random: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, 1, 24, 24) of bars, and labels: 0 upright, 1 lying."""
    labels = torch.randint(2, (count,), generator=random)
    angle = (torch.rand(count, generator=random) - 0.5) * 1.2 + labels * torch.pi / 2  # 34 degrees to either side
    centre = torch.randint(9, 15, (count, 2), generator=random).float()
    rows, columns = torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij")
    dy, dx = rows - centre[:, 0, None, None], columns - centre[:, 1, None, None]
    sine, cosine = angle.sin()[:, None, None], angle.cos()[:, None, None]
    along, across = cosine * dy + sine * dx, cosine * dx - sine * dy
    images = ((along.abs() < 7) & (across.abs() < 1.5)).float()
    return images[:, None] + 0.3 * torch.randn(count, 1, 24, 24, generator=random), labels


def train(net: nn.Module, steps: int, random: torch.Generator) -> float:
    """Train and return the mean loss of the last 10 steps."""
    optimizer = torch.optim.SGD(parameter_groups(net, lr=0.1), momentum=0.9)  # predictors of offsets: 0.01
    losses = []
    for _ in range(steps):
        images, labels = bars(32, random)
        loss = cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-10:]) / 10


torch.manual_seed(0)
random = torch.Generator().manual_seed(0)
net = nn.Sequential(
    nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
    nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2),
)  # fmt: skip
print(f"loss of the plain net: {train(net, 30, random):.3f}")

images, _ = bars(8, random)
before = net.eval()(images)
deformable = DeformConv2d(8, 16, 3, padding=1, max_offset=3)
missing, unexpected = deformable.load_state_dict(net[3].state_dict(), strict=False)
print("left as they were:", ", ".join(missing))
net[3] = deformable
print("same outputs after the swap:", torch.allclose(net(images), before, atol=1e-5))

print(f"loss after 60 steps more, deformable: {train(net.train(), 60, random):.3f}")
offset, mask = deformable.offsets_and_mask(net[:3](images))
print(f"offsets learned: up to {offset.abs().max():.2f} pixels; masks {mask.min():.2f} to {mask.max():.2f}")
