"""The operator on MXNet's arrays and symbols: deformconv's signature, with `data` first."""

from __future__ import annotations

from operator import index
from typing import Any, NoReturn

from deformconv.gluon import calls
from deformconv.gluon.custom import Registered
from deformconv.ops.conv import operator
from deformconv.ops.window import count, integers, paddings
from deformconv.ops.words import unexpected
from deformconv.sampling.rule import check_boundary

__all__ = ["DEFORM_CONV", "deform_conv"]


def _complete(shapes: dict[str, list[int]], parameters: dict[str, Any], kept: dict[str, Any]) -> None:
    """The weight's input channels and the bias' size from the other shapes.

    A symbol may keep the weight's shape, with 0 for what is open, for a variable that carries none.
    """
    data, weight = shapes["data"], shapes["weight"]
    if not weight:
        weight += kept["weight_shape"] or ()
    if len(weight) > 1:
        if weight[1] < 1 and len(data) > 1 and data[1] > 0:
            weight[1] = data[1] // (parameters["groups"] or 1)
        if "bias" in shapes and not (shapes["bias"] and shapes["bias"][0] > 0) and weight[0] > 0:
            shapes["bias"] = [weight[0]]


def _checked(parameters: dict[str, Any]) -> dict[str, Any]:
    """Check what can be checked without shapes, where the symbol is written and not where it is run."""
    check_boundary(parameters["boundary"])
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
    return checked if several else index(value)


DEFORM_CONV = Registered(
    operator.DEFORM_CONV, "deformconv", _complete, words={"input": "data"}, kept=("weight_shape",), check_parameters=_checked
)


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
    **unknown: NoReturn,
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
    if unknown:
        raise unexpected(deform_conv, unknown)
    operands = {"data": data, "offset": offset, "weight": weight, "bias": bias, "mask": mask}
    parameters = {
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "offset_groups": offset_groups,
        "boundary": boundary,
    }
    return calls.call(DEFORM_CONV, operands, parameters, backend, name, {"weight_shape": None})
