"""The pooling of boxes as a benchmark: right results, and what the report makes of them."""

from __future__ import annotations

import pytest
from tests.bench import made_up

from deformconv.bench import reports
from deformconv.bench.measure import Pace, differences
from deformconv.bench.peers import DIRECTIONS
from deformconv.bench.reports import REPORTS, Plan
from deformconv.bench.rois import ROI_CASES, ROI_PEERS, RoiCase, roi_case_of

torch = pytest.importorskip("torch")

TINY = RoiCase("tiny", boxes=5, channels=6, size=(9, 11), bins=3)


def test_names_differ_and_cases_survive_json():
    assert len({case.name for case in ROI_CASES}) == len(ROI_CASES)
    assert all(roi_case_of({**case._asdict(), "size": list(case.size)}) == case for case in ROI_CASES)
    assert TINY.what == "5 boxes on 2x6x9x11, 3x3 bins of 2x2 samples"


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_results_are_those_of_array_operations(direction: str):
    found = []
    for name in ("deformconv-roi", "truth-roi"):
        peer = ROI_PEERS[name](1)
        peer.prepare(TINY)
        found.append(peer.results(direction))
    errors = differences(*found)
    assert errors.keys() == {"output"} | ({"input", "offset", "mask"} if direction != "forward" else set())
    assert max(errors.values()) < 1e-5


def test_measured(in_process):
    pytest.importorskip("torchvision")
    pooling = next(other for other in reports.OTHERS if other.word == "rois")._replace(cases=(TINY,))
    progress = made_up.Counting()
    plan = Plan([], ["deformconv", "torchvision"], DIRECTIONS, 2, Pace(1, 1e-3))
    rows = reports.operator(pooling, plan, progress)
    assert len(progress.steps) == progress.expected == 4
    assert [list(row["results"]) for row in rows] == [["deformconv", "torchvision"]] * 2 + [["1", "2"]] * 2
    assert all(result["milliseconds"] > 0 for row in rows for result in row["results"].values())
    text = REPORTS["rois"].write(rows)
    assert text.count("| tiny") == 4 and "torchvision / ours" in text and "2 threads, ms" in text
