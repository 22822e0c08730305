"""Three small nets of equal budget (plain, v1, v2), trained side by side on the same scattered digits."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from deformconv.studies import digits
from deformconv.studies.digits import Digits
from deformconv.studies.schedule import KINDS, Schedule, batches
from deformconv.torch import DeformConv2d, parameter_groups

__all__ = ["KINDS", "DigitNet", "Run", "Schedule", "accuracy", "multiply_adds", "scores", "train"]

# The output positions of each of a net's convolutions.
POSITIONS = (20 * 20, 20 * 20, 20 * 20, 10 * 10, 10 * 10)


class DigitNet(nn.Module):
    """Five 3x3 convolutions over a 40 x 40 canvas, the third and the fifth deformable, and a linear layer.

    Channels: 1 -> 12 (stride 2) -> 16 -> middle -> 32 (stride 2) -> middle, maximum over positions -> 10.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        first, second = KINDS[kind]
        self.body = nn.Sequential(
            _block(nn.Conv2d(1, 12, 3, stride=2, padding=1, bias=False)),
            _block(nn.Conv2d(12, 16, 3, padding=1, bias=False)),
            _block(_middle(kind, 16, first)),
            _block(nn.Conv2d(first, 32, 3, stride=2, padding=1, bias=False)),
            _block(_middle(kind, 32, second)),
        )
        self.head = nn.Linear(second, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Scores (N, 10) of images (N, 1, 40, 40)."""
        features: Tensor = self.body(images)
        scores: Tensor = self.head(features.amax((2, 3)))
        return scores


def _middle(kind: str, in_channels: int, out_channels: int) -> nn.Conv2d | DeformConv2d:
    if kind == "plain":
        return nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
    return DeformConv2d(in_channels, out_channels, 3, padding=1, bias=False, modulated=kind == "v2")


def _block(convolution: nn.Conv2d | DeformConv2d) -> nn.Module:
    return nn.Sequential(convolution, nn.BatchNorm2d(convolution.out_channels), nn.ReLU(inplace=True))


def multiply_adds(net: DigitNet) -> int:
    """Multiply-adds of the convolutions on one image; a sample takes 4 for its corners, 1 for its mask."""
    total = 0
    for block, positions in zip(net.body, POSITIONS, strict=True):
        total += positions * sum(p.numel() for p in block.parameters() if p.ndim == 4)
        for layer in block.modules():
            if isinstance(layer, DeformConv2d):
                total += positions * 9 * layer.in_channels * (5 if layer.modulated else 4)
    return total


@dataclass
class Run:
    """One net and how its training went."""

    kind: str
    seed: int
    net: DigitNet
    losses: list[float] = field(default_factory=list)  # one a step
    accuracies: dict[int, float] = field(default_factory=dict)  # held-out, by step
    seconds: list[float] = field(default_factory=list)  # one a step

    @property
    def accuracy(self) -> float:
        """Held-out accuracy after the last step."""
        return self.accuracies[max(self.accuracies)]

    @property
    def seconds_per_step(self) -> float:
        return median(self.seconds)


def train(training: Digits, held_out: Digits, schedule: Schedule, seed: int) -> Iterator[list[Run]]:
    """Train one net of each kind, step by step on the same batches; yields all runs after every step.

    `training` are scans, placed anew for every batch; `held_out` are canvases.
    """
    runs, optimizers, schedulers = [], [], []
    for kind in KINDS:
        torch.manual_seed(seed)
        net = DigitNet(kind)
        optimizer = torch.optim.AdamW(parameter_groups(net, schedule.learning_rate), weight_decay=0.01)
        peaks = [group["lr"] for group in optimizer.param_groups]
        schedulers.append(torch.optim.lr_scheduler.OneCycleLR(optimizer, peaks, schedule.steps))
        optimizers.append(optimizer)
        runs.append(Run(kind, seed, net))
    for step, batch in enumerate(batches(training, schedule, seed), 1):
        images, labels = torch.from_numpy(batch.images)[:, None], torch.from_numpy(batch.labels)
        for run, optimizer, scheduler in zip(runs, optimizers, schedulers, strict=True):
            started = time.perf_counter()
            loss = cross_entropy(run.net.train()(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.seconds.append(time.perf_counter() - started)
            run.losses.append(loss.item())
            scheduler.step()
            if step in schedule.evaluation_steps:
                run.accuracies[step] = accuracy(run.net, held_out)
        yield runs


@torch.inference_mode()
def scores(net: DigitNet, images: digits.Images) -> Tensor:
    """The scores (N, 10) of canvases (N, 40, 40), computed in evaluation mode."""
    net.eval()
    return torch.cat([net(part) for part in torch.from_numpy(images)[:, None].split(250)])


def accuracy(net: DigitNet, canvases: Digits) -> float:
    """The share of canvases whose highest score is their label's."""
    return float((scores(net, canvases.images).argmax(1).numpy() == canvases.labels).mean())
