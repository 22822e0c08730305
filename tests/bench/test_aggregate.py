"""Deformable aggregation as a benchmark: right results, and what the report makes of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from tests.bench import made_up

from deformconv.bench import reports
from deformconv.bench.aggregate import (
    AGGREGATE_CASES,
    AGGREGATE_PEERS,
    TINY,
    AggregateCase,
    TruthAggregate,
    aggregate_arrays,
    aggregate_case_of,
)
from deformconv.bench.measure import Pace, differences
from deformconv.bench.peers import DIRECTIONS
from deformconv.bench.reports import REPORTS, Plan
from deformconv.cli import bench

torch = pytest.importorskip("torch")

V4 = TINY._replace(name="tiny v4", softmax=False, batch=1)


def test_names_differ_and_cases_survive_json() -> None:
    assert len({case.name for case in AGGREGATE_CASES}) == len(AGGREGATE_CASES)
    for case in AGGREGATE_CASES:
        assert aggregate_case_of({**case._asdict(), "size": list(case.size)}) == case
        assert case.channels % case.group_channels == 0
    assert TINY.what == "2x8x5x6, 2 groups of 4, 3x3"
    assert AGGREGATE_CASES[0].what == "1x64x56x56, 4 groups of 16, 3x3"
    assert AGGREGATE_CASES[4].what == "1x64x200x334, 4 groups of 16, 3x3"
    assert AGGREGATE_CASES[-1].what == "8x768x14x14, 24 groups of 32, 3x3"


@pytest.mark.parametrize("case", [TINY, V4], ids=lambda case: case.name)
def test_offsets_keep_away_from_pixels_and_masks_are_the_nets(case: AggregateCase) -> None:
    arrays = aggregate_arrays(case)
    fractions = arrays["offset"] - np.floor(arrays["offset"])
    assert fractions.min() > 0.009 and fractions.max() < 0.991
    sums = arrays["mask"].reshape(case.batch, case.groups, 9, *case.size).sum(2)
    assert np.allclose(sums, 1, atol=1e-6) == case.softmax


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", ["deformconv-aggregate", "torchvision-aggregate", "grid_sample-aggregate"])
def test_results_are_those_of_array_operations(name: str, direction: str) -> None:
    peer = AGGREGATE_PEERS[name]
    for package in peer.packages:
        pytest.importorskip(package)
    found = []
    for each in (peer(1), TruthAggregate(1)):
        each.prepare(TINY)
        found.append(each.results(direction))
    errors = differences(*found)
    assert errors.keys() == {"output"} | ({"input", "offset", "mask"} if direction != "forward" else set())
    assert max(errors.values()) < 1e-5


def test_tensors_lie_in_memory_as_each_library_has_them() -> None:
    for name, last in (("deformconv-aggregate", True), ("grid_sample-aggregate", True), ("torchvision-aggregate", False)):
        peer = AGGREGATE_PEERS[name](1)
        peer.prepare(TINY)
        tensors: dict[str, Any] = peer.tensors
        assert all(tensor.is_contiguous(memory_format=torch.channels_last) == last for tensor in tensors.values()), name


def rows(ours: dict[str, Any], **theirs: dict[str, Any]) -> list[dict[str, Any]]:
    row = {"aggregate": TINY._asdict(), "direction": "forward", "results": {"deformconv": ours, **theirs}}
    sizes = {"deformconv": {"bytes": 2**20}, "torchvision": {"bytes": 2**22}, "grid_sample": {"bytes": 2**23}}
    threads = {"1": made_up.result(6.0), "2": made_up.result(3.0)}
    return [row, {**row, "results": threads}, {**row, "results": sizes}]


def test_what_is_written_of_made_up_times() -> None:
    found = rows(made_up.result(2.0), torchvision=made_up.result(32.0), grid_sample=made_up.result(64.0))
    text = REPORTS["aggregate"].write(found)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    head = ["torchvision, groups=C", "grid_sample", "torchvision / ours", "grid_sample / ours"]
    assert ["case", "what", "direction", "deformconv", *head] in lines
    assert ["tiny", TINY.what, "forward", "2.00", "32.0", "64.0", "16.0", "32.0"] in lines
    assert ["tiny", "forward", "6.00", "3.00", "2.00"] in lines
    assert ["tiny", TINY.what, "1.00", "4.00", "8.00", "0.250", "0.125"] in lines
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in REPORTS["aggregate"].write(rows(made_up.result(2.0), grid_sample=made_up.result(64.0))).splitlines()
    ]
    assert ["tiny", TINY.what, "forward", "2.00", "-", "64.0", "-", "32.0"] in lines


def test_a_wrong_result_of_theirs_is_not_ours() -> None:
    refused = {"reason": "differs by 1.0e-01 in output"}
    assert not bench._is_wrong(rows(made_up.result(1.0), torchvision=refused, grid_sample=refused))
    assert bench._is_wrong(rows(refused, torchvision=made_up.result(1.0)))


class Fake(made_up.Fake):
    """Whose calls take memory."""

    def ask(self, do: str, **request: Any) -> Any:
        return 2**20 if do == "peak" else super().ask(do, **request)


def test_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision")
    begun = []

    @contextmanager
    def processes(libraries: Sequence[str], threads: int) -> Iterator[list[Fake]]:
        begun.append((list(libraries), threads))
        yield [Fake(library, made_up.RIGHT) for library in libraries]

    monkeypatch.setattr(reports, "processes", processes)
    progress = made_up.Counting()
    plan = Plan([], ["deformconv", "torchvision"], ("forward",), 4, Pace(1, 1e-3), quick=True)
    rows = REPORTS["aggregate"].measure(plan, progress)
    assert len(progress.steps) == progress.expected == 5
    names = ["deformconv", "torchvision", "grid_sample"]
    assert [list(row["results"]) for row in rows] == [names, ["1", "2"], names]
    peers = [f"{name}-aggregate" for name in names]
    assert begun[0] == (["truth-aggregate", *peers], 4) and begun[-3:] == [([peer], 4) for peer in peers]
    without = REPORTS["aggregate"].measure(plan._replace(libraries=["deformconv"]), progress)
    assert list(without[0]["results"]) == ["deformconv", "grid_sample"]
