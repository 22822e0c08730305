"""A file is written whole or not at all, whatever interrupts the writing, and a lock ends with the process that has it."""

import os
import runpy
import signal
import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from deformconv import files
from deformconv.files import InUseError, locked, whole_file


def test_a_file_appears_at_the_end_of_the_block(tmp_path):
    path = tmp_path / "new" / "name.txt"
    with whole_file(path) as part:
        assert part.suffix == ".txt" and not path.exists()
        part.write_text("first")
    assert path.read_text() == "first"
    with whole_file(path) as part:
        part.write_text("second")
        assert path.read_text() == "first"
    assert path.read_text() == "second"
    assert os.listdir(path.parent) == ["name.txt"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, OSError])
def test_an_interrupted_file_leaves_the_old_one_and_no_rest(tmp_path, error):
    path = tmp_path / "name.txt"
    path.write_text("old")
    with pytest.raises(error), whole_file(path) as part:
        part.write_text("ha")
        raise error
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["name.txt"]


HOLD = """
import sys
from deformconv.files import locked

with locked(sys.argv[1]):
    print("locked", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(path):
    """Another process that has a path locked until its standard input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "locked\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("ending", ["end", "kill"])
def test_a_lock_is_one_process_s_until_that_ends(ending, tmp_path):
    if ending == "kill" and os.name == "nt":
        pytest.skip("signals of POSIX")
    path = tmp_path / "lock"
    path.write_text("4711, of a process that was killed long ago\n")
    with holder(path) as process:
        for _ in range(2):
            with pytest.raises(InUseError, match=rf"^process {process.pid}$"), locked(path):
                raise AssertionError
        if ending == "end":
            process.communicate("")
        else:
            process.send_signal(signal.SIGKILL)
        process.wait(30)
        with locked(path):
            assert path.read_text() == f"{os.getpid()}\n"
    with holder(path):  # it was given back
        pass


def test_a_lock_is_given_back_by_a_block_that_raises(tmp_path):
    with pytest.raises(KeyboardInterrupt), locked(tmp_path / "lock"):
        with pytest.raises(InUseError), locked(tmp_path / "lock"):
            raise AssertionError
        raise KeyboardInterrupt
    with locked(tmp_path / "lock"):
        pass


@pytest.mark.skipif(os.name == "nt", reason="it has locks on every file system")
def test_a_file_system_without_locks_is_used_without_them(tmp_path, monkeypatch):
    import fcntl

    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path / "lock"):
        assert (tmp_path / "lock").exists()


@pytest.mark.skipif(os.name == "nt", reason="the test beside it runs there")
def test_locks_of_windows(tmp_path, monkeypatch):
    """Its call, by a stand-in: a byte is locked, and nobody else reads or writes that one."""
    import fcntl

    seen = []

    def locking(file, mode, count):
        seen.append((mode, os.lseek(file, 0, os.SEEK_CUR), count))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PermissionError(13, "Permission denied") from None

    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(LK_NBLCK=2, locking=locking))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "win32")
        windows = runpy.run_path(files.__file__)
    path = tmp_path / "lock"
    with windows["locked"](path):
        with pytest.raises(windows["InUseError"], match=f"process {os.getpid()}"), windows["locked"](path):
            raise AssertionError
        assert path.read_text() == f"{os.getpid()}\n"
    with windows["locked"](path):
        pass
    assert seen == [(2, 2**30, 1)] * 3
