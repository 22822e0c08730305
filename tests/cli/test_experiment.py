"""`deformconv experiment detect`: what it says of wrong calls, and from end to end in a process of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deformconv import installation
from deformconv.cli import main as command_line
from deformconv.cli.main import main

COMMAND = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from deformconv.cli.main import main
sys.exit(main())
"""
# A few steps of the regular detector and of v2.
TINY = ("--fast", "--arms", "v2", "--base-steps", "2", "--steps", "1", "--images", "2")


@pytest.fixture
def installed():
    for needed in ("torch", "torchvision", "lightning_fabric", "mlxtend", "skimage", "pycocotools", "matplotlib", "rich"):
        pytest.importorskip(needed, reason="the experiment needs it")


def start(output: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, "experiment", "detect", "--output", str(output), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_help(capsys):
    assert main(["experiment", "detect", "--help"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    for word in ("--fast", "--seeds", "--arms", "--sweep", "--output", "v2-mimic", "scratch"):
        assert word in text


def test_it_says_in_one_sentence_what_to_install(monkeypatch, capsys, tmp_path):
    missing = ("lightning_fabric", "skimage", "pycocotools")
    monkeypatch.setattr(command_line, "find_spec", lambda name: None if name in missing else object())
    assert main(["experiment", "detect", "--output", str(tmp_path / "new")]) == 1
    packages = ("lightning-fabric", "pycocotools", "scikit-image")
    assert capsys.readouterr().err == (
        f"Error: the experiment needs {', '.join(packages)}, not installed here: "
        f"{installation.command('experiment', *packages)}\n"
    )
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--arms", "v2,v3"], 2, "'v3' is none of regular, seconds, wide, v1, v2-conv, v2, v2-mimic, scratch"),
        (["--seeds", "0"], 2, "--seeds"),
        (["--steps", "0"], 2, "--steps"),
    ],
)
def test_a_wrong_call_is_explained(installed, options, code, message, tmp_path, capsys):
    assert main(["experiment", "detect", "--output", str(tmp_path / "new"), *options]) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_made_is_explained(installed, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["experiment", "detect", "--output", str(tmp_path / "file" / "new")]) == 1
    assert f"Error: cannot make the folder {tmp_path / 'file' / 'new'}: " in capsys.readouterr().err


def test_a_folder_of_another_budget_is_refused(installed, tmp_path, capsys):
    from deformconv.studies.detection.plan import DEFAULT, accepted

    accepted(tmp_path, DEFAULT)
    assert main(["experiment", "detect", "--fast", "--output", str(tmp_path)]) == 1
    assert f"Error: {tmp_path} has results with base steps 1500, and this run has 20: choose" in capsys.readouterr().err


def test_a_failed_training_ends_with_1_and_says_why(installed, tmp_path, capsys, monkeypatch):
    from deformconv.studies.detection import experiment, workers

    def fail(*_, **__):
        raise workers.WorkerError("much-0-base failed:\nValueError: [no] such thing")

    monkeypatch.setattr(experiment, "compiled", lambda *_, **__: None)
    monkeypatch.setattr(experiment, "run_jobs", fail)
    assert main(["experiment", "detect", "--fast", "--output", str(tmp_path)]) == 1
    assert "Error: much-0-base failed:\nValueError: [no] such thing" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_folder_in_which_another_command_trains_is_refused(installed, tmp_path, capsys):
    """Until that one ends, here by a signal that no program hears."""
    from deformconv.studies.detection.plan import held

    process = start(tmp_path, "--fast", "--arms", "v2", "--base-steps", "5000")
    try:
        for _ in range(600):
            if (tmp_path / "budget.json").exists():
                break
            time.sleep(0.1)
        assert main(["experiment", "detect", "--fast", "--output", str(tmp_path)]) == 1
        said = capsys.readouterr()
        assert said.err == (
            f"Error: {tmp_path} is in use by another command, process {process.pid}: wait until that has ended, or choose "
            "another folder by --output\n"
        )
        assert said.out == ""  # nothing is compiled or trained
    finally:
        process.kill()
        process.communicate()
    with held(tmp_path):
        pass


@pytest.mark.slow
def test_from_end_to_end_and_once_more(installed, tmp_path, capsys):
    """A second run trains nothing."""
    out, err = start(tmp_path, *TINY).communicate(timeout=300)
    assert err == "" and "\x1b" not in out
    assert "3 trainings; 2 at a time" in out and "Done in" in out
    names = {f"much-0-{arm}.{end}" for arm in ("base", "regular", "v2") for end in ("json", "pt")}
    written = {"budget.json", "lock", "detection.json", "detection.md", "detections.png", "where-v2-looks.png"}
    assert {path.name for path in tmp_path.iterdir()} == names | written
    first = json.loads((tmp_path / "detection.json").read_text())
    assert [row["arm"] for row in first["arms"]] == ["base", "regular", "v2"]
    assert (tmp_path / "detection.md").read_text().startswith("# A detector of deformable parts")
    for name in ("detections.png", "where-v2-looks.png"):
        data = (tmp_path / name).read_bytes()
        assert data.startswith(b"\x89PNG") and data.endswith(b"IEND\xaeB`\x82") and len(data) > 20_000

    times = {name: (tmp_path / name).stat().st_mtime_ns for name in names}
    assert main(["experiment", "detect", "--output", str(tmp_path), *TINY]) == 0
    assert "3 trainings, 3 of them done before" in capsys.readouterr().out
    assert times == {name: (tmp_path / name).stat().st_mtime_ns for name in names}
    assert json.loads((tmp_path / "detection.json").read_text())["results"] == first["results"]


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_an_interrupt_leaves_no_half_written_file(installed, tmp_path):
    process = start(tmp_path, "--fast", "--arms", "v2", "--base-steps", "5000", "--workers", "1")
    try:
        for _ in range(1200):  # until the first checkpoint is there
            if list(tmp_path.glob("much-0-*.checkpoint.pt")):
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert err.strip() == "Interrupted: nothing is left half-written."
    files = {path.name for path in tmp_path.iterdir()}
    files -= {"budget.json", "lock"}
    assert files and all(name.endswith(".checkpoint.pt") for name in files)
    assert not any(name.startswith(".") for name in files)
