"""What an operator tells everybody else, once: its arguments, parameters, checks and backends.

Dispatch, the front ends, the registration with PyTorch and `explain` are made from this and name no argument of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

from deformconv.errors import ShapeError

__all__ = [
    "DTYPES", "HALF", "Argument", "Backend", "Line", "Operand", "Operator", "Parameter", "Spec", "check_dtypes_and_devices",
    "checked_spec", "half_in_float32", "same_shape",
]  # fmt: skip


HALF = ("float16", "bfloat16")
DTYPES = (*HALF, "float32", "float64")


class Operand(NamedTuple):
    """What the checks need to know of an array."""

    shape: tuple[int, ...]
    dtype: str
    device: str = "cpu"


class Argument(NamedTuple):
    """An array that an operator takes."""

    name: str
    optional: bool = False
    # Its gradient from grad_output, for an argument whose values no gradient depends on. Backward passes do not see it, so it
    # must be optional.
    gradient: Callable[[Any], Any] | None = None
    by_image: bool = True  # whether its first axis is the batch
    by_position: bool = False  # whether its axes from the third on are the output's
    precise: bool = False  # whether it may be float32 beside others in half precision, as positions should be
    leaves_out: bool = False  # whether a 0 in it leaves a sample out
    keeps_format: bool = False  # whether its gradient lies in memory as it does: channels first or last
    differentiable: bool = True  # whether it has a gradient; if not, a call is constant in it
    # (spec, NumPy array): raise what is wrong with its values, which no shape shows. Values on a GPU are not looked at, since
    # that would wait for it, nor those that a compiler has not computed yet.
    check_values: Callable[[Any, Any], None] | None = None

    @property
    def in_backward(self) -> bool:
        """Whether gradients depend on its values."""
        return self.gradient is None


class Parameter(NamedTuple):
    """An argument that is no array."""

    name: str
    kind: Literal["int", "int?", "int[]", "float", "float?", "bool", "str"]  # in the words of PyTorch's schemas


class Line(NamedTuple):
    """A line of an operator's list of backends: a module of that name in its folder."""

    name: str
    by_name_only: bool = False


class Spec(Protocol):
    """A checked call, a frozen dataclass: everything that shapes, dtypes and parameters determine."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def __hash__(self) -> int: ...

    @property
    def dtype(self) -> str: ...

    @property
    def batch(self) -> int: ...

    @property
    def output_shape(self) -> tuple[int, ...]: ...

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the arguments that were given, by name, in the operator's order."""
        ...

    def with_given(self, names: Collection[str]) -> Spec:
        """The same call with these optional arguments given as well."""
        ...


class Backend(Protocol):
    """What a backend is: a module with these functions and values.

    `forward(spec, *operands)` and `backward(spec, grad_output, *operands, wanted=...)` get the spec in the dtype that the
    backend computes in, and arrays of that dtype. Beside half precision, arguments that are `precise` may be float32; NumPy's
    arrays of bfloat16, which NumPy does not have, may be its bits as uint16. Results are new arrays of the arguments' dtypes;
    backward returns them in the order of the operator's arguments, None for each that is not wanted. If a
    backend takes NumPy's memory and can run another library's calls, the keyword `library` says whose the arrays are. If it
    can write results into the caller's arrays, it takes them by the keyword `out`: an array, or backward's by name. Native
    arrays carry no graph, and their GPU is the current one. A backend of native arrays may have no `backward`: then PyTorch
    differentiates its `forward`. If it has `parts`, which cuts a call into smaller ones, PyTorch does that for one part after
    the other.
    """

    @property
    def TAKES(self) -> Literal["numpy", "native"]:
        """NumPy arrays, or the arrays of the caller's library."""
        ...

    @property
    def DETERMINISTIC(self) -> bool:
        """Whether results are the same bit for bit each time, where the caller's library is told to be deterministic.

        Else the backend is passed over then. One that is made of the library's own operations leaves it to them.
        """
        ...

    @property
    def forward(self) -> Callable[..., Any]:
        """The output."""
        ...

    def reasons_against(self, spec: Any, library: str, device: str, backward: bool) -> list[str]:
        """Why this backend cannot run a call, as sentences; none if it can."""
        ...

    def how(self, spec: Any, library: str, device: str, backward: bool) -> list[str]:
        """What there is to say of how a call is computed on a device, as sentences."""
        ...

    def computes_in(self, dtype: str, library: str) -> str:
        """The dtype that arrays of `dtype` are brought to before, and results brought back from: `dtype` if it takes them."""
        ...


def half_in_float32(dtype: str, library: str) -> str:
    """What most backends compute in: half precision of PyTorch and JAX is brought to float32 and rounded once, at the end."""
    return "float32" if dtype in HALF and library in ("torch", "jax") else dtype


def check_dtypes_and_devices(first: tuple[str, Operand], others: Mapping[str, Operand | None]) -> None:
    """Raise unless all arrays that were given have the floating-point dtype and the device of `first`, a name and its array."""
    name_of_first, expected = first
    for name, operand in {name_of_first: expected, **others}.items():
        if operand is None:
            continue
        if operand.dtype not in DTYPES:
            raise TypeError(f"`{name}` is {operand.dtype}; expected floating point: one of {', '.join(DTYPES)}. Cast it first.")
        if operand.dtype != expected.dtype:
            text = (
                f"`{name}` is {operand.dtype} and `{name_of_first}` is {expected.dtype}; expected one dtype for all "
                f"arrays: cast `{name}` to {expected.dtype}, or the others to {operand.dtype}."
            )
            if "float64" in (operand.dtype, expected.dtype):
                text += " NumPy makes float64 unless told otherwise."
            raise TypeError(text)
        if operand.device != expected.device:
            raise ValueError(
                f"`{name}` is on {operand.device} and `{name_of_first}` is on {expected.device}; expected one device for all "
                "arrays."
            )


def same_shape(spec: Spec, grad_output: Operand, form: str = "") -> None:
    """Raise unless `grad_output` has the output's shape and the call's dtype; `form` is that shape's axes in words."""
    if tuple(grad_output.shape) != spec.output_shape:
        expected = f"{spec.output_shape}: {form}" if form else f"{spec.output_shape}"
        raise ShapeError(f"`grad_output` has shape {tuple(grad_output.shape)}; expected the output's, {expected}.")
    check_grad_dtype(spec, grad_output)


def check_grad_dtype(spec: Spec, grad_output: Operand) -> None:
    if grad_output.dtype != spec.dtype:
        raise TypeError(
            f"`grad_output` is {grad_output.dtype}; expected the dtype of `{next(iter(spec.shapes))}`, {spec.dtype}."
        )


@dataclass(frozen=True, eq=False)
class Operator:
    """An operator, as everybody outside of its folder knows it."""

    name: str  # "deform_conv": the public functions' and PyTorch's schema's
    package: str  # where its backends are; "portable", for any array library, is one of them
    arguments: tuple[Argument, ...]
    parameters: tuple[Parameter, ...]
    backends: tuple[Line, ...]  # the first that can run a call runs it
    gradients: Callable[..., Any]  # a named tuple with a field for each argument, None by default
    # (operands by name, parameters by name, the rank of the function that was called, whether to remember) -> spec
    check: Callable[[Mapping[str, Operand | None], Mapping[str, Any], int | None, bool], Spec]
    check_grad_output: Callable[[Any, Operand], None] = same_shape
    # A call's parameters as PyTorch's registry keeps them, and back; `plain` from unchecked ones and the operands' shapes.
    pack: Callable[[Any], tuple[Any, ...]] = lambda spec: ()
    unpack: Callable[..., dict[str, Any]] = lambda *values: {}
    plain: Callable[[Mapping[str, Any], Sequence[Any]], tuple[Any, ...]] = lambda parameters, shapes: ()
    # (the rank of the function that was called, the arguments' numbers of axes) -> whether there is a batch axis; None where
    # these numbers fit neither way
    has_batch: Callable[[int | None, Sequence[int | None]], bool | None] = lambda rank, axes: True
    autocast: bool = True  # whether PyTorch's autocast brings its tensors to half precision, as it does with a convolution's
    # The names of arguments in which the output is linear together, where those that are left out of them are fixed.
    linear: tuple[tuple[str, ...], ...] = ()

    names: tuple[str, ...] = field(init=False)  # the arguments'
    optional: frozenset[str] = field(init=False)  # their names
    in_backward: tuple[Argument, ...] = field(init=False)  # those that gradients depend on
    differentiable: tuple[str, ...] = field(init=False)  # the names of those that have a gradient
    parameter_names: tuple[str, ...] = field(init=False)
    has_values_to_check: bool = field(init=False)

    def __post_init__(self) -> None:
        for argument in self.arguments:
            if not (argument.in_backward or argument.optional):
                raise ValueError(f"`{argument.name}` is left out of the backward pass, so it must be optional.")
        # Plain attributes, since compilers that read a call cannot follow functools.cached_property.
        for name, value in {
            "names": tuple(argument.name for argument in self.arguments),
            "optional": frozenset(argument.name for argument in self.arguments if argument.optional),
            "in_backward": tuple(argument for argument in self.arguments if argument.in_backward),
            "differentiable": tuple(argument.name for argument in self.arguments if argument.differentiable),
            "has_values_to_check": any(argument.check_values is not None for argument in self.arguments),
            "parameter_names": tuple(parameter.name for parameter in self.parameters),
        }.items():
            object.__setattr__(self, name, value)

    def wanted(self, spec: Spec, names: Collection[str] | None) -> tuple[str, ...]:
        """Check the names of wanted gradients; None means one for every argument that was given."""
        given = spec.shapes
        if names is None:
            return tuple(argument.name for argument in self.arguments if argument.name in given and argument.differentiable)
        names = (names,) if isinstance(names, str) else tuple(names)
        for name in names:
            if name not in self.differentiable:
                raise ValueError(f"`wanted` names {name!r}; expected some of {', '.join(self.differentiable)}.")
            if name not in given:
                raise ValueError(f"`wanted` names {name!r}, but no `{name}` was passed: pass it or do not ask.")
        return names

    def given_in_backward(self, spec: Spec) -> list[str]:
        """The names of the arguments that were given and that gradients depend on."""
        return [argument.name for argument in self.in_backward if argument.name in spec.shapes]

    def described(self, spec: Spec) -> str:
        """The shapes of a call in words, without arguments that no gradient depends on: others determine their shapes."""
        shown = {argument.name for argument in self.in_backward}
        return ", ".join(f"{name} {shape}" for name, shape in spec.shapes.items() if name in shown)


def checked_spec(
    operator: Operator, operands: Mapping[str, Operand | None], parameters: Mapping[str, Any], rank: int | None, cached: bool
) -> Spec:
    """The checked call. Positions beside half precision may be float32: bfloat16 has a position of 20 to 0.125 pixels."""
    first: Any = operands[operator.names[0]]
    if first.dtype in HALF:
        precise = {argument.name for argument in operator.arguments if argument.precise}
        operands = {
            name: operand._replace(dtype=first.dtype) if operand and name in precise and operand.dtype == "float32" else operand
            for name, operand in operands.items()
        }
    return operator.check(operands, parameters, rank, cached)
