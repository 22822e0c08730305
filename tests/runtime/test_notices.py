"""What is said when kernels compile: to a terminal, to the log, and to who watches."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from numba import types

from deformconv.runtime import notices

# A program with a kernel of its own, which compiles in a moment.
PROGRAM = """
import logging, sys
import numpy as np
from deformconv.runtime.cache import kernel
from deformconv.runtime import cache

@kernel
def total(x):
    return x.sum()

if sys.argv[1:] == ["log"]:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
if sys.argv[1:] == ["full"]:
    def full(*_):
        raise OSError(28, "No space left on device")
    cache.os.replace = full
print(total(np.ones(3)), total(np.ones(3, np.float32)))
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    file = tmp_path / "own.py"
    file.write_text(PROGRAM)
    return file


def run(program: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, program, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_notice_is_for_terminals_and_said_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    notice = notices._Notice()
    notice()
    assert capsys.readouterr().err == ""  # captured output is no terminal
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    notice = notices._Notice()
    notice()
    notice()
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert message.startswith("deformconv: compiling kernels for this machine, once")


def test_a_terminal_is_told_nothing_that_the_log_says(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with caplog.at_level(logging.INFO, "deformconv"):
        notices._Notice()()
    assert capsys.readouterr().err == ""


def test_a_kernel_is_described_by_its_name_dtype_and_axes() -> None:
    def forward() -> None: ...

    forward.__module__ = "deformconv.ops.conv.cpu_kernels"
    reals, counts = types.Array(types.float32, 1, "C"), types.Array(types.int64, 1, "C")
    plan = types.Tuple((types.UniTuple(types.int64, 3), counts))
    assert str(notices.kind_of(forward, (counts, plan, types.UniTuple(reals, 4)))) == "conv.cpu_kernels.forward (float32, 3-D)"
    assert str(notices.kind_of(forward, (counts, types.UniTuple(reals, 4)))) == "conv.cpu_kernels.forward (float32)"
    assert str(notices.kind_of(forward, (types.int64,))) == "conv.cpu_kernels.forward"
    for bits, name in ((types.int16, "float16"), (types.uint16, "bfloat16")):
        mixed = types.Tuple((reals, types.Array(bits, 1, "C")))
        assert str(notices.kind_of(forward, (counts, plan, mixed))) == f"conv.cpu_kernels.forward ({name}, 3-D)"


def test_the_log_says_what_compiles_and_how_long_it_took(program: Path, tmp_path: Path) -> None:
    folder = str(tmp_path / "kernels")
    ran = run(program, "log", DEFORMCONV_CACHE_DIR=folder)
    assert ran.returncode == 0 and ran.stdout == "3.0 3.0\n"
    lines = ran.stderr.splitlines()
    assert [re.sub(r"\d+\.\d s", "N s", line) for line in lines[1::2]] == [
        f"INFO deformconv: compiled __main__.total ({dtype}) in N s, kept in {folder}" for dtype in ("float64", "float32")
    ]
    assert all(line.startswith("INFO deformconv: compiling __main__.total (float") for line in lines[::2])
    assert run(program, "log", DEFORMCONV_CACHE_DIR=folder).stderr == ""  # loaded
    assert run(program, DEFORMCONV_CACHE_DIR=folder).stderr == ""


def test_nothing_is_said_to_who_has_not_set_up_logging(program: Path, tmp_path: Path) -> None:
    assert run(program, DEFORMCONV_CACHE_DIR=str(tmp_path / "kernels")).stderr == ""


def test_who_cannot_keep_a_kernel_is_warned_once(program: Path, tmp_path: Path) -> None:
    taken = tmp_path / "a file"
    taken.write_text("")
    ran = run(program, DEFORMCONV_CACHE_DIR=str(taken / "kernels"))
    assert ran.stdout == "3.0 3.0\n"
    assert ran.stderr == (
        "machine code cannot be kept on disk (no folder can be written), so every process compiles its kernels anew: set"
        f" DEFORMCONV_CACHE_DIR to a folder that can be written. Tried: {taken / 'kernels'}\n"
    )


def test_a_full_disk_is_named(program: Path, tmp_path: Path) -> None:
    ran = run(program, "full", DEFORMCONV_CACHE_DIR=str(tmp_path / "kernels"))
    assert ran.stdout == "3.0 3.0\n"
    assert ran.stderr.count("\n") == 1
    assert "No space left on device), so every process compiles its kernels anew" in ran.stderr


def test_a_cache_can_be_required(program: Path, tmp_path: Path) -> None:
    folders = {"DEFORMCONV_CACHE_DIR": str(tmp_path / "kernels"), "DEFORMCONV_REQUIRE_CACHE": "1"}
    refused = run(program, **folders)
    assert refused.returncode == 1 and not list(tmp_path.rglob("*.bin"))
    message = refused.stderr.splitlines()[-1]
    assert message.startswith("deformconv.errors.BackendError: __main__.total (float64) for the processor ")
    assert (
        f"DEFORMCONV_REQUIRE_CACHE forbids to compile it. Looked in {tmp_path / 'kernels'}. Run `deformconv warmup" in message
    )
    assert run(program, **(folders | {"DEFORMCONV_REQUIRE_CACHE": "0"})).returncode == 0
    assert run(program, **folders).stdout == "3.0 3.0\n"
