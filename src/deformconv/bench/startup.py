"""The first call of a process: with machine code on disk, without any, and in two processes at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deformconv.bench.figures import Row, markdown

__all__ = ["Start", "measure", "write"]

FIRST_CALL = """
import time
began = time.perf_counter()
import torch
imported = time.perf_counter()
from deformconv.torch import deform_conv2d
loaded = time.perf_counter()
shapes = (2, 32, 20, 20), (2, 18, 20, 20), (32, 32, 3, 3), (32,), (2, 9, 20, 20)
generator = torch.Generator().manual_seed(0)
x, offset, weight, bias, mask = (torch.randn(shape, generator=generator).requires_grad_() for shape in shapes)
output = deform_conv2d(x, offset, weight, bias, padding=1, mask=mask)
output.sum().backward()
called = time.perf_counter()
import hashlib, json
results = [output.detach(), *(tensor.grad for tensor in (x, offset, weight, bias, mask))]
seen = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in results)).hexdigest()
print(json.dumps({"import": imported - began, "load": loaded - imported, "first": called - imported, "results": seen}))
"""


class Start:
    """A process that makes its first call, in a folder and with variables of its environment if given.

    It finds Python's bytecode on disk, as an installed package's users do, also where the environment says to write none.
    """

    def __init__(self, folder: Path | None = None, **variables: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", FIRST_CALL], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            cwd=folder, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "", **variables},
        )  # fmt: skip

    def end(self) -> dict[str, Any]:
        """The seconds of each part, and a name for the results' bits."""
        try:
            printed, complaint = self.process.communicate()
        finally:  # an interrupt must not leave a process behind that compiles into a folder which is gone
            self.process.kill()
            self.process.wait()
        if self.process.returncode:
            last = (complaint.strip().splitlines() or ["it said nothing"])[-1]
            raise RuntimeError(f"a first call failed: {last}")
        found: dict[str, Any] = json.loads(printed)
        return found


def measure(step: Callable[[str], None], warm: int, cold: bool) -> list[dict[str, Any]]:
    """Medians of some warm starts, and a cold one; and whether two that start cold at once do no harm."""
    step("the first call, warm")
    Start().end()  # it compiles, if nothing is on disk
    runs = [Start().end() for _ in range(warm)]
    rows = [_row("import torch", [run["import"] for run in runs]), _row("warm, after that", [run["first"] for run in runs])]
    if not cold:
        return rows
    with tempfile.TemporaryDirectory() as folder:
        step("the first call, cold")
        alone = Start(DEFORMCONV_CACHE_DIR=folder).end()
        rows.append(_row("cold, after importing torch", [alone["first"]]))
        written = _files(folder)
    with tempfile.TemporaryDirectory() as folder:
        step("the first call, two at once")
        both = [start.end() for start in (Start(DEFORMCONV_CACHE_DIR=folder), Start(DEFORMCONV_CACHE_DIR=folder))]
        between = _files(folder)
        later = Start(DEFORMCONV_CACHE_DIR=folder).end()
        agree = len({run["results"] for run in (*runs, alone, *both, later)}) == 1
        whole = written == between == _files(folder)
    cold_both = _row("two cold at once, each", [run["first"] for run in both])
    return [*rows, cold_both | {"results agree": agree, "cache is whole": whole}]


def _files(folder: str) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file()}


def _row(what: str, seconds: list[float]) -> dict[str, Any]:
    low, middle, high = np.quantile(seconds, (0.25, 0.5, 0.75)).tolist()
    return {"what": what, "seconds": middle, "quartiles": [low, high], "processes": len(seconds)}


def write(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        said = [f"{key}: {'yes' if row[key] else 'NO'}" for key in ("results agree", "cache is whole") if key in row]
        lines.append([row["what"], f"{row['seconds']:.2f}", str(row["processes"]), ", ".join(said)])
    return markdown(["first call", "seconds", "processes", "and"], lines)
