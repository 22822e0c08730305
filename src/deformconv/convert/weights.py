"""Weights of nets in Flax, Equinox and Keras, to and from state_dicts of PyTorch. Arrays are NumPy's, PyTorch is not needed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import numpy as np

from deformconv.convert.leaves import Leaf, leaves_of, put
from deformconv.convert.params_file import as_array
from deformconv.errors import ShapeError

__all__ = ["from_torch", "to_torch"]

RECORD = "mask_scale"  # in the metadata of a state_dict, as deformconv.torch.loading has it
COUNTERS = "num_batches_tracked"  # of PyTorch's norms, which nobody else counts


def to_torch(model: Any, names: Mapping[str, str] | None = None) -> OrderedDict[str, np.ndarray]:
    """Return the parameters of a net in Flax, Equinox or Keras as a state_dict of the same net in PyTorch.

    A parameter's name is the path to it, with PyTorch's word at its end: `net.conv1.kernel` is `conv1.weight`. Kernels of
    convolutions, deformable ones and their predictors among them, are turned to (C_out, C_in/groups, *kernel), those of dense
    layers to (out, in); norms and embeddings are renamed, with the running mean and variance of Flax and Keras; parameters of
    your own modules stay as they are. A dense layer that reads a flattened map has its inputs in the order of that map, which
    is channels last in Flax and Keras and channels first in PyTorch: average the map before it, or turn its weight yourself.
    Dropout's random keys and an optimizer's counters are left out.

    Args:
        model: a module or a state of Flax NNX, Linen's `variables` or `variables["params"]`, an Equinox model, or a Keras model
            or layer whose weights there are. A tree alone does not tell convolutions from transposed ones or from a `kernel`
            of your own, nor `mask_scale`, which must be that of the layers in PyTorch then; of models it is noted, and looked
            at when PyTorch loads it.
        names: what modules are called in PyTorch, by what they would be called: {"Conv_0": "stem", "DeformConv_0": "deform"};
            a module's name stands for all that is within. "" leaves a name out.

    Returns:
        NumPy arrays by name, of the model's dtype; bfloat16, which NumPy has not, becomes float32. PyTorch loads them by
        `net.load_state_dict(convert_state_dict(state, source="deformconv", model=net))`.

    Raises:
        TypeError: `model` is none of these.
        ValueError: a layer whose parameters lie otherwise in PyTorch (transposed convolutions, attention, recurrent layers,
            Equinox's BatchNorm), two parameters of one name, or a name in `names` that nothing has.

    Example:
        >>> import numpy as np
        >>> from deformconv.convert import to_torch
        >>> params = {"conv": {"kernel": np.ones((3, 3, 4, 8)), "bias": np.ones(8)}, "head": {"kernel": np.ones((8, 10))}}
        >>> {name: array.shape for name, array in to_torch(params).items()}
        {'conv.weight': (8, 4, 3, 3), 'conv.bias': (8,), 'head.weight': (10, 8)}
    """
    found: OrderedDict[str, np.ndarray] = OrderedDict()
    metadata: dict[str, Any] = {}
    for name, leaf in _named(model, names).items():
        found[name] = leaf.array()
        if (layer := _layer_of(name)) is not None and leaf.mask_scale is not None:
            metadata[layer] = {"version": 1, RECORD: leaf.mask_scale}
    found._metadata = metadata  # type: ignore[attr-defined]  # where PyTorch keeps it
    return found


def from_torch(model: Any, state: Mapping[str, Any], names: Mapping[str, str] | None = None, *, strict: bool = True) -> Any:
    """Return a net in Flax, Equinox or Keras with the parameters of the same net in PyTorch.

    Args:
        model: as for `to_torch`; a tree's arrays say which shapes and dtypes are wanted.
        state: the net's state_dict: PyTorch's tensors or NumPy arrays by name.
        names: as for `to_torch`.
        strict: False leaves parameters as they are which `state` lacks (the predictors, where `state` is of a plain net), and
            passes by those that the model lacks.

    Returns:
        A module of NNX or Keras itself, changed in place, as these libraries do; else a new tree.

    Raises:
        ShapeError: a parameter has another shape.
        TypeError: `model` is none of these.
        ValueError: as `to_torch`; a parameter that one side lacks; or masks of another scale.

    Example:
        >>> import numpy as np
        >>> from deformconv.convert import from_torch
        >>> params = {"conv": {"kernel": np.zeros((3, 3, 4, 8), np.float32)}}
        >>> from_torch(params, {"conv.weight": np.ones((8, 4, 3, 3))})["conv"]["kernel"].shape
        (3, 3, 4, 8)
    """
    leaves = _named(model, names)
    if not isinstance(state, Mapping):
        raise TypeError(f"`state` is a {type(state).__name__}; expected names and arrays, as net.state_dict() returns them.")
    if strict:
        _check_names(leaves, state)
    values = {}
    for name, leaf in leaves.items():
        if name not in state:
            continue
        array = as_array(state[name])
        if array.shape != leaf.shape:
            raise ShapeError(_wrong_shape(name, array.shape, leaf))
        values[leaf.path] = np.array(leaf.back(array), order="C")  # JAX takes over memory, PyTorch's too
    if not values:
        raise ValueError(f"`state` has none of the model's {len(leaves)} parameters, as {next(iter(leaves))!r}; see `names`.")
    _check_masks(leaves, state)
    return put(model, values)


def _named(model: Any, names: Mapping[str, str] | None) -> dict[str, Leaf]:
    """The model's parameters by the names that they have in PyTorch."""
    names, used = names or {}, set()
    found: dict[str, Leaf] = {}
    for leaf in leaves_of(model):
        name = leaf.name
        said = max((word for word in names if name.startswith(f"{word}.")), key=len, default=None)
        if said is not None:
            used.add(said)
            name = f"{names[said]}{name[len(said) :]}".lstrip(".")
        if name in found:
            raise ValueError(
                f"{found[name].path!r} and {leaf.path!r} are both {name!r} in PyTorch; expected two names: say in `names` what "
                "their modules are called there."
            )
        found[name] = leaf
    if unused := [word for word in names if word not in used]:
        modules = sorted({name.rpartition(".")[0] for name in found})
        raise ValueError(f"`names` has {unused[0]!r}, and no module is called so; there are {', '.join(map(repr, modules))}.")
    return found


def _layer_of(name: str) -> str | None:
    """The layer whose predictor's weight it is."""
    *layer, predictor, parameter = ["", *name.split(".")] if "." in name else ["", "", name]
    return ".".join(layer[1:]) if (predictor, parameter) == ("offset_conv", "weight") else None


def _check_names(leaves: Mapping[str, Leaf], state: Mapping[str, Any]) -> None:
    """Raise for a parameter that one side lacks."""
    over = [name for name in state if name not in leaves and not name.endswith(COUNTERS)]
    for name, leaf in leaves.items():
        if name not in state:
            close = get_close_matches(name, over, 1)
            like = f", but has {close[0]!r}: see `names`" if close else ""
            predictor = " For weights of a plain net pass strict=False." * ("offset_conv." in name)
            raise ValueError(f"`state` has no {name!r}, for {leaf.path!r} of the model{like}.{predictor}")
    if over:
        raise ValueError(
            f"`state` has {over[0]!r}, and `model` no such parameter; expected the state_dict of the same net: see `names`, or "
            "pass strict=False."
        )


def _wrong_shape(name: str, shape: tuple[int, ...], leaf: Leaf) -> str:
    text = (
        f"{name!r} has shape {shape} in `state`; expected {leaf.shape}, for {leaf.path!r}, {tuple(leaf.value.shape)}, of the "
        "model."
    )
    if shape == tuple(leaf.value.shape):
        text += " It lies there as in the model already: from_torch takes arrays as PyTorch has them."
    return text


def _check_masks(leaves: Mapping[str, Leaf], state: Mapping[str, Any]) -> None:
    """Raise where a state_dict notes other masks than a layer of the model has."""
    metadata: Mapping[str, Any] = getattr(state, "_metadata", None) or {}
    for name, leaf in leaves.items():
        recorded = None if (layer := _layer_of(name)) is None else metadata.get(layer, {}).get(RECORD)
        if None not in (recorded, leaf.mask_scale) and recorded != leaf.mask_scale:
            raise ValueError(
                f"the masks of {leaf.path.rpartition('/offset_conv')[0] or 'this layer'!r} are {recorded:g}*sigmoid in `state` "
                f"and {leaf.mask_scale:g}*sigmoid in the model: build its layer with mask_scale={recorded:g}."
            )
