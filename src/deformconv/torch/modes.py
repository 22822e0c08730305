"""What of PyTorch stands between a call and its tensors' memory, and which way a call takes because of it.

No other file asks PyTorch for its modes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from deformconv.dispatch import Deterministic
from deformconv.torch.tensors import PLAIN

__all__ = [
    "Door", "active", "any_autocast", "autocast", "compiling", "deterministic", "door", "exported_opset", "exporting",
    "exporting_program", "forward_mode", "is_special", "map_level", "mapped", "on_device_of",
    "refuse_script", "traced", "transformed", "untraced", "with_derivatives", "without_autocast",
]  # fmt: skip

# "memory": a backend reads the tensors' memory. "registered": PyTorch's dispatcher is called, and a compiler, tracer, mode or
# subclass sees the operator. "transformed": torch.func's transforms see a Function. "decomposed": PyTorch's own operations
# carry forward-mode derivatives. "onnx": a node of the standard is written.
Door = Literal["memory", "registered", "transformed", "decomposed", "onnx"]


def door(*tensors: Tensor | None) -> Door:
    """The way that a call on these tensors takes."""
    if not is_special(*tensors) and not forward_mode():
        return "memory"
    if exporting():
        return "onnx"
    if compiling():  # a compiler takes the registered operator, which finds out for itself
        return "registered"
    if forward_mode():
        return "decomposed"
    return "transformed" if transformed() else "registered"


def active() -> bool:
    """Whether anything but autograd is on, which a call must look at more closely."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_any_autocast_enabled()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
    )


def is_special(*tensors: Tensor | None) -> bool:
    """Whether a call is more than its tensors' memory: traced, transformed, under a mode, or on wrapped tensors."""
    return (
        compiling()
        or transformed()
        or torch._C._len_torch_dispatch_stack() > 0
        or traced()
        or any(type(t) not in PLAIN and t is not None for t in tensors)
    )


def compiling() -> bool:
    """Whether torch.compile or torch.export reads this call."""
    return torch.compiler.is_compiling()


def refuse_script(layer: Any) -> NoReturn:
    """Say that torch.jit.script cannot compile a layer, and what can."""
    raise NotImplementedError(
        f"torch.jit.script cannot compile a {type(layer).__name__}; expected torch.jit.trace(net, example_inputs) or "
        "torch.export.export(net, example_inputs), which record the operator."
    )


def traced() -> bool:
    """Whether torch.jit.trace records this call: sizes are tensors then."""
    return torch._C._get_tracing_state() is not None


def transformed() -> bool:
    """Whether this runs within torch.func's grad, vjp or vmap."""
    return torch._C._are_functorch_transforms_active()


def forward_mode() -> bool:
    """Whether forward-mode derivatives are being computed."""
    return forward_ad._current_level >= 0


def mapped(grad_output: Tensor) -> bool:
    """Whether autograd runs backward for many gradients at once (`is_grads_batched`), by a vmap of its own."""
    return (
        type(grad_output) is Tensor
        and torch._C._dispatch_isTensorSubclassLike(grad_output)
        and torch._C._len_torch_dispatch_stack() == 0
        and not transformed()
    )


def map_level() -> int:
    """How many of autograd's own vmaps are within each other here."""
    level: int = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    return level


def any_autocast() -> bool:
    """Whether autocast is on for any type of device; faster to ask than `autocast`."""
    return torch._C._is_any_autocast_enabled()


def autocast(device: str) -> bool:
    """Whether autocast is on for a type of device."""
    # PyTorch 2.4 compiles no call of is_autocast_available, which is of use for devices that may have no autocast.
    return (
        any_autocast()
        and (device in ("cpu", "cuda") or torch.amp.is_autocast_available(device))
        and torch.is_autocast_enabled(device)
    )


def without_autocast(device: str) -> Any:
    """A context in which autocast does not reach the operations that make up ours."""
    return torch.autocast(device, enabled=False) if autocast(device) else nullcontext()


def on_device_of(tensor: Tensor) -> Any:
    """A context in which a tensor's GPU is the current one, on which kernels are launched."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()


def deterministic() -> Deterministic | None:
    """Whether torch.use_deterministic_algorithms is set, and in which way."""
    if not torch.are_deterministic_algorithms_enabled():
        return None
    if torch.is_deterministic_algorithms_warn_only_enabled():
        return Deterministic("torch.use_deterministic_algorithms(True, warn_only=True)", warn_only=True)
    return Deterministic("torch.use_deterministic_algorithms(True)")


def exporting() -> bool:
    """Whether torch.onnx.export reads this call: within torch.jit.trace it is the older exporter."""
    return torch.onnx.is_in_onnx_export()


# A compiler that reads a call of ours evaluates this once and takes the result for a constant. The same mark is made by
# `torch.compiler.assume_constant_result`, which loads the compiler.
exporting._dynamo_marked_constant = True  # type: ignore[attr-defined]


def exported_opset() -> int | None:
    """The opset that torch.onnx.export writes for. It is an argument of one of PyTorch's functions further up the stack."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("torch.onnx.") and "opset_version" in frame.f_locals:
            found = frame.f_locals["opset_version"]
            return found if isinstance(found, int) else None
        frame = frame.f_back
    return None


exported_opset._dynamo_marked_constant = True  # type: ignore[attr-defined]


def exporting_program() -> bool:
    """Whether torch.export reads this call; PyTorch 2.4 to 2.6 say so by the mark that PyTorch 2.7 has a function for."""
    return bool(getattr(torch.compiler, "_is_exporting_flag", False))


exporting_program._dynamo_marked_constant = True  # type: ignore[attr-defined]


@contextmanager
def untraced() -> Iterator[None]:
    """A context that torch.jit.trace does not record, and in which sizes are plain numbers; it records our call as a whole."""
    torch_c: Any = torch._C
    state = torch_c._get_tracing_state()
    if state is None:
        yield
        return
    torch_c._set_tracing_state(None)
    try:
        yield
    finally:
        torch_c._set_tracing_state(state)


def with_derivatives() -> Any:
    """A context in which PyTorch can differentiate the portable form, also within a registered operator's kernel.

    If a compiler or a mode called that kernel, the dispatcher has excluded all that comes before kernels, autograd included.
    """
    if not torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.FuncTorchDynamicLayerFrontMode):
        return nullcontext()
    excluded = torch._C._dispatch_tls_local_exclude_set() & _AUTOCAST
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)


def _autocast_keys() -> Any:
    first, *others = (key for name, key in torch._C.DispatchKey.__members__.items() if name.startswith("Autocast"))
    keys = torch._C.DispatchKeySet(first)
    for key in others:
        keys = keys.add(key)
    return keys


_AUTOCAST = _autocast_keys()
