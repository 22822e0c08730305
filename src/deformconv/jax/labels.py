"""Which parameters belong to predictors of offsets, for optimizers that train them at a learning rate of their own."""

from __future__ import annotations

from typing import Any

import jax

__all__ = ["offset_labels"]

PREDICTORS = ("offset_conv",)  # the names that layers give to what predicts their offsets


def offset_labels(params: Any) -> Any:
    """Label the parameters of predictors "offset" and all others "rest", as optax.multi_transform wants them.

    Predictors of offsets are usually trained at a tenth of the learning rate. They are what lies under the name `offset_conv`,
    which the layers of deformconv.flax, deformconv.flax.linen and deformconv.equinox give to theirs.

    Args:
        params: a tree of parameters: `nnx.state(model, nnx.Param)` of Flax, `variables["params"]` of Linen, an Equinox model or
            `eqx.filter(model, eqx.is_inexact_array)`; or the gradients or updates of one.

    Returns:
        The same tree with a word for each parameter.

    Raises:
        TypeError: `params` is no tree of parameters.

    Example:
        >>> import jax.numpy as jnp
        >>> from deformconv.jax import offset_labels
        >>> kernel = {"kernel": jnp.ones((3, 3, 4, 8))}
        >>> offset_labels({"conv": kernel, "deform": {"offset_conv": kernel, **kernel}})
        {'conv': {'kernel': 'rest'}, 'deform': {'kernel': 'rest', 'offset_conv': {'kernel': 'offset'}}}

        The predictors' steps are a tenth of what the optimizer would take, whichever it is:

        >>> import optax
        >>> scales = {"offset": optax.scale(0.1), "rest": optax.identity()}
        >>> optimizer = optax.chain(optax.adam(1e-3), optax.multi_transform(scales, offset_labels))
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if len(leaves) == 1 and leaves[0][0] == () and not hasattr(params, "dtype"):
        raise TypeError(
            f"`params` is a {type(params).__name__}, which JAX takes for one leaf; expected a tree of parameters: "
            "nnx.state(model, nnx.Param) of Flax, variables['params'] of Linen, or a model of Equinox."
        )
    return jax.tree_util.tree_map_with_path(lambda path, leaf: "offset" if _is_predictors(path) else "rest", params)


def _is_predictors(path: tuple[Any, ...]) -> bool:
    """Whether one of the keys on the way to a leaf, of a dict or of an object's attribute, is a predictor's name."""
    names = (getattr(key, "key", getattr(key, "name", None)) for key in path)
    return any(name in PREDICTORS for name in names if isinstance(name, str))
