"""The rules of operations that change a map's size: convolution, pooling, interpolation, padding."""

from __future__ import annotations

from typing import Any

import numpy as np

from deformconv.plots.operations import Operation, Rules
from deformconv.plots.places import Place, each, mapped, moved, windowed

__all__ = ["RULES"]

RULES = Rules()


@RULES.of("convolution", "_convolution", "convolution_overrideable")
def _convolution(operation: Operation, place: Place, shape: tuple[int, ...], number: int) -> Place | None:
    given = operation.given
    kernel = tuple(given["weight"].shape[2:])
    rank = len(kernel)
    if not given["transposed"]:
        return windowed(place, shape, kernel, given["stride"], given["padding"], given["dilation"])
    window = (each(given[name], rank) for name in ("stride", "padding", "dilation"))
    maps = [((p - d * (k - 1) / 2) / s, 1 / s) for k, s, p, d in zip(kernel, *window, strict=True)]
    return mapped(place, shape, maps)


@RULES.of("deformconv::deform_conv")
def _deform_conv(operation: Operation, place: Place, shape: tuple[int, ...], number: int) -> Place | None:
    given = operation.given
    kernel = tuple(given["weight"].shape[2:])
    return windowed(place, shape, kernel, given["stride"], given["padding"][::2], given["dilation"])


@RULES.of("deformconv::deform_aggregate")
def _deform_aggregate(operation: Operation, place: Place, shape: tuple[int, ...], number: int) -> Place | None:
    given = operation.given
    return windowed(place, shape, given["kernel_size"], given["stride"], given["padding"][::2], given["dilation"])


@RULES.of("torchvision::deform_conv2d")
def _torchvision(operation: Operation, place: Place, shape: tuple[int, ...], number: int) -> Place | None:
    given = operation.given
    window = ([given[f"{name}_h"], given[f"{name}_w"]] for name in ("stride", "pad", "dilation"))
    return windowed(place, shape, tuple(given["weight"].shape[2:]), *window)


@RULES.of(
    "max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices", "max_pool3d_with_indices", "mkldnn_max_pool2d",
    "mkldnn_max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
)  # fmt: skip
def _pool(operation: Operation, place: Place, shape: tuple[int, ...], number: int) -> Place | None:
    given = operation.given
    rank = int(operation.name[-2] if operation.name.endswith("d") else operation.name.split("_pool")[1][0])
    kernel = each(given["kernel_size"], rank)
    return windowed(place, shape, kernel, given.get("stride") or kernel, given["padding"], given.get("dilation", 1))


@RULES.of(
    "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
    "adaptive_max_pool2d", "adaptive_max_pool3d", "mkldnn_adaptive_avg_pool2d",
)  # fmt: skip
def _adaptive(operation: Operation, place: Place, shape: tuple[int, ...], number: int) -> Place | None:
    rank = int(operation.name[-2])
    maps = []
    for size, outputs in zip(operation.given["self"].shape[-rank:], shape[-rank:], strict=True):
        i = np.arange(outputs)
        maps.append(_line((i * size // outputs + -((i + 1) * size // -outputs) - 1) / 2, size))
    return mapped(place, shape, maps)


def _line(positions: Any, step: float) -> tuple[float, float]:
    """The straight line (shift, factor) through positions; a single position has the step that is given."""
    if len(positions) < 2:
        return float(positions[0]), float(step)
    factor, shift = np.polyfit(np.arange(len(positions)), positions, 1)
    return float(shift), float(factor)


def _scale(operation: Operation, axis: int, rank: int, size: int, outputs: int) -> float:
    """Input pixels per output pixel, as PyTorch computes it: of the scale that was passed, if one was."""
    given = operation.given
    scales = given.get("scale_factors")
    passed = scales[axis] if scales else given.get("scales" if rank == 1 else f"scales_{'dhw'[axis - rank]}")
    return 1 / passed if passed else size / outputs


@RULES.of(
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d",
    "_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d",
)  # fmt: skip
def _nearest(operation: Operation, place: Place, shape: tuple[int, ...], number: int) -> Place | None:
    rank, half = int(operation.name[-2]), 0.5 if "exact" in operation.name else 0.0
    maps = []
    for axis, (along, outputs) in enumerate(zip(place.axes[-rank:], shape[-rank:], strict=True)):
        size = along[0].size
        scale = _scale(operation, axis, rank, size, outputs)
        read = np.minimum(np.floor((np.arange(outputs) + half) * scale), size - 1)
        maps.append((float(np.mean(read - scale * np.arange(outputs))), scale))
    return mapped(place, shape, maps)


@RULES.of(
    "upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d",
    "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "_upsample_lanczos2d_aa",
)  # fmt: skip
def _interpolated(operation: Operation, place: Place, shape: tuple[int, ...], number: int) -> Place | None:
    rank = 1 if "1d" in operation.name else 3 if "3d" in operation.name else 2
    maps = []
    for axis, (along, outputs) in enumerate(zip(place.axes[-rank:], shape[-rank:], strict=True)):
        size = along[0].size
        if operation.given["align_corners"]:
            maps.append((0.0, (size - 1) / (outputs - 1)) if outputs > 1 else (0.0, 1.0))
        else:
            scale = _scale(operation, axis, rank, size, outputs)
            maps.append(((scale - 1) / 2, scale))
    return mapped(place, shape, maps)


@RULES.of("pixel_shuffle", "pixel_unshuffle")
def _shuffled(operation: Operation, place: Place, shape: tuple[int, ...], number: int) -> Place | None:
    given = operation.given
    factor = 1 / given["upscale_factor"] if "upscale_factor" in given else given["downscale_factor"]
    return mapped(place, shape, [((factor - 1) / 2, factor)] * 2)


@RULES.of(
    "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d",
    "replication_pad1d", "replication_pad2d", "replication_pad3d",
)  # fmt: skip
def _padded(operation: Operation, place: Place, shape: tuple[int, ...], number: int) -> Place | None:
    amounts = operation.given["pad" if "pad" in operation.given else "padding"]
    axes = list(place.axes)
    for axis, before in enumerate(amounts[::2], 1):
        axes[-axis] = moved(axes[-axis], shape[-axis], -before)
    return Place(tuple(axes), place.doubt)
