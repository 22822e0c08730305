"""The benchmark on a GPU, without one: what it makes of rows, how it spends its time, and a smoke run on the CPU."""

from __future__ import annotations

import contextlib
import json
import re
import types
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from deformconv.bench import gpu, gpu_clock, gpu_figures, gpu_peers  # noqa: E402
from deformconv.bench.cases import Case, named  # noqa: E402
from deformconv.bench.gpu_peers import GPU_CASES, GPU_PEERS, TINY  # noqa: E402
from deformconv.bench.peers import DIRECTIONS  # noqa: E402

ROOT = Path(__file__).parents[2]
FORWARD, TRAINING = DIRECTIONS

# Milliseconds of made-up libraries, in which every goal is met: 16, 4, 8, and 2 times the faster plain convolution.
TIMES = {"deformconv": 1.0, "dense": 0.75, "dense-channels-last": 0.5, "torchvision": 4.0, "deformops": 8.0, "portable": 16.0}
CEILINGS = {"copy": 2e12, "bf16": 5e14, "fp32": 4e13, "tf32": 2e14, "fp16": 5e14}
CARD = {
    "device": "A Card", "capability": "9.0", "memory": "80 GiB", "driver": "580.1", "CUDA": "13.0", "python": "3.12.3",
    "packages": {"deformconv": "0.1.0", "torch": "2.11.0"},
}  # fmt: skip


@pytest.fixture(autouse=True)
def settings():
    """PyTorch's settings are afterwards what they were."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    yield
    matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before


def result(milliseconds: float, **more: Any) -> dict[str, Any]:
    found = {"milliseconds": milliseconds, "quartiles": [0.9 * milliseconds, 1.2 * milliseconds], "by": "graph", "issue": 0.05}
    return found | {"peak": 3 << 20, "same bits": True, "error": 2e-3, "errors": {"output": 2e-3}} | more


def row(case: Case, dtype: str, direction: str = FORWARD, **times: float) -> dict[str, Any]:
    results = {name: result(time) for name, time in (times or TIMES).items()}
    for name in results:
        if reason := gpu_peers.LACKING.get((name, dtype)):
            results[name] = {"reason": reason}
    return {"layer": case._asdict(), "dtype": dtype, "direction": direction, "results": results}


def made_up() -> dict[str, Any]:
    rows = [row(case, dtype, way) for case in GPU_CASES for dtype in gpu_peers.DTYPES for way in DIRECTIONS]
    part = {"date": "2026-11-01", "commit": "1234567", "budget": 540.0, "channels last": False, "rows": rows, "left out": 0}
    return {"machine": CARD, "ceilings": CEILINGS, "gpu": part}


def cells(table: str) -> list[list[str]]:
    """The lines of a Markdown table, without its head."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in re.findall(r"^\|.*", table, re.M)][2:]


class TestVerdicts:
    def test_met_by_every_layer(self):
        found = gpu_figures.verdicts(made_up()["gpu"]["rows"])
        assert [verdict.said for verdict in found] == ["met"] * len(gpu_figures.GOALS)
        assert [verdict.worst[0] for verdict in found] == [16.0, 4.0, 4.0, 8.0, 2.0]
        assert [verdict.measured for verdict in found] == [8, 2, 2, 2, 2]

    def test_the_bounds_are_those_that_were_asked_for(self):
        asked = {(goal.what, goal.dtypes, goal.directions): goal.asked for goal in gpu_figures.GOALS}
        assert asked == {
            ("portable / ours", ("bf16", "fp32"), DIRECTIONS): "at least 10",
            ("torchvision / ours", ("fp32",), (FORWARD,)): "at least 3",
            ("torchvision / ours", ("fp32",), (TRAINING,)): "at least 3",
            ("deformops / ours", ("bf16",), (FORWARD,)): "at least 5",
            ("ours / plain convolution", ("bf16",), (FORWARD,)): "at most 3",
        }

    def test_the_worst_layer_decides_and_is_named(self):
        rows = made_up()["gpu"]["rows"]
        bad = next(r for r in rows if r["layer"]["name"] == "c256-100" and (r["dtype"], r["direction"]) == ("fp32", TRAINING))
        bad["results"]["deformconv"] = result(2.0)  # 8 times portable's, 2 times torchvision's
        found = gpu_figures.verdicts(rows)
        assert [verdict.said for verdict in found] == ["missed", "met", "missed", "met", "met"]
        assert found[0].worst == (8.0, "c256-100, fp32, forward+backward")
        assert found[2].worst == (2.0, "c256-100, fp32, forward+backward")
        assert "8.00 (c256-100, fp32, forward+backward)" in gpu_figures.verdict_table(rows)

    def test_another_layer_is_told_and_decides_nothing(self):
        rows = made_up()["gpu"]["rows"]
        slow = next(r for r in rows if r["layer"]["name"] == "depthwise" and (r["dtype"], r["direction"]) == ("bf16", FORWARD))
        slow["results"]["deformconv"] = result(4.0)
        *_, plain = gpu_figures.verdicts(rows)
        assert (plain.said, plain.worst[0], plain.everywhere) == ("met", 2.0, (8.0, "depthwise, bf16, forward"))

    def test_half_a_run_is_not_called_whole(self):
        rows = [row(named("c256-56"), "fp32")]
        said = [verdict.said for verdict in gpu_figures.verdicts(rows)]
        assert said[0] == "met by 1 of 8, the others not measured"
        assert said[1] == "met by 1 of 2, the others not measured"
        assert said[2:] == ["not measured"] * 3
        rows[0]["results"]["deformconv"] = result(100.0)
        assert [verdict.said for verdict in gpu_figures.verdicts(rows)][:2] == ["missed"] * 2


class TestTables:
    def test_times_are_microseconds_with_ratios(self):
        rows = made_up()["gpu"]["rows"]
        lines = cells(gpu_figures.speed_table(rows, FORWARD))
        assert len(lines) == len(GPU_CASES) * 4
        fp32 = next(line for line in lines if line[0] == "c256-56" and line[2] == "fp32")
        assert fp32[1] == "2x256x56x56 -> 256"
        assert fp32[3:] == ["1000", "750", "500", "4000", "8000", "16000", "16.0", "4.00", "8.00", "2.00"]
        bf16 = next(line for line in lines if line[0] == "c256-56" and line[2] == "bf16")
        assert bf16[6] == "-" and bf16[10] == "-"  # torchvision has no bfloat16

    def test_signs_and_reasons_are_explained(self):
        found = made_up()
        results = found["gpu"]["rows"][0]["results"]
        results["portable"] |= {"by": "events", "not recorded": "RuntimeError: it waits"}
        results["dense"] = {"reason": "failed: ValueError: no"}
        results["deformops"] = {"reason": "differs by 3.0e-01 in offset"}
        found["gpu"]["left out"] = 7
        table = cells(gpu_figures.speed_table(found["gpu"]["rows"], FORWARD))
        assert table[0][4] == "failed" and table[0][7] == "differs" and table[0][8] == "16000*"
        notes = gpu_figures.notes(found)
        assert "plain: failed: ValueError: no (c256-56 bf16 forward)" in notes
        assert "deformops: differs by 3.0e-01 in offset (c256-56 bf16 forward)" in notes
        assert any(note.startswith("* portable: not recorded") and "RuntimeError: it waits" in note for note in notes)
        assert {"torchvision: has no bfloat16", gpu_figures.PINNED, gpu_figures.LAYOUTS} <= set(notes)
        assert "7 of the measurements were left out, since their time of 540 s was over." in notes

    def test_what_is_said_of_deformops_is_what_is_done(self):
        for blocks in gpu_peers.BLOCKS.values():
            assert "x".join(map(str, blocks.values())) in gpu_figures.PINNED

    def test_what_else_was_measured(self):
        rows = [row(named("c256-56"), "fp16")]
        rows[0]["results"]["torchvision"] |= {"same bits": False, "error": 0.04, "issue": 0.02, "peak": 64 << 20}
        rows[0]["results"].pop("deformops")
        (line,) = cells(gpu_figures.details(rows))
        assert line[3:] == [
            "50.0 / 20.0 / - / 50.0", "3.00 / 64.0 / - / 3.00", "2e-03 / 4e-02 / - / 2e-03", "yes / no / - / yes",
        ]  # fmt: skip

    def test_our_errors_and_bits_in_a_sentence(self):
        rows = [row(named("c256-56"), "fp32"), row(named("c256-56"), "bf16"), row(named("edvr"), "bf16")]
        rows[0]["results"]["deformconv"] |= {"error": 3e-7, "same bits": False}
        rows[2]["results"]["deformconv"] |= {"error": 5e-3}
        text = gpu_figures.ours(rows)
        assert "fp32 3.0e-07, bf16 5.0e-03" in text and "in 2 of 3 measurements" in text
        assert gpu_figures.ours([]) == ""

    def test_kernels_are_summed(self):
        table = gpu_figures.kernel_table(
            [{"kernel": "void a|b", "microseconds": 30.0, "times": 1.0}, {"kernel": "c", "microseconds": 10.0, "times": 2.5}]
        )
        assert cells(table) == [["void a/b", "30.0", "75 %", "1"], ["c", "10.0", "25 %", "2.5"], ["all", "40.0", "", "3.5"]]


class TestRoofline:
    CASE = Case("small", 2, 16, 8, (5, 4), groups=2, offset_groups=2)

    def test_the_floor_counts_products_and_bytes_of_the_dtype(self):
        products, memory = gpu_figures.floor(self.CASE, "bf16", FORWARD, CEILINGS)
        assert products == pytest.approx(2 * 2 * 20 * 9 * 16 * 8 / 2 / 5e14)
        halves = 2 * 16 * 20 + 8 * 8 * 9 + 8 + 2 * 8 * 20  # input, weight, bias, output
        floats = 2 * 2 * 18 * 20 + 2 * 2 * 9 * 20  # offsets and masks
        assert memory == pytest.approx((2 * halves + 4 * floats) / 2e12)
        wide = gpu_figures.floor(self.CASE, "fp32", FORWARD, CEILINGS)
        assert wide == pytest.approx((products * 5e14 / 4e13, 4 * (halves + floats) / 2e12))
        assert gpu_figures.floor(self.CASE, "bf16", TRAINING, CEILINGS)[0] == pytest.approx(3 * products)

    def test_the_share_is_that_of_the_higher_floor(self):
        floors = gpu_figures.floor(self.CASE, "bf16", FORWARD, CEILINGS)
        rows = [row(self.CASE, "bf16", deformconv=4e3 * max(floors)), row(self.CASE, "bf16", torchvision=1.0)]
        (line,) = cells(gpu_figures.roofline(rows, CEILINGS))
        assert line[-1] == "25 %"


class TestPage:
    def test_it_has_everything(self):
        text = gpu_figures.page(made_up())
        assert (
            "A Card (capability 9.0, 80 GiB, driver 580.1, CUDA 13.0); deformconv 0.1.0, torch 2.11.0; commit 1234567" in text
        )
        assert "a copy 2.00 TB/s; products bf16 500 TFLOP/s, fp32 40 TFLOP/s, tf32 200 TFLOP/s, fp16 500 TFLOP/s" in text
        assert (
            text.count("GPU time of a call, ") == 2 and "the least that the card allows" in text and "same bits again" in text
        )

    def test_the_committed_guide_is_made_from_the_committed_figures(self):
        file = ROOT / gpu_figures.RESULTS
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
        guide = (ROOT / gpu_figures.PAGE).read_text(encoding="utf-8")
        begin, end = gpu_figures.MARKS
        assert guide.partition(begin)[2].partition(end)[0] == gpu_figures.section(found)
        assert (ROOT / gpu_figures.CHART).exists() == (found is not None)

    def test_a_smoke_run_is_no_figure(self):
        found = made_up()
        found["machine"] = {"device": "cpu", "packages": {}}
        with pytest.raises(ValueError, match="no GPU has measured it: its times are no figures"):
            gpu_figures.section(found)
        assert "no figure" in gpu_figures.line(found)

    def test_it_is_written_between_its_marks(self, tmp_path):
        pytest.importorskip("matplotlib")
        guide = tmp_path / gpu_figures.PAGE
        guide.parent.mkdir()
        guide.write_text("before\n" + "old\n".join(gpu_figures.MARKS) + "after\n", encoding="utf-8")
        gpu_figures.main(tmp_path)
        assert guide.read_text(encoding="utf-8") == f"before\n{gpu_figures.UNMEASURED.join(gpu_figures.MARKS)}after\n"
        found = made_up()
        found["gpu"]["rows"] = [one for one in found["gpu"]["rows"] if one["dtype"] != "tf32"]
        (tmp_path / "benchmarks").mkdir()
        (tmp_path / gpu_figures.RESULTS).write_text(json.dumps(found))
        gpu_figures.main(tmp_path)
        text = guide.read_text(encoding="utf-8")
        assert "A Card" in text and text.startswith("before\n<!-- gpu:begin") and text.endswith("gpu:end -->\nafter\n")
        assert f"](../{gpu_figures.CHART})" in text
        assert 10_000 < (tmp_path / gpu_figures.CHART).stat().st_size < 300_000

    def test_a_chart_of_nothing(self, tmp_path):
        pytest.importorskip("matplotlib")
        found = made_up()
        found["gpu"]["rows"] = [row(named("edvr"), "bf16", deformconv=1.0)]
        with pytest.raises(ValueError, match="nothing to draw"):
            gpu_figures.save_chart(tmp_path / "chart.png", found)


def a_run(monkeypatch: pytest.MonkeyPatch, measured: Any, clock: Any = None, **more: Any) -> tuple[gpu.Run, list[str]]:
    """A run on the CPU in which a measurement is `measured(library, case, dtype, direction)`, and what it tells."""
    told: list[str] = []
    plan = gpu.Plan("cpu", ("c256-56", "tiny"), ("fp32",), ("deformconv", "portable"), (FORWARD,))._replace(**more)
    if clock is not None:
        monkeypatch.setattr(gpu.time, "monotonic", clock)
    monkeypatch.setattr(gpu, "given", lambda *arguments: {})
    monkeypatch.setattr(gpu.Run, "_measured", lambda run, *arguments: measured(*arguments[:4]))
    return gpu.Run(plan, "1234567", told.append), told


class TestRun:
    def test_what_matters_most_comes_first(self):
        order = [(case.name, dtype, direction) for case, dtype, direction in gpu.jobs(gpu.Plan())]
        main = [("c256-56", "bf16"), ("c256-56", "fp32"), ("c256-100", "bf16"), ("c256-100", "fp32")]
        assert order[:8] == [(case, dtype, direction) for case, dtype in main for direction in DIRECTIONS]
        assert len(order) == len(set(order)) == len(GPU_CASES) * 4 * 2
        assert {goal for one in gpu_figures.GOALS for goal in one.cases} == {case for case, _, _ in order[:8]}

    def test_a_result_is_told_and_kept_at_once(self, monkeypatch, tmp_path):
        file = tmp_path / "gpu.json"
        seen = []

        def measured(library, case, dtype, direction):
            kept = json.loads(file.read_text()) if file.exists() else None
            seen.append((library, case.name, len(told), [list(one["results"]) for one in kept["gpu"]["rows"]]))
            return result(1.0)

        run, told = a_run(monkeypatch, measured)
        found = gpu.measure(run, file)
        assert json.loads(file.read_text()) == json.loads(json.dumps(found))
        first, second = ["deformconv"], ["deformconv", "portable"]
        assert seen == [
            ("deformconv", "c256-56", 1, []), ("portable", "c256-56", 2, [first]), ("deformconv", "tiny", 3, [second]),
            ("portable", "tiny", 4, [second, first]),
        ]  # fmt: skip
        assert re.search(r"c256-56 +fp32 +forward +deformconv +1000.0 us by graph, 50.0 us to issue, peak 3.00 MiB, ", told[1])
        assert "error 2.0e-03, the same bits" in told[1]
        assert list(tmp_path.iterdir()) == [file]

    def test_nothing_begins_that_would_not_end_in_time(self, monkeypatch):
        now = [0.0]
        takes = {"deformconv": 2.0, "portable": 30.0}

        def measured(library, case, dtype, direction):
            now[0] += takes[library]
            return result(1.0)

        run, told = a_run(monkeypatch, measured, lambda: now[0], budget=60.0, directions=DIRECTIONS)
        found = gpu.measure(run)
        # After 2 + 30 + 2 seconds there are 26 left: too few for another half minute of portable, enough for ours.
        assert [list(one["results"]) for one in found["gpu"]["rows"]] == [["deformconv", "portable"], *[["deformconv"]] * 3]
        assert found["gpu"]["left out"] == 3 and now[0] < 60
        assert told[-1] == "Out of time: 3 measurements were left out."

    def test_no_time_at_all(self, monkeypatch):
        run, _ = a_run(monkeypatch, None, budget=1.0)
        found = gpu.measure(run)
        assert found["gpu"]["rows"] == [] and found["gpu"]["left out"] == 4
        assert gpu_figures.page(found)

    def test_a_missing_library_is_a_reason(self, monkeypatch):
        monkeypatch.setattr(GPU_PEERS["portable"], "packages", ("torch", "a_library_that_is_not_there"))
        run, told = a_run(monkeypatch, lambda *_: result(1.0), cases=("tiny",))
        (one,) = gpu.measure(run)["gpu"]["rows"]
        assert one["results"]["portable"] == {"reason": "not installed here: a_library_that_is_not_there"}
        assert "not installed here: a_library_that_is_not_there" in told[-1]
        assert "portable: not installed here: a_library_that_is_not_there" in gpu_figures.notes(run.found)

    def test_what_a_library_has_not(self):
        assert gpu_peers.reason_against("deformconv", "bf16") is None
        for (library, dtype), reason in gpu_peers.LACKING.items():
            assert library in GPU_PEERS and dtype in gpu_peers.DTYPES and reason.startswith("has no")

    def test_a_failure_is_a_reason_and_the_next_goes_on(self, monkeypatch):
        def measured(library, case, dtype, direction):
            if library == "deformconv":
                raise ValueError("it cannot\nsecond line")
            return result(1.0)

        run, _ = a_run(monkeypatch, measured, cases=("tiny",))
        (one,) = gpu.measure(run)["gpu"]["rows"]
        assert one["results"]["deformconv"] == {"reason": "failed: ValueError: it cannot"}
        assert one["results"]["portable"]["milliseconds"] == 1.0

    def test_a_lost_gpu_ends_the_run_and_keeps_its_rows(self, monkeypatch, tmp_path):
        cleared = []

        def clear(device):
            cleared.append(device)
            if len(cleared) == 2:
                raise RuntimeError("an illegal memory access")

        monkeypatch.setattr(gpu_clock, "clear", clear)
        run, told = a_run(monkeypatch, lambda *_: result(1.0))
        found = gpu.measure(run, tmp_path / "gpu.json")
        assert "the GPU is lost after portable, c256-56, fp32, forward: an illegal memory access" in found["gpu"]["ended"]
        assert told[-1].startswith("ENDED: the GPU is lost")
        assert json.loads((tmp_path / "gpu.json").read_text())["gpu"]["ended"] == found["gpu"]["ended"]
        assert list(found["gpu"]["rows"][0]["results"]) == ["deformconv"]


def test_a_profile_goes_on_after_a_failure(monkeypatch, tmp_path):
    def kernels(plan, case, dtype, direction):
        if case.name == "tiny":
            raise RuntimeError("no backend can run it")
        return [{"kernel": "sample", "microseconds": 12.5, "times": 2.0}]

    monkeypatch.setattr(gpu, "_kernels", kernels)
    run, told = a_run(monkeypatch, None, cases=("tiny", "c256-56"))
    found = gpu.profile(run, tmp_path / "kernels.json")
    # c256-56 is one of those that matter most.
    assert [(one["layer"]["name"], one["kernels"][0]["kernel"]) for one in found["kernels"]] == [("c256-56", "sample")]
    assert "c256-56, fp32, forward" in told[1] and "| sample |" in told[1] and "12.5" in told[1]
    assert told[2].endswith("tiny, fp32, forward: failed: RuntimeError: no backend can run it")
    assert len(json.loads((tmp_path / "kernels.json").read_text())["kernels"]) == 1


class TestOnTheCpu:
    @pytest.mark.slow
    def test_a_smoke_run(self, tmp_path, capsys):
        file = tmp_path / "smoke.json"
        gpu.main(["--device", "cpu", "--dtypes", "fp32,bf16", "--libraries", "deformconv,dense,portable", "--json", str(file)])
        printed = capsys.readouterr().out
        found = json.loads(file.read_text())
        assert found["machine"]["device"] == "cpu" and "ceilings" not in found
        assert [(one["layer"]["name"], one["dtype"], one["direction"]) for one in found["gpu"]["rows"]] == [
            ("tiny", dtype, direction) for dtype in ("fp32", "bf16") for direction in DIRECTIONS
        ]
        for one in found["gpu"]["rows"]:
            ours = one["results"]["deformconv"]
            assert ours["by"] == "wall" and ours["milliseconds"] > 0 and ours["same bits"]
            assert ours["error"] < (1e-6 if one["dtype"] == "fp32" else 8e-3)
            names = {"output"} | ({"input", "offset", "weight", "bias", "mask"} if one["direction"] == TRAINING else set())
            assert set(ours["errors"]) == names
            assert "error" not in one["results"]["dense"]
        assert printed.count("us by wall") == 12 and "no figure" in printed

    def test_tables_and_a_chart_of_an_earlier_run(self, tmp_path, capsys):
        pytest.importorskip("matplotlib")
        file, chart = tmp_path / "gpu.json", tmp_path / "gpu.svg"
        file.write_text(json.dumps(made_up()))
        gpu.main(["--from", str(file), "--markdown", "--chart", str(chart)])
        assert capsys.readouterr().out == "\n" + gpu_figures.page(made_up()) + "\n"
        assert "deformops" in chart.read_text() or chart.stat().st_size > 5000

    def test_a_later_run_of_some_takes_the_place_of_theirs(self, tmp_path, capsys):
        """And what stays of another commit says so."""
        later = made_up()
        later["gpu"] |= {"commit": "89abcde", "date": "2026-11-02", "budget": 60.0}
        later["gpu"]["rows"] = [row(GPU_CASES[0], "fp32", FORWARD, deformconv=0.5, torchvision=3.0)]
        files = [tmp_path / name for name in ("earlier.json", "later.json", "both.json")]
        for file, found in zip(files, (made_up(), later), strict=False):
            file.write_text(json.dumps(found))
        gpu.main(["--from", str(files[0]), "--join", str(files[1]), "--json", str(files[2]), "--markdown"])
        both = json.loads(files[2].read_text())
        assert (both["gpu"]["commit"], both["gpu"]["budget"]) == ("89abcde", 600.0)
        assert len(both["gpu"]["rows"]) == len(made_up()["gpu"]["rows"])
        (found,) = [one for one in both["gpu"]["rows"] if gpu._key(one) == (GPU_CASES[0].name, "fp32", FORWARD)]
        times = {name: (one["milliseconds"], one.get("commit")) for name, one in found["results"].items()}
        assert times["deformconv"] == (0.5, None)
        assert times["torchvision"] == (3.0, None)
        assert times["dense"] == (0.75, "1234567")
        note = "Measured at commit 1234567, on such a card with the same versions: deformconv in 63 of 64 results, plain,"
        assert note in capsys.readouterr().out

    def test_runs_on_two_cards_are_not_joined(self):
        other = made_up() | {"machine": CARD | {"device": "Another"}}
        with pytest.raises(ValueError, match="not of one kind of card"):
            gpu.joined(made_up(), other)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--cases", "c256-56,no"], "expected one or more of c256-56,c256-100,"),
            (["--from", "nowhere.json"], "--from nowhere.json: there is no such file"),
            (["--device", "cpu", "--profile"], "--profile counts the kernels of a GPU, and --device cpu has none"),
            (["--from", __file__, "--join", "nowhere.json"], "--join nowhere.json: there is no such file"),
            (["--join", __file__], "--join is for a file that --from names"),
            ([], "PyTorch finds no GPU here; --device cpu makes a smoke run"),
        ],
    )
    def test_what_cannot_be_is_said_at_once(self, arguments, message, capsys, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(SystemExit):
            gpu.main(arguments)
        assert message in capsys.readouterr().err

    def test_a_chart_without_matplotlib(self, capsys, monkeypatch):
        monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(SystemExit):
            gpu.main(["--device", "cpu", "--chart", "chart.png"])
        assert "--chart needs matplotlib, not installed here; --from FILE --chart draws elsewhere" in capsys.readouterr().err

    def test_a_wrong_result_has_no_time(self, monkeypatch):
        class Wrong(gpu_peers.Portable):
            def operator(self, case):
                right = super().operator(case)
                return lambda **arguments: 1.01 * right(**arguments)

        monkeypatch.setitem(GPU_PEERS, "portable", Wrong)
        plan = gpu.Plan("cpu", ("tiny",), ("fp32",), ("portable",), DIRECTIONS)
        rows = gpu.measure(gpu.Run(plan, "", lambda text: None))["gpu"]["rows"]
        for one in rows:
            found = one["results"]["portable"]
            assert "milliseconds" not in found and re.match(r"differs by 1.0e-02 in \w+", found["reason"])

    def test_errors_are_those_of_the_accuracy_module(self):
        from deformconv.accuracy import error

        right = torch.tensor([1.0, -4.0, 2.0], dtype=torch.float64)
        found = torch.tensor([1.5, -4.0, 2.0])
        assert gpu._error(found, right) == error(found.numpy(), right.numpy()) == 0.125
        assert gpu._error(torch.zeros(2), torch.zeros(2, dtype=torch.float64)) == 0
        for wrong in (None, found[:2], found * float("nan")):
            assert gpu._error(wrong, right) == float("inf")


class TestGiven:
    def test_offsets_stay_wide_beside_halves_and_all_libraries_get_the_same_numbers(self):
        half = gpu_peers.given(TINY, "fp16", "cpu")
        assert half["input"].dtype == half["grad_output"].dtype == torch.float16
        assert half["offset"].dtype == half["mask"].dtype == torch.float32
        ((theirs, _), (ours, again)) = (gpu_peers.copies(name, half, 2) for name in ("torchvision", "deformconv"))
        assert theirs["offset"].dtype == torch.float16 and torch.equal(theirs["offset"].float(), ours["offset"])
        assert ours["input"].data_ptr() != again["input"].data_ptr() and torch.equal(ours["input"], again["input"])
        assert ours["input"].requires_grad and not ours["grad_output"].requires_grad

    def test_channels_last(self):
        laid = gpu_peers.given(TINY, "fp32", "cpu", channels_last=True)
        assert all(laid[name].is_contiguous(memory_format=torch.channels_last) for name in ("input", "grad_output"))
        assert torch.equal(laid["input"], gpu_peers.given(TINY, "fp32", "cpu")["input"])
        (plain,) = gpu_peers.copies("dense-channels-last", gpu_peers.given(TINY, "fp32", "cpu"), 1)
        assert all(plain[name].is_contiguous(memory_format=torch.channels_last) for name in ("input", "weight", "grad_output"))

    def test_tf32_is_set_for_products_and_convolutions(self):
        for allowed in (True, False):
            gpu_peers.allow_tf32(allowed)
            assert torch.backends.cuda.matmul.allow_tf32 is torch.backends.cudnn.allow_tf32 is allowed


class Card:
    """A made-up GPU with a clock: a call that is issued takes its time there, one that is recorded takes it at each replay."""

    def __init__(self, records: bool = True) -> None:
        self.now, self.recording, self.records, self.calls, self.replays = 0.0, False, records, [], 0
        self.allocated, self.most = 100, 100

    def call(self, number: int) -> None:
        if self.recording and not self.records:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        self.calls.append(number)
        if not self.recording:
            self.now += 1.0 + number

    def module(self) -> types.SimpleNamespace:
        card = self

        class Graph:
            def replay(self):
                card.replays += 1
                card.now += sum(1.0 + number for number in self.numbers)

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = card.now

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return end.at - self.at

        @contextlib.contextmanager
        def graph(found):
            card.recording, before = True, len(card.calls)
            try:
                yield
            finally:
                card.recording = False
                found.numbers = card.calls[before:]

        stream = types.SimpleNamespace(wait_stream=lambda other: None)
        cuda = types.SimpleNamespace(
            Stream=lambda: stream, current_stream=lambda: stream, stream=lambda which: contextlib.nullcontext(), graph=graph,
            synchronize=lambda: None, CUDAGraph=Graph, Event=Event, memory_allocated=lambda: card.allocated,
            max_memory_allocated=lambda: card.most, reset_peak_memory_stats=lambda: setattr(card, "most", card.allocated),
        )  # fmt: skip
        return types.SimpleNamespace(cuda=cuda)


class TestClock:
    def test_replays_of_a_graph_of_a_call_on_each_input(self, monkeypatch):
        card = Card()
        monkeypatch.setattr(gpu_clock, "torch", card.module())
        found = gpu_clock.times(card.call, 4, "cuda", 0.01)
        assert found["by"] == "graph" and found["milliseconds"] == pytest.approx((1 + 2 + 3 + 4) / 4)
        assert found["quartiles"] == pytest.approx([2.5, 2.5]) and found["issue"] >= 0
        assert card.calls[:4] == [0, 1, 2, 3] and card.replays >= 2 + gpu_clock.LEAST

    def test_events_where_nothing_can_be_recorded(self, monkeypatch):
        card = Card(records=False)
        monkeypatch.setattr(gpu_clock, "torch", card.module())
        found = gpu_clock.times(card.call, 2, "cuda", 0.01)
        assert (found["by"], found["milliseconds"]) == ("events", pytest.approx(1.5))
        assert found["not recorded"] == "RuntimeError: operation not permitted when stream is capturing"

    def test_memory_counts_what_is_kept_and_what_is_used_meanwhile(self, monkeypatch):
        card = Card()
        monkeypatch.setattr(gpu_clock, "torch", card.module())
        scratch = iter((1000, 30))  # the first call tries things out

        def call():
            card.allocated = 110  # it keeps 10
            card.most = max(card.most, card.allocated + next(scratch))
            return "found"

        assert gpu_clock.memory(call, "cuda") == ("found", 40)
        assert gpu_clock.memory(lambda: "found", "cpu") == ("found", None)

    def test_a_profile_is_of_one_call_and_of_the_gpu_alone(self):
        kind = torch.autograd.DeviceType

        def one(key, device, time, count):
            return types.SimpleNamespace(key=key, device_type=device, self_device_time_total=time, count=count)

        found = gpu_clock.of_one_call(
            [one("aten::mm", kind.CPU, 50.0, 4), one("sample", kind.CUDA, 20.0, 4), one("gemm", kind.CUDA, 80.0, 8),
             one("nothing", kind.CUDA, 0.0, 1)], 4,
        )  # fmt: skip
        assert found == [
            {"kernel": "gemm", "microseconds": 20.0, "times": 2.0}, {"kernel": "sample", "microseconds": 5.0, "times": 1.0},
        ]  # fmt: skip

    def test_without_a_card_the_machine_is_the_cpu(self):
        found = gpu_clock.machine("cpu")
        assert found["device"] == "cpu" and {"deformconv", "torch"} <= set(found["packages"])
