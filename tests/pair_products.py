"""Products of bfloat16 in pairs or in float32, whatever the processor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from deformconv.ops.conv import cpu


@contextmanager
def products_in(words: str | None) -> Iterator[None]:
    """Within the block CPU kernels of convolution multiply bfloat16 in words of this dtype, or for None in float32."""
    plans = cpu._plans()
    before, plans.words = plans.words, lambda: words
    try:
        _forget_plans()
        yield
    finally:
        plans.words = before
        _forget_plans()


def _forget_plans() -> None:
    for made in (cpu._forward_plan, cpu._packed_plan, cpu._layer_plan, cpu._packed_layer_plan, cpu._backward_plans, cpu.small):
        made.cache_clear()
