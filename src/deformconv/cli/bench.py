"""`deformconv bench`: what is asked for, measured, printed, written and drawn."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import click

from deformconv.bench import figures, measure
from deformconv.bench.cases import CASES, QUICK, Case
from deformconv.bench.peers import DIRECTIONS, PEERS, missing

__all__ = ["run"]


def run(
    cases: Sequence[str],
    libraries: Sequence[str],
    directions: Sequence[str],
    threads: int | None,
    quick: bool,
) -> int:
    chosen = _cases(cases or (QUICK if quick else ()))
    peers = _libraries(libraries)
    rows = measure.measure(
        chosen, peers, directions or DIRECTIONS, threads=threads or 2, blocks=3 if quick else 7,
        seconds=0.1 if quick else 0.5, notify=lambda line: click.echo(line, err=True),
    )  # fmt: skip
    for direction in directions or DIRECTIONS:
        click.echo(f"\n{direction}, milliseconds\n\n" + figures.speed_table(rows, direction))
    click.echo("\n" + figures.summary(rows))
    return 0


def _cases(names: Sequence[str]) -> list[Case]:
    return [case for case in CASES if not names or case.name in names]


def _libraries(names: Sequence[str]) -> list[str]:
    assert find_spec("torch")
    return [name for name in PEERS if (name == "deformconv" or not names or name in names) and not missing(PEERS[name].packages)]
