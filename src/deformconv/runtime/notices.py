"""What is said when a kernel is compiled: to the log, to a terminal, and to who shows how far it is."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from numba import types

__all__ = ["Kind", "kind_of", "log", "must_not_compile", "notice", "tell", "warn_that_nothing_is_kept", "watchers"]

log = logging.getLogger("deformconv")

_HALF = {"int16": "float16", "uint16": "bfloat16"}  # as arrays hold it (`half`)


class Kind(NamedTuple):
    """A kernel, the dtype of its reals and the number of axes that it is compiled for; None where it is for any."""

    name: str
    dtype: str | None
    rank: int | None

    def __str__(self) -> str:
        details = [self.dtype, None if self.rank is None else f"{self.rank}-D"]
        return f"{self.name} ({', '.join(filter(None, details))})" if any(details) else self.name


def kind_of(function: Callable[..., Any], signature: Iterable[Any]) -> Kind:
    kinds = list(_kinds(signature))
    numbers = [kind.dtype for kind in kinds if isinstance(kind, types.Array)]
    dtypes = [
        _HALF[str(number)] for number in numbers if str(number) in _HALF
    ]  # what is computed in float32 for half precision
    dtypes += [str(number) for number in numbers if isinstance(number, types.Float)]
    # A plan begins with the sizes of the input: a tuple within a tuple.
    inner = (kind.types[0] for kind in kinds if isinstance(kind, types.BaseTuple) and len(kind))
    ranks = (kind.count for kind in inner if isinstance(kind, types.UniTuple) and isinstance(kind.dtype, types.Integer))
    folder = function.__module__.split(".")[-2:]  # the operator's, for several have a file of that name
    name = ".".join([*folder, function.__name__.strip("_")])
    return Kind(name, next(iter(dtypes), None), next(ranks, None))


def _kinds(signature: Iterable[Any]) -> Iterator[Any]:
    """The types of a signature, and those within its tuples."""
    for kind in signature:
        yield kind
        if isinstance(kind, types.BaseTuple):
            yield from _kinds(kind.types)


def _announce() -> None:
    is_logged = log.isEnabledFor(logging.INFO) and log.hasHandlers()
    if sys.stderr is not None and sys.stderr.isatty() and not is_logged:
        print(
            "deformconv: compiling kernels for this machine, once (about half a minute) ...",
            file=sys.stderr,
            flush=True,
        )


class _Notice:
    """Says once per process that a compilation has begun; `warmup` replaces it with its own."""

    def __init__(self) -> None:
        self.announce: Callable[[], None] | None = _announce

    def __call__(self) -> None:
        announce, self.announce = self.announce, None
        if announce is not None:
            announce()

    @contextlib.contextmanager
    def silent(self) -> Iterator[None]:
        """A context in which it says nothing, since somebody else does."""
        told, self.announce = self.announce, None
        try:
            yield
        finally:
            self.announce = told


notice = _Notice()

# Called with "compiling", "compiled" or "loaded", and the kernel.
watchers: list[Callable[[str, Kind], None]] = []


def tell(event: str, kernel: Kind) -> None:
    for watcher in watchers:
        watcher(event, kernel)


@functools.cache
def warn_that_nothing_is_kept(reason: str, folders: tuple[Path, ...]) -> None:
    """Once per process and reason."""
    log.warning(
        "machine code cannot be kept on disk (%s), so every process compiles its kernels anew: set DEFORMCONV_CACHE_DIR to a"
        " folder that can be written. Tried: %s",
        reason, ", ".join(map(str, folders)),
    )  # fmt: skip


def must_not_compile() -> bool:
    return os.environ.get("DEFORMCONV_REQUIRE_CACHE", "") not in ("", "0")
