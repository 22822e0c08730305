"""Deformable convolution for Python, with no compiler and no CUDA toolkit.

`deform_conv`, `deform_aggregate`, `deform_roi_pool` and `deform_attention` take NumPy arrays and PyTorch tensors;
`deformconv.torch` and `deformconv.gluon` have the layers, `deformconv.vision` what makes a net that you have deformable,
`deformconv.convert` what takes weights and layers from elsewhere, `deformconv.plots` what shows where a net looks, of which
`look` makes a page. These rooms, frameworks and compiled kernels are loaded on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deformconv.errors import BackendError, ShapeError

if TYPE_CHECKING:
    from deformconv.functional import (
        deform_aggregate,
        deform_aggregate_backward,
        deform_attention,
        deform_attention_backward,
        deform_conv,
        deform_conv_backward,
        deform_roi_pool,
        deform_roi_pool_backward,
        explain,
    )  # fmt: skip
    from deformconv.ops.conv.spec import Gradients
    from deformconv.plots.looking import look
    from deformconv.runtime.processors import get_num_threads, set_num_threads

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "Gradients",
    "ShapeError",
    "__version__",
    "deform_aggregate",
    "deform_aggregate_backward",
    "deform_attention",
    "deform_attention_backward",
    "deform_conv",
    "deform_conv_backward",
    "deform_roi_pool",
    "deform_roi_pool_backward",
    "explain",
    "get_num_threads",
    "look",
    "set_num_threads",
]

_WHERE = {
    "deform_aggregate": "functional",
    "deform_aggregate_backward": "functional",
    "deform_attention": "functional",
    "deform_attention_backward": "functional",
    "deform_conv": "functional",
    "deform_conv_backward": "functional",
    "deform_roi_pool": "functional",
    "deform_roi_pool_backward": "functional",
    "explain": "functional",
    "Gradients": "ops.conv.spec",
    "get_num_threads": "runtime.processors",
    "look": "plots.looking",
    "set_num_threads": "runtime.processors",
}
# Not in dir(): completing a name must not load a framework.
_ROOMS = ("convert", "equinox", "flax", "gluon", "jax", "keras", "plots", "torch", "vision")


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _WHERE:
        found = globals()[name] = getattr(import_module(f"deformconv.{_WHERE[name]}"), name)
        return found
    if name in _ROOMS:
        return import_module(f"deformconv.{name}")
    raise AttributeError(f"module 'deformconv' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
