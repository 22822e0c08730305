"""Which part of a picture is enough: a search for a small region that leaves a small error, in a bounded number of tries."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["Found", "cell_sizes", "smallest_region"]

Region = npt.NDArray[np.bool_]
Values = npt.NDArray[np.floating]

# The search begins with so many cells along the longest axis, and looks for superfluous ones in so many portions first.
COARSE, PORTIONS = 8, 16


class Found(NamedTuple):
    """A region within the bound, and the region with its last step undone, which is not; None where there was no step."""

    region: Region
    error: float
    undone: Region | None
    error_undone: float | None


def cell_sizes(size: Sequence[int], finest: int) -> list[int]:
    """Sides of cells in pixels, from about COARSE cells along the longest axis down to the finest, halved each time."""
    halvings = max(0, math.ceil(math.log2(max(size) / (finest * COARSE))))
    return [finest << power for power in range(halvings, -1, -1)]


def smallest_region(
    measure: Callable[[Region], float],
    effects: Callable[[Region], Iterable[Values]],
    size: Sequence[int],
    *,
    bound: float,
    passes: int,
    cell: int,
    at: Sequence[float],
) -> Found:
    """A small region (*S) whose error is at most `bound`; the whole picture's is 0.

    Args:
        measure: the error that a region leaves; one pass.
        effects: arrays (*S) of what each pixel of a region changes in the response, to first order, one array for each of some
            sums of channels; one pass.
        bound: of the error.
        passes: the most calls of `measure` and `effects` together, at least 1.
        cell: side of the finest cells, pixels.
        at: where the unit is, image pixels: of cells with the same effect the nearer one counts as the more important.
    """
    search = _Search(measure, effects, size, bound, passes, at)
    return search.run(cell)


@dataclass(frozen=True, eq=False)
class _Cells:
    """A picture (*S) cut into cubes; those at the far edges may be smaller."""

    labels: npt.NDArray[np.intp]  # (*S)
    count: int
    centres: Values  # (count, D)

    @classmethod
    def of_side(cls, size: Sequence[int], side: int) -> _Cells:
        shape = tuple(-(-length // side) for length in size)
        rows = np.meshgrid(*(np.arange(length) // side for length in size), indexing="ij", sparse=True)
        centres = np.indices(shape).reshape(len(shape), -1).T * side + (side - 1) / 2
        return cls(np.ravel_multi_index(tuple(np.broadcast_arrays(*rows)), shape), math.prod(shape), centres)

    def within(self, region: Region) -> npt.NDArray[np.intp]:
        """The cells that have pixels in a region."""
        return np.unique(self.labels[region])

    def only(self, region: Region, chosen: npt.NDArray[np.intp]) -> Region:
        """The part of a region that lies in some cells."""
        is_chosen = np.zeros(self.count, bool)
        is_chosen[chosen] = True
        return region & is_chosen[self.labels]


class _State(NamedTuple):
    """A region that is within the bound, and a part of it that is not."""

    region: Region
    error: float
    undone: Region
    error_undone: float


class _Search:
    """A region that is within the bound at all times, and grows smaller."""

    def __init__(
        self,
        measure: Callable[[Region], float],
        effects: Callable[[Region], Iterable[Values]],
        size: Sequence[int],
        bound: float,
        passes: int,
        at: Sequence[float],
    ) -> None:
        self._measure, self._effects, self._size, self._bound, self._left = measure, effects, tuple(size), bound, passes
        self._at = np.asarray(at, np.float64)

    def run(self, finest: int) -> Found:
        empty = np.zeros(self._size, bool)
        error = self._measured(empty)
        if error <= self._bound:
            return Found(empty, error, None, None)
        self._empty = empty, error
        whole = self._state = _State(np.ones(self._size, bool), 0.0, *self._empty)
        cells = _Cells.of_side(self._size, finest)
        # Fine cells at once are the best where errors add up. Where they do not, coarse cells take along what hangs together.
        self._shrink(cells)
        at_once, self._state = self._state, whole
        self._refine(cell_sizes(self._size, finest))
        self._state = min(at_once, self._state, key=lambda state: int(state.region.sum()))
        # The last is always a `_shrink`, whose end shows that the last step was needed.
        self._shrink(cells)
        while self._prune(cells, self._spare(cells)):
            self._shrink(cells)
        return Found(*self._state)

    def _refine(self, sides: list[int]) -> None:
        """Go from coarse cells to fine ones."""
        for number, side in enumerate(sides):
            cells = _Cells.of_side(self._size, side)
            self._shrink(cells)
            self._prune(cells, self._spare(cells) // (len(sides) - number))

    def _spare(self, cells: _Cells) -> int:
        """How many passes are left beside those of a last `_shrink`."""
        return self._left - 2 - math.ceil(math.log2(len(cells.within(self._state.region))))

    def _shrink(self, cells: _Cells) -> None:
        """Keep the most important cells: so many that the error is within the bound, and is not with one cell fewer.

        The bisection needs no order among errors: it ends between two neighbours, of which one is within the bound and the
        other not. Where the passes end first, the step between the two has several cells.
        """
        if self._left < 2:
            return
        order = self._order(cells)
        whole, enough, few = self._state.region, len(order), 0
        too_few = self._empty
        while enough - few > 1 and self._left:
            middle = (enough + few) // 2
            region = cells.only(whole, order[:middle])
            error = self._measured(region)
            if error <= self._bound:
                enough, self._state = middle, _State(region, error, *too_few)
            else:
                few, too_few = middle, (region, error)
                if region.sum() > self._state.undone.sum():
                    self._state = _State(self._state.region, self._state.error, *too_few)

    def _prune(self, cells: _Cells, passes: int) -> bool:
        """Leave out what is not needed, the least important first, in portions that grow smaller; whether there was some."""
        if passes < 2:
            return False
        last = self._left - passes
        order = self._order(cells)
        before, portion = len(order), max(1, len(order) // PORTIONS)
        while True:
            end = len(order)
            while end > 0 and self._left > last:
                start = max(0, end - portion)
                order, end = self._without(cells, order, start, end), start
            if portion == 1 or self._left <= last:
                return len(order) < before
            portion //= 2

    def _without(self, cells: _Cells, order: npt.NDArray[np.intp], start: int, end: int) -> npt.NDArray[np.intp]:
        """The cells that are needed when it has been tried to do without those from `start` to `end`."""
        fewer = np.concatenate([order[:start], order[end:]])
        if not len(fewer):
            return order  # the empty region is known to be too little
        region = cells.only(self._state.region, fewer)
        error = self._measured(region)
        if error > self._bound:
            return order
        self._state = _State(region, error, *self._empty)
        return fewer

    def _measured(self, region: Region) -> float:
        self._left -= 1
        return self._measure(region)

    def _order(self, cells: _Cells) -> npt.NDArray[np.intp]:
        """The cells within the region, those that change the response most first."""
        self._left -= 1
        region, important = self._state.region, np.zeros(cells.count)
        labels = cells.labels[region]
        for effect in self._effects(region):
            important += np.bincount(labels, effect[region], cells.count) ** 2
        important[np.isnan(important)] = np.inf
        within = cells.within(region)
        distance = ((cells.centres[within] - self._at) ** 2).sum(1)
        return within[np.lexsort((distance, -important[within]))]
