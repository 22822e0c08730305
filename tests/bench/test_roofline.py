"""The roofline: floors of time from counted operations and bytes."""

from __future__ import annotations

import pytest

from deformconv.bench.cases import Case
from deformconv.bench.roofline import Machine, floor, measure, table

CASE = Case("small", 2, 16, 8, (5, 4), groups=2)
MACHINE = Machine(operations=1e9, bytes=1e6)


def test_the_floor_counts_products_and_arrays() -> None:
    products, memory = floor(CASE, "forward", MACHINE)
    assert products == pytest.approx(2 * 2 * 20 * 9 * 16 * 8 / 2 / 1e9)
    input, offset, mask, weight, bias, output = 2 * 16 * 20, 2 * 18 * 20, 2 * 9 * 20, 8 * 8 * 9, 8, 2 * 8 * 20
    assert memory == pytest.approx(4 * (input + offset + mask + weight + bias + output) / 1e6)
    assert floor(CASE, "forward+backward", MACHINE)[0] == pytest.approx(3 * products)


def test_the_table_has_the_share_of_the_peak_and_no_line_without_a_time() -> None:
    products = 1000 * floor(CASE, "forward", MACHINE)[0]
    rows = [
        {"layer": CASE._asdict(), "direction": "forward", "results": {"deformconv": {"milliseconds": 4 * products}}},
        {"layer": CASE._asdict(), "direction": "forward", "results": {"deformconv": {"reason": "differs"}}},
    ]
    lines = table(rows, MACHINE).splitlines()
    assert len(lines) == 3
    assert "25 %" in lines[2]


@pytest.mark.slow
def test_a_machine_is_measured() -> None:
    machine = measure(threads=1, seconds=0.01, rounds=3)
    assert machine.operations > 1e8
    assert machine.bytes > 1e7
