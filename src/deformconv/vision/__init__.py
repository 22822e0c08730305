"""Deformable parts for models of computer vision in PyTorch: surgery on a net, a detector's parts, InternImage's layers."""

import deformconv.torch  # noqa: F401  (it says what to install where PyTorch is missing)

# isort: split
from typing import Any

from deformconv.installation import import_for
from deformconv.vision.dcnv3 import DCNv3
from deformconv.vision.dcnv4 import DCNv4
from deformconv.vision.surgery import Replaced, make_deformable

__all__ = ["DCNv3", "DCNv4", "FeatureMimicking", "MultiScaleDeformRoIPool", "Replaced", "make_deformable"]

_NEED_TORCHVISION = {"FeatureMimicking": "mimicking", "MultiScaleDeformRoIPool": "detection"}


def __getattr__(name: str) -> Any:
    """Load what needs torchvision only when it is asked for."""
    if name not in _NEED_TORCHVISION:
        raise AttributeError(f"module 'deformconv.vision' has no attribute {name!r}")
    module = import_for(f"deformconv.vision.{name}", f"deformconv.vision.{_NEED_TORCHVISION[name]}", "torchvision")
    return getattr(module, name)
