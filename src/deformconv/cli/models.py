"""The model that a command names: a function that makes it, or a file of weights whose architecture is known."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deformconv.convert.checkpoint import CheckpointError, load_checkpoint
from deformconv.installation import import_for

__all__ = ["ModelError", "model_of"]

_RESNETS = ("resnet", "resnext", "wide_resnet")
_PREDICTOR = ".offset_conv."


class ModelError(ValueError):
    """A model that cannot be had; the text is a sentence for a user."""


def model_of(text: str | None, weights: Path | None) -> nn.Module:
    """The model for `--model` and `--weights`, in evaluation mode; the package's own net for neither.

    "module:function" imports the module, from the current folder too, and calls the function: it runs their code. Anything else
    is a file of weights, and no code in it is run.
    """
    if text is None:
        if weights is not None:
            raise ModelError("--weights has no --model to load into; pass --model module:function, which makes the model.")
        from deformconv.plots.example import example_net

        return example_net()
    module, colon, function = text.partition(":")
    if colon and not Path(text).exists() and all(part.isidentifier() for part in module.split(".")):
        model = _made(module, function)
        if weights is not None:
            _load(model, tensors_of(weights), weights)
    elif weights is not None:
        raise ModelError(f"--model {text} is a file of weights itself; with --weights pass --model module:function.")
    else:
        model = _recognised(tensors_of(Path(text)), Path(text))
    return model.eval()


def _made(module: str, function: str) -> nn.Module:
    """What a function of the user's returns, or the model itself, if the name is one's."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    named = f"--model {module}:{function}"
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise ModelError(f"{named}: the module {module} imports {error.name}, which is not installed.") from None
        raise ModelError(f"{named}: there is no module {error.name}, neither here nor among what is installed.") from None
    except Exception as error:
        raise ModelError(f"{named}: importing {module} failed: {_shown(error)}") from error
    for name in function.split("."):
        if not hasattr(found, name):
            raise ModelError(f"{named}: {module} has no {function!r}. Functions there: {_functions(module) or 'none'}.")
        found = getattr(found, name)
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise ModelError(f"{named} is a {type(found).__name__}; expected a function that returns a torch.nn.Module.")
    try:
        model = found()
    except Exception as error:
        raise ModelError(f"{named}: the call {function}() failed: {_shown(error)}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"{named}: the call {function}() returned a {type(model).__name__}; expected a torch.nn.Module.")
    return model


def _shown(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _functions(module: str) -> str:
    own = vars(sys.modules[module]).items()
    return ", ".join(name for name, value in own if getattr(value, "__module__", None) == module and callable(value))


def tensors_of(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a state_dict in a file, whatever a training program or DistributedDataParallel wrapped it in."""
    if not path.is_file():
        raise ModelError(f"{path}: there is no such file; --model is a file of weights, or module:function.")
    try:
        return load_checkpoint(path)
    except CheckpointError as error:
        raise ModelError(str(error)) from None


def _load(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]]
        raise ModelError(f"{path} does not fit the model: {' '.join(lines)[:400]}") from None


def _recognised(state: Mapping[str, Tensor], path: Path) -> nn.Module:
    """The net whose names and shapes these are, with these weights."""
    for builder in (_digits, _resnet):
        if (model := builder(state)) is not None:
            _load(model, state, path)
            return model
    raise ModelError(
        f"{path} has weights, and no code to compute with them: they are those of no net that is known here (torchvision's "
        "ResNets made deformable, the demo's net). Pass --model module:function, which makes the model, and "
        f"--weights {path}."
    )


def _fits(model: nn.Module, state: Mapping[str, Tensor], but: str | None = None) -> bool:
    """Whether the names and shapes agree, but for those with a word in their name."""
    own, theirs = (
        {name: tuple(tensor.shape) for name, tensor in tensors.items() if but is None or but not in name}
        for tensors in (model.state_dict(), state)
    )
    return own == theirs


def _digits(state: Mapping[str, Tensor]) -> nn.Module | None:
    from deformconv.studies.training import DigitNet, of_kind

    nets = (of_kind(kind, DigitNet()) for kind in ("v2", "v1"))
    return next((net for net in nets if _fits(net, state)), None)


def _resnet(state: Mapping[str, Tensor]) -> nn.Module | None:
    """A ResNet of torchvision, some of whose convolutions were made deformable."""
    if not any(_PREDICTOR in name for name in state) or "fc.weight" not in state:
        return None
    models = import_for("This file of weights", "torchvision.models", "torchvision")
    with torch.device("meta"):
        names = [name for name in models.list_models(module=models) if name.startswith(_RESNETS)]
        classes = len(state["fc.weight"])
        name = next((n for n in names if _fits(models.get_model(n, num_classes=classes), state, _PREDICTOR)), None)
    if name is None:
        return None
    model: nn.Module = models.get_model(name, num_classes=classes)
    _make_deformable(model, state)
    return model


def _make_deformable(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Make the layers deformable for which there is a predictor; its channels say whether v1 or v2, and how many groups."""
    from deformconv.torch.loading import RECORD
    from deformconv.vision import make_deformable

    notes: Mapping[str, Any] = getattr(state, "_metadata", {})
    modules = dict(model.named_modules())
    for key, weight in state.items():
        layer, found, rest = key.partition(_PREDICTOR)
        if found and rest == "weight":
            taps, channels = weight[0, 0].numel(), len(weight)
            in_channels: Any = modules[layer].in_channels
            modulated = channels % (3 * taps) == 0 and in_channels % (channels // (3 * taps)) == 0
            groups = channels // ((3 if modulated else 2) * taps)
            make_deformable(model, [layer], modulated=modulated, offset_groups=groups)
            made: Any = model.get_submodule(layer)
            made.mask_scale = notes.get(layer, {}).get(RECORD, made.mask_scale)
