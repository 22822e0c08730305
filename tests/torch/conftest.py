"""What tests of PyTorch's front end share."""

from __future__ import annotations

import pytest

from deformconv.ops.conv import cpu
from deformconv.runtime import work


@pytest.fixture
def nothing_is_small(monkeypatch):
    """Within it every call is worth sharing out; what it gives forgets how calls were planned."""
    from deformconv.torch import calls  # here, so that tests are collected where PyTorch is absent

    def forget():
        calls._plan.cache_clear()
        cpu.small.cache_clear()

    forget()
    monkeypatch.setattr(work, "SHARED_FROM", 0)
    yield forget
    forget()
