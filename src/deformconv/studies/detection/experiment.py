"""`deformconv experiment detect`: the paper's arms, trained and compared."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

from deformconv.files import whole_file
from deformconv.studies.detection import report
from deformconv.studies.detection.jobs import load, run_job
from deformconv.studies.detection.plan import BASE, TITLES, USUAL, Budget, Job, accepted, held, plan, result
from deformconv.studies.detection.scenes import VARIATIONS, Scenes
from deformconv.studies.detection.workers import run_jobs
from deformconv.studies.kernels import compiled

__all__ = ["run"]


def run(output: Path, *, budget: Budget, arms: Sequence[str], seeds: Sequence[int], swept: bool, workers: int) -> int:
    """Train what the folder does not have yet, `workers` at a time; print and write the report, draw, return the exit code.

    Raises FolderError if the folder has results of another budget or another command uses it, and WorkerError if a training
    fails.
    """
    console = Console(highlight=False)
    started = time.perf_counter()
    with held(output):
        accepted(output, budget)
        variations = list(VARIATIONS) if swept else [USUAL]
        planned = plan(arms, seeds, variations)
        compiled(console, rois=True)
        train_all(console, output, budget, planned, workers)
        results = [one for job in planned if (one := result(output, job)) is not None]
        found = report.everything(results, budget, variations)
        report.print_report(console, found)
        _write(console, output, found)
        _draw(console, output, budget, planned)
        console.print(f"\nDone in {_minutes(time.perf_counter() - started)}.", style="bold")
        return 0


def train_all(console: Console, output: Path, budget: Budget, planned: Sequence[Job], workers: int) -> None:
    """Run the jobs that are not done, with a bar for each that runs and one for all."""
    done = [job for job in planned if result(output, job) is not None]
    todo = [job for job in planned if job not in done]
    kept = f", {len(done)} of them done before" if done else ""
    console.print(
        f"{len(planned)} trainings{kept}; {workers} at a time, each on one thread.\n"
        "Ctrl-C stops them, and the same command goes on."
    )
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(20),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[doing]}"),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        total = progress.add_task("all", total=len(planned), completed=len(done), doing="")
        bars: dict[Job, TaskID] = {}

        def watch(job: Job, share: float, doing: str) -> None:
            title = f"{TITLES[job.arm]}, seed {job.seed}" + ("" if job.variation == USUAL else f", variation {job.variation}")
            if job not in bars:
                bars[job] = progress.add_task(title, total=1.0, doing=doing)
            progress.update(bars[job], completed=min(share, 1.0), doing=doing)
            if share > 1:
                progress.remove_task(bars[job])
                progress.advance(total)
                progress.console.print(f"  {title}: {doing}")

        run_jobs(output, budget, todo, done, workers=workers, watch=watch, duty=run_job)


def _write(console: Console, output: Path, found: dict[str, Any]) -> None:
    texts = {"detection.json": json.dumps(found, indent=1, allow_nan=False) + "\n", "detection.md": report.page(found)}
    for name, text in texts.items():
        with whole_file(output / name) as part:
            part.write_text(text, encoding="utf-8")
        console.print(f"  {output / name}", soft_wrap=True, markup=False)


def _draw(console: Console, output: Path, budget: Budget, planned: Sequence[Job]) -> None:
    # Not at the top: the first import of matplotlib builds its font cache, which takes a while.
    from deformconv.studies.detection import pictures

    seed = planned[0].seed
    shown = {job.arm: job for job in planned if (job.variation, job.seed) == (USUAL, seed)}
    models = {arm: load(output, shown[arm], budget) for arm in TITLES if arm in shown}
    scenes = Scenes("test", 1, size=budget.size)
    figures = {"detections.png": pictures.found({TITLES[arm]: model for arm, model in models.items() if arm != BASE}, scenes)}
    looking = next((models[arm] for arm in ("v2", "v2-mimic") if arm in models), None)
    if looking is not None:
        figures["where-v2-looks.png"] = pictures.looks(looking, scenes)
    for name, figure in figures.items():
        with whole_file(output / name) as part:
            _save(figure, part)
        console.print(f"  {output / name}", soft_wrap=True, markup=False)


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"


def _save(figure: Any, path: Path) -> None:
    """Write a figure as PNG with 256 colours, which photographs take a third of the room with."""
    from io import BytesIO

    from PIL import Image

    buffer = BytesIO()
    figure.savefig(buffer, dpi=150, format="png")
    Image.open(buffer).convert("RGB").quantize(256, method=Image.Quantize.MEDIANCUT).save(path, format="PNG", optimize=True)
