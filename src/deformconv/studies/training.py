"""A small plain net, trained on scattered digits, and what is made of it: trained on as it is, and with deformable layers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field, replace
from itertools import pairwise
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from deformconv.studies import digits
from deformconv.studies.digits import Digits
from deformconv.studies.schedule import CONVOLUTIONS, Schedule, batches
from deformconv.torch import DeformConv2d, parameter_groups
from deformconv.vision import make_deformable

__all__ = [
    "KINDS", "LONGER", "DigitNet", "Run", "Schedule", "Training", "accuracy", "multiply_adds", "of_kind", "scores", "train",
]  # fmt: skip

KINDS = ("plain", "longer", "v1", "v2")
# A net of kind "longer" is the plain one, trained on for so many times the others' steps that this costs no less than v2 does.
LONGER = 3


class DigitNet(nn.Module):
    """Three 3x3 convolutions over a 40 x 40 canvas, the maximum over positions, and a linear layer."""

    kind = "plain"

    def __init__(self) -> None:
        super().__init__()
        channels = (1, *(channels for channels, _ in CONVOLUTIONS))
        strides = (stride for _, stride in CONVOLUTIONS)
        self.body = nn.Sequential(*(_block(*pair, stride) for pair, stride in zip(pairwise(channels), strides, strict=True)))
        self.head = nn.Linear(channels[-1], 10)

    def forward(self, images: Tensor) -> Tensor:
        """Scores (N, 10) of images (N, 1, 40, 40)."""
        features: Tensor = self.body(images)
        scores: Tensor = self.head(features.amax((2, 3)))
        return scores


def _block(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    convolution = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


def of_kind(kind: str, trained: DigitNet) -> DigitNet:
    """A copy of a plain net, which computes the same, with deformable layers where its kind has some."""
    net = deepcopy(trained)
    net.kind = kind
    if kind in ("v1", "v2"):
        make_deformable(net, "body.[12].0", modulated=kind == "v2", max_offset=4)
    return net


def multiply_adds(net: DigitNet) -> int:
    """Multiply-adds of the convolutions on one image; a sample takes 4 for its corners, 1 for its mask."""
    total, side = 0, digits.CANVAS
    for block, (_, stride) in zip(net.body, CONVOLUTIONS, strict=True):
        side //= stride
        total += side**2 * sum(p.numel() for p in block.parameters() if p.ndim == 4)
        for layer in block.modules():
            if isinstance(layer, DeformConv2d):
                total += side**2 * 9 * layer.in_channels * (5 if layer.modulated else 4)
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


@dataclass(frozen=True)
class Training:
    """The plain net's training, and that of the nets that are made of it."""

    first: Schedule
    then: Schedule


def train(training: Digits, held_out: Digits, plan: Training, seed: int) -> Iterator[list[Run]]:
    """Train a plain net, then a copy of it of each kind, step by step on the same batches; yields the runs after every step.

    First there is one run, the plain net's; then there is one of each kind, which has the accuracy before its first step as
    that of step 0. `training` are scans, placed anew for every batch; `held_out` are canvases.
    """
    torch.manual_seed(seed)
    first = Run("plain", seed, DigitNet())
    yield from _side_by_side([first], [plan.first], training, held_out, (seed, 0))
    runs = [Run(kind, seed, of_kind(kind, first.net), accuracies={0: first.accuracy}) for kind in KINDS]
    longer = replace(plan.then, steps=LONGER * plan.then.steps)
    schedules = [longer if kind == "longer" else plan.then for kind in KINDS]
    yield from _side_by_side(runs, schedules, training, held_out, (seed, 1))


def _side_by_side(
    runs: list[Run], schedules: list[Schedule], training: Digits, held_out: Digits, seed: tuple[int, int]
) -> Iterator[list[Run]]:
    """Train each net by its schedule, one step of each in turn on the same batch, as long as the longest schedule lasts."""
    optimizers, schedulers = [], []
    for run, schedule in zip(runs, schedules, strict=True):
        optimizers.append(torch.optim.AdamW(parameter_groups(run.net, schedule.learning_rate), weight_decay=0.01))
        peaks = [group["lr"] for group in optimizers[-1].param_groups]
        schedulers.append(torch.optim.lr_scheduler.OneCycleLR(optimizers[-1], peaks, schedule.steps))
    longest = max(schedules, key=lambda schedule: schedule.steps)
    for step, batch in enumerate(batches(training, longest, seed), 1):
        images, labels = torch.from_numpy(batch.images)[:, None], torch.from_numpy(batch.labels)
        for run, schedule, optimizer, scheduler in zip(runs, schedules, optimizers, schedulers, strict=True):
            if step > schedule.steps:
                continue
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
