"""A step of training of mmdetection's deformable detectors: our operators under mmcv-lite, and torchvision's in their place.

    .venv-mmdet/bin/python tools/mmdet_step.py [--rounds 7] [--models dconv mdpool] [--size 320 480]

Blocks of steps take turns. The deformable operator alone is exchanged: torchvision's deform_conv2d for the convolutions, and
for the poolings its roi_align, which leaves the offsets out, since it has none that moves bins. It needs the environment of
`make test-mmdet`, a quiet machine, and no limits on threads.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import median, quantiles
from typing import Any
from unittest.mock import patch

import torch
import torchvision

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.mmdet import oracles
from tests.mmdet.models import DEFORMABLE, batch, build, loss_of

from deformconv.convert.mmcv import accelerate_mmcv


def pooled_without_offsets(
    input: Any,
    rois: Any,
    offset: Any,
    output_size: Any,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    gamma: float = 0.1,
) -> Any:
    """torchvision's RoI align in the place of mmcv's deformable pooling."""
    found = torchvision.ops.roi_align(input, rois, output_size, spatial_scale, sampling_ratio, True)
    return found if offset is None else found + 0 * offset.sum()  # which goes back to the offsets as well


def theirs(model: str) -> AbstractContextManager[Any]:
    """torchvision's operator in the place of a model's deformable one."""
    if "pool" in model:
        return patch.object(sys.modules["mmcv.ops.deform_roi_pool"], "deform_roi_pool", pooled_without_offsets)
    name = "deform_conv2d" if model == "dconv" else "modulated_deform_conv2d"
    return patch.object(sys.modules[f"mmcv.ops.{name[:-2]}"], name, getattr(oracles, name))


def blocks(model: str, options: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Seconds for a step with ours and with theirs, of one block after the other."""
    detector = build(DEFORMABLE[model], pool_features=1024)
    detector.train()
    images, samples = batch(images=options.images, size=tuple(options.size))
    optimizer = torch.optim.SGD(detector.parameters(), lr=1e-6)

    def step() -> None:
        optimizer.zero_grad()
        loss_of(detector, images, samples).backward()
        optimizer.step()

    found: tuple[list[float], list[float]] = ([], [])
    for number in range(options.rounds):
        for other in (False, True) if number % 2 else (True, False):
            with theirs(model) if other else nullcontext():
                found[other].append(seconds(step, options.steps))
    return found


def seconds(step: Callable[[], None], steps: int) -> float:
    """Seconds for a step, of several after one that is not measured."""
    step()
    began = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - began) / steps


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="blocks with ours, and with torchvision's (default: 7)")
    parser.add_argument("--steps", type=int, default=2, help="that are measured of a block (default: 2)")
    parser.add_argument("--images", type=int, default=1, help="of a batch (default: 1)")
    parser.add_argument("--size", type=int, nargs=2, default=[320, 480], help="height and width of an image (default: 320 480)")
    parser.add_argument("--models", nargs="+", choices=DEFORMABLE, default=list(DEFORMABLE))
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    with accelerate_mmcv():
        for model in options.models:
            ours, others = blocks(model, options)
            low, middle, high = quantiles(
                [other / our for our, other in zip(ours, others, strict=True)], n=4, method="inclusive"
            )
            print(
                f"{model}, {options.images} x {options.size[0]} x {options.size[1]}, {torch.get_num_threads()} threads: "
                f"{median(ours):.3f} s a step, with torchvision's operator {median(others):.3f} s: "
                f"{median(others) / median(ours):.2f} times as long; of pairs of blocks the median {middle:.2f}, half between "
                f"{low:.2f} and {high:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
