"""Parameters of nets in Flax, Equinox and Keras, one by one: PyTorch's name of each, and how its array lies there.

No framework is imported at the top: a model's own classes say whose it is, and a tree of arrays is Flax's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

__all__ = ["FRAMEWORKS", "Leaf", "framework_of", "leaves_of", "put"]

FRAMEWORKS = ("flax", "equinox", "keras")
FLOATS = ("float16", "bfloat16", "float32", "float64")
# What a library's own layers are called whose parameters lie in PyTorch's way, or in a way that `_rule` knows.
KNOWN = {
    "flax": ("Conv", "Linear", "BatchNorm", "LayerNorm", "GroupNorm", "RMSNorm", "Embed"),
    "equinox": ("Conv", "Linear", "LayerNorm", "GroupNorm", "RMSNorm", "Embedding"),
    "keras": (
        "BaseConv", "Conv1D", "Conv2D", "Conv3D", "Dense", "BatchNormalization", "LayerNormalization", "GroupNormalization",
        "Embedding",
    ),
}  # fmt: skip
# What a user's class is derived from: its own parameters are carried over as they are.
BASES = ("Module", "ModuleBase", "Pytree", "Object", "Layer", "Model", "Functional", "Sequential", "List", "Dict")
NAMES = {
    "kernel": "weight", "scale": "weight", "embedding": "weight", "mean": "running_mean", "var": "running_var",
    "gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var", "embeddings": "weight",
}  # fmt: skip
COLLECTIONS = ("params", "batch_stats")  # of Linen's variables


class Leaf(NamedTuple):
    """A parameter."""

    path: str  # in the model's own words: "layers/1/kernel"
    name: str  # in PyTorch's: "layers.1.weight"
    value: Any  # an array of the framework's
    there: Callable[[np.ndarray], np.ndarray]  # as it lies in PyTorch
    back: Callable[[np.ndarray], np.ndarray]
    mask_scale: float | None  # of the layer, if its path is a predictor's and its layer is known

    def array(self) -> np.ndarray:
        """The numbers as PyTorch has them, in memory of their own; bfloat16, which NumPy has not, becomes float32."""
        value = np.asarray(self.value)
        return np.array(self.there(value.astype(np.float32) if value.dtype.name == "bfloat16" else value), order="C")

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in PyTorch."""
        return self.there(np.broadcast_to(np.float32(0), tuple(self.value.shape))).shape


def framework_of(model: Any) -> str:
    """Whose model or tree of parameters it is."""
    for kind in type(model).__mro__:
        if (top := kind.__module__.split(".")[0]) in FRAMEWORKS:
            return top
    if isinstance(model, Mapping):
        return "flax"
    raise TypeError(
        f"`model` is a {type(model).__name__}; expected a model of Flax (NNX), Equinox or Keras, a state of NNX, or a tree of "
        "arrays as Linen's `variables`."
    )


def leaves_of(model: Any) -> list[Leaf]:
    """The parameters, in the model's order; raise for a layer of a library's whose parameters lie otherwise."""
    walk = {"flax": _of_flax, "equinox": _of_equinox, "keras": _of_keras}[framework_of(model)]
    found = [leaf for leaf in walk(model) if str(getattr(leaf.value, "dtype", "")) in FLOATS]
    if not found:
        raise ValueError(f"`model`, a {type(model).__name__}, has no parameters; expected a net whose layers have been built.")
    return found


def put(model: Any, values: Mapping[str, np.ndarray]) -> Any:
    """The model with other arrays, by the paths of its leaves and as it has them: a copy, or itself where frameworks do so."""
    kind = framework_of(model)
    if kind == "keras":
        for path, variable, *_ in _variables(model):
            if path in values:
                variable.assign(values[path])
        return model
    if kind == "equinox":
        import jax

        paths, tree = jax.tree_util.tree_flatten_with_path(model)
        leaves = [_like(leaf, values.get("/".join(_words(path)))) for path, leaf in paths]
        return jax.tree_util.tree_unflatten(tree, leaves)
    if isinstance(model, Mapping):
        return _mapped(model, (), values)
    from flax import nnx

    nnx.update(model, put(nnx.state(model), values))
    return model


def _leaf(
    path: tuple[str, ...], value: Any, kind: str, holder: Any, drop: tuple[int, ...] = (), is_layers: bool = True
) -> Leaf:
    """A parameter of a library's layer, or of a module of the user's own, which stays as it is.

    `holder` is what holds its module, and `drop` are places in the path that have no name in PyTorch.
    """
    *module, parameter = [word for place, word in enumerate(path) if place not in drop]
    there, back = _rule(kind if is_layers else None, parameter, tuple(value.shape))
    name = ".".join([*module, NAMES.get(parameter, parameter) if is_layers and kind != "equinox" else parameter])
    scale = getattr(holder, "mask_scale", None) if module and module[-1] == "offset_conv" else None
    return Leaf("/".join(path), name, value, there, back, scale)


def _rule(kind: str | None, parameter: str, shape: tuple[int, ...]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """How an array of a library's layer lies in PyTorch, and the way back; with None for the library both are as they are."""
    rank = len(shape)
    if kind is None:
        pass
    elif kind == "equinox":
        if parameter == "bias" and rank > 1 and set(shape[1:]) == {1}:
            return (lambda array: array.reshape(-1)), (lambda array: array.reshape(-1, *shape[1:]))
    elif parameter == "kernel" and rank == 2:  # of a dense layer, (in, out)
        return np.transpose, np.transpose
    elif parameter == "kernel" and rank > 2:  # of a convolution, (*K, in, out)
        spatial = tuple(range(rank - 2))
        there, back = (rank - 1, rank - 2, *spatial), (*range(2, rank), 1, 0)
        return (lambda array: np.transpose(array, there)), (lambda array: np.transpose(array, back))
    return (lambda array: array), (lambda array: array)


def _is_known(kind: str, owner: Any, path: str) -> bool:
    """Whether it is a layer of a library's, and no module of the user's own; raise for one whose parameters lie otherwise."""
    theirs = [base for base in type(owner).__mro__ if base.__module__.split(".")[0] == kind]
    name = next((base.__name__ for base in theirs), None)
    if any(base.__name__ in KNOWN[kind] for base in theirs):
        return True
    if name is None or name in BASES:
        return False
    statistics = " Its mean and variance lie in an eqx.nn.State, not in the model." * (
        kind == "equinox" and name == "BatchNorm"
    )
    raise ValueError(
        f"{path!r} belongs to a {type(owner).__name__}, whose parameters lie otherwise in PyTorch; expected convolutions, "
        f"dense layers, norms and embeddings.{statistics} Carry it over yourself, and the net's rest part by part."
    )


def _of_flax(model: Any) -> Iterator[Leaf]:
    if isinstance(model, Mapping):
        yield from _of_tree(model)
        return
    from flax import nnx

    for path, variable in _flat(nnx.state(model), ()):
        if not _is_number(variable):
            continue
        modules = [model]
        for word in path[:-1]:
            modules.append(_child(modules[-1], word))
        owner, holder = modules[-1], modules[-2] if len(modules) > 1 else None
        words = tuple(map(str, path))
        is_layers = _is_known("flax", owner, "/".join(words))
        drop = tuple(
            place for place, (module, word) in enumerate(zip(modules, words[:-1], strict=False))
            if isinstance(module, nnx.Sequential) and word == "layers"
        )  # fmt: skip
        yield _leaf(words, _value(variable), "flax", holder, drop, is_layers)


def _of_tree(tree: Mapping[Any, Any]) -> Iterator[Leaf]:
    """A state of NNX, Linen's variables or parameters, or what was read from a file: nothing but names and arrays."""
    is_variables = isinstance(tree.get("params"), Mapping) and not type(tree).__module__.startswith("flax.nnx")
    if is_variables and (others := [name for name in tree if name not in COLLECTIONS]):
        raise ValueError(
            f"`model` has the collection {others[0]!r}; expected Linen's {' and '.join(map(repr, COLLECTIONS))} alone: "
            '{"params": variables["params"], ...}.'
        )
    for path, variable in _flat(tree, ()):
        words = tuple(map(str, path))
        if _is_attention(tree, path):
            raise ValueError(
                f"{'/'.join(words)!r} belongs to an attention, whose parameters lie otherwise in PyTorch; expected "
                "convolutions, dense layers, norms and embeddings. Carry it over yourself, and the net's rest part by part."
            )
        if _is_number(variable):
            yield _leaf(words, _value(variable), "flax", None, (0,) if is_variables else ())


def _is_attention(tree: Any, path: tuple[Any, ...]) -> bool:
    """Whether a kernel is of Flax's attention, whose three axes are no convolution's."""
    if len(path) < 2 or path[-1] != "kernel":
        return False
    for word in path[:-2]:
        tree = tree[word]
    return {"query", "key", "value"} <= {str(name) for name in tree}


def _of_equinox(model: Any) -> Iterator[Leaf]:
    import equinox as eqx
    import jax

    for path, value in jax.tree_util.tree_leaves_with_path(model):
        if not eqx.is_array(value) and not isinstance(value, np.ndarray):
            continue
        words, modules = _words(path), [model]
        for word in words[:-1]:
            modules.append(_child(modules[-1], word))
        owner = next((module for module in reversed(modules) if isinstance(module, eqx.Module)), model)
        is_layers = owner is modules[-1] and _is_known("equinox", owner, "/".join(words))
        drop = tuple(
            place for place, word in enumerate(words[:-1]) if type(modules[place]) is eqx.nn.Sequential and word == "layers"
        )  # fmt: skip
        yield _leaf(words, value, "equinox", modules[-2] if len(modules) > 1 else None, drop, is_layers)


def _of_keras(model: Any) -> Iterator[Leaf]:
    from keras import ops

    for path, variable, owner, holder in _variables(model):
        value, is_layers = np.asarray(ops.convert_to_numpy(variable.value)), _is_known("keras", owner, path)
        yield _leaf(tuple(path.split("/")), value, "keras", holder, (), is_layers)


def _variables(layer: Any, path: tuple[str, ...] = (), holder: Any = None) -> Iterator[tuple[str, Any, Any, Any]]:
    """A Keras layer's variables with their paths, by the names of the layers within, their layers and what holds these."""
    own = layer._flatten_layers(include_self=False, recursive=False)
    children = list(own)
    within = {id(variable) for child in children for variable in child.variables}
    for variable in layer.variables:
        if id(variable) not in within:
            yield "/".join([*path, variable.name]), variable, layer, holder
    for child in children:
        yield from _variables(child, (*path, child.name), layer)


def _flat(tree: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping) or (hasattr(value, "items") and not hasattr(value, "dtype")):
            yield from _flat(value, (*path, name))
        elif value is not None:
            yield (*path, name), value


def _mapped(tree: Any, path: tuple[str, ...], values: Mapping[str, np.ndarray]) -> Any:
    """A tree of the same kind with other arrays."""
    found: dict[Any, Any] = {}
    for name, value in tree.items():
        here = (*path, str(name))
        if isinstance(value, Mapping) or (hasattr(value, "items") and not hasattr(value, "dtype")):
            found[name] = _mapped(value, here, values)
        elif (array := values.get("/".join(here))) is None:
            found[name] = value
        else:
            new = _like(_value(value), array)
            found[name] = value.replace(new) if _is_variable(value) else new
    return found if type(tree) is dict else type(tree)(found)


def _like(leaf: Any, array: np.ndarray | None) -> Any:
    """An array of the kind and dtype that the leaf has."""
    if array is None:
        return leaf
    if isinstance(leaf, np.ndarray):
        return array.astype(leaf.dtype)
    import jax.numpy as jnp

    return jnp.asarray(array, leaf.dtype)


def _is_variable(value: Any) -> bool:
    return type(value).__module__.split(".")[0] == "flax" or any(
        base.__module__.startswith("flax.nnx") for base in type(value).__mro__
    )


def _value(variable: Any) -> Any:
    if not _is_variable(variable):
        return variable
    return variable.get_value() if hasattr(variable, "get_value") else variable.value


def _is_number(variable: Any) -> bool:
    return str(getattr(_value(variable), "dtype", "")) in FLOATS


def _words(path: tuple[Any, ...]) -> tuple[str, ...]:
    """The words of a path through JAX's trees: attributes' names, dicts' keys, places in lists."""
    return tuple(str(next(getattr(key, kind) for kind in ("name", "key", "idx") if hasattr(key, kind))) for key in path)


def _child(module: Any, word: Any) -> Any:
    """What a module, a dict or a list has under a word of a path; None where its class says otherwise."""
    if isinstance(module, Mapping):
        return module.get(word)
    if hasattr(module, str(word)) and not str(word).isdigit():
        return getattr(module, str(word))
    try:
        return module[int(word)]
    except (TypeError, ValueError, IndexError, KeyError):
        return None
