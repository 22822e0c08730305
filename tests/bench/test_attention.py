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
@pytest.mark.parametrize("name", [name for name in ATTENTION_PEERS if name != TruthAttention.name])
def test_results_are_those_of_array_operations(name: str, direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ATTENTION_PEERS[name].packages:
        pytest.importorskip(package)
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
    begun = []

    @contextmanager
    def processes(libraries: Sequence[str], threads: int) -> Iterator[list[Fake]]:
        begun.append((list(libraries), threads))
        yield [Fake(library, made_up.RIGHT) for library in libraries]

    monkeypatch.setattr(reports, "processes", processes)
    monkeypatch.setattr(reports, "missing", lambda packages: [])
    progress = made_up.Counting()
    plan = Plan([], ["deformconv", "kornia"], DIRECTIONS, 4, Pace(1, 1e-3))
    rows = REPORTS["attention"].measure(plan, progress)
    assert len(progress.steps) == progress.expected == 14
    labels = ["deformconv", "transformers", "kornia", "mmcv"]
    assert [list(row["results"]) for row in rows] == [labels] * 4 + [["1", "2"]] * 2 + [labels] * 2
    assert all(result["milliseconds"] == 1 for row in rows[:6] for result in row["results"].values())
    assert all(result["bytes"] == 2**20 for row in rows[6:] for result in row["results"].values())
    truth, ours, *_ = names = [f"{label}-attention" for label in ("truth", *labels)]
    assert begun == [(names, 4), ([truth], 4), ([ours], 1), ([ours], 2), *[([name], 4) for name in names[1:]] * 2]
    text = REPORTS["attention"].write(rows)
    assert text.count("| detr-") == 8 and all(f"{label} / ours" in text for label in labels[1:])
    assert len(REPORTS["attention"].measure(plan._replace(quick=True), progress)) == 2 + 2 + 1


def test_libraries_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have no column, and the reader learns what to install."""
    other = next(other for other in reports.OTHERS if other.word == "attention")
    text = REPORTS["attention"].write(rows(made_up.result(2.0), made_up.result(32.0)))
    assert "transformers / ours" in text and "kornia" not in text and "mmcv" not in text
    monkeypatch.setattr(reports, "missing", lambda packages: [name for name in packages if name in ("transformers", "mmcv")])
    assert other.absent() == {"transformers, eager": "transformers", "mmcv, on a CPU": "mmcv-lite"}
    plan = Plan([], ["deformconv", "torchvision"], DIRECTIONS, 1, Pace(1, 1e-3))
    assert list(other.chosen(plan)) == ["deformconv"]  # kornia has a convolution too, and was not asked for
    assert list(other.chosen(plan._replace(libraries=["deformconv", "kornia"]))) == ["deformconv", "kornia"]
