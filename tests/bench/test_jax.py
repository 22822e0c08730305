"""The benchmark in JAX and Keras: right results, the ratios that are asked for, and what is written of them."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from tests.bench import made_up

from deformconv import installation
from deformconv.bench import jax as bench
from deformconv.bench import jax_rows
from deformconv.bench.cases import Case
from deformconv.bench.jax_peers import JAX_PEERS
from deformconv.bench.keras_peers import KERAS_BACKENDS, KERAS_CASE, KERAS_PEERS, KerasCase, KerasTruth, keras_case_of
from deformconv.bench.measure import Pace, Process, differences, peer_of, results_of
from deformconv.bench.peers import DIRECTIONS, PEERS, Truth
from deformconv.bench.reports import REPORTS
from deformconv.cli import bench as command
from deformconv.cli.main import main

ROOT = Path(__file__).parents[2]
TINY = Case("tiny", 2, 4, 6, (7, 9), groups=2, offset_groups=2)
SMALL_NET = KerasCase("small", 2, (9, 10), 4)
ASKED = list(bench.BARS)


def test_names_differ_and_cases_survive_json():
    assert len({*PEERS, *JAX_PEERS, *KERAS_PEERS}) == len(PEERS) + len(JAX_PEERS) + len(KERAS_PEERS)
    assert all(peer_of(name) is peer for name, peer in (JAX_PEERS | KERAS_PEERS).items())
    assert keras_case_of(json.loads(json.dumps(KERAS_CASE._asdict()))) == KERAS_CASE
    assert KERAS_CASE.what == "2 layers of 64 channels, 3x3, on 2x56x56"


@pytest.fixture(scope="module")
def truth():
    pytest.importorskip("torch")
    peer = Truth(1)
    peer.prepare(TINY)
    return {direction: peer.results(direction) for direction in DIRECTIONS}


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", [name for name, peer in JAX_PEERS.items() if peer.deforms])
def test_results_in_jax_are_those_of_array_operations(name: str, direction: str, truth):
    if name != "numpy":
        pytest.importorskip("jax")
    peer = JAX_PEERS[name](2)
    peer.prepare(TINY)
    errors = differences(peer.results(direction), truth[direction])
    assert max(errors.values()) < 1e-5 and len(errors) == (1 if direction == DIRECTIONS[0] else 6)


def test_xlas_convolution_is_the_same_in_both_layouts():
    pytest.importorskip("jax")
    found = []
    for name in ("jax-dense", "jax-dense-last"):
        peer = JAX_PEERS[name](2)
        peer.prepare(TINY)
        found.append(peer.results(DIRECTIONS[1]))
    assert set(found[0]) == {"output", "input", "weight", "bias"}
    last = {name: np.moveaxis(array, -1, 1) if name in ("output", "input") else array for name, array in found[1].items()}
    last["weight"] = np.moveaxis(last["weight"], (-1, -2), (0, 1))
    assert max(differences(last, found[0]).values()) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("backend", KERAS_BACKENDS)
def test_the_net_in_keras_is_that_of_array_operations(backend: str):
    """And the plain one has the same weights, but for the predictors."""
    for package in ("torch", *KERAS_PEERS[f"keras-{backend}"].packages):
        if find_spec(package) is None:
            pytest.skip(f"needs {package}")
    truth = KerasTruth(1)
    truth.prepare(SMALL_NET)
    process = Process(f"keras-{backend}", 1)
    try:
        for direction in DIRECTIONS:
            errors = differences(results_of(process, SMALL_NET, direction), truth.results(direction))
            assert max(errors.values()) < SMALL_NET.tolerance
            assert len(errors) == (1 if direction == DIRECTIONS[0] else 9)
            assert process.ask("time", direction=direction, calls=1)[0] > 0
    finally:
        process.close()


def operator_rows(forward, training, small):
    rows = zip((jax_rows.CASE, jax_rows.CASE, jax_rows.SMALL), (DIRECTIONS[0], DIRECTIONS[1], DIRECTIONS[0]), strict=True)
    times = (forward, training, small)
    return [made_up.row(case, direction, **found) for (case, direction), found in zip(rows, times, strict=True)]


def figures():
    """Made up; one layout of XLA's convolution is the faster forward, the other in training."""
    operator = operator_rows(
        {"jax": 2.0, "numpy": 2.5, "jax-dense": 8.0, "jax-dense-last": 4.0},
        {"jax": 6.0, "numpy": 5.0, "jax-dense": 5.0, "jax-dense-last": 8.0},
        {"jax": 0.042, "numpy": 0.030},
    )
    keras = [
        {
            "net": KERAS_CASE._asdict(), "backend": backend, "direction": direction,
            "results": {f"keras-{backend}": made_up.result(time), f"keras-{backend}-dense": made_up.result(10.0)},
        }
        for backend, both in (("jax", (12.0, 15.0)), ("tensorflow", (22.0, 19.0)))
        for direction, time in zip(DIRECTIONS, both, strict=True)
    ]  # fmt: skip
    machine = made_up.MACHINE | {"libraries": {"jax": "0.10.2"}}
    return {"machine": machine, "threads": 2, "blocks": 7, "operator": operator, "keras": keras}


def test_what_is_asked_for():
    """XLA's convolution is the faster of its two layouts."""
    assert bench.bars(figures()) == dict(zip(ASKED, map(pytest.approx, (0.8, 0.5, 1.2, 12.0, 1.5, 1.9)), strict=True))
    assert bench.bars({**figures(), "operator": [], "keras": []}) == dict.fromkeys(ASKED)


def test_tables():
    text = bench.operator_text(figures())
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    cells = {line[0]: line[1:] for line in lines}
    assert cells["deformconv.jax"] == ["2.00", "6.00", "42.0"] and cells["XLA's convolution, NHWC"] == ["4.00", "8.00", "-"]
    assert "Forward takes 0.800 times NumPy's front end's time and 0.500 times that of XLA's own convolution" in text
    assert "a training step 1.20 times" in text and "A small call takes 12.0 microseconds more" in text
    text = bench.keras_text(figures())
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert lines[2:] == [
        ["jax", "10.0", "12.0", "1.20", "10.0", "15.0", "1.50"],
        ["tensorflow", "10.0", "22.0", "2.20", "10.0", "19.0", "1.90"],
        ["torch", "-", "-", "-", "-", "-", "-"],
    ]
    wrong = figures()
    wrong["keras"][0]["results"]["keras-jax"] = {"reason": "differs by 1.0e-01 in output"}
    assert "| differs by 1.0e-01 in output |" in bench.keras_text(wrong)


def test_figures_are_written_between_the_pages_marks(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "benchmarks").mkdir()
    for name, mark in bench.PAGES.items():
        (tmp_path / name).write_text(f"before\n<!-- {mark}:begin -->\nold\n<!-- {mark}:end -->\nafter\n")
    for _ in range(2):
        bench.write(figures(), tmp_path)
    assert json.loads((tmp_path / bench.RESULTS).read_text())["threads"] == 2
    for name, text in zip(bench.PAGES, (bench.operator_text(figures()), bench.keras_text(figures())), strict=True):
        mark = bench.PAGES[name]
        assert (tmp_path / name).read_text() == f"before\n<!-- {mark}:begin -->\n{text}<!-- {mark}:end -->\nafter\n"
    (tmp_path / "docs" / "keras.md").write_text("no marks")
    with pytest.raises(
        ValueError, match=r"keras\.md: the document has no <!-- keras:begin -->; expected a repository's folder"
    ):
        bench.write(figures(), tmp_path)
    with pytest.raises(ValueError, match=r"jax\.md: .*No such file.*; expected a repository's folder"):
        bench.write(figures(), tmp_path / "elsewhere")


def test_the_documents_quote_the_committed_figures():
    """Once they were measured; the tables follow from the file."""
    if not (ROOT / bench.RESULTS).exists():
        pytest.skip(f"{bench.RESULTS} is not there yet: make bench-jax")
    found = json.loads((ROOT / bench.RESULTS).read_text(encoding="utf-8"))
    for name, text in zip(bench.PAGES, (bench.operator_text(found), bench.keras_text(found)), strict=True):
        mark = bench.PAGES[name]
        assert f"<!-- {mark}:begin -->\n{text}<!-- {mark}:end -->" in (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_short_run(monkeypatch):
    for package in ("torch", "jax"):
        pytest.importorskip(package)
    monkeypatch.setattr(jax_rows, "CASE", TINY)
    progress = made_up.Counting()
    found = bench.measure(Pace(1, 1e-3), progress, ["operator"])
    assert len(progress.steps) == progress.expected == 3
    for row in found["operator"]:
        assert set(row["results"]) == set(JAX_PEERS)
        assert all(result["milliseconds"] > 0 for result in row["results"].values())
    assert None not in list(bench.bars(found).values())[:4]
    assert bench.operator_text(found).startswith(REPORTS["jax"].write(found["operator"]))
    json.dumps(found)


def test_the_command_measures_the_same(monkeypatch, capsys):
    """Where JAX and Keras are; else it says what to install, and leaves them out of everything."""
    rows = figures()
    monkeypatch.setattr(jax_rows, "measure_operator", lambda threads, pace, progress: rows["operator"])
    monkeypatch.setattr(jax_rows, "measure_keras", lambda threads, pace, progress: rows["keras"])
    monkeypatch.setattr(command, "missing", lambda packages: [])
    assert main(["bench", "jax", "keras", "--quick"]) == 0
    text = capsys.readouterr().out
    assert jax_rows.operator_table(rows["operator"]) in text and jax_rows.keras_table(rows["keras"]) in text
    assert main(["bench", "jax", "--case", "c64-56"]) == 2
    assert "the report jax measures a case of its own, and --case names none" in capsys.readouterr().err
    monkeypatch.setattr(command, "missing", lambda packages: [name for name in packages if name == "jax"])
    assert main(["bench", "jax"]) == 1
    how = installation.command("jax", "jax")
    assert f"the report jax cannot be measured: jax not installed here. {how}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--write", ".", "--only", "keras"], "--write takes the figures of both parts, and --only measures one"),
        (["--only", "gluon"], "invalid choice: 'gluon'"),
    ],
)
def test_a_wrong_call_is_explained(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(bench, "missing", lambda packages: [])
    with pytest.raises(SystemExit):
        bench.main(arguments)
    assert message in capsys.readouterr().err


def test_what_is_not_installed_is_named(capsys, monkeypatch):
    monkeypatch.setattr(bench, "missing", lambda packages: ["jax"])
    with pytest.raises(SystemExit):
        bench.main([])
    assert "jax not installed here: `make bench-jax` makes an environment that has them" in capsys.readouterr().err
