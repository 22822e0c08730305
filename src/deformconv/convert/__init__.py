"""Weights and layers of other libraries, with their words and conventions. Frameworks are loaded where they are needed."""

from deformconv.convert.layers import replace_layers
from deformconv.convert.torchvision import accelerate_torchvision

__all__ = [
    "accelerate_torchvision",
    "replace_layers",
]
