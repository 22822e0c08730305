"""What torchrun starts for the tests: `ranks.py killed`, `hanging` or `gradients`, and a folder."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch
from tests.studies.detection.small import Scenes, detector
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torchvision.models.detection import FasterRCNN

from deformconv.studies.detection.per_image import drawn
from deformconv.studies.detection.training import launched, train
from deformconv.vision import FeatureMimicking

BATCH = 4


class Lopsided(Scenes):
    """Scenes without a box in what a second process is given of the first step."""

    def __getitem__(self, index: int, /) -> tuple[Tensor, dict[str, Tensor]]:
        numbers, _ = drawn(0, 0, BATCH, self.size)
        image, target = super().__getitem__(3 * index + 1)
        if index in numbers[1::2]:
            target = {name: value[:0] for name, value in target.items()}
        return image, target


class Unlucky(Scenes):
    """Scenes at whose ninth the second process ends or waits forever."""

    def __init__(self, ending: str) -> None:
        super().__init__()
        self.ending, self.drawn = ending, 0

    def __getitem__(self, index: int, /) -> tuple[Tensor, dict[str, Tensor]]:
        self.drawn += 1
        if os.environ["RANK"] == "1" and self.drawn == 9:
            if self.ending == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(600)
        return super().__getitem__(index)


CASES = {"detector": Scenes(), "mimicking": Scenes(), "lopsided": Lopsided()}


def model(case: str = "mimicking") -> FasterRCNN | FeatureMimicking:
    inner = detector()
    if case == "detector":
        return inner
    torch.manual_seed(1)
    return FeatureMimicking(inner, rois_per_image=1, crop=64).double()


def gradients(case: str) -> dict[str, Tensor]:
    """Those of a first step."""
    trained = model(case)
    train(trained, CASES[case], steps=1, batch=BATCH)
    return {name: parameter.grad for name, parameter in trained.named_parameters() if parameter.grad is not None}


def plain_ddp() -> float:
    """A step of FeatureMimicking within DistributedDataParallel as it is, without the trainer; the second rank has no box."""
    wrapped = DistributedDataParallel(model())
    image, target = Scenes()[1]
    rows = slice(0, 0) if os.environ["RANK"] == "1" else slice(None)
    losses = wrapped([image.double()], [{"boxes": target["boxes"][rows].double(), "labels": target["labels"][rows]}])
    sum(losses.values()).backward()
    classifier: Tensor = wrapped.module.classifier.weight.grad
    return classifier.abs().sum().item()


if __name__ == "__main__":
    torch.set_num_threads(1)
    fabric = launched(timeout=float(os.environ.get("TIMEOUT", "600")))
    folder = Path(sys.argv[2])
    if sys.argv[1] != "gradients":
        train(model(), Unlucky(sys.argv[1]), steps=8, batch=BATCH, checkpoint=folder / "run.pt", every=2, fabric=fabric)
    found = {case: gradients(case) for case in CASES}
    resumed = train(model(), Scenes(), steps=8, batch=BATCH, checkpoint=folder / "run.pt", fabric=fabric)
    report = {"gradients": found, "plain": plain_ddp(), "losses": resumed.losses}
    torch.save(report, folder / f"{fabric.global_rank}.pt")
