"""`deformconv bench attention` beside mmcv: its own function for CPUs, and not ours in its place."""

from __future__ import annotations

import pytest
import torch

from deformconv.bench.attention import ATTENTION_PEERS, TINY, TruthAttention
from deformconv.bench.measure import differences
from deformconv.bench.peers import DIRECTIONS
from deformconv.convert import attention_kernels


def ours(*_: torch.Tensor) -> torch.Tensor:
    raise AssertionError("this library's kernel was called")


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_mmcvs_own_function_is_measured(direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_kernels, "deform_attention", ours)
    found = []
    for peer in (ATTENTION_PEERS["mmcv-attention"](1), TruthAttention(1)):
        peer.prepare(TINY)
        found.append(peer.results(direction))
    errors = differences(*found)
    assert len(errors) == (1 if direction == "forward" else 4) and max(errors.values()) < 1e-5
