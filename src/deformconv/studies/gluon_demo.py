"""`deformconv demo-gluon`: MXNet's own numbers, then the demo's digit net trained in Gluon with v1 and with v2."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import mxnet as mx
import numpy as np
from mxnet import autograd, gluon
from mxnet.gluon import nn
from mxnet.gluon.contrib import cnn
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from deformconv.accuracy import TOLERANCE, error
from deformconv.gluon import DeformableConvolution, ModulatedDeformableConvolution
from deformconv.studies import digits
from deformconv.studies.digits import Digits
from deformconv.studies.kernels import compiled
from deformconv.studies.schedule import CONVOLUTIONS, Schedule, batches

__all__ = ["BLOCKS", "accuracy", "digit_net", "run", "train"]

FULL = Schedule(steps=400, evaluations=5)
FAST = Schedule(steps=30, evaluations=2)
BLOCKS: dict[str, tuple[Any, Any]] = {  # ours and MXNet's
    "v1": (DeformableConvolution, cnn.DeformableConvolution),
    "v2": (ModulatedDeformableConvolution, cnn.ModulatedDeformableConvolution),
}


def run(*, fast: bool, seed: int) -> int:
    """Run the two parts and return the exit code: 1 if a check failed."""
    console = Console(highlight=False)
    started = time.perf_counter()
    compiled(console)
    console.print("\n[bold]1. The same weights in MXNet's block and in ours[/]")
    holds = [check_block(console, kind, seed) for kind in BLOCKS]
    console.print("\n[bold]2. A net on handwritten digits, scaled, turned and moved (Trainer, hybridized)[/]")
    training, held_out = digits.split(digits.load(), held_out=300 if fast else 1000)
    compare(console, training, held_out, FAST if fast else FULL, seed)
    console.print(f"\nDone in {time.perf_counter() - started:.0f} s.", style="bold")
    return 0 if all(holds) else 1


def check_block(console: Console, kind: str, seed: int) -> bool:
    """Load MXNet's block's parameters into ours and compare the outputs."""
    mx.random.seed(seed)
    ours, theirs = BLOCKS[kind]
    x = mx.nd.random.normal(shape=(4, 16, 20, 20))
    old, new = (block(16, kernel_size=3, padding=1, offset_weight_initializer=mx.init.Normal(0.1)) for block in (theirs, ours))
    for layer in (old, new):
        layer.initialize(mx.init.Normal(0.1))
        layer(x)
    for source, target in zip(old.collect_params().values(), new.collect_params().values(), strict=True):
        target.set_data(source.data())
    expected, found = old(x).asnumpy(), new(x).asnumpy()
    difference = error(found, expected)
    holds = difference <= TOLERANCE["float32"]
    verdict = "[green]ok    [/]" if holds else "[bold red]FAILED[/]"
    console.print(f"  {verdict}  {kind}: {ours.__name__} gives MXNet's outputs (error {difference:.0e})")
    return holds


def digit_net(kind: str) -> nn.HybridSequential:
    """The demo's net: three 3x3 convolutions, two of them deformable, maximum over positions, a linear layer."""
    net = nn.HybridSequential()
    for block, (channels, stride) in zip((nn.Conv2D, BLOCKS[kind][0], BLOCKS[kind][0]), CONVOLUTIONS, strict=True):
        net.add(block(channels, 3, strides=stride, padding=1, use_bias=False), nn.BatchNorm(), nn.Activation("relu"))
    net.add(nn.GlobalMaxPool2D(), nn.Dense(10))
    return net


def train(kind: str, training: Digits, schedule: Schedule, seed: int) -> Iterator[tuple[nn.HybridSequential, float]]:
    """Train a net, step by step; yields it and the step's loss."""
    mx.random.seed(seed)
    net = digit_net(kind)
    net.initialize(mx.init.Xavier(magnitude=2))
    net.hybridize()
    net(mx.nd.zeros((1, 1, digits.CANVAS, digits.CANVAS)))
    net.collect_params(".*_offset_(weight|bias)").setattr("lr_mult", 0.1)
    trainer = gluon.Trainer(net.collect_params(), "adam", {"learning_rate": schedule.learning_rate})
    loss_of = gluon.loss.SoftmaxCrossEntropyLoss()
    for step, batch in enumerate(batches(training, schedule, seed)):
        trainer.set_learning_rate(schedule.learning_rate * _one_cycle(step / schedule.steps))
        images, labels = mx.nd.array(batch.images[:, None]), mx.nd.array(batch.labels)
        with autograd.record():
            loss = loss_of(net(images), labels)
        loss.backward()
        trainer.step(len(batch.labels))
        yield net, float(loss.mean().asscalar())


def _one_cycle(share: float) -> float:
    """The learning rate's share of its peak: up in the first 30 % of the steps, then down."""
    if share < 0.3:
        return 0.04 + 0.96 * (1 - math.cos(math.pi * share / 0.3)) / 2
    return (1 + math.cos(math.pi * (share - 0.3) / 0.7)) / 2


def accuracy(net: nn.HybridSequential, canvases: Digits) -> float:
    """The share of canvases whose highest score is their label's."""
    right = 0
    for start in range(0, len(canvases.labels), 250):
        piece = slice(start, start + 250)
        scores = net(mx.nd.array(canvases.images[piece, None])).asnumpy()
        right += int((scores.argmax(axis=1) == canvases.labels[piece]).sum())
    return right / len(canvases.labels)


def compare(console: Console, training: Digits, held_out: Digits, schedule: Schedule, seed: int) -> dict[str, float]:
    """Train a net of each version with progress, print and return the held-out accuracies."""
    canvases = digits.scatter(held_out, np.random.default_rng(0))
    console.print(f"  {len(training.labels)} digits to train on, {len(canvases.labels)} others held out\n")
    console.print("  net  step    loss  held-out accuracy", style="bold")
    columns = (TextColumn(" "), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    accuracies: dict[str, float] = {}
    seconds: dict[str, float] = {}
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(BLOCKS) * schedule.steps)
        for kind in BLOCKS:
            losses: list[float] = []
            started, measuring = time.perf_counter(), 0.0
            for step, (net, loss) in enumerate(train(kind, training, schedule, seed), 1):
                losses.append(loss)
                progress.update(task, advance=1, description=f"{kind}, loss {loss:.2f}")
                if step in schedule.evaluation_steps:
                    before = time.perf_counter()
                    accuracies[kind] = accuracy(net, canvases)
                    measuring += time.perf_counter() - before
                    progress.console.print(f"  {kind:3} {step:5} {np.mean(losses[-15:]):7.3f}  {accuracies[kind]:.1%}")
            seconds[kind] = time.perf_counter() - started - measuring
    console.print()
    for kind, share in accuracies.items():
        milliseconds = 1000 * seconds[kind] / schedule.steps
        console.print(f"  {kind}: accuracy {share:.1%} on digits it never saw, {milliseconds:.0f} ms a step")
    return accuracies
