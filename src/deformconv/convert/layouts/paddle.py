"""Paddle's names, and its fully connected layers."""

from __future__ import annotations

from deformconv.convert.layouts.layout import Layout, Place

__all__ = ["PADDLE"]

_BUFFERS = {"running_mean": "_mean", "running_var": "_variance"}


def _others(place: Place) -> str | None:
    if place.parameter == "num_batches_tracked":
        return None
    return place._replace(parameter=_BUFFERS.get(place.parameter, place.parameter)).key


PADDLE = Layout(
    "paddle", "PaddleDetection", weight="{layer}.conv_dcn.{parameter}", others=_others, dilated=False, transposed=True
)
