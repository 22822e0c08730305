"""`deformconv bench`: what it is told, what it says, and what it ends with."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from tests.bench import made_up

from deformconv.bench import document, reports
from deformconv.bench.cases import CASES
from deformconv.cli import bench
from deformconv.cli.main import main
from deformconv.installation import command

INSTALL = command("bench", "kornia", "matplotlib", "ncnn", "numba", "onnx", "onnxruntime", "openvino", "torch", "torchvision")


@pytest.fixture
def measures(monkeypatch):
    """A benchmark that takes no time: what is asked for is kept, and the figures are made up."""
    asked = []

    def speed(cases, libraries, directions, threads, pace, progress):
        asked.append((cases, libraries, directions, threads, pace))
        progress.begin(len(cases))
        for case in cases:
            progress.step(case.name)
        names = [case.name for case in cases]
        return [row for row in made_up.rows() if row["layer"]["name"] in names and row["direction"] in directions]

    monkeypatch.setattr(bench, "speed", speed)
    monkeypatch.setattr(bench, "missing", lambda packages: [])
    return asked


@pytest.fixture
def absent(monkeypatch):
    """Packages that are not there, by name."""
    found: set[str] = set()
    monkeypatch.setattr(bench, "missing", lambda packages: [name for name in packages if name in found])
    return found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--case", "c64"], "there is no case 'c64'; there are c64-56, c128-28, "),
        (["aggregate", "--case", "c64-56"], "the report aggregate measures cases of its own, and --case names none"),
        (["--case", "intern-7"], "the report speed measures layers, and --case names none"),
        (["--library", "mmcv"], "there is no library 'mmcv'; there are deformconv, prepacked, onnxruntime, openvino, ncnn, "),
        (["--direction", "sideways"], "there is no direction 'sideways'; there are forward, forward+backward"),
        (
            ["loudness"],
            "there is no report 'loudness'; there are speed, net, rois, attention, aggregate, offsets, half, small, scaling, "
            "memory, startup, jax, keras, all",
        ),
        (["--threads", "0"], "--threads"),
        (["--seconds", "0"], "--seconds"),
        (["--plot", "chart.txt"], "--plot chart.txt: expected a name that ends with .png, .svg, .pdf"),
        (["memory", "--plot", "chart.png"], "--plot draws the report speed, which is not among those asked for"),
        (["--from", "nowhere.json"], "nowhere.json"),
    ],
)
def test_a_wrong_call_is_explained_and_ends_with_2(arguments, message, capsys, measures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert measures == [] and not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_files_that_cannot_be_written_are_said_at_once(option, capsys, measures, tmp_path):
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "results.png"
    assert main(["bench", option, str(path)]) == 1
    assert f"Error: cannot write {option} {path}: " in capsys.readouterr().err
    assert measures == []


def test_missing_libraries_are_named_with_how_to_get_them(measures, absent, capsys, monkeypatch):
    monkeypatch.setattr(bench, "missing", lambda packages: [name for name in packages if name in ("kornia", "onnx")])
    assert main(["bench", "--quick"]) == 0
    text = capsys.readouterr().out
    assert f"Not installed, so not compared: ONNX Runtime, kornia. {INSTALL} brings all of them." in text
    assert measures[0][1] == ["deformconv", "prepacked", "openvino", "ncnn", "torchvision", "dense"]


def test_another_operators_missing_libraries_are_named_with_how_to_get_them(measures, capsys, monkeypatch):
    monkeypatch.setattr(reports, "missing", lambda packages: [name for name in packages if name in ("transformers", "mmcv")])
    monkeypatch.setitem(bench.REPORTS, "attention", bench.REPORTS["attention"]._replace(measure=lambda plan, progress: []))
    assert main(["bench", "attention"]) == 0
    text = capsys.readouterr().out
    named = "transformers, eager (pip install transformers); mmcv, on a CPU (pip install mmcv-lite)"
    assert f"\nNot installed, so not compared in the report attention: {named}.\n" in text
    assert main(["bench", "--quick"]) == 0
    assert "Not installed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("gone", "arguments", "message"),
    [
        ("onnx", ["--library", "onnxruntime"], "onnxruntime cannot be measured: onnx not installed here"),
        ("torchvision", ["net"], "the report net cannot be measured: torchvision not installed here"),
        ("torch", [], "deformconv cannot be measured: torch not installed here"),
    ],
)
def test_what_is_asked_for_must_be_there(gone, arguments, message, absent, capsys):
    absent.add(gone)
    assert main(["bench", *arguments]) == 1
    assert capsys.readouterr().err == f"Error: {message}. {INSTALL}\n"


def test_a_picture_needs_matplotlib(measures, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    assert main(["bench", "--plot", str(tmp_path / "chart.png")]) == 1
    assert capsys.readouterr().err == f"Error: --plot needs matplotlib, not installed here: {INSTALL}\n"


def test_options_reach_the_measurement(measures, capsys):
    assert main(["bench"]) == 0
    assert main(["bench", "--quick", "--case", "dbnet", "--library", "dense", "--threads", "1", "--direction", "forward"]) == 0
    assert main(["bench", "--quick", "--blocks", "5", "--seconds", "0.2"]) == 0
    whole, one, quick = measures
    assert whole[0] == list(CASES) and whole[1][0] == "deformconv" and whole[2] == ("forward", "forward+backward")
    assert whole[4] == (7, 0.3)
    assert [case.name for case in one[0]] == ["dbnet"] and one[1:4] == (["deformconv", "dense"], ["forward"], 1)
    assert [case.name for case in quick[0]] == ["c64-56", "c128-28", "primes"] and quick[4] == (5, 0.2)


def test_what_is_printed(measures, capsys):
    assert main(["bench", "--case", "primes", "--case", "signal-1d"]) == 0
    captured = capsys.readouterr()
    for words in ("Speed, forward, milliseconds", "Speed, forward+backward, milliseconds", "Geometric means", "| primes "):
        assert words in captured.out
    assert "* as 2-D of height 1" in captured.out
    assert "threads; Python" in captured.out
    assert "primes" in captured.err and "primes" not in captured.err.split("\n")[0]  # the progress, step by step


def test_results_are_written_read_and_drawn(measures, capsys, tmp_path):
    file, picture = tmp_path / "new" / "results.json", tmp_path / "chart.svg"
    assert main(["bench", "--quick", "--json", str(file), "--plot", str(picture)]) == 0
    first = capsys.readouterr().out
    found = json.loads(file.read_text())
    assert found["machine"] == document.machine()
    assert {"threads", "blocks", "date", "rows", "seconds a block"} == set(found["speed"])
    assert picture.read_text().startswith("<?xml")
    again = tmp_path / "again.svg"
    assert main(["bench", "--from", str(file), "--plot", str(again)]) == 0
    assert first.startswith(capsys.readouterr().out) and again.exists()
    assert len(measures) == 1
    assert main(["bench", "memory", "--from", str(file)]) == 1
    assert f"{file} has no memory" in capsys.readouterr().err


def test_reports_join_one_file(measures, capsys, tmp_path, monkeypatch):
    file = tmp_path / "results.json"
    started = [{"what": "import torch", "seconds": 1.0, "quartiles": [1.0, 1.0], "processes": 3}]
    report = bench.REPORTS["startup"]._replace(measure=lambda plan, progress: started)
    monkeypatch.setitem(bench.REPORTS, "startup", report)
    assert main(["bench", "startup", "--json", str(file)]) == 0
    assert main(["bench", "--quick", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert set(found) == {"machine", "startup", "speed"} and found["startup"]["rows"] == started


def test_another_machine_s_file_is_left_alone_unless_all_of_it_is_measured(measures, capsys, tmp_path):
    file = tmp_path / "results.json"
    other = made_up.document() | {"memory": made_up.section([])}
    file.write_text(json.dumps(other))
    assert main(["bench", "--quick", "--json", str(file)]) == 1
    assert "cannot add to" in (error := capsys.readouterr().err) and "it was measured elsewhere" in error
    assert json.loads(file.read_text()) == json.loads(json.dumps(other)) and measures == []
    file.write_text(json.dumps(made_up.document()))
    assert main(["bench", "--quick", "--json", str(file)]) == 0
    assert json.loads(file.read_text())["machine"] == document.machine()


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_file_of_another_kind_is_not_overwritten(text, measures, capsys, tmp_path):
    file = tmp_path / "precious.json"
    file.write_text(text)
    for option in ("--json", "--from"):
        assert main(["bench", option, str(file)]) == 1
        assert f"{file} is not a benchmark's file: " in capsys.readouterr().err
    assert file.read_text() == text and measures == []


@pytest.mark.parametrize(
    "row",
    [
        {"results": {"deformconv": {"reason": "differs by 1.0e-01 in output"}}},
        {"results": {"sigma 20": {"reason": "differs by 1.0e-01 in output"}}},
        {"results agree": False},
        {"cache is whole": False},
    ],
)
def test_our_own_wrong_results_end_with_1(row):
    assert bench._is_wrong([row])
    assert not bench._is_wrong([{"results": {"kornia": {"reason": "has no 3-D"}}}, {"results agree": True}])


def test_a_wrong_result_of_ours_is_an_error(capsys, measures, monkeypatch):
    monkeypatch.setattr(bench, "_is_wrong", lambda rows: True)
    assert main(["bench", "--quick"]) == 1
    assert capsys.readouterr().err.endswith("Error: deformconv failed, or its results are wrong: see above\n")


def test_a_report_that_cannot_be_measured_says_why(capsys, measures, monkeypatch):
    def measure(plan, progress):
        raise RuntimeError("a first call failed: no luck")

    monkeypatch.setitem(bench.REPORTS, "startup", bench.REPORTS["startup"]._replace(measure=measure))
    assert main(["bench", "startup"]) == 1
    assert capsys.readouterr().err == "Error: startup: a first call failed: no luck\n"


@pytest.mark.slow
def test_it_runs(tmp_path):
    """The whole of it, in processes of its own, as briefly as can be."""
    pytest.importorskip("torchvision")
    file = tmp_path / "results.json"
    arguments = ["--quick", "--case", "primes", "--blocks", "1", "--seconds", "0.001", "--threads", "1", "--json", str(file)]
    ran = subprocess.run(
        [sys.executable, "-m", "deformconv.cli", "bench", *arguments],
        capture_output=True, text=True, timeout=300, check=False, env={**os.environ, "PYTHONWARNINGS": "default"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "| primes | 3x37x41x29 -> 53, kernel 5x3, stride 2x1 |" in ran.stdout
    rows = json.loads(file.read_text())["speed"]["rows"]
    assert [row["direction"] for row in rows] == ["forward", "forward+backward"]
    for row in rows:
        for library, result in row["results"].items():
            if "reason" in result:
                assert result["reason"] == "has no gradients" and row["direction"] != "forward"
                continue
            low, high = result["quartiles"]
            assert 0 < low <= result["milliseconds"] <= high
            assert library == "dense" or result["error"] < 1e-5


def test_help(capsys):
    assert main(["bench", "--help"]) == 0
    text = capsys.readouterr().out
    options = "quick", "base", "case", "library", "direction", "threads", "json", "plot", "from"
    for word in ("memory", *(f"--{option}" for option in options)):
        assert word in text
    assert max(map(len, text.splitlines())) <= 80
