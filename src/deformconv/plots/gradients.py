"""Gradients of one unit's channels: each of them, or random sums that tell the root mean square over all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["Signs", "channel_signs", "check_channels", "check_finite", "gradients", "unit_response"]

Signs = npt.NDArray[np.float64]


def channel_signs(channels: int, limit: int, seed: int) -> Signs:
    """Weights (R, channels) of sums over a unit's channels, from which `sum((weights @ a)**2)` is `mean(a**2)` for any a.

    Up to `limit` channels each is a sum of its own, and that is exact. Of more channels there are `limit` sums with random
    signs, and it is so in expectation: the products of two different signs are 0 on average. The relative standard deviation
    of the mean square is at most sqrt(2 / limit), where one direction holds all of it.
    """
    if channels <= limit:
        return np.eye(channels) / np.sqrt(channels)
    signs = np.random.default_rng(seed).choice((-1.0, 1.0), (limit, channels))
    return np.asarray(signs / np.sqrt(limit * channels))


def check_channels(channels: object) -> int:
    """The number of sums over channels, or an error that says what it is."""
    if isinstance(channels, bool) or not isinstance(channels, (int, np.integer)) or channels < 1:
        raise ValueError(
            f"`channels` is {channels!r}; expected an integer of at least 1: a unit of up to so many channels has its gradients "
            "computed one by one, a unit of more has so many random sums."
        )
    return int(channels)


def unit_response(features: Tensor, unit: Sequence[int]) -> Tensor:
    """The channels (C,) of one unit of `features` (1, C, *O)."""
    return features[(0, slice(None), *unit)]


def gradients(response: Tensor, inputs: Sequence[Tensor], signs: Signs) -> Iterator[tuple[Tensor | None, ...]]:
    """For each of the sums (R, C) of a unit's channels (C,): its gradient with respect to each input, None where it has none."""
    for index, row in enumerate(signs):
        # Sums are made in the response's own dtype, in which a sign over the root of the channels may be rounded: the same for
        # all channels, so that they weigh the same.
        weights = torch.as_tensor(row, dtype=response.dtype, device=response.device)
        more = index + 1 < len(signs)
        yield torch.autograd.grad(response, list(inputs), weights, retain_graph=more, allow_unused=True)


def check_finite(values: npt.NDArray[np.float64], layer: str, unit: Sequence[int]) -> None:
    """Raise ValueError where a gradient is NaN or infinite."""
    if not np.isfinite(values).all():
        raise ValueError(
            f"the gradient of unit {tuple(unit)} of layer {layer!r} has {np.sum(~np.isfinite(values))} of {values.size} numbers "
            "that are NaN or infinite; expected finite ones. Half precision may have overflowed (try `model.float()`), or the "
            "picture or the parameters are not finite."
        )
