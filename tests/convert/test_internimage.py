"""The authors' rows, counted one by one: group, width, height, x before y; DCNv4's offsets before a group's masks."""

from __future__ import annotations

import math
from itertools import product

import pytest

torch = pytest.importorskip("torch")

from deformconv.convert.internimage import Taps, mask_rows, offset_rows, packed, unpacked  # noqa: E402


def theirs(taps: Taps) -> list[tuple[int, int, int]]:
    """(group, row, column) of every tap that is predicted, in the authors' order."""
    size, middle = taps.kernel_size, taps.kernel_size // 2
    found = [(group, j, i) for group, i, j in product(range(taps.group), range(size), range(size))]
    return [tap for tap in found if not (taps.remove_center and tap[1:] == (middle, middle))]


def ours(taps: Taps) -> list[tuple[int, int, int]]:
    return list(product(range(taps.group), range(taps.kernel_size), range(taps.kernel_size)))


TAPS = [Taps(2, 3, False), Taps(3, 3, True), Taps(1, 4, False), Taps(2, 5, True), Taps(2, 1, False)]


@pytest.mark.parametrize("taps", TAPS, ids=str)
@pytest.mark.parametrize("trailing", [(), (2,)])
def test_rows_of_v3(taps: Taps, trailing: tuple[int, ...]) -> None:
    known = theirs(taps)
    assert (taps.offsets, taps.masks) == (2 * len(known), len(known))
    offsets = torch.arange(1.0, 1 + taps.offsets).view(-1, *[1] * len(trailing)).expand(-1, *trailing)
    masks = torch.arange(1.0, 1 + taps.masks).view(-1, *[1] * len(trailing)).expand(-1, *trailing)
    found, weighed = offset_rows(offsets, taps), mask_rows(masks, taps, -math.inf)
    wanted, factors = [], []
    for tap in ours(taps):
        number = known.index(tap) if tap in known else None
        wanted += [0.0, 0.0] if number is None else [2 * number + 2.0, 2 * number + 1.0]  # y, x
        factors.append(-math.inf if number is None else number + 1.0)
    for rows, expected in ((found, wanted), (weighed, factors)):
        assert rows.shape == (len(expected), *trailing)
        assert all(torch.equal(row, torch.full(trailing, number)) for row, number in zip(rows, expected, strict=True))


@pytest.mark.parametrize("taps", TAPS, ids=str)
def test_rows_of_v4(taps: Taps) -> None:
    known, each = theirs(taps), taps.each
    assert packed(taps) == min(number for number in range(0, 1000, 8) if number >= 3 * len(known))
    offset, mask = unpacked(torch.arange(float(packed(taps))), taps)
    wanted, factors = [], []
    for group, row, column in ours(taps):
        taps_of_group = [tap for tap in known if tap[0] == group]
        if (group, row, column) not in taps_of_group:
            wanted, factors = [*wanted, 0.0, 0.0], [*factors, 0.0]
            continue
        number, first = taps_of_group.index((group, row, column)), group * 3 * each
        wanted += [first + 2.0 * number + 1, first + 2.0 * number]
        factors.append(first + 2.0 * each + number)
    assert offset.tolist() == wanted and mask.tolist() == factors
