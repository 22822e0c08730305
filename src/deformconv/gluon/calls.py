"""How a public function's call on MXNet's arrays or symbols reaches an operator."""

from __future__ import annotations

from typing import Any

import mxnet as mx
from mxnet.ndarray import NDArray
from mxnet.symbol import Symbol

from deformconv import dispatch
from deformconv.errors import ShapeError
from deformconv.gluon.arrays import operand
from deformconv.gluon.custom import Registered, check_device
from deformconv.ops.operator import Operand

__all__ = ["call", "check_array"]


def call(
    op: Registered,
    operands: dict[str, Any],
    parameters: dict[str, Any],
    backend: str | None,
    name: str | None,
    kept: dict[str, Any],
) -> Any:
    """Run the operator or write its symbol.

    `operands` are by MXNet's names of arguments, and `kept` is what a symbol keeps beside the parameters.
    """
    names = zip(operands.items(), op.in_our_words(operands), strict=True)
    operands = {word: value for (word, value), name in names if value is not None or name not in op.operator.optional}
    symbolic = _are_symbols(op, operands)
    if symbolic:
        dispatch.check_name(op.operator, backend)
        parameters = op.check_parameters(parameters)
    else:
        parameters = _checked(op, operands, parameters, backend)
    settings = parameters | {"backend": backend, "operands": tuple(operands)} | kept
    attributes = {key: repr(value) for key, value in settings.items()}
    # mxnet.np's arrays are NDArrays, and its symbols Symbols, which an operator of one's own takes in the older form only.
    values = {key: _plain_layout(value.as_nd_ndarray()) for key, value in operands.items()}
    if symbolic:
        result = mx.sym.Custom(**values, op_type=op.op_type, **attributes)
    else:
        result = mx.nd.Custom(*values.values(), op_type=op.op_type, **attributes)
    result = _plain_layout(result, name)
    return result.as_np_ndarray() if isinstance(operands[op.first], (mx.np.ndarray, mx.sym.np._Symbol)) else result


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


def _are_symbols(op: Registered, operands: dict[str, Any]) -> bool:
    """Whether the operands are Symbols; they may as well be NDArrays, but nothing else and not both."""
    kind = Symbol if isinstance(operands[op.first], Symbol) else NDArray
    for name, value in operands.items():
        if not isinstance(value, kind):
            if value is None:
                raise TypeError(f"`{name}` is None; expected an MXNet {kind.__name__}.")
            found = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
            text = f"`{name}` is a {found}; expected an MXNet {kind.__name__}"
            if name != op.first:
                text += f", as `{op.first}` is"
            text += "." if isinstance(value, (Symbol, NDArray)) else f": pass `mxnet.nd.array({name})`."
            raise TypeError(text)
    return kind is Symbol


def _checked(op: Registered, operands: dict[str, Any], parameters: dict[str, Any], backend: str | None) -> dict[str, Any]:
    """Check a call on arrays before MXNet sees it, since MXNet passes on no text; the parameters as the check found them."""
    operator = op.operator
    for name, array in operands.items():
        check_array(name, array)
    given: dict[str, Operand] = op.in_our_words({name: operand(array) for name, array in operands.items()})
    try:
        spec = operator.check(dict.fromkeys(operator.names) | given, parameters, None, True)
    except (ShapeError, TypeError, ValueError) as error:
        raise op.in_gluon_words(error) from None
    for backward in {False, mx.autograd.is_recording()}:
        dispatch.choose(operator, spec, "numpy", "cpu", backward, backend)
    return operator.unpack(*operator.pack(spec))


def check_array(name: str, array: NDArray) -> None:
    """Raise unless the kernels can reach the array's memory."""
    check_device(array.context, name)
    if array.stype != "default":
        raise TypeError(f"`{name}` is stored as {array.stype}; expected a dense array: `{name}.tostype('default')`.")
