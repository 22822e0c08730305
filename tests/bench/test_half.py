"""Half precision as a benchmark: right results of the same numbers, and what the report makes of them."""

from __future__ import annotations

import pytest
from tests.bench import made_up

from deformconv.accuracy import TOLERANCE
from deformconv.bench import reports
from deformconv.bench.cases import Case
from deformconv.bench.half import HALF_CASES, HALF_PEERS, HalfCase, half_case_of
from deformconv.bench.measure import Pace, differences
from deformconv.bench.peers import DIRECTIONS
from deformconv.bench.reports import HALF, REPORTS, Plan
from deformconv.ops.conv.cpu_plan import words

torch = pytest.importorskip("torch")

TINY = HalfCase("tiny", 2, 6, 4, (9, 7))


def test_cases_survive_json():
    assert all(half_case_of({**case._asdict(), "size": list(case.size)}) == case for case in HALF_CASES)
    assert half_case_of(TINY._asdict()).tolerance == TOLERANCE["bfloat16"] > Case(*TINY).tolerance


@pytest.mark.parametrize("name", [name for name in HALF if name.startswith("deformconv")])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_results_are_those_of_array_operations_on_the_same_numbers(name: str, direction: str):
    found = []
    for library in (name, "truth-half"):
        peer = HALF_PEERS[library](1)
        peer.prepare(TINY)
        found.append(peer.results(direction))
    errors = differences(*found)
    wanted = {"output"} | ({"input", "offset", "weight", "bias", "mask"} if direction != "forward" else set())
    assert errors.keys() == wanted
    _, dtype = name.split("-")
    assert max(errors.values()) < TOLERANCE[dtype]
    assert (max(errors.values()) > TOLERANCE["float32"]) == (dtype != "float32")


def test_tensors_are_of_the_dtype_and_places_of_float32():
    peer = HALF_PEERS["deformconv-bfloat16"](1)
    peer.prepare(TINY)
    dtypes = {name: tensor.dtype for name, tensor in peer.tensors.items()}
    halves, whole = dict.fromkeys(("input", "weight", "bias"), torch.bfloat16), dict.fromkeys(("offset", "mask"), torch.float32)
    assert dtypes == halves | whole


def test_measured(in_process, monkeypatch):
    monkeypatch.setattr(reports, "HALF_CASES", (TINY, TINY._replace(name="not asked for")))
    progress = made_up.Counting()
    plan = Plan([Case(*TINY)], ["deformconv", "dense"], DIRECTIONS, 2, Pace(1, 1e-3))
    rows = REPORTS["half"].measure(plan, progress)
    assert len(progress.steps) == progress.expected == 2
    assert [list(row["results"]) for row in rows] == [list(HALF)] * 2
    assert all(result["milliseconds"] > 0 for row in rows for result in row["results"].values())
    assert [row["pairs"] for row in rows] == [words() is not None] * 2
    without = REPORTS["half"].measure(plan._replace(libraries=["deformconv"], directions=DIRECTIONS[:1]), progress)
    assert [list(row["results"]) for row in without] == [list(HALF[:3])]


def test_ratios_are_of_the_same_library_and_of_the_plain_convolution():
    times = dict(zip(HALF, (8.0, 4.0, 6.0, 5.0, 16.0), strict=True))
    text = REPORTS["half"].write([made_up.row(TINY, **times)])
    line = [cell.strip() for cell in text.splitlines()[2].split("|")[1:-1]]
    assert line == ["tiny", "forward", "8.00", "4.00", "6.00", "5.00", "16.0", "0.500", "0.750", "0.250"]


@pytest.mark.parametrize("slow", [False, True])
def test_a_plain_convolution_without_a_kernel_is_explained(slow):
    times = {"deformconv-bfloat16": 2.0, "dense-float32": 1.0, "dense-bfloat16": 90.0 if slow else 1.5}
    text = reports.write_half([made_up.row(HALF_CASES[0], **times)])
    assert (reports.SLOW_NOTE in text) == slow
    assert "c64-56" in text
