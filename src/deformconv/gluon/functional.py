"""The operator on MXNet's arrays and symbols: deformconv's signature, with `data` first."""

from __future__ import annotations

import operator
from typing import Any

import mxnet as mx
from mxnet.ndarray import NDArray
from mxnet.symbol import Symbol

from deformconv import dispatch
from deformconv.errors import ShapeError
from deformconv.gluon.arrays import operand
from deformconv.gluon.custom import check_device, in_gluon_words, in_our_words, register
from deformconv.ops.conv.operator import DEFORM_CONV
from deformconv.ops.conv.spec import ConvSpec, conv_spec
from deformconv.ops.window import count, integers, paddings
from deformconv.sampling.rule import check_boundary

__all__ = ["deform_conv"]

OP_TYPE = "deformconv"  # graphs that are saved have it


def _complete(shapes: dict[str, list[int]], parameters: dict[str, Any]) -> None:
    """The weight's input channels and the bias' size from the other shapes."""
    data, weight = shapes["data"], shapes["weight"]
    if len(weight) > 1:
        if weight[1] < 1 and len(data) > 1 and data[1] > 0:
            weight[1] = data[1] // (parameters["groups"] or 1)
        if "bias" in shapes and not (shapes["bias"] and shapes["bias"][0] > 0) and weight[0] > 0:
            shapes["bias"] = [weight[0]]


DeformConvProp = register(DEFORM_CONV, OP_TYPE, _complete)


def deform_conv(
    data: Any,
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
    name: str | None = None,
) -> Any:
    """Convolve with a kernel whose taps are moved by `offset` and, in v2, weighed by `mask`.

    It is `deformconv.deform_conv`, where the formula stands, with `data` for `input`.

    NDArrays give an NDArray, at once and under `mxnet.autograd.record` with its gradient; Symbols give a Symbol, for
    `gluon.SymbolBlock`, `hybridize` and Module. It computes on the CPU, forward and backward, in float32 and float64.

    Args:
        data: shape (N, C_in, *S), with 1 to 3 spatial axes.
        offset: shape (N, offset_groups*K*D, *O), in input pixels; group-major, then tap (row-major), then dy before dx.
        weight: shape (C_out, C_in/groups, *kernel). As a Symbol it carries at least the kernel and C_out, from which the number
            of axes and the rest follow: `mxnet.sym.var("weight", shape=(8, 0, 3, 3))`.
        bias: shape (C_out,), or None.
        stride, padding, dilation, groups, offset_groups, boundary, backend: as in `deformconv.deform_conv`. MXNet's own v1 has
            the rule boundary="inside", its v2 "zeros".
        mask: shape (N, offset_groups*K, *O), a factor for every sample; None for v1.
        name: the Symbol's name.

    Returns:
        The output, shape (N, C_out, *O), of the kind that was passed.

    Raises:
        ShapeError: a shape or a parameter's value does not fit.
        TypeError: the arguments are not all NDArrays, or all Symbols, or not of one floating-point dtype.
        ValueError: `boundary` or `backend` is unknown, or the arrays are in different contexts.
        BackendError: the arrays are on a GPU, or no backend, or not the named one, can run the call.
        MXNetError: all of these, when a graph of Symbols is bound or run; MXNet passes on no text, which is then on stderr.

    Example:
        >>> import mxnet as mx
        >>> from deformconv.gluon import deform_conv
        >>> x, weight = mx.nd.ones((10, 3, 100, 100)), mx.nd.ones((5, 3, 3, 3))
        >>> offset, mask = mx.nd.zeros((10, 18, 100, 100)), mx.nd.ones((10, 9, 100, 100))
        >>> offset.attach_grad()
        >>> with mx.autograd.record():
        ...     y = deform_conv(x, offset, weight, padding=1, mask=mask)
        >>> y.backward()
        >>> y.shape, offset.grad.shape
        ((10, 5, 100, 100), (10, 18, 100, 100))

    Papers: v1, arXiv 1703.06211, equations 2 and 3; v2, arXiv 1811.11168, equation 1.
    """
    operands = {"data": data, "offset": offset, "weight": weight, "bias": bias, "mask": mask}
    parameters = {
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "offset_groups": offset_groups,
        "boundary": boundary,
    }
    return call(operands, parameters, backend, name)


def call(
    operands: dict[str, Any],
    parameters: dict[str, Any],
    backend: str | None = None,
    name: str | None = None,
    weight_shape: tuple[int, ...] | None = None,
) -> Any:
    """Run the operator or write its symbol; `weight_shape`, where known, is for a Symbol that carries none, 0 what is open."""
    operands = {key: value for key, value in operands.items() if value is not None or key not in DEFORM_CONV.optional}
    symbolic = _are_symbols(operands)
    if symbolic:
        parameters = _checked(parameters, backend)
    else:
        spec = _spec(operands, parameters, backend)
        parameters = {key: getattr(spec, key) for key in parameters}
    settings = parameters | {"backend": backend, "operands": tuple(operands), "weight_shape": weight_shape}
    attributes = {key: repr(value) for key, value in settings.items()}
    # mxnet.np's arrays are NDArrays, and its symbols Symbols, which an operator of one's own takes in the older form only.
    values = {key: _plain_layout(value.as_nd_ndarray()) for key, value in operands.items()}
    if symbolic:
        result = mx.sym.Custom(**values, op_type=OP_TYPE, **attributes)
    else:
        result = mx.nd.Custom(*values.values(), op_type=OP_TYPE, **attributes)
    result = _plain_layout(result, name)
    return result.as_np_ndarray() if isinstance(operands["data"], (mx.np.ndarray, mx.sym.np._Symbol)) else result


def _plain_layout(value: Any, name: str | None = None) -> Any:
    """The same numbers, in MXNet's own order whatever follows or precedes, and in memory that lives as long as it is read.

    Arrays that a convolution or another operator of oneDNN wrote may lie in its blocked order. For an operator in Python MXNet
    1.9.1 reorders them into temporary memory, and frees it before that operator, on a thread of its own, has read it: forward
    for its inputs, backward for the output's gradient. So an operator without oneDNN copies each of them. In a graph that must
    not be one that MXNet runs in place, or else the array keeps its order; but a variable is not overwritten, and only a
    product infers its shape backwards.
    """
    if isinstance(value, Symbol) and value.get_children() is not None:
        return mx.sym.slice_axis(value, axis=0, begin=0, end=None, name=name)
    F = mx.sym if isinstance(value, Symbol) else mx.nd
    return F._internal._mul_scalar(value, scalar=1.0)


def _are_symbols(operands: dict[str, Any]) -> bool:
    """Whether the operands are Symbols; they may as well be NDArrays, but nothing else and not both."""
    kind = Symbol if isinstance(operands["data"], Symbol) else NDArray
    for name, value in operands.items():
        if not isinstance(value, kind):
            if value is None:
                raise TypeError(f"`{name}` is None; expected an MXNet {kind.__name__}.")
            found = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
            text = f"`{name}` is a {found}; expected an MXNet {kind.__name__}"
            if name != "data":
                text += ", as `data` is"
            text += "." if isinstance(value, (Symbol, NDArray)) else f": pass `mxnet.nd.array({name})`."
            raise TypeError(text)
    return kind is Symbol


def _spec(operands: dict[str, Any], parameters: dict[str, Any], backend: str | None) -> ConvSpec:
    """Check a call on arrays before MXNet sees it, since MXNet passes on no text."""
    for name, array in operands.items():
        check_array(name, array)
    shapes: dict[str, Any] = in_our_words({name: operand(array) for name, array in operands.items()})
    try:
        spec = conv_spec(**shapes, **parameters)
    except (ShapeError, TypeError, ValueError) as error:
        raise in_gluon_words(error) from None
    for backward in {False, mx.autograd.is_recording()}:
        dispatch.choose(DEFORM_CONV, spec, "numpy", "cpu", backward, backend)
    return spec


def check_array(name: str, array: NDArray) -> None:
    """Raise unless the kernels can reach the array's memory."""
    check_device(array.context, name)
    if array.stype != "default":
        raise TypeError(f"`{name}` is stored as {array.stype}; expected a dense array: `{name}.tostype('default')`.")


def _checked(parameters: dict[str, Any], backend: str | None) -> dict[str, Any]:
    """Check what can be checked without shapes, where the symbol is written and not where it is run."""
    check_boundary(parameters["boundary"])
    dispatch.check_name(DEFORM_CONV, backend)
    checked = dict(parameters)
    for name in ("stride", "padding", "dilation"):
        checked[name] = _number_or_numbers(name, parameters[name])
    for name in ("groups", "offset_groups"):
        if parameters[name] is not None:
            checked[name] = count(name, parameters[name])
    return checked


def _number_or_numbers(name: str, value: Any) -> Any:
    """A parameter of the window, checked; one number for all axes stays one, since only the shapes know how many axes."""
    several = isinstance(value, (tuple, list, str))
    # A flat list of 4 or 6 is a mistake, of which `paddings` says so.
    D = {1: 1, 3: 3, 6: 3}.get(len(value), 2) if isinstance(value, (tuple, list)) else 2
    checked = paddings(value, D) if name == "padding" else integers(name, value, D, 1)
    return checked if several else operator.index(value)
