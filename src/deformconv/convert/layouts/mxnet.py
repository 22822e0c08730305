"""MXNet's names: of Gluon's blocks, and of the symbols of Deformable-ConvNets."""

from __future__ import annotations

from deformconv.convert.layouts.layout import Layout, Place
from deformconv.convert.mxnet import BOUNDARY, GLUON_MASK_SCALE

__all__ = ["MXNET", "MXNET_SYMBOL"]

_BOUNDARIES = (BOUNDARY[False], BOUNDARY[True])


def _is_norm(place: Place) -> bool:
    """Whether the module's weight is a norm's, which is a vector; a fully connected layer's is a matrix."""
    weight = getattr(place.module, "weight", None)
    is_norm = hasattr(place.module, "running_mean") or "Norm" in type(place.module).__name__
    return is_norm and (weight is None or weight.ndim == 1)


def _gluon(place: Place) -> str | None:
    """Of `save_parameters`, where blocks have the names of their places."""
    if place.parameter == "num_batches_tracked":
        return None
    words = {"weight": "gamma", "bias": "beta"} if _is_norm(place) else {}
    return place._replace(parameter=words.get(place.parameter, place.parameter)).key


def _symbol(place: Place) -> str | None:
    """Of `save_checkpoint`, where a parameter's name is a whole word, and the kind stands before it."""
    if place.parameter == "num_batches_tracked":
        return None
    words = {"running_mean": "moving_mean", "running_var": "moving_var"}
    kind = "aux" if place.parameter in words else "arg"
    if _is_norm(place):
        words = {**words, "weight": "gamma", "bias": "beta"}
    return f"{kind}:{'_'.join(filter(None, (place.name.replace('.', '_'), words.get(place.parameter, place.parameter))))}"


MXNET = Layout(
    "mxnet", "MXNet's Gluon", weight="{layer}.deformable_conv_{parameter}", predictor="{layer}.offset_{parameter}",
    others=_gluon, mask_scale=GLUON_MASK_SCALE, boundaries=_BOUNDARIES, grouped=True,
)  # fmt: skip

MXNET_SYMBOL = Layout(
    "mxnet_symbol", "MXNet's symbols, as in Deformable-ConvNets", weight="arg:{word}_{parameter}",
    alone="arg:{word}_{parameter}", predictor="arg:{word}_offset_{parameter}", others=_symbol, mask_scale=GLUON_MASK_SCALE,
    boundaries=_BOUNDARIES,
)  # fmt: skip
