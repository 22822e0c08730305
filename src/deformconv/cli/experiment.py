"""`deformconv experiment`: what is asked for, checked before it is trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from deformconv.studies.detection.plan import ARMS, DEFAULT, FAST, FolderError
from deformconv.studies.detection.workers import WorkerError

__all__ = ["known_arms", "run"]


def run(
    arms: list[str], output: Path, *, fast: bool, seeds: int, seed: int, sweep: bool, workers: int, **numbers: int | None
) -> int:
    """Run it and return the exit code; `numbers` are those of the budget that were asked for."""
    asked = {name: value for name, value in numbers.items() if value is not None}
    budget = replace(FAST if fast else DEFAULT, **asked)
    from deformconv.studies.detection import experiment  # here, since it loads PyTorch

    try:
        return experiment.run(output, budget=budget, arms=arms, seeds=range(seed, seed + seeds), swept=sweep, workers=workers)
    except (FolderError, WorkerError) as error:
        raise click.ClickException(str(error)) from None


def known_arms(text: str | None) -> list[str]:
    """The arms that `--arms` names, all without it; click's error if one is unknown."""
    if text is None:
        return ARMS
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in ARMS:
            raise click.BadParameter(f"{name!r} is none of {', '.join(ARMS)}", param_hint="--arms")
    return names
