"""Multi-scale deformable attention, registered with PyTorch: who loads a saved program may call no function of ours."""

from __future__ import annotations

from deformconv.ops.attention import operator
from deformconv.torch.attention.export import EXPORT
from deformconv.torch.registry import Registered

__all__ = ["DEFORM_ATTENTION"]

DEFORM_ATTENTION = Registered(operator.DEFORM_ATTENTION, export=EXPORT)
