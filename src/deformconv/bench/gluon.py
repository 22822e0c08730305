"""`python -m deformconv.bench.gluon`: a training step through a Gluon block, beside MXNet's own.

MXNet's v1, our v1 and our v2 (MXNet's has no backward pass on the CPU) each run in a process of their own, in alternating
blocks of calls. First the two v1 must agree in outputs and gradients.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np

from deformconv.accuracy import error
from deformconv.bench.cases import TOLERANCE
from deformconv.runtime.host import processor_name
from deformconv.runtime.processors import available_processors

SHAPE, CHANNELS = (2, 64, 56, 56), 64  # N, C, H, W and C_out
KINDS = ("mxnet v1", "deformconv v1", "deformconv v2")


def _block(kind: str) -> Any:
    from mxnet.gluon.contrib import cnn

    import deformconv.gluon as ours

    library, number = kind.split()
    name = "DeformableConvolution" if number == "v1" else "ModulatedDeformableConvolution"
    return getattr(cnn if library == "mxnet" else ours, name)(CHANNELS, kernel_size=3, padding=1)


class _Worker:
    """What a process can be asked."""

    def prepare(self, kind: str) -> None:
        import mxnet as mx

        self.mx, random = mx, np.random.default_rng(0)
        self.x = mx.nd.array(random.standard_normal(SHAPE))
        self.x.attach_grad()
        self.net = _block(kind)
        self.net.initialize()
        self.net(self.x)
        for name, parameter in sorted(self.net._reg_params.items()):
            size = {"offset_weight": 0.04, "deformable_conv_weight": 0.04}.get(name, 0.3)
            parameter.set_data(mx.nd.array(size * random.standard_normal(parameter.shape)))

    def results(self, file: str) -> None:
        output = self.step()
        found = {name: parameter.grad().asnumpy() for name, parameter in self.net._reg_params.items()}
        np.savez(file, output=output.asnumpy(), x=self.x.grad.asnumpy(), **found)

    def step(self) -> Any:
        with self.mx.autograd.record():
            output = self.net(self.x)
        output.backward()
        self.mx.nd.waitall()
        return output

    def time(self, calls: int) -> list[float]:
        seconds = []
        for _ in range(calls):
            began = time.perf_counter()
            self.step()
            seconds.append(time.perf_counter() - began)
        return seconds


class _Process:
    """A worker, seen from outside."""

    def __init__(self, kind: str) -> None:
        command = [sys.executable, "-W", "ignore", "-m", "deformconv.bench.gluon", "--worker"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.ask("prepare", kind=kind)

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


def _serve() -> None:
    worker = _Worker()
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(getattr(worker, request.pop("do"))(**request)), flush=True)


def _agree(processes: dict[str, _Process]) -> None:
    """Raise unless the two v1 give the same outputs and gradients."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("mxnet v1", "deformconv v1"):
            file = str(Path(folder, kind + ".npz"))
            processes[kind].ask("results", file=file)
            with np.load(file) as arrays:
                found[kind] = dict(arrays)
    for name, expected in found["mxnet v1"].items():
        difference = error(found["deformconv v1"][name], expected)
        if not difference <= TOLERANCE:
            raise RuntimeError(
                f"v1 differs from MXNet's in {name}: error {difference:.0e}, at most {TOLERANCE:.0e} is rounding."
            )


def _machine() -> dict[str, str]:
    libraries = {name: version(name) for name in ("mxnet", "numpy", "numba")}
    return {
        "processor": processor_name(),
        "processors": str(available_processors()),
        "python": platform.python_version(),
        **libraries,
    }


def measure(rounds: int) -> dict[str, Any]:
    """Time the three in alternating blocks; `rounds` blocks of each."""
    processes = {kind: _Process(kind) for kind in KINDS}
    try:
        _agree(processes)
        seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for process in processes.values():
            process.ask("time", calls=2)  # warm
        for _ in range(rounds):
            for kind, process in processes.items():
                seconds[kind] += process.ask("time", calls=2 if kind.startswith("mxnet") else 12)
    finally:
        for process in processes.values():
            process.end()
    medians = {kind: 1000 * median(times) for kind, times in seconds.items()}
    return {
        "what": "forward and backward through a Gluon block, N,C,H,W = 2,64,56,56, 64 outputs, 3x3, float32",
        "machine": _machine(),
        "milliseconds": {kind: round(value, 2) for kind, value in medians.items()},
        "quartiles": {kind: [round(1000 * q, 2) for q in quantiles(times, n=4)[::2]] for kind, times in seconds.items()},
        "v1 speedup": round(medians["mxnet v1"] / medians["deformconv v1"], 1),
        "v2 to v1": round(medians["deformconv v2"] / medians["deformconv v1"], 2),
    }


def sentence(figures: dict[str, Any]) -> str:
    """The figures in one sentence, as docs/gluon.md quotes them."""
    theirs, v1, v2 = (f"{figures['milliseconds'][kind]:.0f} ms" for kind in KINDS)
    machine = f"{figures['machine']['processors']} cores, {figures['machine']['processor']}"
    return (
        f"A training step through the block (2x64x56x56 -> 64, forward and backward; {machine}): MXNet's v1 {theirs}, "
        f"our v1 {v1}, {figures['v1 speedup']} times as fast, our v2 {v2} (`make bench-gluon`)."
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m deformconv.bench.gluon", description="A training step in Gluon.")
    parser.add_argument("--rounds", type=int, default=8, help="alternating blocks of calls (default: 8)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return _serve()
    figures = measure(options.rounds)
    print(f"{figures['what']}; {figures['machine']['processor']}, {figures['machine']['processors']} processors\n")
    for kind in KINDS:
        low, high = figures["quartiles"][kind]
        print(f"  {kind:14} {figures['milliseconds'][kind]:7.1f} ms a step (quartiles {low:.1f} to {high:.1f})")
    print(f"\nOur v1 is {figures['v1 speedup']} times as fast as MXNet's; our v2 takes {figures['v2 to v1']} of our v1's time.")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
