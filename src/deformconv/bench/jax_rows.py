"""The operator in JAX and the layer in Keras, measured beside their libraries' plain convolutions: rows, and tables of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deformconv.bench.cases import Case, named
from deformconv.bench.figures import digits, markdown, ratio
from deformconv.bench.jax_peers import JAX_PEERS
from deformconv.bench.keras_peers import KERAS_BACKENDS, KERAS_CASE, KERAS_PEERS, KerasTruth
from deformconv.bench.measure import Entry, Pace, Progress, compare, processes
from deformconv.bench.peers import DIRECTIONS, Truth, missing

__all__ = [
    "CASE", "PLAIN", "SMALL", "backends", "keras_ratio", "keras_row", "keras_table", "measure_keras", "measure_operator",
    "operator_row", "operator_table",
]  # fmt: skip

CASE, SMALL = named("c64-56"), Case("1x8x8x8", 1, 8, 8, (8, 8))
PLAIN = frozenset(name for name in (*JAX_PEERS, *KERAS_PEERS) if "-dense" in name)  # what is not ours

Row = Mapping[str, Any]
Rows = list[dict[str, Any]]


def _calls() -> list[tuple[Case, str]]:
    return [(CASE, DIRECTIONS[0]), (CASE, DIRECTIONS[1]), (SMALL, DIRECTIONS[0])]


def backends() -> list[str]:
    """The backends of Keras that are there."""
    return [name for name in KERAS_BACKENDS if not missing(KERAS_PEERS[f"keras-{name}"].packages)]


def measure_operator(threads: int, pace: Pace, progress: Progress) -> Rows:
    """Times of a layer's operator in both directions, and of a small call."""
    rows = []
    progress.begin(len(_calls()))
    with processes([Truth.name, *JAX_PEERS], threads) as (truth, *others):
        for case, direction in _calls():
            progress.step(f"{case.name}, {direction}")
            results = compare({one.library: Entry(one, case) for one in others}, direction, truth, pace)
            rows.append({"layer": case._asdict(), "direction": direction, "results": results})
    return rows


def measure_keras(threads: int, pace: Pace, progress: Progress) -> Rows:
    """Times of a net's prediction and training step, on each backend that is there."""
    rows = []
    progress.begin(len(DIRECTIONS) * len(backends()))
    for backend in backends():
        with processes([KerasTruth.name, f"keras-{backend}", f"keras-{backend}-dense"], threads) as (truth, *others):
            for direction in DIRECTIONS:
                progress.step(f"Keras on {backend}, {direction}")
                results = compare({one.library: Entry(one, KERAS_CASE) for one in others}, direction, truth, pace)
                rows.append({"net": KERAS_CASE._asdict(), "backend": backend, "direction": direction, "results": results})
    return rows


def operator_row(rows: Sequence[Row], case: Case, direction: str) -> Row | None:
    return next((row for row in rows if row["layer"]["name"] == case.name and row["direction"] == direction), None)


def keras_row(rows: Sequence[Row], backend: str, direction: str) -> Row | None:
    return next((row for row in rows if (row["backend"], row["direction"]) == (backend, direction)), None)


def keras_ratio(rows: Sequence[Row], backend: str, direction: str) -> float | None:
    row = keras_row(rows, backend, direction)
    return None if row is None else ratio(row, [f"keras-{backend}"], [f"keras-{backend}-dense"])


def _cell(row: Row | None, name: str, factor: float = 1.0) -> str:
    if row is None:
        return "-"
    result = row["results"].get(name, {})
    return digits(factor * result["milliseconds"]) if "milliseconds" in result else str(result.get("reason", "-"))


def operator_table(rows: Sequence[Row]) -> str:
    chosen = [operator_row(rows, case, direction) for case, direction in _calls()]
    lines = [[peer.title, *(_cell(row, name, factor) for row, factor in zip(chosen, (1, 1, 1000), strict=True))]
             for name, peer in JAX_PEERS.items()]  # fmt: skip
    head = ["jitted, but for NumPy's", "forward, ms", "forward and all gradients, ms", f"{SMALL.name} forward, µs"]
    return markdown(head, lines, 1)


def keras_table(rows: Sequence[Row]) -> str:
    lines = []
    for backend in KERAS_BACKENDS:
        names = (f"keras-{backend}-dense", f"keras-{backend}")
        own = [keras_row(rows, backend, direction) for direction in DIRECTIONS]
        ratios = [digits(keras_ratio(rows, backend, direction)) for direction in DIRECTIONS]
        cells = [[*(_cell(row, name) for name in names), value] for row, value in zip(own, ratios, strict=True)]
        lines.append([backend, *cells[0], *cells[1]])
    head = [
        "backend",
        *(f"{what}{end}" for what in ("predict", "training step") for end in (": Conv2D, ms", ": DeformConv2D, ms", ", ratio")),
    ]
    return markdown(head, lines, 1)
