"""Multi-scale deformable attention as a benchmark: right results, and what the report makes of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from tests.bench import made_up

from deformconv.bench import reports
from deformconv.bench.attention import (
    ATTENTION_CASES,
    ATTENTION_PEERS,
    TINY,
    AttentionCase,
    TruthAttention,
    attention_arrays,
    attention_case_of,
)
from deformconv.bench.measure import Pace, differences
from deformconv.bench.peers import DIRECTIONS
from deformconv.bench.reports import REPORTS, Plan
from deformconv.cli import bench

torch = pytest.importorskip("torch")

ENCODER = TINY._replace(name="tiny encoder", queries=None)


def test_names_differ_and_cases_survive_json() -> None:
    assert len({case.name for case in ATTENTION_CASES}) == len(ATTENTION_CASES)
    for case in ATTENTION_CASES:
        assert attention_case_of({**case._asdict(), "levels": [list(level) for level in case.levels]}) == case
    assert TINY.what == "1x5 queries, 2 heads of 4, 2 points on each of 4x6, 2x3"
    assert ATTENTION_CASES[1].what.startswith("1x22,223 queries, 8 heads of 32, 4 points on each of 100x167, ")


@pytest.mark.parametrize("case", [TINY, ENCODER], ids=lambda case: case.name)
def test_points_lie_around_their_query_and_on_no_row_or_column(case: AttentionCase) -> None:
    arrays = attention_arrays(case)
    pixels = arrays["locations"] * np.array([(width, height) for height, width in case.levels])[:, None] - 0.5
    fractions = pixels - np.floor(pixels)
    assert fractions.min() > 0.009 and fractions.max() < 0.991
    assert np.allclose(arrays["weights"].sum((-2, -1)), 1, atol=1e-6)
    exact = attention_arrays(case._replace(sigma=0.0, points=1))["locations"]
    assert np.allclose(exact[..., 0, :], exact[:, :, :1, :1, 0], atol=0.02)  # a query's place is the same in every level
    if case is ENCODER:
        assert np.allclose(exact[0, 0, 0, 0, 0], (0.5 / 6, 0.5 / 4), atol=0.02)
        assert np.allclose(exact[0, 1, 0, 0, 0], (1.5 / 6, 0.5 / 4), atol=0.02)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", ["deformconv-attention", "transformers-attention"])
def test_results_are_those_of_array_operations(name: str, direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(name.partition("-")[0])
    found = []
    for peer in (ATTENTION_PEERS[name](1), TruthAttention(1)):
        monkeypatch.setattr(TruthAttention, "at_once", 7)
        peer.prepare(ENCODER)
        found.append(peer.results(direction))
    errors = differences(*found)
    assert errors.keys() == {"output"} | ({"value", "locations", "weights"} if direction != "forward" else set())
    assert max(errors.values()) < 1e-5


def rows(ours: dict[str, Any], theirs: dict[str, Any]) -> list[dict[str, Any]]:
    row = {"attention": TINY._asdict(), "direction": "forward", "results": {"deformconv": ours, "transformers": theirs}}
    peak = {**row, "results": {"deformconv": {"bytes": 2**20}, "transformers": {"bytes": 2**22}}}
    return [row, {**row, "results": {"1": made_up.result(6.0), "2": made_up.result(3.0)}}, peak]


def test_what_is_written_of_made_up_times() -> None:
    text = REPORTS["attention"].write(rows(made_up.result(2.0), made_up.result(32.0)))
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert ["tiny", TINY.what, "forward", "2.00", "32.0", "16.0"] in lines
    assert ["tiny", "forward", "6.00", "3.00", "2.00"] in lines
    assert ["tiny", TINY.what, "1.00", "4.00", "0.250"] in lines


def test_a_wrong_result_of_theirs_is_not_ours() -> None:
    refused = {"reason": "differs by 1.0e-01 in output"}
    assert not bench._is_wrong(rows(made_up.result(1.0), refused))
    assert bench._is_wrong(rows(refused, made_up.result(1.0)))


class Fake(made_up.Fake):
    """Whose calls take memory."""

    def ask(self, do: str, **request: Any) -> Any:
        return 2**20 if do == "peak" else super().ask(do, **request)


def test_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    begun = []

    @contextmanager
    def processes(libraries: Sequence[str], threads: int) -> Iterator[list[Fake]]:
        begun.append((list(libraries), threads))
        yield [Fake(library, made_up.RIGHT) for library in libraries]

    monkeypatch.setattr(reports, "processes", processes)
    progress = made_up.Counting()
    plan = Plan([], ["deformconv", "torchvision"], DIRECTIONS, 4, Pace(1, 1e-3))
    rows = REPORTS["attention"].measure(plan, progress)
    assert len(progress.steps) == progress.expected == 10
    both = ["deformconv", "transformers"]
    assert [list(row["results"]) for row in rows] == [both] * 4 + [["1", "2"]] * 2 + [both] * 2
    assert all(result["milliseconds"] == 1 for row in rows[:6] for result in row["results"].values())
    assert all(result["bytes"] == 2**20 for row in rows[6:] for result in row["results"].values())
    ours, theirs, truth = "deformconv-attention", "transformers-attention", "truth-attention"
    assert begun == [
        ([truth, ours, theirs], 4), ([truth], 4), ([ours], 1), ([ours], 2), *[([ours], 4), ([theirs], 4)] * 2,
    ]  # fmt: skip
    text = REPORTS["attention"].write(rows)
    assert text.count("| detr-") == 8 and "transformers / ours" in text
    assert len(REPORTS["attention"].measure(plan._replace(quick=True), progress)) == 2 + 2 + 1
