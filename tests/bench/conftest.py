"""What the benchmark's tests share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from deformconv.bench import reports
from deformconv.bench.worker import Worker
from deformconv.runtime import processors


class InProcess:
    """A worker that is asked in this process, for tests of what a report asks: a process of its own loads PyTorch anew."""

    def __init__(self, library: str, threads: int) -> None:
        self.library, self.worker = library, Worker(library, threads)

    def ask(self, do: str, **request: Any) -> Any:
        return getattr(self.worker, do)(**request)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Reports measure in this process; afterwards it has the threads that it had."""
    torch = pytest.importorskip("torch")

    @contextmanager
    def workers(libraries: Sequence[str], threads: int) -> Iterator[list[InProcess]]:
        yield [InProcess(library, threads) for library in libraries]

    monkeypatch.setattr(reports, "processes", workers)
    monkeypatch.setattr(processors, "_chosen_threads", processors._chosen_threads)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
