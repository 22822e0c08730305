"""An operator as MXNet's engine, autograd and symbols know it: a custom operator.

MXNet calls these methods from C++, some of them from threads of its own. Of an exception it prints a traceback, and raises an
MXNetError without our text. So the text goes to stderr first.
"""

from __future__ import annotations

import atexit
import sys
from ast import literal_eval
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache, wraps
from typing import Any, NamedTuple

import mxnet as mx
import numpy as np
from mxnet.base import MXNetError
from mxnet.ndarray.ndarray import _DTYPE_MX_TO_NP

from deformconv import dispatch
from deformconv.errors import BackendError, ShapeError
from deformconv.gluon.arrays import device, view, write
from deformconv.numpy import run
from deformconv.ops.operator import Operand, Operator, Spec
from deformconv.ops.words import in_words

__all__ = ["Registered", "check_device"]

# What every operator's symbols keep as text beside its parameters, in graphs that may be saved: names and their meaning stay.
OTHERS = ("operands", "backend")


@atexit.register
def _finish() -> None:
    """Wait until MXNet has computed everything: it aborts a process that ends before an operator in Python has run."""
    with suppress(MXNetError):
        mx.nd.waitall()


# (shapes by MXNet's names, the operator's parameters, what else its symbols keep) -> None
Complete = Callable[[dict[str, list[int]], dict[str, Any], dict[str, Any]], None]


class Registered:
    """An operator as MXNet knows it.

    Args:
        operator: what it takes and what can run it.
        op_type: the custom operator's name in MXNet; graphs that are saved have it.
        complete: fills in, in place, what known shapes determine of the others: MXNet infers a block's deferred parameters
            that way. A shape that is not known is empty.
        words: MXNet's names of arguments and parameters, where they are not the operator's.
        kept: the names of what else a symbol keeps, for `complete`.
        check_parameters: checks what it can without shapes, where a symbol is written, and returns the parameters.
        sentences: what the operator's errors advise that does not hold for MXNet's, and what is said in its place.
    """

    def __init__(
        self,
        operator: Operator,
        op_type: str,
        complete: Complete,
        words: Mapping[str, str],
        kept: tuple[str, ...] = (),
        check_parameters: Callable[[dict[str, Any]], dict[str, Any]] = dict,
        sentences: Mapping[str, str] = {},
    ) -> None:
        self.operator, self.op_type, self.complete, self.kept = operator, op_type, complete, kept
        self.check_parameters = check_parameters
        self._words, self._sentences = dict(words), dict(sentences)
        self._ours = {word: name for name, word in words.items()}
        first = operator.names[0]
        self.first = self._words.get(first, first)  # MXNet's name of the first argument
        self.prop = type(f"{op_type}_Prop", (_Prop,), {"_op": self})
        mx.operator.register(op_type)(self.prop)

    def in_gluon_words(self, error: Exception) -> Exception:
        """The same error, calling arguments as MXNet does."""
        return in_words(error, self._words, self._sentences)

    def in_our_words(self, named: dict[str, Any]) -> dict[str, Any]:
        """The same values, by the operator's own names of arguments."""
        return {self._ours.get(name, name): value for name, value in named.items()}


def check_device(context: Any, name: str) -> None:
    """Raise unless the context's memory is one that the kernels reach."""
    found = device(context)
    if not found.startswith("cpu"):
        raise BackendError(
            f"`{name}` is on {found}; deformconv computes MXNet's arrays on the CPU: pass `{name}.as_in_context(mxnet.cpu())`, "
            "or run the net in the context mxnet.cpu()."
        )


def _told(method: Callable[..., Any]) -> Callable[..., Any]:
    """Write the text of a method's exception on stderr, since MXNet does not pass it on."""

    @wraps(method)
    def call(self: Any, *arguments: Any, **keywords: Any) -> Any:
        try:
            return method(self, *arguments, **keywords)
        except (ShapeError, BackendError, TypeError, ValueError) as error:
            kind = f"{type(error).__module__}.{type(error).__qualname__}".removeprefix("builtins.")
            print(f"{kind}: {self._op.in_gluon_words(error)}", file=sys.stderr, flush=True)
            raise

    return call


class _Computation(mx.operator.CustomOp):
    """One call's computation: forward, and backward from the inputs alone."""

    def __init__(self, op: Registered, spec: Spec, backend: str | None, operands: Sequence[str]) -> None:
        super().__init__()
        self._op, self._operator, self._spec, self._backend = op, op.operator, spec, backend
        self._operands = tuple(op.in_our_words(dict.fromkeys(operands)))

    @_told
    def forward(self, is_train: bool, req: list[str], in_data: list[Any], out_data: list[Any], aux: list[Any]) -> None:
        if req[0] == "null":
            return
        arrays: dict[str, Any] = dict.fromkeys(self._operator.names)
        arrays |= zip(self._operands, map(view, in_data), strict=True)
        out = view(out_data[0]) if req[0] == "write" else None
        output = run.forward_on(self._operator, self._module(backward=False), self._spec, list(arrays.values()), out)
        if out is None:
            write(out_data[0], req[0], output)

    @_told
    def backward(
        self,
        req: list[str],
        out_grad: list[Any],
        in_data: list[Any],
        out_data: list[Any],
        in_grad: list[Any],
        aux: list[Any],
    ) -> None:
        requests = {name: request for name, request in zip(self._operands, req, strict=True) if request != "null"}
        if not requests:
            return
        wanted = [name for name in requests if name in self._operator.differentiable]
        arrays = {name: view(array) for name, array in zip(self._operands, in_data, strict=True)}
        saved = [arrays.get(argument.name) for argument in self._operator.in_backward]
        module = self._module(backward=True)
        gradients = run.backward_on(self._operator, module, self._spec, view(out_grad[0]), saved, wanted)
        for name, request, array in zip(self._operands, req, in_grad, strict=True):
            if request != "null":
                gradient = getattr(gradients, name)
                write(array, request, np.zeros(array.shape, array.dtype) if gradient is None else gradient)

    def _module(self, backward: bool) -> Any:
        return dispatch.choose(self._operator, self._spec, "numpy", "cpu", backward, self._backend)


class _Parameters(NamedTuple):
    """What a symbol keeps as text, as Python's values."""

    operands: tuple[str, ...]
    backend: str | None
    kept: dict[str, Any]  # what this operator's symbols keep beside
    values: dict[str, Any]  # the operator's own parameters


@lru_cache(maxsize=256)
def _parameters(op: Registered, attributes: tuple[tuple[str, str], ...]) -> _Parameters:
    values, operator = dict(attributes), op.operator
    # The attributes of `mxnet.AttrScope` come beside ours, all between double underscores.
    names = {name for name in values if not name.startswith("__")}
    if names != {*operator.parameter_names, *OTHERS, *op.kept}:
        raise TypeError(
            f"the operator {op.op_type!r} has the attributes {', '.join(sorted(names)) or 'none'}; expected a symbol that "
            f"`deformconv.gluon.{operator.name}` made, in this version."
        )
    read = {name: literal_eval(values[name]) for name in names}
    own = {name: read[name] for name in operator.parameter_names}
    kept = {name: read[name] for name in op.kept}
    return _Parameters(**{name: read[name] for name in OTHERS}, kept=kept, values=own)


class _Prop(mx.operator.CustomOpProp):
    """What MXNet asks before it computes: the arguments' names, shapes and types.

    It does not declare which arrays the backward pass needs, though that is not all of them: MXNet applies the last declaration
    to all operators, and fails on one with fewer arguments after a forward pass of one with more.
    """

    _op: Registered

    def __init__(self, **attributes: str) -> None:
        super().__init__(need_top_grad=True)
        # They are read later: an exception in a constructor ends the process, by a segmentation fault in MXNet.
        self._attributes = tuple(attributes.items())

    @property
    def _parameters(self) -> _Parameters:
        return _parameters(self._op, self._attributes)

    @property
    def _operands(self) -> tuple[str, ...]:
        return self._parameters.operands

    @_told
    def list_arguments(self) -> list[str]:
        return list(self._operands)

    def list_outputs(self) -> list[str]:
        return ["output"]

    @_told
    def infer_shape(self, in_shape: list[list[int]]) -> tuple[list[Any], list[Any], list[Any]]:
        shapes = dict(zip(self._operands, map(list, in_shape), strict=True))
        self._op.complete(shapes, self._parameters.values, self._parameters.kept)
        if all(shape and min(shape) > 0 for shape in shapes.values()):
            output = list(self._spec(shapes, dict.fromkeys(shapes, "float32")).output_shape)
        else:
            output = [-1] * max(map(len, shapes.values()))  # MXNet asks again when it knows more
        return list(shapes.values()), [output], []

    @_told
    def infer_type(self, in_type: list[Any]) -> tuple[list[Any], list[Any], list[Any]]:
        known = next((dtype for dtype in in_type if dtype is not None), np.float32)
        types = [known if dtype is None else dtype for dtype in in_type]
        return types, [types[0]], []

    @_told
    def create_operator(self, ctx: Any, in_shapes: list[list[int]], in_dtypes: list[int]) -> _Computation:
        shapes = dict(zip(self._operands, in_shapes, strict=True))
        types = [np.dtype(_DTYPE_MX_TO_NP[number]).name for number in in_dtypes]
        spec = self._spec(shapes, dict(zip(self._operands, types, strict=True)))
        # Choosing here says why no backend can run before anything does.
        check_device(ctx, self._op.first)
        backend = self._parameters.backend
        dispatch.choose(self._op.operator, spec, "numpy", "cpu", False, backend)
        return _Computation(self._op, spec, backend, self._operands)

    def _spec(self, shapes: dict[str, list[int]], types: dict[str, str]) -> Spec:
        known = self._op.in_our_words({name: Operand(tuple(shape), types[name]) for name, shape in shapes.items()})
        operator = self._op.operator
        return operator.check(dict.fromkeys(operator.names) | known, self._parameters.values, None, True)
