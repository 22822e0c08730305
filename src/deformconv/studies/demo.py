"""`deformconv demo`: the classic example, three nets trained, pictures of where they look, a net kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, median

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor
from torch.nn.functional import conv2d

from deformconv.accuracy import TOLERANCE, error
from deformconv.studies import digits
from deformconv.studies.digits import Digits
from deformconv.studies.files import whole_file
from deformconv.studies.kernels import compiled
from deformconv.studies.training import KINDS, DigitNet, Run, Schedule, multiply_adds, scores, train
from deformconv.torch import deform_conv2d

__all__ = ["run"]

FULL = Schedule(steps=400, evaluations=5)
FAST = Schedule(steps=30, evaluations=2)
LAYERS = {2: "stride 2", 4: "stride 4"}  # the nets' deformable layers, by block


def run(output: Path, *, fast: bool, seeds: int, first_seed: int) -> int:
    """Run the four parts and return the exit code: 1 if a check failed."""
    console = Console(highlight=False)
    started = time.perf_counter()
    compiled(console)
    holds = [classic_example(console, repeats=3 if fast else 7)]
    training, held_out = digits.split(digits.load(), held_out=300 if fast else 1000)
    schedule, all_seeds = FAST if fast else FULL, range(first_seed, first_seed + seeds)
    runs = compare_nets(console, training, held_out, schedule, all_seeds)
    net = _net_to_keep(runs)
    draw(console, output, runs, net, held_out)
    holds.append(keep(console, output, net, held_out))
    console.print(f"\nDone in {time.perf_counter() - started:.0f} s.", style="bold")
    return 0 if all(holds) else 1


def _net_to_keep(runs: Sequence[Run]) -> DigitNet:
    return next(run.net for run in runs if run.kind == "v2")


def _title(console: Console, number: int, title: str) -> None:
    console.print(f"\n[bold]{number}. {title}[/]")


def _check(console: Console, statement: str, difference: float, limit: float = TOLERANCE["float32"]) -> bool:
    """Say whether a difference is within its limit, and return it. A NaN is not."""
    holds = difference <= limit
    verdict = "[green]ok    [/]" if holds else "[bold red]FAILED[/]"
    found = f"{difference:.0e}" + ("" if holds else f", at most {limit:.0e} is rounding")
    console.print(f"  {verdict}  {statement} (error {found})")
    return holds


def classic_example(console: Console, repeats: int) -> bool:
    """v1 and v2 on random input: shapes, times beside a plain convolution, and the check at zero offsets."""
    _title(console, 1, "The classic example: 3x3 kernel, 3 -> 64 channels, 10 images of 100x100")
    random = torch.Generator().manual_seed(0)
    x = torch.randn(10, 3, 100, 100, generator=random)
    weight = torch.randn(64, 3, 3, 3, generator=random) / 27**0.5
    offset = torch.randn(10, 18, 100, 100, generator=random)  # 2 axes x 9 taps, in pixels
    mask = torch.rand(10, 9, 100, 100, generator=random)  # 9 taps
    calls: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
        "plain": (lambda x, w: conv2d(x, w, padding=1), [x, weight]),
        "v1": (lambda x, w, o: deform_conv2d(x, o, w, padding=1), [x, weight, offset]),
        "v2": (lambda x, w, o, m: deform_conv2d(x, o, w, padding=1, mask=m), [x, weight, offset, mask]),
    }
    table = Table(box=box.SIMPLE, pad_edge=False)
    for name in ("", "offset", "mask", "output"):
        table.add_column(name, no_wrap=True)
    for name in ("forward", "+ backward"):
        table.add_column(name, justify="right")
    for name, (call, arguments) in calls.items():
        shapes = [_shape(arguments[i]) if i < len(arguments) else "" for i in (2, 3)]
        forward, both = _milliseconds(call, arguments, repeats)
        table.add_row(f"  {name}", *shapes, _shape(call(*arguments)), f"{forward:.1f} ms", f"{both:.1f} ms")
    console.print(table)
    plain = conv2d(x, weight, padding=1)
    zero, one = torch.zeros_like(offset), torch.ones_like(mask)
    v1, v2 = deform_conv2d(x, zero, weight, padding=1), deform_conv2d(x, zero, weight, padding=1, mask=one)
    results = {"v1 with zero offsets": v1, "v2 with zero offsets and masks 1": v2}
    return all([_check(console, f"{name} is a plain convolution", error(result, plain)) for name, result in results.items()])


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))


def _milliseconds(call: Callable[..., Tensor], arguments: list[Tensor], repeats: int) -> tuple[float, float]:
    """Medians, warm: a forward pass alone, and one with the gradients of all arguments."""
    leaves = [argument.clone().requires_grad_() for argument in arguments]
    grad_output = torch.randn_like(call(*arguments))

    def forward() -> None:
        with torch.inference_mode():
            call(*arguments)

    def both() -> None:
        torch.autograd.grad(call(*leaves), leaves, grad_output)

    medians = []
    for work in (forward, both):
        work()
        seconds = []
        for _ in range(repeats):
            started = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - started)
        medians.append(1000 * median(seconds))
    return medians[0], medians[1]


def compare_nets(console: Console, training: Digits, held_out: Digits, schedule: Schedule, seeds: Sequence[int]) -> list[Run]:
    """Train one net of each kind for every seed, with progress, and print what came out."""
    _title(console, 2, "Three nets of equal budget on handwritten digits, scaled, turned and moved")
    # The held-out canvases are one and the same for all seeds.
    canvases = digits.scatter(held_out, np.random.default_rng(0))
    console.print(f"  {len(training.labels)} digits to train on, {len(canvases.labels)} others held out\n")
    kinds = "".join(f"{kind:>7}" for kind in KINDS)
    console.print(f"  seed  step    training loss         held-out accuracy\n  {'':10}{kinds}  {kinds}", style="bold")
    columns = (
        TextColumn(" "),
        BarColumn(20),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    runs: list[Run] = []
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(seeds) * schedule.steps)
        for seed in seeds:
            latest: list[Run] = []
            for step, latest in enumerate(train(training, canvases, schedule, seed), 1):
                live = " ".join(f"{run.kind} {run.losses[-1]:.2f}" for run in latest)
                progress.update(task, advance=1, description=f"loss {live}")
                if step in schedule.evaluation_steps:
                    losses = "".join(f"{mean(run.losses[-15:]):7.3f}" for run in latest)
                    accuracies = "".join(f"{run.accuracies[step]:7.1%}" for run in latest)
                    progress.console.print(f"  {seed:4}  {step:4}{losses}  {accuracies}")
            runs += latest
    _print_result(console, runs, schedule)
    return runs


def _print_result(console: Console, runs: Sequence[Run], schedule: Schedule) -> None:
    seeds = len({run.seed for run in runs})
    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("  net")
    for name in ("parameters", "multiply-adds", "time a step", "accuracy", "spread"):
        table.add_column(name, justify="right")
    for kind in KINDS:
        same = [run for run in runs if run.kind == kind]
        accuracies = [100 * run.accuracy for run in same]
        table.add_row(
            f"  {kind}",
            f"{sum(parameter.numel() for parameter in same[0].net.parameters()):,}",
            f"{multiply_adds(same[0].net) / 1e6:.1f} M",
            f"{1000 * median(run.seconds_per_step for run in same):.0f} ms",
            f"{mean(accuracies):.1f} %",
            f"{min(accuracies):.1f} - {max(accuracies):.1f}" if seeds > 1 else "one seed",
        )
    console.print(table)
    whose = f"mean of {seeds} seeds" if seeds > 1 else "of one seed"
    console.print(
        f"  Accuracy on the held-out digits, {whose}. Equal budget: parameters and\n"
        "  multiply-adds within 1.3 %, the same digits, schedule and "
        f"{schedule.steps} steps of {schedule.batch}.\n"
        "  Nothing is tuned for one of them."
    )


def draw(console: Console, output: Path, runs: Sequence[Run], net: DigitNet, held_out: Digits) -> None:
    """Write the pictures."""
    # Not at the top: the first import of matplotlib builds its font cache, which takes a while.
    from deformconv.studies.pictures import looks, training_curves

    _title(console, 3, "Pictures")
    figures = {f"sampling-points-{name.replace(' ', '-')}.png": looks(net, held_out, block) for block, name in LAYERS.items()}
    figures["training.png"] = training_curves(runs)
    for name, figure in figures.items():
        with whole_file(output / name) as part:
            figure.savefig(part, dpi=150)
        console.print(f"  {output / name}", soft_wrap=True, markup=False)


def keep(console: Console, output: Path, net: DigitNet, held_out: Digits) -> bool:
    """Save the net, load it into a new one, and check that the two predict alike."""
    _title(console, 4, "The v2 net, saved and loaded again")
    path = output / "digits-v2.pt"
    with whole_file(path) as part:
        torch.save({"kind": net.kind, "state": net.state_dict()}, part)
    loaded = torch.load(path, weights_only=True)
    again = DigitNet(loaded["kind"])
    again.load_state_dict(loaded["state"])
    canvases = digits.scatter(held_out, np.random.default_rng(0)).images
    console.print(f"  {path}", soft_wrap=True, markup=False)
    return _check(
        console,
        "the loaded net gives the same scores",
        error(scores(again, canvases), scores(net, canvases)),
    )
