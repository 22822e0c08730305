"""What the experiment consists of: trainings that wait for one another. Nothing here needs a framework."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deformconv import __version__
from deformconv.files import InUseError, locked, whole_file

__all__ = [
    "ARMS", "BASE", "CLOCK", "DEFAULT", "FAST", "SCRATCH", "SWEPT", "TITLES", "USUAL", "Budget", "FolderError", "Job",
    "accepted", "held", "plan", "result",
]  # fmt: skip

BASE, SCRATCH = "base", "scratch"  # the regular detector and v2's, both from fresh weights
SWEPT = ("regular", "v2")  # the arms that are trained for every variation
USUAL = "much"  # the variation of all other trainings
CLOCK = "v2"  # the arm for whose seconds "regular, for equal seconds" is trained
SIZE = 128  # pixels of a scene's side
TITLES = {
    BASE: "regular, before",
    "regular": "regular",
    "seconds": "regular, for equal seconds",
    "wide": "regular, wider head",
    "v1": "v1: conv5, pooling",
    "v2-conv": "v2: convolution",
    "v2": "v2: convolution, pooling",
    "v2-mimic": "v2: convolution, pooling, mimicking",
    SCRATCH: "v2: convolution, from scratch",
}
ARMS = [name for name in TITLES if name != BASE]  # what may be asked for


class FolderError(ValueError):
    """A folder has results of something else, or another command uses it."""


@dataclass(frozen=True)
class Budget:
    """What one job's numbers depend on."""

    base_steps: int = 1500
    steps: int = 600
    batch: int = 8
    size: int = SIZE
    images: int = 1000  # to test on


DEFAULT, FAST = Budget(), Budget(base_steps=20, steps=10, batch=4, size=64, images=24)


@dataclass(frozen=True)
class Job:
    """One training and its evaluation."""

    variation: str
    seed: int
    arm: str

    @property
    def name(self) -> str:
        return f"{self.variation}-{self.seed}-{self.arm}"

    @property
    def needs(self) -> list[Job]:
        """The jobs that must be done before."""
        arms = [] if self.arm in (BASE, SCRATCH) else [BASE]
        if self.arm == "seconds":
            arms += ["regular", CLOCK]
        return [Job(self.variation, self.seed, arm) for arm in arms]


def plan(arms: Iterable[str], seeds: Iterable[int], variations: Sequence[str] = (USUAL,)) -> list[Job]:
    """All jobs, each after those that it needs; the usual variation's arms and, of the others, those that are swept."""
    jobs: dict[Job, None] = {}

    def add(job: Job) -> None:
        for needed in job.needs:
            add(needed)
        jobs.setdefault(job)

    for seed in seeds:
        # What all differences are taken from comes first, and what takes longest: both processes have work from the start.
        for arm in (BASE, SCRATCH, "regular", *arms):
            if arm != SCRATCH or SCRATCH in arms:
                add(Job(USUAL, seed, arm))
        for variation in variations:
            if variation != USUAL:
                for arm in SWEPT:
                    add(Job(variation, seed, arm))
    return list(jobs)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """A context in which no other command trains in the folder, which is made; FolderError if one does."""
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(folder / "lock"))
        except InUseError as error:
            raise FolderError(
                f"{folder} is in use by another command, {error}: wait until that has ended, or choose another folder by "
                "--output"
            ) from None
        yield


def accepted(folder: Path, budget: Budget) -> None:
    """Write down what the folder's results are of; FolderError if it has those of another budget or version."""
    path = folder / "budget.json"
    asked = {**asdict(budget), "deformconv": __version__}
    if not path.exists():
        with whole_file(path) as part:
            part.write_text(json.dumps(asked, indent=2) + "\n", encoding="utf-8")
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict) or found.keys() != asked.keys():
        raise FolderError(f"{path} is not what this version writes: choose another folder by --output, or empty this one")
    for name, value in asked.items():
        if found[name] != value:
            raise FolderError(
                f"{folder} has results with {name.replace('_', ' ')} {found[name]}, and this run has {value}: choose another "
                "folder by --output, or what that run had, which then goes on"
            )


def result(folder: Path, job: Job) -> dict[str, Any] | None:
    """What a finished job found; None if it is not finished."""
    path = folder / f"{job.name}.json"
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
