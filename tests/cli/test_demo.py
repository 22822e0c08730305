"""The demo from end to end, in a process of its own as a user runs it."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

for extra in ("torch", "matplotlib", "mlxtend", "rich"):
    pytest.importorskip(extra, reason="the demo needs it")

PICTURES = {"sampling-points-middle.png", "sampling-points-last.png", "training.png"}


@pytest.fixture(scope="module", autouse=True)
def compiled_kernels():
    """A machine's first run also compiles; the times below are those of every other run."""
    subprocess.run([sys.executable, "-m", "deformconv.cli", "warmup", "--rank", "2"], check=True, timeout=300)


# The command itself; but what a shell starts in the background, as CI may do with the tests, ignores SIGINT.
COMMAND = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from deformconv.cli.main import main
sys.exit(main())
"""


# On many processors the libraries' threads wait for each other at the cost of processor time.
TWO_THREADS = {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2", "DEFORMCONV_NUM_THREADS": "2"}


def start(output: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, "demo", "--output", str(output), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | TWO_THREADS,
    )


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="the processor time of children is POSIX")
def test_the_fast_demo(tmp_path):
    import resource

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = start(tmp_path / "new" / "folder", "--fast")
    out, err = process.communicate(timeout=300)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert process.returncode == 0, out + err
    assert err == "" and "\x1b" not in out
    # 30 seconds on two processors, counted so that other work on the machine does not matter.
    assert (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime) < 60

    for part in ("1. The classic example", "2. A trained net made deformable", "3. Pictures", "4. The v2 net"):
        assert f"\n{part}" in out
    assert "10x18x100x100" in out and "10x9x100x100" in out and "10x64x100x100" in out
    assert out.count("  ok  ") == 3 and "FAILED" not in out
    share = r" +\d+\.\d%"
    assert re.search(rf"^ +0({share}){{5}} +[+-]\d+\.\d +[+-]\d+\.\d$", out, re.M)  # before, and one of each kind
    table = [line.split() for line in out.splitlines() if line.rstrip().endswith(" %")]
    assert [row[0] for row in table] == ["plain", "longer", "v1", "v2"]
    gains = re.findall(r"^  (v[12]) - (plain|longer) +[+-]\d+\.\d  +for (equal steps|no more cost): ", out, re.M)
    budgets = (("plain", "equal steps"), ("longer", "no more cost"))
    assert gains == [(kind, *budget) for budget in budgets for kind in ("v1", "v2")]

    files = {path.name for path in (tmp_path / "new" / "folder").iterdir()}
    assert files == PICTURES | {"digits-v2.pt"}
    for name in PICTURES:
        data = (tmp_path / "new" / "folder" / name).read_bytes()
        assert data.startswith(b"\x89PNG") and data.endswith(b"IEND\xaeB`\x82") and len(data) > 20_000


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_an_interrupt_during_training_leaves_nothing(tmp_path):
    process = start(tmp_path / "output")  # not the fast one: its training may be over before the signal comes
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("  seed"):
            break
    time.sleep(1)  # a few steps into the training
    process.send_signal(signal.SIGINT)
    try:
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert err.strip() == "Interrupted: nothing is left half-written."
    assert not list(tmp_path.rglob("*.*"))


def test_gains_are_paired_by_seed():
    from deformconv.studies import demo

    def run(kind, seed, accuracy):
        return demo.Run(kind, seed, None, accuracies={0: 0.5, 3: accuracy})

    plain = [run("plain", 0, 0.80), run("plain", 1, 0.70)]
    v2 = [run("v2", 0, 0.81), run("v2", 1, 0.75)]
    assert demo._gain(v2, plain) == "+3.0 (+1.0 to +5.0)"
    assert demo._gain(plain, v2) == "-3.0 (-5.0 to -1.0)"
    assert demo._gain(v2[:1], plain[:1]) == "+1.0"


def test_training_takes_one_thread_and_gives_the_others_back():
    import torch

    from deformconv.studies import demo

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyboardInterrupt), demo._one_thread():
            assert torch.get_num_threads() == 1
            raise KeyboardInterrupt
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_failed_check_ends_with_1(monkeypatch, capsys):
    from rich.console import Console

    from deformconv.studies import demo

    console = Console()
    assert demo._check(console, "this", 1e-7) and not demo._check(console, "that", 1e-3)
    assert not demo._check(console, "the other", float("nan"))
    assert "FAILED  that (error 1e-03, at most 1e-05 is rounding)" in capsys.readouterr().out

    monkeypatch.setattr(demo, "compiled", lambda console: None)
    monkeypatch.setattr(demo, "classic_example", lambda console, repeats: False)
    monkeypatch.setattr(demo, "compare_nets", lambda *_: [])
    monkeypatch.setattr(demo, "draw", lambda *_: None)
    monkeypatch.setattr(demo, "keep", lambda *_: True)
    monkeypatch.setattr(demo, "_net_to_keep", lambda runs: None)
    assert demo.run(Path("nowhere"), fast=True, seeds=1, first_seed=0) == 1
