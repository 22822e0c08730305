"""A recorded forward pass run again, for the recorded image or another one, up to the layer that is asked about."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deformconv.errors import ShapeError
from deformconv.plots.inputs import Inputs
from deformconv.plots.observe import Event, observe, unseen
from deformconv.vision.aggregates import Aggregate

__all__ = ["Probe", "leads_to", "rerun", "undisturbed"]


Until = Callable[[ExitStack, BaseException, list[Tensor]], None]


class _Stop(BaseException):
    """Ends a forward pass: nothing in a model catches it as an error of its own."""


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """A model in evaluation mode, and as it was afterwards: modes, buffers and random numbers.

    Within, random numbers begin with the same seed each time, and who observes the model from outside sees nothing.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(module, name, buffer) for module in model.modules() for name, buffer in module._buffers.items()]
    values = [None if buffer is None else buffer.detach().clone() for _, _, buffer in buffers]
    devices = {p.device.index for p in model.parameters() if p.is_cuda}
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=sorted(devices)), unseen():
            torch.manual_seed(0)
            model.eval()
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for (module, name, buffer), value in zip(buffers, values, strict=True):
                module._buffers[name] = buffer
                if buffer is not None and value is not None and not torch.equal(buffer, value):
                    buffer.copy_(value)
        random.setstate(python)
        np.random.set_state(numpy)


def rerun(model: nn.Module, inputs: Inputs, image: Tensor, which: int, until: Until) -> None:
    """Run a model on an image in the place of a recorded one; with gradients, if the image requires one.

    `until` gets the stack that ends with the run, what to raise to stop it, and the tensors that the model gets as pictures.
    """
    whole: Any = model
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        whole = model.module  # the wrapper would share the batch out, or wait for a backward pass
    with undisturbed(model), torch.inference_mode(False), torch.set_grad_enabled(image.requires_grad), ExitStack() as stack:
        args, kwargs = inputs.with_picture(image, which)
        stop = _Stop()
        until(stack, stop, inputs.pictures(args, kwargs))
        try:
            whole(*args, **kwargs)
        except _Stop as reached:
            if reached is not stop:
                raise
            reached.__traceback__ = None  # its frames hold the activations


def leads_to(output: Tensor, image: Tensor) -> bool:
    """Whether the graph leads from an output to an image that requires a gradient."""
    left, seen = [output.grad_fn], set()
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        if node is image.grad_fn or getattr(node, "variable", None) is image:
            return True
        seen.add(node)
        left += [following for following, _ in node.next_functions]
    return output is image


class Probe:
    """A recorded model as a function from an image to what one layer computes.

    Args:
        trace: a Trace, as `record` gives it.
        layer: the name of any module of the model.
        index: which of its calls within one forward pass.
        image: which image of the recorded batch.

    Raises:
        ValueError: nothing was recorded, the model has no such module, the batch no such image, or `index` is negative.
    """

    def __init__(self, trace: Any, layer: str, index: int = 0, image: int = 0) -> None:
        self._model: nn.Module = trace.model
        self._inputs: Inputs = trace.inputs
        self.layer, self.index, self._which = layer, index, image
        if index < 0:
            raise ValueError(f"`index` is {index}; expected the number of a call, from 0.")
        modules = dict(self._model.named_modules())
        if layer not in modules:
            raise ValueError(
                f"the model has no layer {layer!r}; its deformable layers are {', '.join(map(repr, trace.layers))}."
            )
        self._module = modules[layer]
        if isinstance(self._module, torch.jit.ScriptModule):
            raise ValueError(
                f"layer {layer!r} is a script of torch.jit, which cannot be looked into; expected a Python module."
            )
        self.image: Tensor = self._inputs.picture(image)  # (1, C, *S)

    def features(self, image: Tensor, watch: Callable[[Event], None] | None = None) -> Tensor:
        """The layer's output for an image, or a batch of them, in evaluation mode; the forward pass ends there.

        Of DCNv3 and DCNv4 it is what their samples add up to, before the last projection.

        Args:
            image: (N, C, *S), of the recorded image's size. If it requires a gradient, the output has a graph.
            watch: gets the Event of every deformable layer that runs on the way.

        Returns:
            (N, channels, *O), where the layer is one that gives such.

        Raises:
            ShapeError: the image is not of the recorded shape.
            ValueError: the layer is not reached, gives no tensor, or the graph does not lead from it to the image.
        """
        if image.shape[1:] != self.image.shape[1:] or image.ndim != self.image.ndim:
            expected = ", ".join(map(str, self.image.shape[1:]))
            raise ShapeError(f"`image` has shape {tuple(image.shape)}; expected (N, {expected}), as the recorded one.")
        found: list[Any] = []
        calls = 0

        def until(stack: ExitStack, stop: BaseException, pictures: list[Tensor]) -> None:
            if watch is not None:
                stack.enter_context(observe(self._model, watch))

            def reached(output: Any) -> None:
                nonlocal calls
                calls += 1
                if calls == self.index + 1:
                    found.append(output)
                    raise stop

            if isinstance(self._module, Aggregate):  # which returns a map whose channels are last, or pixels in a row
                stack.enter_context(observe(self._module, lambda event: reached(event.output)))
            else:
                stack.callback(self._module.register_forward_hook(lambda _, __, output: reached(output)).remove)

        rerun(self._model, self._inputs, image, self._which, until)
        return self._checked(found, calls, image)

    def _checked(self, found: list[Any], calls: int, image: Tensor) -> Tensor:
        if not found:
            raise ValueError(
                f"layer {self.layer!r} is called {calls} times in a forward pass in evaluation mode, so there is no call "
                f"{self.index} (they are counted from 0). Reruns are in evaluation mode: record the model in it, model.eval()."
            )
        output = found[0]
        if not isinstance(output, Tensor):
            raise ValueError(
                f"layer {self.layer!r} returns a {type(output).__name__}; expected a layer that returns one tensor (N, C, *O), "
                "as one of its parts may."
            )
        if image.requires_grad and not leads_to(output, image):
            raise ValueError(
                f"layer {self.layer!r} has no gradient with respect to the image: on the way there the model runs under "
                "torch.no_grad() or torch.inference_mode(), detaches a tensor, or leaves PyTorch. Expected a model that is "
                "differentiable up to this layer."
            )
        return output
