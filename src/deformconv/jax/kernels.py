"""The kernels of any operator, as XLA calls them on the CPU, with its own memory for arguments and results.

A call travels as text, in an attribute of the program: programs that are saved outlive the process that made them.
"""

from __future__ import annotations

from ast import literal_eval
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deformconv import dispatch
from deformconv.errors import BackendError
from deformconv.jax import ffi
from deformconv.numpy import run
from deformconv.ops.operator import Operand, Operator, Spec

__all__ = ["backward_call", "forward_call", "make_known"]

FORWARD, BACKWARD = "deformconv_forward", "deformconv_backward"  # XLA's targets; saved programs have these names
_FORM = 1  # of a call's text, in which it stands first
# By package and name. A program may be a stranger's file, which must not choose what is imported.
_known: dict[tuple[str, str], Operator] = {}


def make_known(operator: Operator) -> None:
    """Let programs, also those that another process has saved, call an operator's kernels."""
    _known[operator.package, operator.name] = operator


def forward_call(operator: Operator, spec: Spec, arrays: Sequence[Any], channels_last: bool) -> Any:
    """The output, by XLA's call of the kernels; `arrays` are those that were given, in the operator's order.

    With `channels_last` the caller has moved the input's channels from the last axis, and will move the output's there: in
    memory they stay last.
    """
    names = tuple(spec.shapes)
    (output,) = _call(FORWARD, operator, spec, names, arrays, ("output",), channels_last)
    return output


def backward_call(
    operator: Operator, spec: Spec, grad_output: Any, arrays: Sequence[Any], wanted: Sequence[str], channels_last: bool
) -> list[Any]:
    """The wanted gradients, in the order of `wanted`, as `forward_call`; `arrays` are those that gradients depend on."""
    names = ("output", *operator.given_in_backward(spec))
    return _call(BACKWARD, operator, spec, names, [grad_output, *arrays], tuple(wanted), channels_last)


def _call(
    target: str, operator: Operator, spec: Spec, names: Sequence[str], arrays: Sequence[Any], results: tuple[str, ...],
    channels_last: bool,
) -> list[Any]:  # fmt: skip
    reason = ffi.reason_against()
    if reason is not None:
        raise BackendError(
            f'{reason}: install another version of JAX or of deformconv, or pass backend="portable", which is slower.'
        )
    call = _Call(operator, spec, results, channels_last)
    arrays = [jnp.moveaxis(array, 1, -1) if call.last(name) else array for name, array in zip(names, arrays, strict=True)]
    outs = [jax.ShapeDtypeStruct(call.shape_in_memory(name), jnp.dtype(spec.dtype)) for name in results]
    found = jax.ffi.ffi_call(target, outs)(*arrays, call=call.text())
    return [jnp.moveaxis(array, -1, 1) if call.last(name) else array for name, array in zip(results, found, strict=True)]


class _Call(NamedTuple):
    """What a program keeps of a call."""

    operator: Operator
    spec: Spec
    results: tuple[str, ...]  # "output", or the wanted gradients
    channels_last: bool  # in memory, of what keeps its format

    def text(self) -> str:
        shapes = {name: tuple(map(int, shape)) for name, shape in self.spec.shapes.items()}
        package, name, parameters = self.operator.package, self.operator.name, self.operator.pack(self.spec)
        return repr((_FORM, package, name, self.spec.dtype, shapes, parameters, self.results, self.channels_last))

    def last(self, name: str) -> bool:
        """Whether the channels of an array lie last in memory."""
        return self.channels_last and (name == "output" or self._keeps_format(name))

    def _keeps_format(self, name: str) -> bool:
        return any(
            argument.name == name and argument.by_image and argument.keeps_format for argument in self.operator.arguments
        )

    def shape(self, name: str) -> tuple[int, ...]:
        return self.spec.output_shape if name == "output" else self.spec.shapes[name]

    def shape_in_memory(self, name: str) -> tuple[int, ...]:
        shape = self.shape(name)
        return (shape[0], *shape[2:], shape[1]) if self.last(name) else shape

    def memory(self, name: str) -> Callable[[int], np.ndarray]:
        """What makes an array (N, C, *S) of an address."""
        return ffi.memory(self.shape(name), self.spec.dtype, self.last(name))

    def reader(self, given: Iterable[str], names: Sequence[str]) -> Callable[[list[int]], list[np.ndarray | None]]:
        """What makes arrays of the addresses of those given: one for each of `names`, None for one that is not given."""
        views, places = [self.memory(name) for name in given], {name: place for place, name in enumerate(given)}
        chosen = [places.get(name) for name in names]
        return lambda addresses: [None if place is None else views[place](addresses[place]) for place in chosen]


def _read(text: bytes) -> _Call:
    form, *content = literal_eval(text.decode())
    if form != _FORM:
        raise ValueError(
            f"a program that another version of deformconv compiled was called (form {form} of a call, expected {_FORM}): "
            "compile, or export, it again with this version."
        )
    package, name, dtype, shapes, parameters, results, channels_last = content
    operator = _known.get((package, name))
    if operator is None:
        raise ValueError(
            f"a program calls the operator {name!r} of {package!r}, which JAX does not know in this process: import what makes "
            "it known first."
        )
    operands: dict[str, Operand | None] = dict.fromkeys(operator.names)
    operands |= {name: Operand(shape, dtype) for name, shape in shapes.items()}
    return _Call(operator, operator.check(operands, operator.unpack(*parameters), None, True), results, channels_last)


Computation = Callable[["list[int]", "list[int]"], None]


@lru_cache(maxsize=1024)
def _forward_of(text: bytes) -> Computation:
    call = _read(text)
    operator, spec = call.operator, call.spec
    module = dispatch.choose(operator, spec, "numpy", "cpu", False)
    arrays, output = call.reader(spec.shapes, operator.names), call.memory("output")

    def compute(arguments: list[int], results: list[int]) -> None:
        run.forward_on(operator, module, spec, arrays(arguments), output(results[0]))

    return compute


@lru_cache(maxsize=1024)
def _backward_of(text: bytes) -> Computation:
    call = _read(text)
    operator, spec, wanted = call.operator, call.spec, call.results
    module = dispatch.choose(operator, spec, "numpy", "cpu", True)
    arrays = call.reader(operator.given_in_backward(spec), [argument.name for argument in operator.in_backward])
    output, found = call.memory("output"), [call.memory(name) for name in wanted]

    def compute(arguments: list[int], results: list[int]) -> None:
        grad_output, *others = arguments
        out = {name: view(address) for name, view, address in zip(wanted, found, results, strict=True)}
        run.backward_on(operator, module, spec, output(grad_output), arrays(others), wanted, out)

    return compute


def _forward(text: bytes, arguments: list[int], results: list[int]) -> None:
    _forward_of(text)(arguments, results)


def _backward(text: bytes, arguments: list[int], results: list[int]) -> None:
    _backward_of(text)(arguments, results)


# At the import, since a program that was saved, and is loaded, calls them without having been compiled here.
if find_spec("llvmlite") is not None and ffi.reason_against() is None:
    ffi.register(FORWARD, _forward)
    ffi.register(BACKWARD, _backward)
