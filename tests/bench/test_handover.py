"""What handing work over costs: measured, modelled, said and written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.bench import made_up

from deformconv.bench import handover
from deformconv.bench.cases import CASES, named
from deformconv.bench.measure import Pace
from deformconv.bench.peers import DIRECTIONS
from deformconv.runtime.processors import available_processors

ROOT = Path(__file__).parents[2]


def quoted(folder: Path) -> str:
    begin, end = handover.MARKS
    return (folder / handover.EXPLAINED).read_text(encoding="utf-8").partition(begin)[2].partition(end)[0]


def spread(value: float) -> dict[str, float]:
    return {"least": value, "median": 2 * value}


def figures(load: float = 0.1) -> dict[str, Any]:
    """Made-up ones: a hand-over to 64 threads takes 1 ms, to 16 half as long; a case takes 64 ms on one thread."""
    late = {1: 1.0, 16: 250.0, 64: 500.0}
    row = made_up.row(named("c64-56"), **{"1": 64.0, "2": 32.0})
    return {
        "date": "2026-11-01", "machine": made_up.MACHINE, "load": load, "item": 4.0,
        "handover": [
            {"kind": kind, "threads": number, "nothing": spread(2.0), "some": spread(300.0), "all there": spread(value)}
            for kind in handover.KINDS for number, value in late.items()
        ],
        "counter": [{"threads": 2, "one number": 30.0, "side by side": 20.0, "apart": 3.0}],
        "items": [
            {"case": "c64-56", "direction": "forward", "items": {"16": [48], "64": [96]}},
            {"case": "edvr", "direction": "forward", "items": {"16": [4, 3], "64": [4, 3]}},
        ],
        "speed": [row],
    }  # fmt: skip


def test_the_document_quotes_the_committed_figures():
    results = ROOT / handover.RESULTS
    said = handover.tables(json.loads(results.read_text())) if results.exists() else handover.PENDING
    assert quoted(ROOT) == said


def test_whole_rounds_of_items_bound_the_speed():
    assert handover._bound([64], 64) == 64 and handover._bound([96], 64) == 48 and handover._bound([4], 64) == 4
    assert handover._bound([63], 64) == 63 and handover._bound([65], 64) == 32.5
    assert handover._bound([4, 3], 64) == 3.5  # one part after the other


@pytest.mark.parametrize("threads", [4, 8, 16])
def test_a_forward_pass_leaves_no_thread_without_a_tile(threads: int) -> None:
    """The last round of the named cases' tiles has work for nearly all."""
    for case in CASES[:5]:
        assert handover._bound(handover.items(case, DIRECTIONS[0], threads), threads) >= 0.87 * threads, case.name


def test_the_model_adds_the_hand_over_to_what_items_allow():
    few, many = handover.estimates(figures())
    assert (few["threads"], few["bound"], many["threads"], many["bound"]) == (16, 16.0, 64, 48.0)
    assert few["own"] == few["openmp"] == pytest.approx(64 / (64 / 16 + 0.5))
    assert many["own"] == pytest.approx(64 / (64 / 48 + 1.0))


def test_what_was_not_measured_is_not_modelled():
    found = figures()
    found["handover"] = [row for row in found["handover"] if row["kind"] == "own"]
    assert {row["openmp"] for row in handover.estimates(found)} == {None}
    found["speed"][0]["results"]["1"] = {"reason": "failed: no luck"}
    assert {row["own"] for row in handover.estimates(found)} == {None}
    assert "| edvr   | forward   |       4+3 |        3.50 |       - |" in handover.tables(found)


def test_the_tables():
    text = handover.tables(figures())
    assert text.startswith("Measured on 2 processors of A Processor, 2026-11-01, load 0.1 before.")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    assert ["64", "OpenMP", "2.00", "4.00", "300", "600", "500", "1000"] in cells
    assert ["2", "30.0", "20.0", "3.00"] in cells
    assert ["c64-56", "forward", "64.0", "32.0", "2.00"] in cells
    assert ["c64-56", "forward", "48", "16.0", "14.2", "14.2", "96", "48.0", "27.4", "27.4"] in cells
    without = figures() | {"speed": []}
    assert "Measured, milliseconds" not in handover.tables(without)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_has_items_for_some_threads(case, direction):
    found = handover.items(case, direction, 16)
    assert 1 < sum(found) < 100_000 and min(found) > 0
    assert len(found) == 1 or direction == "forward+backward"


def repository(folder: Path) -> Path:
    for name in ("docs", "benchmarks"):
        (folder / name).mkdir()
    shutil.copyfile(ROOT / handover.EXPLAINED, folder / handover.EXPLAINED)
    return folder


def test_figures_are_written_into_a_repository(tmp_path):
    handover.write(figures(), repository(tmp_path))
    assert json.loads((tmp_path / handover.RESULTS).read_text()) == json.loads(json.dumps(figures()))
    assert quoted(tmp_path) == handover.tables(figures())
    before, after = (ROOT / handover.EXPLAINED).read_text(encoding="utf-8").split(quoted(ROOT))
    text = (tmp_path / handover.EXPLAINED).read_text(encoding="utf-8")
    assert text.startswith(before) and text.endswith(after)


def test_a_busy_machine_s_figures_are_not_written(tmp_path):
    folder = repository(tmp_path)
    with pytest.raises(ValueError, match=r"kept 1\.9 of 2 processors busy before .* need a load below 0\.6\. Nothing is writt"):
        handover.write(figures(load=1.9), folder)
    assert quoted(folder) == quoted(ROOT) and not (folder / handover.RESULTS).exists()


def test_another_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"is not a repository's folder: .*performance\.md"):
        handover.write(figures(), tmp_path)
    folder = repository(tmp_path)
    (folder / handover.EXPLAINED).write_text("no marks")
    with pytest.raises(ValueError, match="is not a repository's folder: the document has no <!-- handover:begin -->"):
        handover.write(figures(), folder)


@pytest.mark.slow
def test_it_measures():
    pytest.importorskip("torch")
    told = made_up.Counting()
    found = handover.measure((1, 3), 2, [named("primes")], Pace(1, 1e-3), told)
    kinds = {(row["kind"], row["threads"]) for row in found["handover"]}
    assert {("own", 1), ("own", 3)} <= kinds
    for row in found["handover"]:
        assert all(0 < row[what]["least"] <= row[what]["median"] for what in ("nothing", "some", "all there"))
    assert [row["threads"] for row in found["counter"]] == [number for number in (1, 3) if number <= available_processors()]
    assert all(value > 0 for row in found["counter"] for value in row.values())
    for row in found["speed"]:
        assert next(iter(row["results"])) == "1" and str(available_processors()) in row["results"]
        assert all(result["milliseconds"] > 0 for result in row["results"].values())
    assert [row["direction"] for row in found["speed"]] == list(DIRECTIONS)
    assert told.steps[-1] == "primes, forward+backward"
    assert handover.tables(json.loads(json.dumps(found))) == handover.tables(found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--case", "c64"], "there is no case 'c64'; there are c64-56, "),
        (["--threads", "0"], "--threads and --rounds are at least 1"),
        (["--rounds", "0"], "--threads and --rounds are at least 1"),
    ],
)
def test_a_wrong_call_is_explained(arguments, message):
    command = [sys.executable, "-m", "deformconv.bench.handover", *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=dict(os.environ))
    assert ran.returncode == 2 and message in ran.stderr and ran.stdout == ""
