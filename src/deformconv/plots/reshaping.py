"""The rules of operations that take, order, join, sum or multiply a tensor's axes."""

from __future__ import annotations

from math import prod

from deformconv.plots.operations import Operation, Rules, guessed
from deformconv.plots.places import Along, Axis, Place, absorbed, each, merged, moved, viewed

__all__ = ["RULES"]

RULES = Rules()


@RULES.of(
    "alias", "detach", "clone", "_to_copy", "lift_fresh", "contiguous", "_conj", "positive", "to", "native_dropout",
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "_batch_norm_with_update",
    "_batch_norm_no_update", "cudnn_batch_norm", "miopen_batch_norm", "batch_norm", "native_group_norm", "native_layer_norm",
    "_fused_rms_norm", "_softmax", "_log_softmax", "_prelu_kernel", "channel_shuffle", "native_channel_shuffle",
    "_weight_norm_interface", "_native_multi_head_attention", "_transformer_encoder_layer_fwd", "rrelu_with_noise",
)  # fmt: skip
def _same(operation: Operation, place: Place, shape: tuple[int, ...], number: int) -> Place | None:
    return place if number == 0 and len(place.axes) == len(shape) else None


@RULES.of("slice")
def _slice(operation: Operation, place: Place, shape: tuple[int, ...], number: int) -> Place | None:
    given = operation.given
    dim = given["dim"] % len(place.axes)
    start, _, step = slice(given["start"], given["end"], given["step"]).indices(given["self"].shape[dim])
    return _with(place, dim, moved(place.axes[dim], shape[dim], start, step) if shape[dim] else (Along(0),))


def _with(place: Place, dim: int, axis: Axis) -> Place:
    axes = list(place.axes)
    axes[dim] = axis
    return Place(tuple(axes), place.doubt)


@RULES.of("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes")
def _split(operation: Operation, place: Place, shape: tuple[int, ...], number: int) -> Place | None:
    given = operation.given
    dim = given["dim"] % len(place.axes)
    sizes = given.get("split_sizes")
    start = sum(sizes[:number]) if sizes is not None else number * given["split_size"]
    return _with(place, dim, moved(place.axes[dim], shape[dim], start))


@RULES.of("flip")
def _flip(operation: Operation, place: Place, shape: tuple[int, ...], number: int) -> Place | None:
    for dim in operation.given["dims"]:
        place = _with(place, dim % len(shape), moved(place.axes[dim], shape[dim], shape[dim] - 1, -1))
    return place


@RULES.of("unfold")
def _unfolded(operation: Operation, place: Place, shape: tuple[int, ...], number: int) -> Place | None:
    given = operation.given
    dim = given["dimension"] % len(place.axes)
    if len(place.axes[dim]) != 1:
        return None
    along = place.axes[dim][0]
    windows = moved(place.axes[dim], shape[dim], 0, given["step"])
    inner = Along(given["size"], along.axis, along.step)
    return Place((*_with(place, dim, windows).axes, (inner,)), place.doubt)


@RULES.of("permute", "transpose", "t", "unsqueeze", "squeeze", "select", "unbind", "expand")
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


@RULES.of("view", "_unsafe_view", "reshape", "_reshape_alias", "view_copy", "_reshape_copy", "flatten")
def _view(operation: Operation, place: Place, shape: tuple[int, ...], number: int) -> Place | None:
    return viewed(place, shape)


@RULES.of("cat", "stack")
def _joined(operation: Operation, place: Place, shape: tuple[int, ...], number: int) -> Place | None:
    dim = operation.given["dim"] % len(shape)
    places = []
    for each_place in operation.known:
        axes = list(each_place.axes)
        if operation.name == "aten::stack":
            axes.insert(dim, (Along(shape[dim]),))
        elif any(along.axis is not None for along in axes[dim]):
            return guessed(operation, shape)
        axes[dim] = (Along(shape[dim]),)
        places.append(Place(tuple(axes), each_place.doubt))
    return merged(places, shape)


@RULES.of(
    "mean", "sum", "amax", "amin", "max", "min", "linalg_vector_norm", "norm", "var", "std", "var_mean", "std_mean", "argmax",
    "argmin", "logsumexp", "any", "all", "prod", "median",
)  # fmt: skip
def _reduced(operation: Operation, place: Place, shape: tuple[int, ...], number: int) -> Place | None:
    dims = operation.given.get("dim")
    gone = {dim % len(place.axes) for dim in (range(len(place.axes)) if dims is None or dims == [] else each(dims, 1))}
    if len(place.axes) == len(shape):  # what is kept as one element lies in the middle
        axes = [moved(axis, 1, (_size(axis) - 1) / 2, _size(axis)) if n in gone else axis for n, axis in enumerate(place.axes)]
    else:
        kept = [axis for n, axis in enumerate(place.axes) if n not in gone]
        axes = absorbed(kept, [place.axes[n] for n in sorted(gone)])
    return Place(tuple(axes), place.doubt) if len(axes) == len(shape) else None


def _size(axis: Axis) -> int:
    return prod(along.size for along in axis)


@RULES.of("mm", "bmm", "addmm", "baddbmm")
def _product(operation: Operation, place: Place, shape: tuple[int, ...], number: int) -> Place | None:
    names = ("batch1", "batch2") if "baddbmm" in operation.name else ("mat1" if "add" in operation.name else "self", "mat2")
    left, right = (operation.places.get(name) for name in names)
    known = [place for place in (left, right) if place is not None]
    if not known:
        return None
    rows: Axis = (Along(shape[-2]),) if left is None else left.axes[-2]
    columns: Axis = (Along(shape[-1]),) if right is None else right.axes[-1]
    if left is not None and right is None:  # weights: what is summed over are channels
        rows = absorbed([rows], left.axes[-1:])[0]
    batch = merged(known, shape) if len(shape) == 3 else None
    axes: tuple[Axis, ...] = (batch.axes[0] if batch else (Along(shape[0]),),) if len(shape) == 3 else ()
    return Place((*axes, rows, columns), known[0].doubt)


@RULES.of(
    "scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_attention_math", "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)  # fmt: skip
def _attention(operation: Operation, place: Place, shape: tuple[int, ...], number: int) -> Place | None:
    return Place((*place.axes[:-1], (Along(shape[-1]),)), place.doubt) if number == 0 else None  # the first is the query


@RULES.of("glu")
def _halved(operation: Operation, place: Place, shape: tuple[int, ...], number: int) -> Place | None:
    dim = operation.given["dim"] % len(shape)
    return _with(place, dim, (Along(shape[dim]),))


@RULES.of("roll")
def _rolled(operation: Operation, place: Place, shape: tuple[int, ...], number: int) -> Place | None:
    dims = operation.given["dims"]
    channels = dims and not any(along.axis is not None for dim in dims for along in place.axes[dim])
    return place if channels else guessed(operation, shape)
