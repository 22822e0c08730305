"""What the demo's nets share in every framework: their widths, their schedule and their batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from deformconv.studies import digits
from deformconv.studies.digits import Digits

__all__ = ["KINDS", "Schedule", "batches"]

# The output channels of the two middle layers. A deformable layer also has the convolution that predicts
# its offsets; the others' middle layers are wider, so that parameters and multiply-adds are the same
# within 1.3 %.
KINDS = {"plain": (52, 36), "v1": (26, 48), "v2": (16, 48)}


@dataclass(frozen=True)
class Schedule:
    """What all nets of a study share."""

    steps: int
    evaluations: int  # on the held-out digits, the last one after the last step
    batch: int = 32
    learning_rate: float = 4e-3  # the peak of a one-cycle schedule; predictors of offsets get a tenth of it

    @property
    def evaluation_steps(self) -> frozenset[int]:
        """The steps, counted from 1, after which nets are evaluated."""
        return frozenset(round(self.steps * (i + 1) / self.evaluations) for i in range(self.evaluations))


def batches(training: Digits, schedule: Schedule, seed: int) -> Iterator[Digits]:
    """As many batches as there are steps: every scan once an epoch, each time at another placement."""
    random = np.random.default_rng(seed)
    order = np.empty(0, np.intp)
    for _ in range(schedule.steps):
        if len(order) < schedule.batch:
            order = np.append(order, random.permutation(len(training.labels)))
        chosen, order = np.split(order, [schedule.batch])
        yield digits.scatter(training.take(chosen), random)
