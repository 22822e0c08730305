"""The NumPy front end: arrays in, arrays out. PyTorch tensors are handed on to the torch room."""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache
from typing import Any

import numpy as np

from deformconv import dispatch
from deformconv.ops.conv.spec import (
    GRADIENTS,
    ConvSpec,
    Gradients,
    Operand,
    check_grad_output,
    conv_spec,
)

__all__ = ["deform_conv", "deform_conv_backward", "explain", "wanted_gradients"]


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
) -> Any:
    """Convolve with a kernel whose taps are moved by `offset` and, in v2, weighed by `mask`.

    For every output position `p`, with D spatial axes and the K taps `k` of the kernel::

        q[k, p]    = p*stride - padding + k*dilation + offset[n, g, k, :, p]
        y[n, o, p] = bias[o] + sum over k, c of
                     weight[o, c, k] * mask[n, g, k, p] * interp(input[n, c], q[k, p])

    `interp` is multilinear. NumPy arrays and PyTorch tensors are taken, all of one floating-point dtype;
    tensors give a tensor, with its gradient. The number of spatial axes, 1 to 3, is that of `weight`; axes
    go depth, height, width.

    Args:
        input: shape (N, C_in, *S).
        offset: shape (N, offset_groups*K*D, *O), in input pixels; group-major, then tap (row-major), then
            axis: a 3x3 kernel's 18 channels are dy, dx of the first tap, dy, dx of the second, and so on.
        weight: shape (C_out, C_in/groups, *kernel).
        bias: shape (C_out,), or None.
        stride: an int, or D ints, in input pixels.
        padding: an int, D ints, D pairs ((before, after), ...), "same" or "valid", in input pixels.
        dilation: the distance between taps: an int, or D ints, in input pixels.
        mask: shape (N, offset_groups*K, *O), a factor for every sample; None for v1.
        groups: verified when given, else inferred from `input` and `weight`.
        offset_groups: verified when given, else inferred from `offset`.
        boundary: what lies outside of the input. "zeros": a corner of the interpolation outside of it is 0.
            "inside": a sample is 0 unless 0 <= q < size on every axis, and then the last pixel continues.
        backend: "cpu", "portable" or "reference"; None takes the first that can run the call (see `explain`).

    Returns:
        The output, shape (N, C_out, *O), where O is, along every axis,
        (size + padding before + padding after - dilation*(kernel - 1) - 1)//stride + 1.

    Raises:
        ShapeError: a shape or a parameter's value does not fit.
        TypeError: an argument is no array, or not of the common floating-point dtype.
        ValueError: `boundary` or `backend` is unknown, or tensors are on different devices.
        BackendError: no backend, or not the named one, can run the call.

    Example:
        With zero offsets it is the plain convolution; here every tap looks one pixel further down.

        >>> import numpy as np, deformconv
        >>> x = np.arange(16.0).reshape(1, 1, 4, 4)
        >>> offset = np.zeros((1, 18, 4, 4))
        >>> offset[:, 0::2] = 1                      # dy of all 9 taps
        >>> weight = np.zeros((1, 1, 3, 3))
        >>> weight[..., 1, 1] = 1                    # the centre tap alone
        >>> print(deformconv.deform_conv(x, offset, weight, padding=1)[0, 0])
        [[ 4.  5.  6.  7.]
         [ 8.  9. 10. 11.]
         [12. 13. 14. 15.]
         [ 0.  0.  0.  0.]]

    Papers: v1, arXiv 1703.06211, equations 2 and 3; v2, arXiv 1811.11168, equation 1.
    """
    operands = {"input": input, "offset": offset, "weight": weight, "bias": bias, "mask": mask}
    if _any_torch(operands):
        from deformconv.torch import functional as torch_room

        return torch_room.deform_conv(
            input, offset, weight, bias, stride, padding, dilation, mask,
            groups=groups, offset_groups=offset_groups, boundary=boundary, backend=backend,
        )  # fmt: skip
    arrays = _arrays(operands)
    spec = _spec(arrays, stride, padding, dilation, groups, offset_groups, boundary)
    module = dispatch.choose(spec, "numpy", "cpu", False, backend)
    return module.deform_conv(spec, **arrays)


def deform_conv_backward(
    grad_output: Any,
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
    wanted: Collection[str] | None = None,
) -> Gradients:
    """Return the gradients of `deform_conv`: `grad_output` times the derivative by each argument.

    The arguments after `grad_output` are those of `deform_conv`, which see. At a kink of the interpolation
    (an integer position) the derivative is the one to the right.

    Args:
        grad_output: the loss's derivative by the output, shape (N, C_out, *O), of the arguments' dtype.
        wanted: the names of the gradients to compute, among "input", "offset", "weight", "bias" and "mask";
            None means all. What is not wanted costs nothing.

    Returns:
        Gradients, a named tuple with the fields input, offset, weight, bias and mask, each with the shape of
        its argument; None where it was not wanted or the argument was not given.

    Raises:
        ValueError: `wanted` names what is no argument, or one that was not given; else as `deform_conv`.

    Example:
        >>> import numpy as np, deformconv
        >>> x, weight = np.arange(16.0).reshape(1, 1, 4, 4), np.ones((1, 1, 1, 1))
        >>> offset = np.full((1, 2, 4, 4), 0.5)      # half a pixel down and to the right
        >>> grad_output = np.ones((1, 1, 4, 4))
        >>> g = deformconv.deform_conv_backward(grad_output, x, offset, weight, wanted=["input", "offset"])
        >>> g.offset.shape, g.weight is None
        ((1, 2, 4, 4), True)
        >>> print(g.offset[0, :, 0, 0])              # the image rises by 4 a row and by 1 a column
        [4. 1.]

    Papers: v1, arXiv 1703.06211, appendix A; v2, arXiv 1811.11168.
    """
    operands = {"input": input, "offset": offset, "weight": weight, "bias": bias, "mask": mask}
    if _any_torch({"grad_output": grad_output, **operands}):
        from deformconv.torch import functional as torch_room

        return torch_room.deform_conv_backward(
            grad_output, input, offset, weight, bias, stride, padding, dilation, mask,
            groups=groups, offset_groups=offset_groups, boundary=boundary, backend=backend, wanted=wanted,
        )  # fmt: skip
    arrays = _arrays(operands)
    grad = _array("grad_output", grad_output)
    spec = _spec(arrays, stride, padding, dilation, groups, offset_groups, boundary)
    check_grad_output(spec, _operand(grad))
    names = wanted_gradients(spec, wanted)
    module = dispatch.choose(spec, "numpy", "cpu", True, backend)
    del arrays["bias"]
    return module.deform_conv_backward(spec, grad, **arrays, wanted=names)


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
) -> str:
    """Say which backend runs a call of `deform_conv`, and each other one's reason not to, without running it.

    Args:
        input, offset, ...: the arguments of `deform_conv`, which see.

    Returns:
        A text of a few lines, for `print`.

    Raises:
        ShapeError, TypeError, ValueError: as `deform_conv`; a backend that cannot run is told, not raised.

    Example:
        >>> import numpy as np, deformconv
        >>> x, offset, weight = np.ones((1, 3, 8, 8)), np.zeros((1, 18, 6, 6)), np.ones((4, 3, 3, 3))
        >>> print(deformconv.explain(x, offset, weight, backend="reference"))  # doctest: +ELLIPSIS
        input (1, 3, 8, 8), offset (1, 18, 6, 6), weight (4, 3, 3, 3); float64, numpy on cpu
        forward: reference
          cpu: can run it, but backend="reference" was asked for
        ...
    """
    operands = {"input": input, "offset": offset, "weight": weight, "bias": bias, "mask": mask}
    if _any_torch(operands):
        from deformconv.torch import functional as torch_room

        return torch_room.explain(
            input, offset, weight, bias, stride, padding, dilation, mask,
            groups=groups, offset_groups=offset_groups, boundary=boundary, backend=backend,
        )  # fmt: skip
    spec = _spec(_arrays(operands), stride, padding, dilation, groups, offset_groups, boundary)
    return dispatch.explain(spec, "numpy", "cpu", backend)


def wanted_gradients(spec: ConvSpec, wanted: Collection[str] | None) -> tuple[str, ...]:
    """Check the names of the wanted gradients; None means one for every argument that was given."""
    absent = {name for name, given in (("bias", spec.biased), ("mask", spec.masked)) if not given}
    if wanted is None:
        return tuple(name for name in GRADIENTS if name not in absent)
    names = (wanted,) if isinstance(wanted, str) else tuple(wanted)
    for name in names:
        if name not in GRADIENTS:
            raise ValueError(f"`wanted` names {name!r}; expected some of {', '.join(GRADIENTS)}.")
        if name in absent:
            raise ValueError(f"`wanted` names {name!r}, but no `{name}` was passed: pass it or do not ask.")
    return names


def _spec(
    arrays: dict[str, Any],
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int | None,
    offset_groups: int | None,
    boundary: str,
) -> ConvSpec:
    operands: dict[str, Any] = {k: None if array is None else _operand(array) for k, array in arrays.items()}
    return conv_spec(
        **operands, stride=stride, padding=padding, dilation=dilation,
        groups=groups, offset_groups=offset_groups, boundary=boundary,
    )  # fmt: skip


def _any_torch(operands: dict[str, Any]) -> bool:
    """Whether the torch room must answer; torch itself need not be imported to know it."""
    return any(hasattr(type(value), "__torch_function__") for value in operands.values())


def _arrays(operands: dict[str, Any]) -> dict[str, Any]:
    return {
        name: None if value is None and name in ("bias", "mask") else _array(name, value) for name, value in operands.items()
    }


def _array(name: str, value: Any) -> np.ndarray:
    if not isinstance(value, np.ndarray):
        if value is None:
            raise TypeError(f"`{name}` is None; expected a NumPy array or a PyTorch tensor.")
        kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
        if kind.startswith("mxnet."):
            advice = "For MXNet's arrays and symbols there is `deformconv.gluon.deform_conv`."
        else:
            advice = f"Pass `numpy.asarray({name}, dtype=...)`."
        raise TypeError(f"`{name}` is a {kind}; expected a NumPy array or a PyTorch tensor. {advice}")
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(
            f"`{name}` is a masked array, whose own mask would be ignored; expected a plain array: pass "
            f"`{name}.filled(0)`, or leave samples out by the argument `mask`."
        )
    if not value.dtype.isnative:
        return value.astype(value.dtype.newbyteorder("="))
    return value if type(value) is np.ndarray else np.asarray(value)


def _operand(array: np.ndarray) -> Operand:
    return Operand(array.shape, _dtype_name(array.dtype))


@lru_cache(maxsize=64)
def _dtype_name(dtype: np.dtype) -> str:
    return dtype.name  # NumPy works it out anew each time
