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
# The models of transformers 5.0 to 5.24 with the operator, and what has it in a model's own module: the class, the function, or
# a layer of the model's own. The class is the one of transformers' hook for kernels, which is not used here: that needs the
# package `kernels`, changes one model at a time, and knows nothing of the functions.
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

    These are Deformable DETR, RT-DETR (v1 and v2), RF-DETR, LW-DETR, D-FINE, DEIMv2, Grounding DINO, MM Grounding DINO,
    OmDet-Turbo, PP-DocLayout (v2 to v4), Mask2Former and OneFormer, with all their heads. Models that are there and models
    that are made or loaded later get them, forward and backward, and under `torch.compile`. It lasts until `undo()` of the
    result, or until the end of its `with` block, for the whole process.

    To transformers' own code go tensors on other devices, tensors whose dtypes differ, and the method "discrete" of RT-DETR
    v2, D-FINE and DEIMv2, which takes the nearest pixel. So do calls that `torch.export`, `torch.jit.trace` and
    `torch.onnx.export` read, so that what these write needs no deformconv.

    Returns:
        An Acceleration, with `undo()`, to be used as a context manager or not.

    Raises:
        ModuleNotFoundError: PyTorch or transformers is not installed.

    Example:
        >>> import torch
        >>> from transformers import DeformableDetrConfig, DeformableDetrModel, ResNetConfig
        >>> from deformconv.convert import accelerate_transformers
        >>> backbone = ResNetConfig(depths=[1, 1, 1, 1], layer_type="basic", out_features=["stage3", "stage4"])
        >>> config = DeformableDetrConfig(
        ...     backbone_config=backbone, num_feature_levels=2, d_model=32, encoder_layers=1, decoder_layers=1,
        ... )
        >>> model = DeformableDetrModel(config).eval()
        >>> x = torch.rand(1, 3, 64, 96)
        >>> expected = model(x).last_hidden_state
        >>> with accelerate_transformers():
        ...     y = model(x).last_hidden_state                  # this library's kernels
        >>> torch.allclose(y, expected, atol=1e-4)
        True

    Paper: arXiv 2010.04159, equation 3.
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
