"""Gradients of one unit's channels: of each, or of random sums that tell the mean square over all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["Sums", "check_channels", "check_finite", "differentiable", "gradients", "sums_of", "unit_response"]


class Sums(NamedTuple):
    """Sums over a unit's channels: for numbers a of the channels, `share * sum((signs @ a)**2)` is the mean of a**2."""

    signs: npt.NDArray[np.float64]  # (sums, channels), of -1, 0 and 1
    share: float


def sums_of(channels: int, limit: int, seed: int) -> Sums:
    """Up to `limit` channels each is a sum of its own, and the mean square is exact.

    Of more channels there are `limit` sums with random signs, and the mean square is right in expectation, since products of
    two signs are 0 on average. Its relative standard deviation is at most sqrt(2 / limit).
    """
    if channels <= limit:
        return Sums(np.eye(channels), 1 / channels)
    return Sums(np.random.default_rng(seed).choice((-1.0, 1.0), (limit, channels)), 1 / (limit * channels))


def check_channels(channels: Any) -> int:
    """The number of sums, or an error that says what it is."""
    if isinstance(channels, bool) or not isinstance(channels, (int, np.integer)) or channels < 1:
        raise ValueError(
            f"`channels` is {channels!r}; expected an integer of at least 1: up to so many channels have their gradients "
            "computed one by one, more are estimated from so many random sums."
        )
    return int(channels)


@contextmanager
def differentiable() -> Iterator[None]:
    """A block that computes gradients, wherever it is called from."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def unit_response(features: Tensor, unit: Sequence[int]) -> Tensor:
    """The channels (C,) of one unit of a layer's output (1, C, *O) or, for one image without a batch axis, (C, *O)."""
    if features.ndim == len(unit) + 2:
        features = features[0]
    cell: Any = (slice(None), *unit)
    return features[cell]


def gradients(response: Tensor, inputs: Sequence[Any], sums: Sums, *, keep: bool = False) -> Iterator[list[Tensor | None]]:
    """For each sum of a unit's channels (C,) its gradient with respect to each input, None where there is no way to it.

    `keep` keeps the graph for further gradients.
    """
    for number, row in enumerate(sums.signs, 1):
        weights = torch.as_tensor(row, dtype=response.dtype, device=response.device)
        more = keep or number < len(sums.signs)
        yield list(torch.autograd.grad(response, inputs, weights, retain_graph=more, allow_unused=True))


def check_finite(values: npt.NDArray[np.float64], layer: str, unit: Sequence[int]) -> None:
    """Raise ValueError where numbers made of a unit's gradient are NaN or infinite."""
    if not (finite := np.isfinite(values)).all():
        raise ValueError(
            f"the gradient of unit {tuple(unit)} of layer {layer!r} has {np.sum(~finite)} of {values.size} numbers that are "
            "NaN or infinite; expected finite ones. The picture or a parameter is not finite, or half precision has "
            "overflowed: then try model.float()."
        )
