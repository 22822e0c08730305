"""A layer for inference whose weight is packed once, and not at each call."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.overrides import has_torch_function

from deformconv.ops.conv.layer import describe
from deformconv.torch import calls, modes, run
from deformconv.torch.conv.functional import DEFORM_CONV
from deformconv.torch.conv.modules import DeformConv1d, DeformConv2d, DeformConv3d, _DeformConvNd
from deformconv.torch.run import Plan
from deformconv.torch.tensors import memory_of, tensor_of

__all__ = ["PrepackedDeformConv"]

_KINDS = (DeformConv1d, DeformConv2d, DeformConv3d)


class _Kept(NamedTuple):
    """Panels, and what they were made of."""

    weight: Tensor
    state: tuple[Any, ...]
    panels: Any


class _Panels:
    """The panels of a layer's weights by name, made again where a weight is another tensor, has moved or has been changed.

    They are this processor's, so that they stay behind when a layer is copied, saved or sent.
    """

    def __init__(self) -> None:
        self._kept: dict[str, _Kept] = {}

    def __reduce__(self) -> Any:
        return _Panels, ()

    def of(self, name: str, weight: Tensor, dtype: str, pack: Callable[[Any], Any]) -> Any:
        """The panels of a weight, in the dtype that is computed in; `pack` makes them of an array."""
        # Tensors that were made under inference mode do not count their changes.
        state = dtype, weight.data_ptr(), None if weight.is_inference() else weight._version
        kept = self._kept.get(name)
        if kept is None or kept.weight is not weight or kept.state != state:
            kept = self._kept[name] = _Kept(weight, state, pack(memory_of(weight)))
        return kept.panels


class PrepackedDeformConv(_DeformConvNd):
    """A copy of a deformable layer for inference: its weight is packed once for the kernels, which pack it at each call else.

    `layer.prepack()` makes one of a `DeformConv1d`, `DeformConv2d` or `DeformConv3d`, and `deformconv.convert.prepack(model)`
    puts them into a copy of a model. It is called as the layer is, and its output has the same bits. The layer itself stays as
    it is: train it on, and prepack it again.

    - It has no parameters. Weight, bias and those of the predictor are buffers, under the names of the layer, so that either
      one loads the other's state_dict.
    - The panels are made on the processor that computes, at the first call; they are not saved, copied or sent along. They are
      made again after `load_state_dict`, `to`, and changes in place. What goes past PyTorch (`weight.data`, `weight.numpy()`)
      is not seen: prepack again after it.
    - Gradients of the input, of passed offsets and of masks are computed as the layer computes them. There are none of the
      weight: it raises RuntimeError if somebody asks for them, and so does `train()`.
    - Compilers, exporters and other devices read the plain weight, and have nothing from the panels; nor does a call that is so
      small that it packs its weight in less time than it takes to look for panels.

    Args:
        layer: what to copy.

    Raises:
        TypeError: `layer` is none of the three, as a subclass of theirs is not.
        ValueError: its weight or bias is computed from other parameters.

    Example:
        >>> import torch
        >>> from deformconv.torch import DeformConv2d
        >>> layer, x = DeformConv2d(64, 64, 3, padding=1), torch.rand(1, 64, 28, 28)
        >>> packed = layer.prepack()
        >>> with torch.inference_mode():
        ...     torch.equal(packed(x), layer(x))
        True
        >>> list(packed.parameters())
        []
    """

    rank: int  # type: ignore[misc]  # the layer's

    def __init__(self, layer: nn.Module) -> None:
        checked = _checked(layer)
        nn.Module.__init__(self)
        with torch.inference_mode(False), torch.no_grad():
            copied = copy.deepcopy(checked)
            for module in copied.modules():
                _make_buffers(module)
        vars(self).update(vars(copied))
        vars(self).pop("_observers", None)
        self.rank, self._function, self._panels = checked.rank, type(checked)._operator, _Panels()
        super().train(False)

    def train(self, mode: bool = True) -> PrepackedDeformConv:
        """Raise for `mode=True`: this layer has nothing to train."""
        if mode:
            raise RuntimeError(
                "train() was called on a prepacked layer, which has no parameters: train the layer or the model that it was "
                "made of, and prepack that again."
            )
        return super().train(False)

    def reset_parameters(self) -> NoReturn:
        """Raise: there are none."""
        raise RuntimeError("A prepacked layer has no parameters to reset: reset the layer that it was made of, and prepack it.")

    def forward(self, input: Tensor, offset: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """As the layer that it was made of, in the same bits."""
        if torch.is_grad_enabled() and any(buffer.requires_grad for buffer in self.buffers()):
            raise RuntimeError(
                "A buffer of a prepacked layer requires a gradient; expected none, since its weight is packed once: compute "
                "gradients with the layer that it was made of."
            )
        return super().forward(input, offset, mask)

    def _operator(
        self, input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any,
        mask: Tensor | None, *, groups: int, offset_groups: int | None, boundary: str,
    ) -> Tensor:  # fmt: skip
        operands = (input, offset, weight, bias, mask)
        if modes.compiling() or has_torch_function(operands):
            return self._function(
                input, offset, weight, bias, stride, padding, dilation, mask,
                groups=groups, offset_groups=offset_groups, boundary=boundary,
            )  # fmt: skip
        parameters = (stride, padding, dilation, groups, offset_groups, boundary)
        return calls.call(DEFORM_CONV, self.rank, None, parameters, operands, self._compute)

    def _compute(self, plan: Plan, *operands: Tensor | None) -> Tensor:
        """`run.forward` with packed weights, where the backend takes them."""
        module, spec = plan.module, plan.inner
        if plan.small is not None or spec is not plan.spec or not hasattr(module, "pack"):
            return run.forward(plan, *operands)
        input, offset, weight, bias, mask = operands
        assert input is not None and weight is not None
        packed = self._panels.of("weight", weight, spec.dtype, lambda array: module.pack(spec, array))
        arrays = map(memory_of, (input, offset, None, bias, mask))
        return run.in_memory_format(tensor_of(module.forward(spec, *arrays, library="torch", packed=packed)), input)

    def _pack(self, plan: Plan, weight: Tensor, predictor_weight: Tensor) -> tuple[Any, Any]:
        """The panels of both weights, for the kernel that predicts and convolves."""
        module, spec, channels = plan.module, plan.spec, len(predictor_weight)
        return (
            self._panels.of("weight", weight, spec.dtype, lambda array: module.pack(spec, array)),
            self._panels.of(
                "predictor", predictor_weight, spec.dtype, lambda array: module.pack_predictor(spec, channels, array)
            ),
        )

    def extra_repr(self) -> str:
        return describe(self, biased=self.bias is not None, predicts=self.offset_conv is not None)


_DeformConvNd._prepacked = PrepackedDeformConv


def _checked(layer: Any) -> _DeformConvNd:
    """The layer; raise unless its call is known, and its weights are parameters of its own."""
    if not isinstance(layer, nn.Module):
        raise TypeError(f"`layer` is a {type(layer).__name__}; expected a DeformConv1d, DeformConv2d or DeformConv3d.")
    if isinstance(layer, _KINDS):
        for name, part in (("", layer), ("offset_conv.", layer.offset_conv)):
            for key in ("weight", "bias"):
                if part is not None and key not in part._parameters and isinstance(getattr(part, key, None), Tensor):
                    raise ValueError(
                        f"`layer` has a {name}{key} that is computed from other parameters, by a parametrization or pruning; "
                        "expected a parameter. Remove that first, in a copy: torch.nn.utils.parametrize."
                        "remove_parametrizations, remove_weight_norm, remove_spectral_norm, prune.remove."
                    )
    if type(layer) not in _KINDS:
        kind = type(layer)
        raise TypeError(
            f"`layer` is a {kind.__module__}.{kind.__qualname__}; expected a DeformConv1d, DeformConv2d or DeformConv3d "
            "itself, since any other class may compute something else."
        )
    found: Any = layer
    return found


def _make_buffers(module: nn.Module) -> None:
    """Make a module's parameters buffers, under the same names."""
    for name, parameter in list(module._parameters.items()):
        del module._parameters[name]
        module.register_buffer(name, None if parameter is None else parameter.detach())
