"""`python -m deformconv.bench.gpu_rois`: deformable RoI pooling on a GPU, beside torchvision's RoI align.

torchvision's moves no bin and weighs none, so that it reads fewer numbers and has one gradient to compute where ours has three.
Times, memory and errors are those of `deformconv.bench.gpu`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from deformconv.bench import gpu_clock, gpu_operators
from deformconv.bench.gpu import words_of
from deformconv.bench.gpu_operators import OnDevice
from deformconv.bench.gpu_peers import DTYPES, Given, step
from deformconv.bench.peers import DIRECTIONS
from deformconv.bench.rois import ROI_CASES, DeformconvRoi, RoiCase, TorchvisionRoi, roi_arrays

__all__ = ["main", "measured"]


class Ours(OnDevice, DeformconvRoi):
    name, backend = "deformconv", "gpu"


class Portable(OnDevice, DeformconvRoi):
    name, backend = "portable", "portable"


class Theirs(OnDevice, TorchvisionRoi):
    name = "torchvision"


PEERS: dict[str, Any] = {peer.name: peer for peer in (Ours, Theirs, Portable)}


def _given(case: RoiCase, to: Any, device: str) -> Given:
    """A case's tensors: boxes, offsets and masks in float32 beside numbers of any dtype."""
    tensors: Given = {name: torch.from_numpy(array).to(device) for name, array in roi_arrays(case).items()}
    return tensors | {name: tensors[name].to(to) for name in ("input", "grad_output")}


def _operator(peer: Any, case: RoiCase, tensors: Given) -> Callable[..., Any]:
    boxes = tensors["boxes"]
    peer.others = {"boxes": boxes.to(tensors["input"].dtype) if isinstance(peer, Theirs) else boxes}  # which wants one dtype
    found: Callable[..., Any] = peer.operator(case)
    return found


def _truth(case: RoiCase, tensors: Given, direction: str) -> Given:
    """What is right for these numbers: array operations in float64, which share nothing with the kernels."""
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    peer = Portable()
    leaves = {name: wide[name].requires_grad_(name != "grad_output") for name in (*peer.given, "grad_output")}
    return step(_operator(peer, case, wide), leaves, direction)


def measured(library: str, case: RoiCase, dtype: str, direction: str, device: str, seconds: float) -> dict[str, Any]:
    """A library's time, its errors where it computes the same, and whether a second run gives the same bits; or why not."""
    try:
        peer, tensors = PEERS[library](), _given(case, getattr(torch, DTYPES[dtype].name), device)
        operate, names = _operator(peer, case, tensors), (*peer.given, "grad_output")
        right = (lambda: _truth(case, tensors, direction)) if peer.deforms else None
        return gpu_operators.measured(operate, names, tensors, direction, device, seconds, right)
    except Exception as error:  # what a library cannot do is a result of the comparison
        return {"reason": f"failed: {type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]}"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print each result at once, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m deformconv.bench.gpu_rois", description="RoI pooling on a GPU.")
    parser.add_argument("--cases", type=int, default=len(ROI_CASES), help="how many, the most important first")
    parser.add_argument("--dtypes", default="bf16,fp32", help=f"some of {', '.join(DTYPES)}, with commas")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a smoke run, for no figure")
    parser.add_argument("--seconds", type=float, default=1.0, help="seconds of a result's blocks (default: 1)")
    parser.add_argument("--json", type=Path, help="write what was measured to this file")
    options = parser.parse_args(arguments)
    rows = []
    for case in ROI_CASES[: options.cases]:
        for dtype in options.dtypes.split(","):
            for direction in DIRECTIONS:
                for library in PEERS:
                    result = measured(library, case, dtype, direction, options.device, options.seconds)
                    rows.append({"case": case._asdict(), "dtype": dtype, "direction": direction, "library": library, **result})
                    print(f"{case.name:22} {dtype:4}  {direction:16}  {library:12} {words_of(result)}", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": gpu_clock.machine(options.device), "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
