"""One training of the experiment and its evaluation, kept when it is done."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from deformconv.files import whole_file
from deformconv.studies.detection.detector import cut, fresh, inner
from deformconv.studies.detection.evaluation import detections, scores
from deformconv.studies.detection.plan import BASE, CLOCK, SCRATCH, Budget, Job, result
from deformconv.studies.detection.scenes import Scenes
from deformconv.studies.detection.training import train

__all__ = ["load", "operations", "run_job"]

_RATE, _FRESH_RATE = 1e-3, 2e-3  # the peaks of learning rates
_TEST_SEED = 2  # the test scenes are one and the same for all seeds and arms; no setting was chosen by these
_EVERY = 25  # steps from one checkpoint to the next
_COUNTED = 8  # test scenes over which operations are counted

Progress = Callable[[float, str], None]  # the share of the job that is done, and what it does


def load(folder: Path, job: Job, budget: Budget) -> nn.Module:
    """The detector of a finished job."""
    model = fresh(job.seed, budget.size)
    if job.arm != BASE:
        model = inner(cut(model, "v2-conv" if job.arm == SCRATCH else job.arm, job.seed))
    model.load_state_dict(torch.load(_weights(folder, job), weights_only=True))
    return model


def run_job(folder: Path, budget: Budget, job: Job, progress: Progress) -> dict[str, Any]:
    """Train and evaluate, from where it was interrupted, and keep what came out."""
    model, steps = _start(folder, budget, job), _steps(folder, budget, job)
    is_fresh = job.arm in (BASE, SCRATCH)
    checkpoint = folder / f"{job.name}.checkpoint.pt"
    # All arms go on with the same scenes, and choose the same anchors and boxes as far as they propose the same.
    history = train(
        model,
        Scenes("training", job.seed, size=budget.size, variation=job.variation),
        steps=steps,
        batch=budget.batch,
        learning_rate=_FRESH_RATE if is_fresh else _RATE,
        seed=2 * job.seed + (not is_fresh),
        checkpoint=checkpoint,
        every=_EVERY,
        progress=lambda share, losses: progress(share, f"loss {sum(losses.values()):.2f}"),
    )
    detector = inner(model).eval()
    progress(1.0, "test")
    test = Scenes("test", _TEST_SEED, size=budget.size, variation=job.variation)
    last = history.losses[-50:]
    found = {
        "variation": job.variation, "seed": job.seed, "arm": job.arm, "steps": history.steps, "seconds": history.seconds,
        "parameters": sum(parameter.numel() for parameter in detector.parameters()), "operations": operations(detector, test),
        **asdict(scores(list(detections(detector, test, budget.images)))),
        "losses": {name: sum(losses[name] for losses in last) / len(last) for name in last[-1]},
    }  # fmt: skip
    with whole_file(_weights(folder, job)) as part:
        torch.save(detector.state_dict(), part)
    with whole_file(folder / f"{job.name}.json") as part:
        part.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    checkpoint.unlink(missing_ok=True)
    return found


def _weights(folder: Path, job: Job) -> Path:
    return folder / f"{job.name}.pt"


def _start(folder: Path, budget: Budget, job: Job) -> nn.Module:
    """The detector that a job trains, as it begins."""
    if job.arm == BASE:
        return fresh(job.seed, budget.size)
    if job.arm == SCRATCH:
        return cut(fresh(job.seed, budget.size), "v2-conv", job.seed)
    return cut(load(folder, Job(job.variation, job.seed, BASE), budget), job.arm, job.seed)


def _steps(folder: Path, budget: Budget, job: Job) -> int:
    """How many; those of equal seconds follow from what two other jobs measured and kept, so that they stay when it goes on."""
    if job.arm in (BASE, SCRATCH):
        return budget.base_steps
    if job.arm != "seconds":
        return budget.steps
    regular, clock = (result(folder, Job(job.variation, job.seed, arm)) for arm in ("regular", CLOCK))
    assert regular is not None and clock is not None  # the jobs that this one needs
    each = regular["seconds"] / regular["steps"]
    return max(1, round(clock["seconds"] / each))


@torch.inference_mode()
def operations(detector: nn.Module, scenes: Scenes) -> float:
    """Multiplications and additions of an image's detection, a mean over some scenes.

    PyTorch's counter knows convolutions, ours among them without their interpolation, and matrix products. What it does not
    know is counted here, RoI pooling: an interpolated sample takes 8, of its four corners.
    """
    samples: dict[Any, Callable[..., int]] = {
        torch.ops.torchvision.roi_align: _pooled,
        torch.ops.deformconv.deform_roi_pool: _pooled,
    }
    detector.eval()
    with FlopCounterMode(display=False, custom_mapping=samples) as counter:
        detector([scenes[index][0] for index in range(_COUNTED)])
    return counter.get_total_flops() / _COUNTED


def _pooled(*shapes: Any, out_shape: Sequence[int], **keywords: Any) -> int:
    """Of pooling by 2 x 2 samples a bin: `out_shape` is (R, C, PH, PW)."""
    return prod(out_shape) * 4 * 8
