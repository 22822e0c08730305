"""What each of PyTorch's operations does to places: a table by the operation's name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from deformconv.plots.places import Along, Axis, Place, absorbed, each, mapped, merged, moved, viewed, windowed

__all__ = ["Operation", "place_of"]


@dataclass(frozen=True)
class Operation:
    """A call of an operation: its name, its arguments by their names, and the places of those that are tensors."""

    name: str
    given: dict[str, Any]
    places: dict[str, Any]  # a list of places for a list of tensors; None where nothing is known
    pointwise: bool

    @property
    def known(self) -> list[Place]:
        found = [part for value in self.places.values() for part in (value if isinstance(value, list) else [value])]
        return [place for place in found if place is not None]

    @property
    def first(self) -> Place | None:
        """The place of the first tensor."""
        place = next(iter(self.places.values()), None)
        return place if isinstance(place, Place) else None


Rule = Callable[[Operation, Place, tuple[int, ...], int], "Place | None"]
_RULES: dict[str, Rule] = {}


def place_of(operation: Operation, shape: tuple[int, ...], number: int) -> Place | None:
    """Where an output of an operation lies, the one with this number; None if nothing is known."""
    if not operation.known:
        return None
    if operation.pointwise:
        return merged(operation.known, shape)
    rule = _RULES.get(operation.name)
    if rule is None:
        return _guessed(operation, shape)
    if operation.first is None and rule not in (_joined, _product, _attention):
        return None
    return rule(operation, operation.first or Place(()), shape, number)


def _guessed(operation: Operation, shape: tuple[int, ...]) -> Place | None:
    """An unknown operation leaves the image's axes where they are, as far as one can guess."""
    place = operation.known[0]
    rank = len({along.axis for axis in place.axes for along in axis} - {None})
    if operation.name.endswith("_like") or "::new_" in operation.name or len(shape) <= rank:
        return None
    spatial = place.spatial(rank)
    if spatial is None or any(size == 0 for size in shape):
        return None
    maps = [((along.size / size - 1) / 2, along.size / size) for along, size in zip(spatial, shape[-rank:], strict=True)]
    last = [moved((along,), size, *m) for along, size, m in zip(spatial, shape[-rank:], maps, strict=True)]
    return Place((*((Along(size),) for size in shape[:-rank]), *last), place.doubt or operation.name)


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def put(rule: Rule) -> Rule:
        _RULES.update((f"aten::{name}" if "::" not in name else name, rule) for name in names)
        return rule

    return put


@_rule(
    "alias", "detach", "clone", "_to_copy", "lift_fresh", "contiguous", "_conj", "positive", "to", "native_dropout",
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "_batch_norm_with_update",
    "_batch_norm_no_update", "cudnn_batch_norm", "miopen_batch_norm", "batch_norm", "native_group_norm", "native_layer_norm",
    "_fused_rms_norm", "_softmax", "_log_softmax", "_prelu_kernel", "channel_shuffle", "native_channel_shuffle",
    "_weight_norm_interface", "_native_multi_head_attention", "_transformer_encoder_layer_fwd", "rrelu_with_noise",
)  # fmt: skip
def _same(operation: Operation, place: Place, shape: tuple[int, ...], number: int) -> Place | None:
    return place if number == 0 and len(place.axes) == len(shape) else None


@_rule("convolution", "_convolution", "convolution_overrideable")
def _convolution(operation: Operation, place: Place, shape: tuple[int, ...], number: int) -> Place | None:
    given = operation.given
    kernel = tuple(given["weight"].shape[2:])
    rank = len(kernel)
    if not given["transposed"]:
        return windowed(place, shape, kernel, given["stride"], given["padding"], given["dilation"])
    window = (each(given[name], rank) for name in ("stride", "padding", "dilation"))
    maps = [((p - d * (k - 1) / 2) / s, 1 / s) for k, s, p, d in zip(kernel, *window, strict=True)]
    return mapped(place, shape, maps)


@_rule("deformconv::deform_conv")
def _deform_conv(operation: Operation, place: Place, shape: tuple[int, ...], number: int) -> Place | None:
    given = operation.given
    kernel = tuple(given["weight"].shape[2:])
    return windowed(place, shape, kernel, given["stride"], given["padding"][::2], given["dilation"])


@_rule("torchvision::deform_conv2d")
def _torchvision(operation: Operation, place: Place, shape: tuple[int, ...], number: int) -> Place | None:
    given = operation.given
    window = ([given[f"{name}_h"], given[f"{name}_w"]] for name in ("stride", "pad", "dilation"))
    return windowed(place, shape, tuple(given["weight"].shape[2:]), *window)


@_rule(
    "max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices", "max_pool3d_with_indices", "mkldnn_max_pool2d",
    "mkldnn_max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
)  # fmt: skip
def _pool(operation: Operation, place: Place, shape: tuple[int, ...], number: int) -> Place | None:
    given = operation.given
    rank = int(operation.name[-2] if operation.name.endswith("d") else operation.name.split("_pool")[1][0])
    kernel = each(given["kernel_size"], rank)
    return windowed(place, shape, kernel, given.get("stride") or kernel, given["padding"], given.get("dilation", 1))


@_rule(
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


@_rule(
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


@_rule(
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


@_rule("pixel_shuffle", "pixel_unshuffle")
def _shuffled(operation: Operation, place: Place, shape: tuple[int, ...], number: int) -> Place | None:
    given = operation.given
    factor = 1 / given["upscale_factor"] if "upscale_factor" in given else given["downscale_factor"]
    return mapped(place, shape, [((factor - 1) / 2, factor)] * 2)


@_rule(
    "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d",
    "replication_pad1d", "replication_pad2d", "replication_pad3d",
)  # fmt: skip
def _padded(operation: Operation, place: Place, shape: tuple[int, ...], number: int) -> Place | None:
    amounts = operation.given["pad" if "pad" in operation.given else "padding"]
    axes = list(place.axes)
    for axis, before in enumerate(amounts[::2], 1):
        axes[-axis] = moved(axes[-axis], shape[-axis], -before)
    return Place(tuple(axes), place.doubt)


@_rule("slice")
def _slice(operation: Operation, place: Place, shape: tuple[int, ...], number: int) -> Place | None:
    given = operation.given
    dim = given["dim"] % len(place.axes)
    start, _, step = slice(given["start"], given["end"], given["step"]).indices(given["self"].shape[dim])
    return _with(place, dim, moved(place.axes[dim], shape[dim], start, step) if shape[dim] else (Along(0),))


def _with(place: Place, dim: int, axis: Axis) -> Place:
    axes = list(place.axes)
    axes[dim] = axis
    return Place(tuple(axes), place.doubt)


@_rule("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes")
def _split(operation: Operation, place: Place, shape: tuple[int, ...], number: int) -> Place | None:
    given = operation.given
    dim = given["dim"] % len(place.axes)
    sizes = given["split_sizes"] if "split_sizes" in given else None
    start = sum(sizes[:number]) if sizes is not None else number * given["split_size"]
    return _with(place, dim, moved(place.axes[dim], shape[dim], start))


@_rule("flip")
def _flip(operation: Operation, place: Place, shape: tuple[int, ...], number: int) -> Place | None:
    for dim in operation.given["dims"]:
        place = _with(place, dim % len(shape), moved(place.axes[dim], shape[dim], shape[dim] - 1, -1))
    return place


@_rule("unfold")
def _unfolded(operation: Operation, place: Place, shape: tuple[int, ...], number: int) -> Place | None:
    given = operation.given
    dim = given["dimension"] % len(place.axes)
    if len(place.axes[dim]) != 1:
        return None
    along = place.axes[dim][0]
    windows = moved(place.axes[dim], shape[dim], 0, given["step"])
    inner = Along(given["size"], along.axis, along.step)
    return Place((*_with(place, dim, windows).axes, (inner,)), place.doubt)


@_rule("permute", "transpose", "t", "unsqueeze", "squeeze", "select", "unbind", "expand")
def _rearranged(operation: Operation, place: Place, shape: tuple[int, ...], number: int) -> Place | None:
    given, axes, name = operation.given, list(place.axes), operation.name.partition("::")[2]
    if name == "permute":
        axes = [axes[dim] for dim in given["dims"]]
    elif name in ("transpose", "t"):
        first, second = (given["dim0"], given["dim1"]) if name == "transpose" else (0, -1)
        axes[first], axes[second] = axes[second], axes[first]
    elif name == "unsqueeze":
        axes.insert(given["dim"] % len(shape), (Along(1),))
    elif name in ("select", "unbind"):
        del axes[given["dim"]]
    elif name == "squeeze":
        dims = range(len(axes)) if given.get("dim") is None else each(given["dim"], 1)
        gone = {dim % len(axes) for dim in dims}
        sizes = given["self"].shape
        axes = [axis for dim, axis in enumerate(axes) if not (dim in gone and sizes[dim] == 1)]
    else:
        axes = [(Along(size),) for size in shape[: len(shape) - len(axes)]] + axes
        sizes = (*(1,) * (len(shape) - given["self"].ndim), *given["self"].shape)
        axes = [axis if old == new else (Along(new),) for axis, old, new in zip(axes, sizes, shape, strict=True)]
    return Place(tuple(axes), place.doubt)


@_rule("view", "_unsafe_view", "reshape", "_reshape_alias", "view_copy", "_reshape_copy", "flatten")
def _view(operation: Operation, place: Place, shape: tuple[int, ...], number: int) -> Place | None:
    return viewed(place, shape)


@_rule("cat", "stack")
def _joined(operation: Operation, place: Place, shape: tuple[int, ...], number: int) -> Place | None:
    dim = operation.given["dim"] % len(shape)
    places = []
    for each_place in operation.known:
        axes = list(each_place.axes)
        if operation.name == "aten::stack":
            axes.insert(dim, (Along(shape[dim]),))
        elif any(along.axis is not None for along in axes[dim]):
            return _guessed(operation, shape)
        axes[dim] = (Along(shape[dim]),)
        places.append(Place(tuple(axes), each_place.doubt))
    return merged(places, shape)


@_rule(
    "mean", "sum", "amax", "amin", "max", "min", "linalg_vector_norm", "norm", "var", "std", "var_mean", "std_mean", "argmax",
    "argmin", "logsumexp", "any", "all", "prod", "median",
)  # fmt: skip
def _reduced(operation: Operation, place: Place, shape: tuple[int, ...], number: int) -> Place | None:
    dims = operation.given.get("dim")
    gone = {dim % len(place.axes) for dim in (range(len(place.axes)) if dims is None or dims == [] else each(dims, 1))}
    left = [((Along(1),) if dim in gone else axis) for dim, axis in enumerate(place.axes)]
    left = absorbed(left, [place.axes[dim] for dim in gone])
    if len(left) != len(shape):
        left = [axis for dim, axis in enumerate(left) if dim not in gone]
    return Place(tuple(left), place.doubt) if len(left) == len(shape) else None


@_rule("mm", "bmm", "addmm", "baddbmm")
def _product(operation: Operation, place: Place, shape: tuple[int, ...], number: int) -> Place | None:
    names = ("batch1", "batch2") if "baddbmm" in operation.name else ("mat1" if "add" in operation.name else "self", "mat2")
    left, right = (operation.places.get(name) for name in names)
    if left is None and right is None:
        return None
    rows = (Along(shape[-2]),) if left is None else left.axes[-2]
    columns = (Along(shape[-1]),) if right is None else right.axes[-1]
    if right is None:  # weights: what is summed over are channels
        rows = absorbed([rows], left.axes[-1:])[0]
    batch = merged([p for p in (left, right) if p is not None], shape) if len(shape) == 3 else None
    axes: tuple[Axis, ...] = (batch.axes[0] if batch else (Along(shape[0]),),) if len(shape) == 3 else ()
    return Place((*axes, rows, columns), (left or right).doubt)


@_rule(
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention", "_scaled_dot_product_attention_math",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_fused_attention_overrideable",
    "scaled_dot_product_attention",
)  # fmt: skip
def _attention(operation: Operation, place: Place, shape: tuple[int, ...], number: int) -> Place | None:
    query = operation.places.get("query")
    return Place((*query.axes[:-1], (Along(shape[-1]),)), query.doubt) if number == 0 and query is not None else None


@_rule("glu")
def _halved(operation: Operation, place: Place, shape: tuple[int, ...], number: int) -> Place | None:
    dim = operation.given["dim"] % len(shape)
    return _with(place, dim, (Along(shape[dim]),))


@_rule("roll")
def _rolled(operation: Operation, place: Place, shape: tuple[int, ...], number: int) -> Place | None:
    dims = operation.given["dims"]
    channels = dims and not any(along.axis is not None for dim in dims for along in place.axes[dim])
    return place if channels else _guessed(operation, shape)
