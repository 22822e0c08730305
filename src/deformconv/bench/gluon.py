"""`python -m deformconv.bench.gluon`: a step through a Gluon block, and the pooling of boxes, beside MXNet's own.

MXNet's v1 of the block, our v1 and our v2 (MXNet's has no backward pass on the CPU), then MXNet's DeformablePSROIPooling and
`deformconv.gluon.contrib`'s, by the same call on the same arrays, each run in a process of their own, in alternating blocks of
calls. First each pair must agree in outputs and gradients.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np

from deformconv.accuracy import error
from deformconv.bench.cases import TOLERANCE
from deformconv.bench.gluon_worker import KINDS, ROI_CASE, ROI_KINDS, ROI_WORDS
from deformconv.bench.peers import DIRECTIONS
from deformconv.runtime.host import processor_name
from deformconv.runtime.processors import available_processors

__all__ = ["measure", "pooling_sentence", "sentence", "write"]

RESULTS, GUIDE, EXPLAINED = "benchmarks/gluon.json", "docs/gluon.md", "docs/performance.md"
BEGIN, END = "<!-- gluon:begin -->\n", "\n<!-- gluon:end -->"


class _Process:
    """A worker, seen from outside."""

    def __init__(self, kind: str, dtype: str = "float32") -> None:
        command = [sys.executable, "-W", "ignore", "-m", "deformconv.bench.gluon_worker"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.ask("prepare", kind=kind, dtype=dtype)

    def ask(self, what: str, **arguments: Any) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"do": what, **arguments}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("a worker ended; its own message is above.")
        return json.loads(line)

    def end(self) -> None:
        self.process.communicate(timeout=30)


@contextmanager
def _processes(*kinds: str, dtype: str = "float32") -> Iterator[dict[str, _Process]]:
    found: dict[str, _Process] = {}
    try:
        for kind in kinds:
            found[kind] = _Process(kind, dtype)
        yield found
    finally:
        for process in found.values():
            process.end()


def _agree(ours: Any, theirs: Any, what: str) -> None:
    """Raise unless two processes give the same outputs and gradients."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for number, process in enumerate((ours, theirs)):
            file = str(Path(folder, f"{number}.npz"))
            process.ask("results", file=file)
            with np.load(file) as arrays:
                found.append(dict(arrays))
    for name, expected in found[1].items():
        difference = error(found[0][name], expected)
        if not difference <= TOLERANCE:
            raise RuntimeError(
                f"{what} differs from MXNet's in {name}: error {difference:.0e}, at most {TOLERANCE:.0e} is rounding."
            )


def _machine() -> dict[str, str]:
    libraries = {name: version(name) for name in ("mxnet", "numpy", "numba")}
    return {
        "processor": processor_name(),
        "processors": str(available_processors()),
        "python": platform.python_version(),
        **libraries,
    }


def _timed(processes: Mapping[str, Any], direction: str, rounds: int) -> dict[str, list[float]]:
    """Each process' seconds a call, in alternating blocks; `rounds` blocks of each."""
    seconds: dict[str, list[float]] = {kind: [] for kind in processes}
    for process in processes.values():
        process.ask("time", calls=2, direction=direction)  # warm
    for _ in range(rounds):
        for kind, process in processes.items():
            seconds[kind] += process.ask("time", calls=2 if kind.startswith("mxnet") else 12, direction=direction)
    return seconds


def _middle(seconds: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    return {
        "milliseconds": {kind: round(1000 * median(times), 2) for kind, times in seconds.items()},
        "quartiles": {kind: [round(1000 * q, 2) for q in quantiles(times, n=4)[::2]] for kind, times in seconds.items()},
    }


def measure(rounds: int) -> dict[str, Any]:
    """Time the blocks and the pooling; `rounds` blocks of calls of each."""
    with _processes(*KINDS) as processes:
        _agree(processes["deformconv v1"], processes["mxnet v1"], "v1")
        found = _middle(_timed(processes, DIRECTIONS[1], rounds))
    times = found["milliseconds"]
    return {
        "what": "forward and backward through a Gluon block, N,C,H,W = 2,64,56,56, 64 outputs, 3x3, float32",
        "machine": _machine(),
        **found,
        "v1 speedup": round(times["mxnet v1"] / times["deformconv v1"], 1),
        "v2 to v1": round(times["deformconv v2"] / times["deformconv v1"], 2),
        "pooling": _measured_pooling(rounds),
    }


def _measured_pooling(rounds: int) -> dict[str, Any]:
    """The same call of both libraries' DeformablePSROIPooling, by direction."""
    with _processes(*ROI_KINDS) as processes:
        # MXNet places samples in the arrays' precision, and in float32 some lie beyond a pixel's or the map's border that do
        # not: its results in float64 are what ours in float32 are compared with.
        with _processes(ROI_KINDS[0], dtype="float64") as exact:
            _agree(processes[ROI_KINDS[1]], exact[ROI_KINDS[0]], "pooling")
        found = {direction: _middle(_timed(processes, direction, rounds)) for direction in DIRECTIONS}
    words = ", ".join(f"{name}={value}" for name, value in ROI_WORDS.items())
    for direction in DIRECTIONS:
        theirs, ours = (found[direction]["milliseconds"][kind] for kind in ROI_KINDS)
        found[direction]["speedup"] = round(theirs / ours, 1)
    return {"what": f"{ROI_CASE.what}: DeformablePSROIPooling(data, rois, trans, {words}), float32", **found}


def sentence(figures: Mapping[str, Any]) -> str:
    """The block's figures in one sentence, as docs/gluon.md quotes them."""
    theirs, v1, v2 = (f"{figures['milliseconds'][kind]:.0f} ms" for kind in KINDS)
    return (
        f"A training step through the block (2x64x56x56 -> 64, forward and backward; {_where(figures)}): MXNet's v1 {theirs}, "
        f"our v1 {v1}, {figures['v1 speedup']} times as fast, our v2 {v2} (`make bench-gluon`)."
    )


def pooling_sentence(figures: Mapping[str, Any]) -> str:
    """The pooling's figures in two sentences, as docs/performance.md quotes them; nothing where it was not measured."""
    if "pooling" not in figures:
        return ""
    forward, both = (figures["pooling"][direction] for direction in DIRECTIONS)
    (theirs, ours), (theirs_both, ours_both) = (
        [f"{found['milliseconds'][kind]:.0f}" for kind in ROI_KINDS] for found in (forward, both)
    )
    return (
        f"Beside MXNet's operator, on its arrays: `mxnet.nd.contrib.DeformablePSROIPooling` and the same call of "
        f"`deformconv.gluon.contrib`, on these boxes with offsets and without masks (`group_size=1`, "
        f"`sample_per_part={ROI_CASE.sampling}`, `trans_std=0.1`; float32; {_where(figures)}). Forward {ours} ms and {theirs}, "
        f"**{forward['speedup']} times as fast**; with the gradients of data and offsets {ours_both} ms and {theirs_both}, "
        f"**{both['speedup']} times** (`make bench-gluon`)."
    )


def _where(figures: Mapping[str, Any]) -> str:
    return f"{figures['machine']['processors']} cores, {figures['machine']['processor']}"


def write(figures: Mapping[str, Any], folder: Path) -> None:
    """Keep the figures in a repository, and quote them in its documents."""
    said = {GUIDE: sentence(figures), EXPLAINED: pooling_sentence(figures)}
    texts = {RESULTS: json.dumps(figures, indent=1) + "\n"}
    for name, quoted in said.items():
        before, begin, rest = (folder / name).read_text(encoding="utf-8").partition(BEGIN)
        _, end, after = rest.partition(END)
        if not end:
            raise ValueError(f"{folder / name} has no {BEGIN.strip()} and {END.strip()}; expected a repository's folder.")
        texts[name] = before + begin + quoted + end + after
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def _print(figures: Mapping[str, Any]) -> None:
    print(f"{figures['what']}; {figures['machine']['processor']}, {figures['machine']['processors']} processors\n")
    _print_times(figures)
    print(f"\nOur v1 is {figures['v1 speedup']} times as fast as MXNet's; our v2 takes {figures['v2 to v1']} of our v1's time.")
    pooling = figures["pooling"]
    print(f"\n{pooling['what']}")
    for direction in DIRECTIONS:
        print(f"\n{direction}")
        _print_times(pooling[direction])
        print(f"  Ours is {pooling[direction]['speedup']} times as fast.")


def _print_times(found: Mapping[str, Any]) -> None:
    for kind, time_of in found["milliseconds"].items():
        low, high = found["quartiles"][kind]
        print(f"  {kind:18} {time_of:7.1f} ms a call (quartiles {low:.1f} to {high:.1f})")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m deformconv.bench.gluon",
        description="A step through a Gluon block and the pooling of boxes, beside MXNet's own.",
    )
    parser.add_argument("--rounds", type=int, default=8, help="alternating blocks of calls (default: 8)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="write them into the repository in this folder")
    options = parser.parse_args()
    figures = measure(options.rounds)
    _print(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if options.write:
        write(figures, options.write)


if __name__ == "__main__":
    main()
