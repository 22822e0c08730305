"""Files that are whole or not there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["whole_file"]


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write to, which becomes `path` at the end of the block, and goes away if the block raises.

    Example:
        >>> with whole_file("picture.png") as part:  # doctest: +SKIP
        ...     figure.savefig(part)
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, since a file is replaced in one step within a file system only; with the same suffix,
    # from which writers choose the format.
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    part = Path(name)
    try:
        os.close(handle)
        yield part
        # mkstemp makes a file for its owner alone; what comes out has the permissions of any new file.
        umask = os.umask(0)
        os.umask(umask)
        part.chmod(0o666 & ~umask)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
