"""Files that are whole or not there, and files that one process has at a time."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

if sys.platform == "win32":
    import msvcrt

    def _lock(file: int) -> bool:
        """Lock an open file; False if another process has it locked."""
        os.lseek(file, _FAR, os.SEEK_SET)
        try:
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
else:
    import fcntl

    def _lock(file: int) -> bool:
        """Lock an open file; False if another process has it locked."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks, as some networks have it
            pass
        return True


__all__ = ["InUseError", "locked", "whole_file"]

# Windows locks bytes and lets nobody else read them: one behind all that is written.
_FAR = 2**30


class InUseError(RuntimeError):
    """Another process has what was asked for; the text is its number."""


@contextmanager
def locked(path: str | os.PathLike[str]) -> Iterator[None]:
    """A context in which no other process has `path` locked.

    The system unlocks it when the process ends, however that ends. The file stays: to delete it would let in two that come at
    the same moment, each with a file of its own.

    Raises InUseError if another process has it.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if not _lock(file):
            os.lseek(file, 0, os.SEEK_SET)
            raise InUseError(f"process {os.read(file, 20).decode(errors='replace').strip() or 'of unknown number'}")
        os.ftruncate(file, 0)
        os.lseek(file, 0, os.SEEK_SET)
        os.write(file, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(file)


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write to, which becomes `path` at the end of the block, and goes away if the block raises.

    Example:
        >>> with whole_file("picture.png") as part:  # doctest: +SKIP
        ...     figure.savefig(part)
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, since only within a file system is a file replaced in one step; with the same
    # suffix, from which writers choose the format.
    part = path.with_name(f".{path.stem}-{secrets.token_hex(4)}{path.suffix}")
    try:
        yield part
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
