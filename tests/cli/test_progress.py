"""The bar of what compiles: on a terminal, where something compiles, and nowhere else."""

from __future__ import annotations

import io
import logging
import sys

import pytest

from deformconv.cli.progress import progress
from deformconv.runtime import notices

FORWARD = notices.Kind("cpu_kernels.forward", "float32", 2)
COLLECT = notices.Kind("cpu_kernels.collect", "float32", None)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def standard_error(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal in its place. Not by a fixture: pytest sets it again before the test begins."""
    made = Terminal()
    monkeypatch.setattr(sys, "stderr", made)
    return made


def test_the_kernel_that_compiles_is_named_beside_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = standard_error(monkeypatch)
    with progress(4) as is_shown:
        assert is_shown
        notices.tell("loaded", FORWARD)
        assert terminal.getvalue() == ""
        notices.tell("compiling", FORWARD)
        assert terminal.getvalue().rstrip().endswith("[######------------------]   25%  cpu_kernels.forward (float32, 2-D)")
        notices.notice()
        notices.tell("compiled", FORWARD)
        notices.tell("compiling", COLLECT)
        last = terminal.getvalue().rpartition("\r")[2].rstrip()
        assert last.endswith("Compiling  [############------------]   50%  cpu_kernels.collect (float32)")
    # Less than was foreseen has to be compiled; the line is whole all the same, and what follows begins another one.
    *_, last = terminal.getvalue().split("\r")
    assert "Compiling  [########################]  100%  " in last and last.endswith("\n")
    assert "deformconv:" not in terminal.getvalue()
    assert notices.watchers == []


def test_where_all_is_loaded_there_is_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = standard_error(monkeypatch)
    with progress(2):
        notices.tell("loaded", FORWARD)
        notices.tell("loaded", COLLECT)
    assert terminal.getvalue() == ""


def test_where_there_is_no_terminal_there_is_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(2) as is_shown:
        assert not is_shown
        notices.tell("compiling", FORWARD)
        notices.tell("compiled", FORWARD)
    assert capsys.readouterr() == ("", "")


def test_an_error_leaves_no_watcher_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = standard_error(monkeypatch)
    told = notices.notice.announce
    with pytest.raises(KeyboardInterrupt), progress(2):
        notices.tell("compiling", FORWARD)
        raise KeyboardInterrupt
    assert notices.watchers == [] and notices.notice.announce is told
    assert terminal.getvalue().endswith("\n") and "100%" not in terminal.getvalue()


def test_a_warning_has_a_line_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = standard_error(monkeypatch)
    log, handler = logging.getLogger("deformconv"), logging.StreamHandler(terminal)
    log.addHandler(handler)
    try:
        with progress(2):
            notices.tell("compiling", FORWARD)
            notices.log.warning("nothing is kept")
            notices.tell("compiling", COLLECT)
        notices.log.warning("afterwards")
    finally:
        log.removeHandler(handler)
    lines = [line.rpartition("\r")[2].rstrip() for line in terminal.getvalue().split("\n")]
    assert lines[0].endswith("cpu_kernels.forward (float32, 2-D)") and lines[1] == "nothing is kept"
    assert "  100%  " in lines[2] and lines[3:] == ["afterwards", ""]
