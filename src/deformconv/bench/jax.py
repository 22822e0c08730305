"""`python -m deformconv.bench.jax`: the operator in JAX, and the layer in Keras, beside their libraries' plain convolutions.

Each library runs in a process of its own, in alternating blocks of calls; what differs from array operations in float64 is not
timed. `make bench-jax` writes what is found into the repository's documents.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deformconv.bench.cases import Case, named
from deformconv.bench.document import machine, packages
from deformconv.bench.figures import digits, markdown, milliseconds, ratio
from deformconv.bench.jax_peers import DENSE, JAX_PEERS, OURS
from deformconv.bench.keras_peers import KERAS_BACKENDS, KERAS_CASE, KERAS_PEERS, KerasTruth
from deformconv.bench.measure import Entry, Pace, Progress, compare, processes
from deformconv.bench.peers import DIRECTIONS, Truth, missing
from deformconv.bench.readme import replaced
from deformconv.files import whole_file
from deformconv.runtime.processors import available_processors

__all__ = ["BARS", "CASE", "SMALL", "bars", "keras_text", "measure", "operator_text", "write"]

FORWARD, TRAINING = DIRECTIONS
CASE, SMALL = named("c64-56"), Case("1x8x8x8", 1, 8, 8, (8, 8))
RESULTS = "benchmarks/jax.json"
PAGES = {"docs/jax.md": "jax", "docs/keras.md": "keras"}
PARTS = ("operator", "keras")
FULL, QUICK = Pace(blocks=9, seconds=0.3), Pace(blocks=3, seconds=0.05)
LIBRARIES = ("jax", "jaxlib", "flax", "equinox", "keras", "tensorflow-cpu")

Row = Mapping[str, Any]
Figures = Mapping[str, Any]

# What is asked for: at most this, of what.
BARS = {
    "forward / NumPy's front end": 1.2,
    "forward / XLA's convolution": 1.0,
    "training step / XLA's convolution": 1.3,
    "small call minus NumPy's, µs": 15.0,
    "Keras' training step / Conv2D's, jax": 2.0,
    "Keras' training step / Conv2D's, tensorflow": 2.0,
}


def measure(pace: Pace, progress: Progress, parts: Sequence[str] = PARTS) -> dict[str, Any]:
    """Time the operator, and Keras' layers on each backend that is there."""
    threads = available_processors()
    found: dict[str, Any] = {
        "machine": machine() | {"libraries": packages(LIBRARIES)},
        "threads": threads,
        "blocks": pace.blocks,
    }
    backends = [name for name in KERAS_BACKENDS if not missing(KERAS_PEERS[f"keras-{name}"].packages)]
    progress.begin(("operator" in parts) * 3 + ("keras" in parts) * len(DIRECTIONS) * len(backends))
    if "operator" in parts:
        with processes([Truth.name, *JAX_PEERS], threads) as (truth, *others):
            for case, direction in ((CASE, FORWARD), (CASE, TRAINING), (SMALL, FORWARD)):
                progress.step(f"{case.name}, {direction}")
                results = compare({one.library: Entry(one, case) for one in others}, direction, truth, pace)
                row = {"layer": case._asdict(), "direction": direction, "results": results}
                found.setdefault("operator", []).append(row)
    for backend in backends if "keras" in parts else ():
        with processes([KerasTruth.name, f"keras-{backend}", f"keras-{backend}-dense"], threads) as (truth, *others):
            for direction in DIRECTIONS:
                progress.step(f"Keras on {backend}, {direction}")
                results = compare({one.library: Entry(one, KERAS_CASE) for one in others}, direction, truth, pace)
                row = {"net": KERAS_CASE._asdict(), "backend": backend, "direction": direction, "results": results}
                found.setdefault("keras", []).append(row)
    return found


def _operator(figures: Figures, case: Case, direction: str) -> Row | None:
    rows = figures.get("operator", ())
    return next((row for row in rows if row["layer"]["name"] == case.name and row["direction"] == direction), None)


def _keras(figures: Figures, backend: str, direction: str) -> Row | None:
    rows = figures.get("keras", ())
    return next((row for row in rows if (row["backend"], row["direction"]) == (backend, direction)), None)


def _over(row: Row | None, over: Sequence[str], under: Sequence[str]) -> float | None:
    return None if row is None else ratio(row, over, under)


def bars(figures: Figures) -> dict[str, float | None]:
    """What is asked for, as it was measured; XLA's convolution is the faster one of two layouts."""
    forward, training, small = (
        _operator(figures, case, direction) for case, direction in ((CASE, FORWARD), (CASE, TRAINING), (SMALL, FORWARD))
    )
    ours, theirs = (None if small is None else milliseconds(small, name) for name in (OURS, "numpy"))
    values = [
        _over(forward, [OURS], ["numpy"]),
        _over(forward, [OURS], DENSE),
        _over(training, [OURS], DENSE),
        None if ours is None or theirs is None else 1000 * (ours - theirs),
        *(_keras_ratio(figures, backend, TRAINING) for backend in ("jax", "tensorflow")),
    ]
    return dict(zip(BARS, values, strict=True))


def _keras_ratio(figures: Figures, backend: str, direction: str) -> float | None:
    return _over(_keras(figures, backend, direction), [f"keras-{backend}"], [f"keras-{backend}-dense"])


def _cell(row: Row | None, name: str, factor: float = 1.0) -> str:
    if row is None:
        return "-"
    result = row["results"].get(name, {})
    return digits(factor * result["milliseconds"]) if "milliseconds" in result else str(result.get("reason", "-"))


def operator_text(figures: Figures) -> str:
    """The operator's table, and what follows from it."""
    rows = [_operator(figures, case, direction) for case, direction in ((CASE, FORWARD), (CASE, TRAINING), (SMALL, FORWARD))]
    lines = [[peer.title, *(_cell(row, name, factor) for row, factor in zip(rows, (1, 1, 1000), strict=True))]
             for name, peer in JAX_PEERS.items()]  # fmt: skip
    head = ["jitted, but for NumPy's", "forward, ms", "forward and all gradients, ms", f"{SMALL.name} forward, µs"]
    numpy, dense, training, small, *_ = map(digits, bars(figures).values())
    said = (
        f"{CASE.shape}, 3x3, v2, float32, {_where(figures)}. Forward takes {numpy} times NumPy's front end's time and {dense} "
        f"times that of XLA's own convolution, whichever layout is the faster, and a training step {training} times; the plain "
        f"convolution has no offsets and masks, nor their gradients. A small call takes {small} microseconds more than NumPy's "
        f"(`make bench-jax`)."
    )
    return f"{markdown(head, lines, 1)}\n\n{said}\n"


def keras_text(figures: Figures) -> str:
    """The layers' table, and what it is of."""
    lines = []
    for backend in KERAS_BACKENDS:
        names = (f"keras-{backend}-dense", f"keras-{backend}")
        rows = [_keras(figures, backend, direction) for direction in DIRECTIONS]
        ratios = [digits(_keras_ratio(figures, backend, direction)) for direction in DIRECTIONS]
        cells = [[*(_cell(row, name) for name in names), value] for row, value in zip(rows, ratios, strict=True)]
        lines.append([backend, *cells[0], *cells[1]])
    head = [
        "backend",
        *(f"{what}{end}" for what in ("predict", "training step") for end in (": Conv2D, ms", ": DeformConv2D, ms", ", ratio")),
    ]
    said = (
        f"{KERAS_CASE.what}, float32, with the layers' predictors, by `predict_on_batch` and `train_on_batch` as Keras "
        f"compiles them by default; {_where(figures)} (`make bench-jax`)."
    )
    return f"{markdown(head, lines, 1)}\n\n{said}\n"


def _where(figures: Figures) -> str:
    processor, threads, blocks = figures["machine"]["processor"], figures["threads"], figures["blocks"]
    return f"{threads} threads of {processor}, medians of {blocks} alternating blocks"


def write(figures: Figures, folder: Path) -> None:
    """Keep the figures in a repository, and quote them in its documents."""
    said = {"jax": operator_text, "keras": keras_text}
    texts = {}
    for name, mark in PAGES.items():
        marks = (f"<!-- {mark}:begin -->\n", f"<!-- {mark}:end -->")
        try:
            texts[name] = replaced((folder / name).read_text(encoding="utf-8"), said[mark](figures), marks)
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder / name}: {error}; expected a repository's folder.") from None
    for name, text in {**texts, RESULTS: json.dumps(figures, indent=1) + "\n"}.items():
        with whole_file(folder / name) as part:
            part.write_text(text, encoding="utf-8")


class _Spoken(Progress):
    """Steps on standard error."""

    def step(self, what: str) -> None:
        print(f"  {what} ...", file=sys.stderr, flush=True)


def _print(figures: Figures) -> None:
    for name, text in zip(PARTS, (operator_text, keras_text), strict=True):
        if name in figures:
            print(f"\n{text(figures)}")
    lines = [[what, digits(value), str(BARS[what])] for what, value in bars(figures).items()]
    print(markdown(["asked for", "measured", "at most"], lines, 1))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m deformconv.bench.jax",
        description="The operator in JAX and the layer in Keras, beside their libraries' plain convolutions.",
    )
    parser.add_argument("--only", choices=PARTS, help="measure one part of the two")
    parser.add_argument("--quick", action="store_true", help="a first look, in half a minute")
    parser.add_argument("--blocks", type=int, help=f"alternating blocks of calls (default: {FULL.blocks})")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="write them into the repository in this folder")
    options = parser.parse_args(arguments)
    if lacking := missing(("jax", "keras", "torch")):
        parser.error(f"{', '.join(lacking)} not installed here: `make bench-jax` makes an environment that has them")
    if options.write and options.only:
        parser.error("--write takes the figures of both parts, and --only measures one")
    pace = QUICK if options.quick else FULL
    pace = pace._replace(blocks=options.blocks or pace.blocks)
    figures = measure(pace, _Spoken(), [options.only] if options.only else PARTS)
    _print(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if options.write:
        write(figures, options.write)


if __name__ == "__main__":
    main()
