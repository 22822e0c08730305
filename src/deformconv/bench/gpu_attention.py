"""`python -m deformconv.bench.gpu_attention`: multi-scale deformable attention and deformable aggregation on a GPU.

Deformable DETR's encoder and decoder, and the shapes of the table in DCNv4's paper with its batch of 64, beside PyTorch's
operations and constructions of grid_sample, transformers' own and one of all taps at once. These compute in float32 where the
numbers are in half precision, as they do under autocast. Times, memory and errors are those of `deformconv.bench.gpu`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from deformconv.bench import gpu_clock
from deformconv.bench.aggregate import AGGREGATE_CASES, DeformconvAggregate, GridSampleAggregate
from deformconv.bench.attention import ATTENTION_CASES, DeformconvAttention, TransformersAttention
from deformconv.bench.gpu import words_of
from deformconv.bench.gpu_operators import OnDevice, measured
from deformconv.bench.gpu_peers import DTYPES, Given, step
from deformconv.bench.peers import DIRECTIONS, missing

__all__ = ["CASES", "LIBRARIES", "main", "row_of"]

LIBRARIES = ("deformconv", "portable", "grid_sample")
BATCH, RIGHT = 64, 2  # images of DCNv4's table, and those of which it is computed in float64 what is right
CASES: tuple[Any, ...] = (
    *reversed(ATTENTION_CASES),
    *(case._replace(batch=BATCH) for case in AGGREGATE_CASES if case.name.startswith("dcnv4")),
)
LEAST = 4.0  # seconds that a measurement takes


class _Attention(OnDevice, DeformconvAttention):
    """Ours, by whatever backend."""


class _Aggregate(OnDevice, DeformconvAggregate):
    """Ours, by whatever backend."""


class _Transformers(OnDevice, TransformersAttention):
    """transformers' own code."""


class _GridSample(OnDevice, GridSampleAggregate):
    """The construction of all taps at once."""


class _Row(NamedTuple):
    """What is measured."""

    library: str
    case: Any
    dtype: str
    direction: str

    @property
    def attends(self) -> bool:
        return hasattr(self.case, "levels")


def _peer(row: _Row) -> Any:
    if row.library == "grid_sample":
        return _Transformers() if row.attends else _GridSample()
    peer: Any = _Attention() if row.attends else _Aggregate()
    peer.backend = "gpu" if row.library == "deformconv" else "portable"
    return peer


def _given(row: _Row, peer: Any, device: str) -> Given:
    """A case's tensors: positions and factors in float32 beside numbers of any dtype, channels last as the nets have them."""
    tensors: Given = {name: torch.from_numpy(array).to(device) for name, array in peer.arrays(row.case).items()}
    to = getattr(torch, DTYPES[row.dtype].name)
    tensors |= {name: tensors[name].to(to) for name in (peer.given[0], "grad_output")}
    if not row.attends:
        tensors = {name: tensor.contiguous(memory_format=torch.channels_last) for name, tensor in tensors.items()}
    return tensors


def _operator(row: _Row, peer: Any, device: str) -> Callable[..., Any]:
    with torch.device(device):
        call: Callable[..., Any] = peer.operator(row.case)
    if row.library != "grid_sample":
        return call

    def widened(*arguments: Any, **others: Any) -> Any:
        given = dict(zip(peer.given, arguments, strict=False)) | others
        first = given[peer.given[0]]
        return call(*(given[name].float() for name in peer.given)).to(first.dtype)

    return widened


def _right(row: _Row, tensors: Given, device: str) -> Given:
    """What is right for the first images: array operations in float64, which share nothing with the kernels."""
    part = {name: tensor[:RIGHT].double().requires_grad_(name != "grad_output") for name, tensor in tensors.items()}
    case = row.case._replace(batch=min(RIGHT, row.case.batch))
    own = row._replace(library="portable", case=case)
    return step(_operator(own, _peer(own), device), part, row.direction)


def row_of(row: _Row, device: str, seconds: float) -> dict[str, Any]:
    """A row's measurement, or why there is none."""
    peer = _peer(row)
    if absent := missing(peer.packages):
        return {"reason": f"not installed here: {', '.join(absent)}"}
    try:
        tensors = _given(row, peer, device)
        right = None if row.library == "grid_sample" else lambda: _right(row, tensors, device)
        names = (*peer.given, "grad_output")
        return measured(_operator(row, peer, device), names, tensors, row.direction, device, seconds, right)
    except Exception as error:  # what a library cannot do is a result of the comparison
        return {"reason": f"failed: {type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]}"}
    finally:
        with suppress(RuntimeError):
            gpu_clock.clear(device)


def _rows(dtypes: Sequence[str], cases: Sequence[Any]) -> list[_Row]:
    """Ours first, of every case, then what stands beside it."""
    return [
        _Row(library, case, dtype, direction)
        for libraries in (LIBRARIES[:1], LIBRARIES[1:])
        for case in cases
        for dtype in dtypes
        for direction in DIRECTIONS
        for library in libraries
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print each result at once, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m deformconv.bench.gpu_attention", description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=len(CASES), help="how many, the most important first")
    parser.add_argument("--dtypes", default="bf16,fp32", help=f"some of {', '.join(DTYPES)}, with commas")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a smoke run, for no figure")
    parser.add_argument("--seconds", type=float, default=0.5, help="seconds of a result's blocks (default: 0.5)")
    parser.add_argument("--budget", type=float, default=240.0, help="seconds after which nothing more is begun (default: 240)")
    parser.add_argument("--json", type=Path, help="write what was measured to this file, after each result")
    options = parser.parse_args(arguments)
    began, found = time.monotonic(), []
    for row in _rows(options.dtypes.split(","), CASES[: options.cases]):
        if time.monotonic() - began > options.budget - LEAST:
            print(f"{options.budget:.0f} seconds are over", flush=True)
            break
        result = row_of(row, options.device, options.seconds)
        found.append({**row._asdict(), "case": row.case._asdict(), **result})
        print(f"{row.case.name:16} {row.dtype:4}  {row.direction:16}  {row.library:12} {words_of(result)}", flush=True)
        if options.json is not None:
            options.json.write_text(json.dumps({"machine": gpu_clock.machine(options.device), "rows": found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
