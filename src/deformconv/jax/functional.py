"""The operator on JAX's arrays: deformconv's signature."""

from __future__ import annotations

from typing import Any, NoReturn

import jax

from deformconv.jax import calls
from deformconv.jax.primitives import Registered
from deformconv.ops.conv import folding, operator
from deformconv.ops.words import unexpected

__all__ = ["DEFORM_CONV", "deform_conv", "deform_conv1d", "deform_conv2d", "deform_conv3d", "explain"]

DEFORM_CONV = Registered(operator.DEFORM_CONV, fold_forward=folding.fold_forward, fold_backward=folding.fold_backward)


def deform_conv(
    input: Any,
    offset: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    mask: Any = None,
    *,
    groups: int | None = None,
    offset_groups: int | None = None,
    boundary: str = "zeros",
    backend: str | None = None,
    **unknown: NoReturn,
) -> jax.Array:
    """Convolve with a kernel whose taps are moved by `offset` and, in v2, weighed by `mask`.

    It is `deformconv.deform_conv`, where the formula stands, for JAX's arrays: eagerly, within `jax.jit`, and under every
    transformation. On the CPU the output and its gradients are computed by compiled kernels, in XLA's own memory, also under
    `jax.vmap`, which makes one call of many; forward-mode and further derivatives are JAX's own operations, and so is
    everything on GPUs and TPUs.

    Args:
        input: shape (N, C_in, *S), with 1 to 3 spatial axes.
        offset: shape (N, offset_groups*K*D, *O), in input pixels; group-major, then tap (row-major), then dy before dx.
        weight: shape (C_out, C_in/groups, *kernel).
        bias: shape (C_out,), or None.
        stride, padding, dilation, groups, offset_groups, boundary: as in `deformconv.deform_conv`; none may be traced.
        mask: shape (N, offset_groups*K, *O), a factor for every sample; None for v1.
        backend: what computes the output and its gradients: "cpu" or "portable"; None takes the first that can run the call
            on the platform for which it is compiled.

    Returns:
        The output, shape (N, C_out, *O), of the dtype of `input`.

    Raises:
        ShapeError: a shape or a parameter's value does not fit. It is raised while a function is traced.
        TypeError: an argument is no array of JAX or NumPy, or not of the common floating-point dtype; only beside an `input` in
            half precision `offset` and `mask` may be float32. NumPy's float64 is float32, unless jax_enable_x64 is set.
        ValueError: `boundary` or `backend` is unknown.
        BackendError: the named backend cannot run the call. It is raised when the call is compiled.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from deformconv.jax import deform_conv
        >>> x, weight = jnp.ones((10, 3, 100, 100)), jnp.ones((5, 3, 3, 3))
        >>> offset, mask = jnp.zeros((10, 18, 100, 100)), jnp.ones((10, 9, 100, 100))
        >>> @jax.jit
        ... def loss(offset):
        ...     return deform_conv(x, offset, weight, padding=1, mask=mask).mean()
        >>> print(f"{loss(offset):.2f}", jax.grad(loss)(offset).shape)
        26.64 (10, 18, 100, 100)

    Papers: v1, arXiv 1703.06211, equations 2 and 3; v2, arXiv 1811.11168, equation 1.
    """
    if unknown:
        raise unexpected(deform_conv, unknown)
    return _call(None, input, offset, weight, bias, stride, padding, dilation, mask, groups, offset_groups, boundary, backend)


def deform_conv1d(
    input: Any,
    offset: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    mask: Any = None,
    *,
    groups: int | None = None,
    offset_groups: int | None = None,
    boundary: str = "zeros",
    backend: str | None = None,
    **unknown: NoReturn,
) -> jax.Array:
    """Convolve signals: `deform_conv` with `input` (N, C_in, length) and `weight` (C_out, C_in/groups, K).

    Args:
        input, offset, weight, ...: as in `deform_conv`; `offset` has a channel for each tap, `mask` as well.

    Returns:
        The output, shape (N, C_out, length_out).

    Raises:
        ShapeError: an array is not for one spatial axis; else as `deform_conv`.

    Example:
        >>> import jax.numpy as jnp
        >>> from deformconv.jax import deform_conv1d
        >>> x, offset = jnp.arange(6.0).reshape(1, 1, 6), jnp.full((1, 1, 6), 0.5)   # one tap, half a sample to the right
        >>> print(deform_conv1d(x, offset, jnp.ones((1, 1, 1)))[0, 0])
        [0.5 1.5 2.5 3.5 4.5 2.5]
    """
    if unknown:
        raise unexpected(deform_conv1d, unknown)
    return _call(1, input, offset, weight, bias, stride, padding, dilation, mask, groups, offset_groups, boundary, backend)


def deform_conv2d(
    input: Any,
    offset: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    mask: Any = None,
    *,
    groups: int | None = None,
    offset_groups: int | None = None,
    boundary: str = "zeros",
    backend: str | None = None,
    **unknown: NoReturn,
) -> jax.Array:
    """Convolve images: `deform_conv` with `input` (N, C_in, H, W) and `weight` (C_out, C_in/groups, kH, kW).

    Args:
        input, offset, weight, ...: as in `deform_conv`; `offset` has dy before dx for each tap.

    Returns:
        The output, shape (N, C_out, H_out, W_out).

    Raises:
        ShapeError: an array is not for two spatial axes; else as `deform_conv`.

    Example:
        >>> import jax.numpy as jnp
        >>> from deformconv.jax import deform_conv2d
        >>> x, offset = jnp.arange(9.0).reshape(1, 1, 3, 3), jnp.ones((1, 2, 3, 3))   # one tap, one pixel down and right
        >>> print(deform_conv2d(x, offset, jnp.ones((1, 1, 1, 1)))[0, 0])
        [[4. 5. 0.]
         [7. 8. 0.]
         [0. 0. 0.]]
    """
    if unknown:
        raise unexpected(deform_conv2d, unknown)
    return _call(2, input, offset, weight, bias, stride, padding, dilation, mask, groups, offset_groups, boundary, backend)


def deform_conv3d(
    input: Any,
    offset: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    mask: Any = None,
    *,
    groups: int | None = None,
    offset_groups: int | None = None,
    boundary: str = "zeros",
    backend: str | None = None,
    **unknown: NoReturn,
) -> jax.Array:
    """Convolve volumes: `deform_conv` with `input` (N, C_in, depth, H, W) and `weight` (C_out, C_in/groups, kD, kH, kW).

    Args:
        input, offset, weight, ...: as in `deform_conv`; `offset` has dz, dy, dx for each tap.

    Returns:
        The output, shape (N, C_out, D_out, H_out, W_out).

    Raises:
        ShapeError: an array is not for three spatial axes; else as `deform_conv`.

    Example:
        >>> import jax.numpy as jnp
        >>> from deformconv.jax import deform_conv3d
        >>> x, weight = jnp.ones((1, 4, 5, 6, 7)), jnp.ones((8, 4, 3, 3, 3))
        >>> deform_conv3d(x, jnp.zeros((1, 3 * 27, 5, 6, 7)), weight, padding=1).shape
        (1, 8, 5, 6, 7)
    """
    if unknown:
        raise unexpected(deform_conv3d, unknown)
    return _call(3, input, offset, weight, bias, stride, padding, dilation, mask, groups, offset_groups, boundary, backend)


def explain(
    input: Any,
    offset: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    mask: Any = None,
    *,
    groups: int | None = None,
    offset_groups: int | None = None,
    boundary: str = "zeros",
    backend: str | None = None,
    **unknown: NoReturn,
) -> str:
    """Say which backend runs a call of `deform_conv`, and each other one's reason not to, without running it.

    Args:
        input, offset, ...: the arguments of `deform_conv`, explained there. Where they are tracers, which are on no device yet,
            the answer is that of the platform that JAX prefers.

    Returns:
        A text of a few lines, for `print`.

    Raises:
        ShapeError, TypeError, ValueError: as `deform_conv`; a backend that cannot run is told, not raised.

    Example:
        >>> import jax.numpy as jnp
        >>> from deformconv.jax import explain
        >>> x, offset, weight = jnp.ones((1, 3, 8, 8)), jnp.zeros((1, 18, 6, 6)), jnp.ones((4, 3, 3, 3))
        >>> print(explain(x, offset, weight, backend="portable"))  # doctest: +ELLIPSIS
        input (1, 3, 8, 8), offset (1, 18, 6, 6), weight (4, 3, 3, 3); float32, jax on cpu
        forward: portable
        ...
    """
    if unknown:
        raise unexpected(explain, unknown)
    operands = {"input": input, "offset": offset, "weight": weight, "bias": bias, "mask": mask}
    parameters = _parameters(stride, padding, dilation, groups, offset_groups, boundary)
    return calls.explain(DEFORM_CONV, operands, parameters, backend)


def _call(
    rank: int | None, input: Any, offset: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, mask: Any,
    groups: Any, offset_groups: Any, boundary: Any, backend: Any,
) -> jax.Array:  # fmt: skip
    operands = {"input": input, "offset": offset, "weight": weight, "bias": bias, "mask": mask}
    parameters = _parameters(stride, padding, dilation, groups, offset_groups, boundary)
    return calls.call(DEFORM_CONV, operands, parameters, backend, rank)


def _parameters(*values: Any) -> dict[str, Any]:
    return dict(zip(operator.DEFORM_CONV.parameter_names, values, strict=True))
