"""Our kernels under the multi-scale deformable attention of transformers' models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from deformconv.convert.acceleration import Acceleration, Place
from deformconv.convert.replacements import Change, replace
from deformconv.installation import import_for

__all__ = ["MODELS", "accelerate_transformers"]

_CLASS, _FUNCTION, _BY_POINTS = (
    "MultiScaleDeformableAttention", "multi_scale_deformable_attention", "multi_scale_deformable_attention_v2",
)  # fmt: skip
# The models of transformers 5.0 to 5.24 with the operator: what has it in the model's own module, and how it gets there. The
# class is the one of transformers' hook for kernels, which we leave alone: it is there with the package `kernels` alone, changes
# a model at a time, and two of the forms below have no hook.
MODELS: dict[str, str] = {
    "deformable_detr": _CLASS,
    "grounding_dino": _CLASS,
    "lw_detr": _CLASS,
    "mm_grounding_dino": _CLASS,
    "omdet_turbo": _CLASS,
    "pp_doclayout_v2": _CLASS,
    "pp_doclayout_v3": _CLASS,
    "pp_doclayout_v4": _CLASS,
    "rf_detr": _CLASS,
    "rt_detr": _CLASS,
    "mask2former": _FUNCTION,
    "oneformer": _FUNCTION,
    "rt_detr_v2": _BY_POINTS,
    "d_fine": "DFineMultiscaleDeformableAttention",
    "deimv2": "Deimv2MultiscaleDeformableAttention",
}


def accelerate_transformers() -> Acceleration:
    """Put this library's kernels under the multi-scale deformable attention of transformers' models, on CPUs.

    DOC
    """
    import deformconv.torch  # noqa: F401  (it says what to install where PyTorch is missing)

    import_for("accelerate_transformers", "transformers", "transformers")
    return Acceleration(_TRANSFORMERS)


def _put() -> Callable[[], None]:
    """Our functions in the models' modules, until what is returned is called."""
    return replace({f"transformers.models.{model}.modeling_{model}": [_change(holder)] for model, holder in MODELS.items()})


def _change(holder: str) -> Change:
    from deformconv.convert import attention_kernels as ours

    if holder == _CLASS:
        return Change(holder, "forward", ours.method)
    if holder == _FUNCTION:
        return Change("", holder, ours.function)
    if holder == _BY_POINTS:
        return Change("", holder, ours.by_points)
    # A layer of these keeps the function in an attribute from its making on.
    name = "ms_deformable_attn_core"
    made: Callable[[Any], property] = lambda nothing: ours.attribute(name, _BY_POINTS)  # noqa: E731
    return Change(holder, name, made, added=True)


_TRANSFORMERS = Place(_put)
