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

from deformconv.bench import jax_rows
from deformconv.bench.document import machine, packages
from deformconv.bench.figures import digits, markdown, milliseconds, ratio
from deformconv.bench.jax_peers import DENSE, OURS
from deformconv.bench.jax_rows import SMALL, keras_ratio, keras_table, operator_row, operator_table
from deformconv.bench.keras_peers import KERAS_CASE
from deformconv.bench.measure import Pace, Progress
from deformconv.bench.peers import DIRECTIONS, missing
from deformconv.bench.readme import replaced
from deformconv.files import whole_file
from deformconv.runtime.processors import available_processors

__all__ = ["BARS", "bars", "keras_text", "measure", "operator_text", "write"]

FORWARD, TRAINING = DIRECTIONS
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
    for name, of_part in zip(PARTS, (jax_rows.measure_operator, jax_rows.measure_keras), strict=True):
        if name in parts:
            found[name] = of_part(threads, pace, progress)
    return found


def _over(row: Row | None, over: Sequence[str], under: Sequence[str]) -> float | None:
    return None if row is None else ratio(row, over, under)


def bars(figures: Figures) -> dict[str, float | None]:
    """What is asked for, as it was measured; XLA's convolution is the faster one of two layouts."""
    layer, rows = jax_rows.CASE, figures.get("operator", ())
    forward, training, small = (
        operator_row(rows, case, direction) for case, direction in ((layer, FORWARD), (layer, TRAINING), (SMALL, FORWARD))
    )
    ours, theirs = (None if small is None else milliseconds(small, name) for name in (OURS, "numpy"))
    values = [
        _over(forward, [OURS], ["numpy"]),
        _over(forward, [OURS], DENSE),
        _over(training, [OURS], DENSE),
        None if ours is None or theirs is None else 1000 * (ours - theirs),
        *(keras_ratio(figures.get("keras", ()), backend, TRAINING) for backend in ("jax", "tensorflow")),
    ]
    return dict(zip(BARS, values, strict=True))


def operator_text(figures: Figures) -> str:
    """The operator's table, and what follows from it."""
    numpy, dense, training, small, *_ = map(digits, bars(figures).values())
    said = (
        f"{jax_rows.CASE.shape}, 3x3, v2, float32, {_where(figures)}. Forward takes {numpy} times NumPy's front end's time and "
        f"{dense} times that of XLA's own convolution, whichever layout is the faster, and a training step {training} times; "
        f"the plain convolution has no offsets and masks, nor their gradients. A small call takes {small} microseconds more "
        f"than NumPy's (`make bench-jax`)."
    )
    return f"{operator_table(figures['operator'])}\n\n{said}\n"


def keras_text(figures: Figures) -> str:
    """The layers' table, and what it is of."""
    said = (
        f"{KERAS_CASE.what}, float32, with the layers' predictors, by `predict_on_batch` and `train_on_batch` as Keras "
        f"compiles them by default; {_where(figures)} (`make bench-jax`)."
    )
    return f"{keras_table(figures['keras'])}\n\n{said}\n"


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
