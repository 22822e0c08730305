"""The other reports: what they measure, and what they make of it."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from tests.bench import made_up

from deformconv.bench import memory, reports, startup
from deformconv.bench.cases import Case, named
from deformconv.bench.measure import Pace
from deformconv.bench.peers import DIRECTIONS, RECORDED
from deformconv.bench.reports import REPORTS, Plan, slope

PRIMES = named("primes")
TINY = Case("tiny", 1, 4, 4, (9, 8))
linux = pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")


def plan(**changes):
    tiny = Plan([TINY], ["deformconv", "torchvision"], DIRECTIONS, 2, Pace(1, 1e-3), quick=True)
    return tiny._replace(**changes)


def measured(name, **changes):
    pytest.importorskip("torchvision")
    progress = made_up.Counting()
    rows = REPORTS[name].measure(plan(**changes), progress)
    assert len(progress.steps) == progress.expected
    return rows


class TestOtherOperators:
    def test_cases_that_were_named(self):
        (other,) = [other for other in reports.OTHERS if other.word == "aggregate"]
        assert other.wanted(plan(quick=False)) == list(other.cases)
        named = other.wanted(plan(quick=False, named=("dcnv4-7-1024", "primes", "intern-7")))
        assert [case.name for case in named] == ["intern-7", "dcnv4-7-1024"]
        assert len(other.wanted(plan())) == 1
        assert other.wanted(plan(named=("primes",))) == []


class TestOffsets:
    def test_every_kind_is_measured(self, in_process):
        rows = measured("offsets")
        assert [row["direction"] for row in rows] == list(DIRECTIONS)
        for row in rows:
            assert list(row["results"]) == ["zero", "sigma 2", "sigma 20"]
            assert all(result["error"] < 1e-5 and result["milliseconds"] > 0 for result in row["results"].values())
        assert "| tiny | forward " in REPORTS["offsets"].write(rows)

    def test_ratios(self):
        row = made_up.row(PRIMES, **{"zero": 2.0, "sigma 2": 4.0, "sigma 20": 5.0})
        cells = [cell.strip() for cell in REPORTS["offsets"].write([row]).splitlines()[2].split("|")[1:-1]]
        assert cells == ["primes", "forward", "2.00", "4.00", "5.00", "0.500", "1.25"]

    def test_a_wrong_kind_is_said(self):
        row = made_up.row(PRIMES, **{"sigma 2": 4.0, "sigma 20": 5.0})
        row["results"]["zero"] = {"reason": "differs by 1.0e-01 in offset"}
        assert "| differs by 1.0e-01 in offset |" in REPORTS["offsets"].write([row])


class TestSmall:
    def test_the_grid_begins_at_the_smallest_call(self):
        cases = reports.small_cases(quick=False)
        assert (cases[0].name, cases[0].shape) == ("1x8x8x8", "1x8x8x8 -> 8")
        assert len(cases) == 24 and all(case.masked for case in cases)
        assert cases[-1].shape == "4x64x32x32 -> 64"
        assert set(reports.small_cases(quick=True)) < set(cases)

    def test_without_and_with_a_gradient_recorded(self, monkeypatch, in_process):
        monkeypatch.setattr(reports, "small_cases", lambda quick: [TINY])
        rows = measured("small", libraries=["deformconv", "torchvision", "dense"])
        assert [row["direction"] for row in rows] == ["forward", RECORDED]
        assert all(set(row["results"]) == {"deformconv", "torchvision"} for row in rows)

    def test_microseconds(self):
        line = REPORTS["small"].write([made_up.row(PRIMES, RECORDED, deformconv=0.04, torchvision=0.08)]).splitlines()[2]
        assert [cell.strip() for cell in line.split("|")[2:-1]] == [RECORDED, "40.0", "80.0", "2.00"]


class TestScaling:
    @pytest.mark.parametrize("power", [0.5, 1.0, 1.1])
    def test_slope(self, power):
        amounts = [1.0, 2.0, 4.0, 8.0]
        assert slope(amounts, [3 * amount**power for amount in amounts]) == pytest.approx(power)

    def test_calls_below_a_millisecond_do_not_count(self):
        assert slope([1.0, 2.0, 4.0], [0.9, 2.0, 4.0]) == pytest.approx(1.0)
        assert slope([1.0, 2.0, 4.0], [0.2, 0.4, 0.8]) is None
        assert slope([1.0, 2.0, 4.0], [None, 2.0, 4.0]) == pytest.approx(1.0)

    def test_one_thing_grows_at_a_time(self):
        for axis, cases in reports.SCALES.items():
            amounts = [reports._amount(case, axis) for case in cases]
            assert amounts == sorted(set(amounts)) and amounts[-1] >= 4 * amounts[0]
            for other in set(reports.SCALES) - {axis}:
                assert len({reports._amount(case, other) for case in cases}) == 1
            # As many output positions as pixels.
            assert all(2 * p == k - 1 for case in cases for p, k in zip(case.padding, case.kernel, strict=True))

    def test_measured(self, monkeypatch, in_process):
        scales = {"batch": tuple(TINY._replace(batch=n) for n in (1, 2, 3))}
        monkeypatch.setattr(reports, "SCALES", scales)
        rows = measured("scaling", directions=["forward"])
        assert list(rows[0]["results"]) == ["1", "3"]  # the ends, since it is quick
        assert list(rows[1]["results"]) == ["1", "2"] and rows[1]["layer"]["name"] == "tiny"

    def test_written(self):
        rows = [
            {"axis": "batch", "direction": "forward", "results": {"2": made_up.result(2.0), "4": made_up.result(4.0)}},
            made_up.row(PRIMES, **{"1": 3.0, "2": 1.5}),
        ]
        text = REPORTS["scaling"].write(rows)
        assert "| batch | forward   | 2: 2.00, 4: 4.00 |  1.00 |" in text
        assert "| primes | forward   |         3.00 |          1.50 |   2.00 |" in text


class TestMemory:
    @linux
    def test_the_peak_is_seen_though_it_is_freed(self):
        # In a process of its own, as in a benchmark: libraries may tell the allocator to keep what is freed.
        code = """
import numpy as np
from deformconv.bench import memory
def call():
    np.ones(2**23)  # 64 MiB
    np.ones(2**22)
memory.peak(call)
print(memory.peak(call))
"""
        peak = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        assert 0.95 * 2**26 < peak < 1.3 * 2**26

    def test_without_proc_it_says_what_is_missing(self, monkeypatch, tmp_path):
        monkeypatch.setattr(memory, "PROCESS", tmp_path / "none")
        with pytest.raises(RuntimeError, match=r"peak memory is read from .*none, which Linux has"):
            memory.peak(lambda: None)

    @pytest.mark.slow
    @linux
    def test_measured(self):
        (row,) = measured("memory")
        ours, theirs = (row["results"][name]["bytes"] for name in ("deformconv", "torchvision"))
        assert 0 < ours < theirs
        arrays = [(3, 37, 41, 29), (3, 30, 21, 29), (3, 15, 21, 29), (3, 53, 21, 29), (53, 37, 5, 3), (53,)]
        assert row["must exist"] == 4 * sum(int(np.prod(shape)) for shape in arrays)

    def test_written(self):
        row = made_up.row(PRIMES, "forward+backward") | {"must exist": 2**20}
        row["results"] = {"deformconv": {"bytes": 3 * 2**20}, "torchvision": {"bytes": 12 * 2**20}}
        cells = [cell.strip() for cell in REPORTS["memory"].write([row]).splitlines()[-1].split("|")[3:-1]]
        assert cells == ["1.00", "3.00", "12.0", "2.00", "0.250"]
        row["results"]["torchvision"] = {"reason": "failed: it cannot"}
        cells = [cell.strip() for cell in REPORTS["memory"].write([row]).splitlines()[-1].split("|")[3:-1]]
        assert cells == ["1.00", "3.00", "-", "2.00", "-"]


class TestStartup:
    @pytest.mark.slow
    def test_measured(self):
        rows = measured("startup")
        assert [row["what"] for row in rows] == ["import torch", "warm, after that"]
        assert all(row["seconds"] > 0 and row["processes"] == 3 for row in rows)

    def test_two_that_start_cold_at_once(self, monkeypatch):
        """What is made of their answers; that they compile into one folder is tested where the cache is."""
        answers = iter([{"import": 1.0, "first": 2.0, "results": "same"}] * 6)

        class Start:
            def __init__(self, DEFORMCONV_CACHE_DIR=None):
                self.cache = DEFORMCONV_CACHE_DIR

            def end(self):
                if self.cache is not None:
                    (startup.Path(self.cache) / "kernel.bin").touch()
                return next(answers)

        monkeypatch.setattr(startup, "Start", Start)
        rows = startup.measure(lambda what: None, warm=1, cold=True)
        assert rows[-1]["results agree"] and rows[-1]["cache is whole"]
        assert "| results agree: yes, cache is whole: yes |" in startup.write(rows)
        answers = iter([{"import": 1.0, "first": 2.0, "results": number} for number in "aaaaba"])
        rows = startup.measure(lambda what: None, warm=1, cold=True)
        assert not rows[-1]["results agree"]
        assert "results agree: NO" in startup.write(rows)

    def test_a_first_call_that_fails(self, monkeypatch):
        monkeypatch.setattr(startup, "FIRST_CALL", "raise SystemError('no luck')")
        with pytest.raises(RuntimeError, match="a first call failed: SystemError: no luck"):
            startup.measure(lambda what: None, warm=1, cold=False)
