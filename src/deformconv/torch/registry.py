"""An operator and its backward in PyTorch's registry, where compilers, exporters, tracers and modes see them.

`deformconv::NAME` and `deformconv::NAME_backward` have a kernel for every device, a fake kernel that computes shapes alone,
derivatives, a rule for vmap and a count of operations. Eager calls go past PyTorch's dispatcher to the same `run`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from deformconv.errors import BackendError
from deformconv.ops.folding import fold_backward, fold_forward
from deformconv.ops.operator import Operator, Spec
from deformconv.torch import autograd, modes, run
from deformconv.torch.tensors import described, device_of, memory_format, operand, requires_grad

__all__ = ["Export", "Registered", "check_opset"]

_library = torch.library.Library("deformconv", "DEF")
# The types of parameters whose values can be the key of a plan; None and tuples of integers can as well.
_TYPES: dict[str, frozenset[type]] = {
    "int": frozenset((int,)),
    "int?": frozenset((int,)),
    "int[]": frozenset((int, str)),  # one number for all axes, or "same"
    "float": frozenset((float, int)),
    "float?": frozenset((float, int)),
    "bool": frozenset((bool,)),
    "str": frozenset((str,)),
}
_TAGS = (torch.Tag.pt2_compliant_tag,)


class Export(NamedTuple):
    """How an operator's calls are written as nodes of ONNX."""

    write: Callable[..., Tensor]  # spec, operands -> output
    first_opset: int  # that has such nodes


def check_opset(first: int, node: str) -> None:
    """Raise where torch.onnx.export writes for an opset that has no such node."""
    opset = modes.exported_opset()
    if opset is not None and opset < first:
        raise BackendError(
            f"This export is for ONNX opset {opset}, which has no {node}; expected torch.onnx.export(..., "
            f"opset_version={first}) or newer."
        )


class Registered:
    """An operator as PyTorch knows it.

    Args:
        operator: what it takes and what can run it.
        fold_forward, fold_backward: how vmap's axis becomes part of one call, if it can be more than a larger batch or a loop.
        export: how a call is written as a node of ONNX, if there is one.
        flops: the multiplications and additions of a forward call, (shapes of the operands and the parameters, shape of the
            output) -> number, and of a backward call, (shape of grad_output, shapes of the operands that gradients depend on
            and the parameters, names of wanted gradients) -> number.
    """

    def __init__(
        self,
        operator: Operator,
        *,
        fold_forward: Callable[..., Tensor] | None = None,
        fold_backward: Callable[..., Any] | None = None,
        export: Export | None = None,
        flops: tuple[Callable[..., int], Callable[..., int]] | None = None,
    ) -> None:
        self.operator, self.export, self._flops = operator, export, flops
        self._fold_forward, self._fold_backward = fold_forward, fold_backward
        self.expected_types = tuple(_TYPES[parameter.kind] for parameter in operator.parameters)
        # The types of parameters of calls that were found plain, and which of them are tuples, whose elements are looked at.
        self.plain_types: dict[tuple[type, ...], tuple[int, ...]] = {}
        self._count = len(operator.arguments)
        self._saved = [number for number, argument in enumerate(operator.arguments) if argument.in_backward]
        name, values = operator.name, [f"{parameter.kind} {parameter.name}" for parameter in operator.parameters]
        tensors = {a.name: f"Tensor{'?' if a.optional else ''} {a.name}" for a in operator.arguments}
        in_backward = [tensors[argument.name] for argument in operator.in_backward]
        forward = ", ".join([*tensors.values(), *values, "str? backend"])
        backward = ", ".join(["Tensor grad_output", *in_backward, *values, "str? backend", "bool[] wanted"])
        _library.define(f"{name}({forward}) -> Tensor", tags=_TAGS)
        _library.define(f"{name}_backward({backward}) -> Tensor[]", tags=_TAGS)
        self.forward_op = getattr(torch.ops.deformconv, name).default
        self.backward_op = getattr(torch.ops.deformconv, f"{name}_backward").default
        for op, *rules in (
            (self.forward_op, self._forward_kernel, self._forward_fake, self._forward_vmap, self._forward_autograd),
            (self.backward_op, self._backward_kernel, self._backward_fake, self._backward_vmap, self._backward_autograd),
        ):
            self._register(op, *rules)
        self.eager_function, self.function, self.backward_function = autograd.functions(name)

    @staticmethod
    def _register(op: Any, kernel: Any, fake: Any, vmap: Any, derivative: Any) -> None:
        name = op.name()
        _library.impl(name.partition("::")[2], kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(name, fake, lib=_library)
        if hasattr(torch.library, "register_vmap"):  # since PyTorch 2.5; before, vmap calls a registered operator one by one
            torch.library.register_vmap(name, vmap, lib=_library)
        _library.impl(name.partition("::")[2], derivative, "Autograd", with_keyset=True)

    # Calling it

    def call(self, backend: str | None, values: Sequence[Any], *operands: Tensor | None) -> Tensor:
        """Call the operator on unchecked tensors, with its parameters as the registry keeps them."""
        if not modes.compiling():
            self._let_modes_count()
        result: Tensor = self.forward_op(*operands, *values, backend)
        return result

    def forward(self, spec: Spec, backend: str | None, *operands: Tensor | None) -> Tensor:
        """Call the operator on checked tensors."""
        return self.call(backend, self.operator.pack(spec), *operands)

    def backward(
        self, spec: Spec, backend: str | None, grad_output: Tensor, operands: Sequence[Tensor | None], wanted: Collection[str]
    ) -> Any:
        """Call the backward operator, which returns what is wanted and nothing else."""
        flags = [name in wanted for name in self.operator.names]
        results = iter(self.backward_op(grad_output, *operands, *self.operator.pack(spec), backend, flags))
        return self.operator.gradients(*(next(results) if flag else None for flag in flags))

    def exporter(self) -> Export:
        """What writes nodes of ONNX; it raises where there are none, and in the older exporter, which knows no such nodes."""
        if self.export is None:
            raise BackendError(f"{self.operator.name} cannot be exported to ONNX, which has no such node.")
        if not modes.compiling() and modes.traced():
            raise BackendError(
                "torch.onnx.export(..., dynamo=False) cannot export deformconv's operators; expected dynamo=True, with "
                f"opset_version={self.export.first_opset} or newer."
            )
        return self.export

    def write_onnx(self, spec: Spec, *operands: Tensor | None) -> Tensor:
        """The call as a node of ONNX."""
        return self.exporter().write(spec, *operands)

    def saved(self, operands: Sequence[Any]) -> list[Any]:
        """The operands that gradients depend on."""
        return [operands[number] for number in self._saved]

    def spec(self, operands: Sequence[Tensor | None], values: Sequence[Any]) -> Spec:
        """Check a call on tensors, with its parameters as the registry keeps them."""
        return run.spec_of(self.operator, described(self.operator, operands), self.operator.unpack(*values))

    def _backward_spec(self, grad_output: Tensor, saved: Sequence[Tensor | None], values: Sequence[Any]) -> Spec:
        """The checked call of a backward pass, as if every argument that it does not see had been given.

        It may be asked for the gradient by such an argument.
        """
        operands: list[Tensor | None] = [None] * self._count
        for number, tensor in zip(self._saved, saved, strict=True):
            operands[number] = tensor
        unseen = [argument.name for argument in self.operator.arguments if not argument.in_backward]
        spec = self.spec(operands, values).with_given(unseen)
        self.operator.check_grad_output(spec, operand(grad_output))
        return spec

    # Kernels

    def _forward_kernel(self, *arguments: Any) -> Tensor:
        operands, values, backend = self._split(arguments)
        with modes.untraced():
            plan = run.plan_for(self, self.spec(operands, values), device_of(operands[0]), False, backend)
            return run.forward(plan, *operands)

    def _backward_kernel(self, *arguments: Any) -> list[Tensor]:
        grad_output, saved, values, backend, wanted = self._split_backward(arguments)
        with modes.untraced():
            spec = self._backward_spec(grad_output, saved, values)
            plan = run.plan_for(self, spec, device_of(grad_output), True, backend)
            gradients = run.backward(plan, grad_output, saved, wanted)
        return [gradient for gradient in gradients if gradient is not None]

    def _forward_fake(self, *arguments: Any) -> Tensor:
        operands, values, _ = self._split(arguments)
        return _empty(self.spec(operands, values).output_shape, operands[0], self.operator.arguments[0].keeps_format)

    def _backward_fake(self, *arguments: Any) -> list[Tensor]:
        grad_output, saved, values, _, wanted = self._split_backward(arguments)
        shapes = self._backward_spec(grad_output, saved, values).shapes
        like = dict(zip((argument.name for argument in self.operator.in_backward), saved, strict=True))
        first = saved[0]
        return [
            _empty(shapes[argument.name], like.get(argument.name, first), argument.keeps_format)
            for argument in self.operator.arguments
            if argument.name in wanted
        ]

    # Derivatives

    def _forward_autograd(self, keyset: Any, *arguments: Any) -> Tensor:
        operands, values, backend = self._split(arguments)
        # A transform that is on here is recorded by a compiler, which cannot record the Function.
        if modes.forward_mode() or modes.transformed():
            return autograd.decomposed(self, self.spec(operands, values), backend, *operands)
        if requires_grad(*operands):
            with modes.untraced():
                spec = self.spec(operands, values)
            result: Tensor = self.function.apply(self, spec, backend, *operands)
            return result
        result = self.forward_op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)
        return result

    def _backward_autograd(self, keyset: Any, *arguments: Any) -> list[Tensor]:
        grad_output, saved, values, backend, wanted = self._split_backward(arguments)
        if modes.forward_mode() or requires_grad(grad_output, *saved):
            spec = self._backward_spec(grad_output, saved, values)
            gradients = autograd.backward(self, spec, backend, grad_output, saved, wanted)
            return [gradient for gradient in gradients if gradient is not None]
        found: list[Tensor] = self.backward_op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)
        return found

    # vmap

    def fold_forward(self, one: Any, spec: Spec, B: int, dims: Sequence[int | None], operands: Sequence[Any]) -> Tensor:
        """The outputs of B calls, B in front, by `one` call of the operator or several."""
        if self._fold_forward is not None:
            return self._fold_forward(one, spec, B, dims, operands)
        return fold_forward(self.operator, one, spec, B, dims, operands)

    def fold_backward(
        self, one: Any, spec: Spec, B: int, dims: Sequence[int | None], operands: Sequence[Any], wanted: Sequence[str]
    ) -> Any:
        """The gradients of B calls, B in front; `operands` are grad_output and what gradients depend on."""
        if self._fold_backward is not None:
            return self._fold_backward(one, spec, B, dims, operands, wanted)
        return fold_backward(self.operator, one, spec, B, dims, operands, wanted)

    def _forward_vmap(self, info: Any, in_dims: Any, *arguments: Any) -> tuple[Tensor, int]:
        operands, values, backend = self._split(arguments)
        dims = in_dims[: self._count]
        spec = self.spec([_without(*pair) for pair in zip(operands, dims, strict=True)], values)

        def one(spec: Spec, *operands: Tensor | None) -> Tensor:
            return self.forward(spec, backend, *operands)

        return self.fold_forward(one, spec, info.batch_size, dims, operands), 0

    def _backward_vmap(self, info: Any, in_dims: Any, *arguments: Any) -> tuple[list[Tensor], list[int]]:
        grad_output, saved, values, backend, wanted = self._split_backward(arguments)
        operands, dims = (grad_output, *saved), in_dims[: 1 + len(self._saved)]
        grad, *others = (_without(*pair) for pair in zip(operands, dims, strict=True))
        assert grad is not None  # it is not optional
        spec = self._backward_spec(grad, others, values)

        def one(spec: Spec, grad_output: Tensor, operands: Sequence[Any], wanted: Collection[str]) -> Any:
            return self.backward(spec, backend, grad_output, operands, wanted)

        gradients = self.fold_backward(one, spec, info.batch_size, dims, operands, wanted)
        found = [gradient for gradient in gradients if gradient is not None]
        return found, [0] * len(found)

    # A call's arguments apart, and what modes want to know

    def _split(self, arguments: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any], str | None]:
        """Operands, parameters and the backend of a forward call."""
        return arguments[: self._count], arguments[self._count : -1], arguments[-1]

    def _split_backward(self, arguments: Sequence[Any]) -> tuple[Any, Sequence[Any], Sequence[Any], str | None, list[str]]:
        """grad_output, operands, parameters, the backend and the wanted names of a backward call."""
        end = 1 + len(self._saved)
        wanted = [name for name, flag in zip(self.operator.names, arguments[-1], strict=True) if flag]
        return arguments[0], arguments[1:end], arguments[end:-2], arguments[-2], wanted

    def _let_modes_count(self) -> None:
        """Tell PyTorch's counter of operations ours; only when somebody uses it, because it takes long to import."""
        counter: Any = sys.modules.get("torch.utils.flop_counter")
        if self._flops is None or counter is None or self.forward_op.overloadpacket in counter.flop_registry:
            return
        formulas = {
            self.forward_op.overloadpacket: self._forward_flops,
            self.backward_op.overloadpacket: self._backward_flops,
        }
        for packet, formula in formulas.items():
            # What register_flop_formula does; PyTorch 2.4's puts overloads there, and its counter asks for packets.
            counter.flop_registry[packet] = counter.shape_wrapper(formula)
        for mode in _get_current_dispatch_mode_stack():  # a counter copied the registry when it was made
            registry = getattr(getattr(mode, "counter", mode), "flop_registry", {})
            registry.update((packet, counter.flop_registry[packet]) for packet in formulas)

    def _forward_flops(self, *arguments: Any, out_shape: Any, **_: Any) -> int:
        assert self._flops is not None  # registered only if there is one
        return self._flops[0](arguments[:-1], out_shape)

    def _backward_flops(self, *arguments: Any, **_: Any) -> int:
        assert self._flops is not None  # registered only if there is one
        grad_output, saved, values, _backend, wanted = self._split_backward(arguments)
        return self._flops[1](grad_output, [*saved, *values], wanted)


def _empty(shape: Sequence[int], like: Tensor, keeps_format: bool) -> Tensor:
    form = memory_format(like) if keeps_format else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=form)


def _without(tensor: Tensor | None, dim: int | None) -> Tensor | None:
    """One of the tensors that a mapped one stands for."""
    return tensor if tensor is None or dim is None else tensor.select(dim, 0)
