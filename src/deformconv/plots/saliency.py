"""The error-bounded saliency region: the part of the image that is enough for a unit to respond as it does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from deformconv.plots.gradients import differentiable, gradients, sums_of, unit_response
from deformconv.plots.masking import smallest_region
from deformconv.plots.progress import bar
from deformconv.plots.rerun import Probe
from deformconv.plots.stack import check_trace
from deformconv.plots.trace import Trace

__all__ = ["SaliencyRegion", "saliency_region"]

Region = npt.NDArray[np.bool_]

FINEST = 64  # cells along the longest axis, about, if nothing is said
CHANNELS = 16  # sums of channels by which cells are put in order


@dataclass(frozen=True, eq=False)
class SaliencyRegion:
    """What `saliency_region` returns; *S is the image's size.

    Attributes:
        layer: the layer's name.
        unit: the output unit, a cell of the layer's output map.
        at: the middle of its undeformed window, image pixels.
        region: (*S) bool, the pixels that are enough.
        error: the length of the change of the unit's channels when all other pixels are masked, over the length of the
            channels; at most `bound`.
        bound: as it was asked for.
        passes: how many images the model was run on.
        share: of the image's pixels that are in the region, 0 to 1.
        undone: (*S) bool, the region with the search's last step undone: without the piece that brought the error within the
            bound, one cell where `max_passes` left the search its time. None where the empty region is enough.
        error_undone: its error, above `bound`; None where the empty region is enough.
    """

    layer: str
    unit: tuple[int, ...]
    at: tuple[float, ...]
    region: Region
    error: float
    bound: float
    passes: int
    share: float
    undone: Region | None
    error_undone: float | None

    def __repr__(self) -> str:
        at = ", ".join(f"{x:.1f}" for x in self.at)
        return (
            f"SaliencyRegion of layer {self.layer!r}, unit {self.unit} at image pixel ({at}): {self.share:.1%} of the image "
            f"leave an error of {self.error:.3g} (bound {self.bound:.3g}), found in {self.passes} passes"
        )


def saliency_region(
    trace: Trace,
    layer: str,
    at: Sequence[float] | None = None,
    *,
    unit: Sequence[int] | None = None,
    bound: float = 0.1,
    max_passes: int = 200,
    cell: int | None = None,
    fill: str | float | Sequence[float] = "mean",
    image: int = 0,
    index: int = 0,
    progress: bool = True,
) -> SaliencyRegion:
    """A small part of the image that is enough: with everything else masked, the unit responds as before, within a bound.

    The smallest such region is out of reach, since there are too many; this one is searched for from coarse cells to fine ones.
    Cells are put in order by what the gradient says that masking them changes. Bisection finds how many of them are needed;
    then it is tried to do without single ones. Every error is measured with the masked image, none is estimated.

    Args:
        trace: from `record`.
        layer: name of any module of the model that returns a map (N, C, *O).
        at: a position in the image, pixels, (y, x): the nearest unit is taken.
        unit: an output cell, (row, column), instead. With neither, the unit nearest to the image's middle.
        bound: of the relative error, ||masked response - response|| / ||response|| over the unit's channels. Of 0, the
            region leaves the response as it is to the last bit.
        max_passes: the model is run on at most so many images, at least 2; more find a smaller region. What the trace runs
            when it is asked for the first time where its layers lie is not counted.
        cell: side of the finest cells, pixels; a 64th of the image's longest side, if None.
        fill: what masked pixels are set to: "mean", the image's mean of each channel; a number; or a number for each channel.
        image: which image of the recorded batch.
        index: which call of the layer in a forward pass.
        progress: show a bar on a terminal, the standard error, where rich is installed.

    Returns:
        A SaliencyRegion: region (*S), its error and share, and how many passes it took.

    Raises:
        ValueError: there is no such layer, unit, image or position; an argument is out of its range; the unit's response is 0
            in all channels, so that no error is relative to it, or not finite; the layer has no gradient with respect to the
            image.
        TypeError: `trace` is none.

    Example:
        >>> import torch
        >>> from deformconv.plots import record
        >>> from deformconv.plots import saliency_region
        >>> from deformconv.torch import DeformConv2d
        >>> net = torch.nn.Sequential(DeformConv2d(3, 8, 3, padding=1), torch.nn.Conv2d(8, 8, 3, padding=1))
        >>> with record(net) as trace:
        ...     y = net(torch.rand(1, 3, 32, 48))
        >>> found = saliency_region(trace, "1", at=(10, 20), bound=0.2)
        >>> found.error <= 0.2, found.error_undone > 0.2
        (True, True)

    Paper: DCNv2, arXiv 1811.11168, section 2.1, where parts of the image are masked progressively.
    """
    check_trace(trace)
    _check(bound, max_passes, cell)
    chosen = trace.unit(layer, at, unit, index)
    middle = tuple(float(x) for x in trace.output_geometry(layer, index).to_image(chosen))
    with bar("Masking, at most", max_passes, shown=progress) as advance, differentiable():
        masked = _Masked(Probe(trace, layer, index, image), layer, chosen, fill, advance)
        size = tuple(masked.image.shape[2:])
        side = max(1, round(max(size) / FINEST)) if cell is None else int(cell)
        found = smallest_region(
            masked.error, masked.effects, size, bound=bound, passes=max_passes - masked.passes, cell=side, at=middle
        )
    share = float(found.region.mean())
    return SaliencyRegion(
        layer, chosen, middle, found.region, found.error, float(bound), masked.passes, share, found.undone, found.error_undone
    )


class _Masked:
    """A unit's response to an image of which some pixels are masked."""

    def __init__(self, probe: Probe, layer: str, unit: tuple[int, ...], fill: Any, advance: Callable[[], None]) -> None:
        self.image, self.passes = probe.image, 0
        self._probe, self._unit, self._advance = probe, unit, advance
        self._fill = _filling(fill, self.image)
        self._response = self._respond(self.image).double()
        self._length = float(self._response.norm())
        if not math.isfinite(self._length):
            raise ValueError(
                f"the response of unit {unit} of layer {layer!r} is not finite, and no error can be measured beside it; "
                "expected a finite picture and parameters. Half precision may have overflowed: then try model.float()."
            )
        if self._length == 0:
            raise ValueError(
                f"the response of unit {unit} of layer {layer!r} is 0 in all its {len(self._response)} channels, and an error "
                "relative to it is not defined; expected a unit that responds, or a layer before a ReLU that ends at 0."
            )

    def error(self, region: Region) -> float:
        """The relative error of the response when all but a region (*S) is masked; infinite where it is not finite."""
        response = self._respond(self._kept(region)).double()
        error = float((response - self._response).norm()) / self._length
        return error if math.isfinite(error) else math.inf

    def effects(self, region: Region) -> Iterator[npt.NDArray[np.float64]]:
        """How much each pixel of a region (*S) changes sums of channels when it is masked too, to first order."""
        image = self._kept(region).requires_grad_()
        response = self._respond(image)
        change = (self.image - self._fill).double()
        for (gradient,) in gradients(response, [image], sums_of(len(response), CHANNELS, 0)):
            if gradient is not None:
                yield (gradient.double() * change).sum((0, 1)).cpu().numpy()

    def _kept(self, region: Region) -> Tensor:
        return torch.where(torch.from_numpy(region).to(self.image.device), self.image, self._fill)

    def _respond(self, image: Tensor) -> Tensor:
        response = unit_response(self._probe.features(image), self._unit)
        self.passes += 1
        self._advance()
        return response


def _check(bound: Any, max_passes: Any, cell: Any) -> None:
    if isinstance(bound, bool) or not isinstance(bound, Real) or not float(bound) >= 0:
        raise ValueError(
            f"`bound` is {bound!r}; expected a number of at least 0, the largest relative error, 0.1 as an example."
        )
    for name, value, least in (("max_passes", max_passes, 2), ("cell", cell, 1)):
        if name == "cell" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
            why = "pixels" if name == "cell" else "of the image as it is and of an empty one"
            raise ValueError(f"`{name}` is {value!r}; expected an integer of at least {least}: {why}.")


def _filling(fill: Any, image: Tensor) -> Tensor:
    """What masks the pixels of an image (1, C, *S): (1, C, 1, ...)."""
    channels, rank = image.shape[1], image.ndim - 2
    if isinstance(fill, str):
        if fill != "mean":
            raise ValueError(
                f'`fill` is {fill!r}; expected "mean", a number, or one for each of the image\'s {channels} channels.'
            )
        pixels = image.flatten(2).double()
        # Of a constant channel it is that very number, whatever the sum is rounded to.
        values = pixels.mean(2).clamp(pixels.amin(2), pixels.amax(2))[0]
    else:
        try:
            values = torch.as_tensor(fill, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError):
            values = torch.empty(0)
        if values.ndim > 1 or values.numel() not in (1, channels) or not values.isfinite().all():
            raise ValueError(
                f'`fill` is {fill!r}; expected "mean", a finite number, or one for each of the image\'s {channels} channels.'
            )
        values = values.expand(channels)
    return values.to(image).reshape(1, channels, *(1,) * rank)
