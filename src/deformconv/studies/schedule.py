"""What the demo's nets share in every framework: their convolutions, their schedule and their batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from deformconv.studies import digits
from deformconv.studies.digits import Digits

__all__ = ["CONVOLUTIONS", "Schedule", "batches"]

# Output channels and stride of each 3x3 convolution. All but the first are deformable in nets of kind v1 and v2.
CONVOLUTIONS = ((8, 2), (16, 2), (16, 1))


@dataclass(frozen=True)
class Schedule:
    """How long and how fast a net is trained."""

    steps: int
    evaluations: int  # on the held-out digits, the last one after the last step
    batch: int = 32
    learning_rate: float = 4e-3  # the peak of a one-cycle schedule; predictors of offsets get a tenth of it

    @property
    def evaluation_steps(self) -> frozenset[int]:
        """The steps, counted from 1, after which nets are evaluated."""
        return frozenset(round(self.steps * (i + 1) / self.evaluations) for i in range(self.evaluations))


def batches(training: Digits, schedule: Schedule, seed: int | Sequence[int]) -> Iterator[Digits]:
    """As many batches as there are steps: every scan once an epoch, each time at another placement."""
    random = np.random.default_rng(seed)
    order = np.empty(0, np.intp)
    for _ in range(schedule.steps):
        if len(order) < schedule.batch:
            order = np.append(order, random.permutation(len(training.labels)))
        chosen, order = np.split(order, [schedule.batch])
        yield digits.scatter(training.take(chosen), random)
