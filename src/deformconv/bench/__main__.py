"""Compare forward and training speed with torchvision's operator and with a plain convolution.

Every library runs in a process of its own, and only one of them computes at a time: blocks of calls alternate between them,
after a warm-up and a check that their results agree. Medians are compared, over all blocks.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
from contextlib import ExitStack, closing
from importlib.metadata import version
from pathlib import Path
from statistics import geometric_mean, median
from typing import IO, Any, cast

import click
import numpy as np

from deformconv.bench.cases import CASES, Case

LIBRARIES = ("deformconv", "torchvision", "dense")
DIRECTIONS = ("forward", "forward+backward")
TOLERANCE = 1e-4  # of two float32 results, each 1e-5 or so from the truth


class Process:
    """A worker process and the conversation with it."""

    def __init__(self, library: str, threads: int) -> None:
        self.library = library
        command = [sys.executable, "-m", "deformconv.bench.worker", library, str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.requests = cast(IO[str], self.process.stdin)  # Popen makes both, since both are pipes
        self.answers = cast(IO[str], self.process.stdout)

    def ask(self, do: str, **request: Any) -> Any:
        self.requests.write(json.dumps({"do": do, **request}) + "\n")
        self.requests.flush()
        answer = self.answers.readline()
        if not answer:
            raise click.ClickException(f"the process of {self.library} ended")
        return json.loads(answer)

    def close(self) -> None:
        self.requests.close()
        self.answers.close()
        self.process.wait()


def check(processes: dict[str, Process]) -> None:
    """Refuse to time results that differ."""
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for library in ("deformconv", "torchvision"):
            file = Path(folder) / f"{library}.npz"
            processes[library].ask("results", file=str(file))
            found[library] = dict(np.load(file))
    for name, expected in found["torchvision"].items():
        error = abs(found["deformconv"][name] - expected).max() / abs(expected).max()
        if not error <= TOLERANCE:
            raise click.ClickException(f"the {name} of deformconv and torchvision differ by {error:.1e}")


def measure(processes: dict[str, Process], direction: str, blocks: int, seconds: float) -> dict[str, list[float]]:
    """Times of alternating blocks, each about `seconds` long."""
    calls = {}
    for library, process in processes.items():
        process.ask("time", direction=direction, calls=2)
        once = median(process.ask("time", direction=direction, calls=3))
        calls[library] = max(1, min(100, round(seconds / once)))
    times: dict[str, list[float]] = {library: [] for library in processes}
    for _ in range(blocks):
        for library, process in processes.items():
            process.ask("time", direction=direction, calls=1)  # the caches belonged to another process
            times[library] += process.ask("time", direction=direction, calls=calls[library])
    return times


def row(case: Case, direction: str, times: dict[str, list[float]]) -> dict[str, Any]:
    medians = {library: 1000 * median(values) for library, values in times.items()}
    quartiles = {library: [1000 * float(q) for q in np.quantile(values, (0.25, 0.75))] for library, values in times.items()}
    return {"case": case.name, "shape": case.shape, "direction": direction, "milliseconds": medians, "quartiles": quartiles}


def ratio(found: dict[str, Any], over: str, under: str) -> float:
    result: float = found["milliseconds"][over] / found["milliseconds"][under]
    return result


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table, with the geometric means of the ratios."""
    lines = [
        "| layer (3x3, v2) | | deformconv | torchvision | plain conv2d | faster than torchvision | times a plain conv2d |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for found in rows:
        times = " | ".join(f"{found['milliseconds'][library]:.1f} ms" for library in LIBRARIES)
        ratios = f"{ratio(found, 'torchvision', 'deformconv'):.1f}x | {ratio(found, 'deformconv', 'dense'):.2f}"
        lines.append(f"| {found['shape']} | {found['direction']} | {times} | {ratios} |")
    for direction in DIRECTIONS:
        chosen = [found for found in rows if found["direction"] == direction]
        faster = geometric_mean(ratio(found, "torchvision", "deformconv") for found in chosen)
        price = geometric_mean(ratio(found, "deformconv", "dense") for found in chosen)
        lines.append(f"| geometric mean | {direction} | | | | **{faster:.1f}x** | **{price:.2f}** |")
    return "\n".join(lines)


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--case", "names", multiple=True, type=click.Choice([case.name for case in CASES]), help="Only this case.")
@click.option("--blocks", type=click.IntRange(1), default=7, show_default=True, help="Blocks of calls for each library.")
@click.option("--seconds", type=float, default=0.5, show_default=True, help="About how long a block takes.")
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True, help="Threads of every library.")
@click.option("--json", "output", type=click.Path(dir_okay=False, path_type=Path), help="Write the results to a file.")
def main(names: tuple[str, ...], blocks: int, seconds: float, threads: int, output: Path | None) -> None:
    """Compare deformconv with torchvision's operator and a plain convolution, in PyTorch on the CPU."""
    rows = []
    with ExitStack() as stack:
        processes = {library: stack.enter_context(closing(Process(library, threads))) for library in LIBRARIES}
        for case in [case for case in CASES if not names or case.name in names]:
            for process in processes.values():
                process.ask("prepare", case=case.name)
            check(processes)
            for direction in DIRECTIONS:
                rows.append(row(case, direction, measure(processes, direction, blocks, seconds)))
                click.echo(f"{case.name}, {direction}: measured", err=True)
    machine = {name: version(name) for name in ("numpy", "numba", "torch", "torchvision")}
    machine |= {"python": platform.python_version(), "processor": processor(), "threads": str(threads)}
    click.echo(table(rows))
    click.echo("\n" + ", ".join(f"{name} {text}" for name, text in machine.items()))
    if output is not None:
        output.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
