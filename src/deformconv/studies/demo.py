"""`deformconv demo`: the classic example, a trained net made deformable, pictures of where it looks, a net kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean, median

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor
from torch.nn.functional import conv2d

from deformconv.accuracy import TOLERANCE, error
from deformconv.files import whole_file
from deformconv.studies import digits
from deformconv.studies.digits import Digits
from deformconv.studies.kernels import compiled
from deformconv.studies.training import KINDS, LONGER, DigitNet, Run, Schedule, Training, multiply_adds, of_kind, scores, train
from deformconv.torch import deform_conv2d

__all__ = ["run"]

# Chosen on other seeds (100 to 104) than the demo's first. Of the learning rates 4e-3 and 1e-2, the plain net too gains more
# by the latter.
FULL = Training(first=Schedule(steps=1200, evaluations=1), then=Schedule(steps=300, evaluations=2, learning_rate=1e-2))
FAST = Training(first=Schedule(steps=100, evaluations=1), then=Schedule(steps=30, evaluations=2, learning_rate=1e-2))
LAYERS = {1: "middle", 2: "last"}  # the nets' deformable layers, by block
PLACEMENTS = 2  # of every held-out digit


def run(output: Path, *, fast: bool, seeds: int, first_seed: int) -> int:
    """Run the four parts and return the exit code: 1 if a check failed."""
    console = Console(highlight=False)
    started = time.perf_counter()
    compiled(console)
    holds = [classic_example(console, repeats=3 if fast else 7)]
    training, held_out = digits.split(digits.load(), held_out=300 if fast else 1000)
    with _one_thread():
        runs = compare_nets(console, training, held_out, FAST if fast else FULL, range(first_seed, first_seed + seeds))
    net = _net_to_keep(runs)
    draw(console, output, runs, net, held_out)
    holds.append(keep(console, output, net, held_out))
    console.print(f"\nDone in {time.perf_counter() - started:.0f} s.", style="bold")
    return 0 if all(holds) else 1


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let PyTorch compute on one thread: several would wait for one another for longer than such small layers take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


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


def compare_nets(console: Console, training: Digits, held_out: Digits, plan: Training, seeds: Sequence[int]) -> list[Run]:
    """For every seed train a plain net and then one of each kind made of it, with progress, and print what came out."""
    _title(console, 2, "A trained net made deformable: handwritten digits, scaled, turned and moved")
    # The held-out canvases are one and the same for all seeds.
    everyone = np.tile(np.arange(len(held_out.labels)), PLACEMENTS)
    canvases = digits.scatter(held_out.take(everyone), np.random.default_rng(0))
    console.print(
        f"  {len(training.labels)} digits to train on, {len(held_out.labels)} others held out, at {PLACEMENTS} placements each"
    )
    console.print(
        f"  {plan.first.steps} steps give a plain net; then, from that very net and on the same digits,\n"
        f"  plain   as it is, {plan.then.steps} steps more\n"
        f"  longer  as it is, {LONGER * plan.then.steps} steps more\n"
        f"  v1, v2  two convolutions made deformable by make_deformable, {plan.then.steps} steps more\n"
    )
    names = "".join(f"{kind:>8}" for kind in ("before", *KINDS))
    console.print(f"  held-out accuracy\n  seed{names}  v2-plain  v2-longer", style="bold")
    columns = (
        TextColumn(" "),
        BarColumn(20),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    runs: list[Run] = []
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(seeds) * (plan.first.steps + LONGER * plan.then.steps))
        for seed in seeds:
            latest: list[Run] = []
            for latest in train(training, canvases, plan, seed):
                live = " ".join(f"{run.kind} {run.losses[-1]:.2f}" for run in latest)
                progress.update(task, advance=1, description=f"loss {live}")
            after = {"before": latest[0].accuracies[0]} | {run.kind: run.accuracy for run in latest}
            accuracies = "".join(f"{accuracy:8.1%}" for accuracy in after.values())
            gains = [100 * (after["v2"] - after[kind]) for kind in ("plain", "longer")]
            progress.console.print(f"  {seed:4}{accuracies}{gains[0]:+10.1f}{gains[1]:+11.1f}")
            runs += latest
    _print_result(console, runs, plan)
    return runs


def _print_result(console: Console, runs: Sequence[Run], plan: Training) -> None:
    by_kind = {kind: [run for run in runs if run.kind == kind] for kind in KINDS}
    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("  net", no_wrap=True)
    for name in ("parameters", "multiply-adds", "step", "steps", "all steps", "accuracy"):
        table.add_column(name, justify="right", no_wrap=True)
    for kind, same in by_kind.items():
        steps, seconds = len(same[0].losses), median(run.seconds_per_step for run in same)
        table.add_row(
            f"  {kind}",
            f"{sum(parameter.numel() for parameter in same[0].net.parameters()):,}",
            f"{multiply_adds(same[0].net) / 1e6:.2f} M",
            f"{1000 * seconds:.1f} ms",
            f"{steps}",
            f"{steps * seconds:.1f} s",
            f"{fmean(100 * run.accuracy for run in same):.1f} %",
        )
    console.print(table)
    seeds = len(by_kind["plain"])
    spread = f"mean of {seeds} seeds (lowest to highest)" if seeds > 1 else "one seed"
    console.print(f"  Points of accuracy gained, {spread}")
    for other, budget in (
        ("plain", f"for equal steps: {plan.then.steps}"),
        ("longer", f"for no more cost: {LONGER} times the steps"),
    ):
        for kind in ("v1", "v2"):
            console.print(f"  {f'{kind} - {other}':13}{_gain(by_kind[kind], by_kind[other]):21} {budget}")
    console.print(
        "  Digits, schedule and learning rates are the same for all. In "
        f"{LONGER} times the steps\n  the plain net takes no fewer multiply-adds than v1 and v2 in theirs."
    )


def _gain(runs: Sequence[Run], others: Sequence[Run]) -> str:
    """The mean difference of two kinds' accuracies, seed by seed, with the lowest and the highest."""
    differences = [100 * (run.accuracy - other.accuracy) for run, other in zip(runs, others, strict=True)]
    spread = f" ({min(differences):+.1f} to {max(differences):+.1f})" if len(differences) > 1 else ""
    return f"{fmean(differences):+.1f}{spread}"


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
    again = of_kind(loaded["kind"], DigitNet())
    again.load_state_dict(loaded["state"])
    canvases = digits.scatter(held_out, np.random.default_rng(0)).images
    console.print(f"  {path}", soft_wrap=True, markup=False)
    return _check(
        console,
        "the loaded net gives the same scores",
        error(scores(again, canvases), scores(net, canvases)),
    )
