"""What a layer notes in a state_dict of its masks, and what it looks for in one that it loads.

The masks of other libraries are sigmoid and those of this one, by default, 2*sigmoid: with the keys renamed, their weights
would load and compute something else.
"""

from __future__ import annotations

import sys
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any, NamedTuple

from torch import Tensor, nn

__all__ = ["RECORD", "Loading", "Sentence", "noted"]

RECORD = "mask_scale"  # the name of the record in a layer's metadata
MMCV_VERSION = 2  # in the metadata of mmcv's layers with a predictor; ours, as most modules, have 1

_has_warned = False


class _Foreign(NamedTuple):
    """How a key of another library's layer ends, after the layer's name; whose it is; and the `source` that converts it."""

    ending: str
    library: str
    source: str


_FOREIGN = (  # in this order: Paddle's layer has a `conv_offset` as well
    _Foreign(".conv_dcn.weight", "PaddleDetection", "paddle"),
    _Foreign(".conv_offset.weight", 'mmcv, mmdetection from version 2, or BasicSR (there source="basicsr")', "mmcv"),
    _Foreign(".conv_offset_mask.weight", "CharlesShang's DCNv2 or CenterNet", "dcnv2"),
    _Foreign(".offset_weight", "MXNet's Gluon", "mxnet"),
    _Foreign(".deform_conv.weight", "torchvision, as `to_torchvision` makes it", "torchvision"),
    _Foreign("_offset.weight", 'detectron2, or of mmdetection 1 (there source="mmdet1")', "detectron2"),
    _Foreign("_offset_weight", "MXNet", "mxnet"),
)


class Sentence(str):
    """An error of the first layer of several: its words, which tell it from others, and how many more layers it is true of."""

    about: tuple[Any, ...]
    words: str
    more: int

    def __new__(cls, about: tuple[Any, ...], words: str, more: int = 0) -> Sentence:
        others = f" So it is with {more} more layer{'s' * (more > 1)}." if more else ""
        made = super().__new__(cls, words + others)
        made.about, made.words, made.more = about, words, more
        return made


class Loading(nn.Module):
    """A layer whose predicted masks are mask_scale*sigmoid, which its state_dict notes beside the tensors."""

    modulated: bool
    mask_scale: float
    _predictors: tuple[str, ...]  # the names that a predictor of masks may have

    def _recorded(self) -> float | None:
        """What the layer notes: its masks' scale, or None where it predicts no masks."""
        return float(self.mask_scale) if self.modulated and self._own() else None

    def _own(self) -> list[str]:
        return [name for name in self._predictors if self._modules.get(name) is not None]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # A dict that the caller passed has no metadata.
        metadata, scale = getattr(destination, "_metadata", {}).get(prefix[:-1]), self._recorded()
        if metadata is not None and scale is not None:
            metadata[RECORD] = scale

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load as every module does, whose hooks may rename keys, and look at what was there."""
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        own = tuple(f"{prefix}{name}." for name in self._own())
        if not own:
            return
        has_own = any(key.startswith(own) for key in state_dict)
        # A module's own keys and those beside it that no module expects are in this list, be the load strict or not.
        error = self._foreign(prefix[:-1], unexpected_keys, has_own)
        if error is None and has_own:
            error = self._other_masks(prefix[:-1], local_metadata)
        if error is not None:
            _say(error_msgs, error)

    def _foreign(self, layer: str, unexpected: list[str], has_own: bool) -> Sentence | None:
        """What to call where the keys of another library's layer stand in for this one's."""
        for foreign in _FOREIGN:
            key = next((key for key in _names(layer, foreign.ending) if key in unexpected), None)
            # What `to_torchvision` makes has its predictor where this library's layer has it.
            if key is not None and (foreign.source == "torchvision" or not has_own):
                return Sentence(
                    (foreign.source,),
                    f'"{key}" is of a deformable layer of {foreign.library}; expected this library\'s keys: load '
                    f'convert_state_dict(state, source="{foreign.source}", model=model), of deformconv.convert, which renames '
                    "the keys and accounts for the masks.",
                )
        return None

    def _other_masks(self, layer: str, metadata: Mapping[str, Any]) -> Sentence | None:
        """What is wrong with a state_dict by its record, or by mmcv's; a warning where there is none."""
        scale, found = self._recorded(), metadata.get(RECORD)
        if scale is None or scale == (1.0 if found is None else found):
            return None
        place = f"layer {layer!r}" if layer else "this layer"
        if found is not None:
            return Sentence(
                (found, scale),
                f"The masks of {place} are {found}*sigmoid in this state_dict, and {scale}*sigmoid in the model: build the "
                f"layer with mask_scale={found}, or set its `mask_scale` before loading.",
            )
        if metadata.get("version") == MMCV_VERSION != self._version:
            return Sentence(
                ("mmcv", scale),
                f"mmcv wrote the weights of {place}, whose keys were renamed. Its masks are sigmoid and those of the model "
                f'{scale}*sigmoid: load convert_state_dict(state, source="mmcv", model=model), of deformconv.convert, with '
                "the state as it was saved, or build the layer with mask_scale=1.0.",
            )
        _warn(place, scale)
        return None


def noted(state: Mapping[str, Tensor], model: nn.Module) -> OrderedDict[str, Tensor]:
    """A state_dict with the tensors of `state` whose metadata says that its masks are those of the model's layers.

    The metadata of all other modules stays; the caller's is not changed.
    """
    metadata: Mapping[str, Any] = getattr(state, "_metadata", None) or {}
    found = OrderedDict((name, dict(entry)) for name, entry in metadata.items())
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Loading) and (scale := module._recorded()) is not None:
            found[name] = {"version": module._version, RECORD: scale}
    result: Any = OrderedDict(state)
    result._metadata = found
    recorded: OrderedDict[str, Tensor] = result
    return recorded


def _names(layer: str, ending: str) -> Iterator[str]:
    """The keys with this ending that a layer may have; MXNet's names have no points."""
    if ending.startswith("."):
        yield f"{layer}{ending}" if layer else ending[1:]
    elif layer:
        yield f"{layer}{ending}"
        if "." in layer and "." not in ending:
            yield f"{layer.replace('.', '_')}{ending}"


def _say(errors: list[str], sentence: Sentence) -> None:
    """Add an error to those of a load, or count it where another layer had the same."""
    for position, said in enumerate(errors):
        if isinstance(said, Sentence) and said.about == sentence.about:
            errors[position] = Sentence(said.about, said.words, said.more + 1)
            return
    errors.append(sentence)


def _warn(place: str, scale: float) -> None:
    """Warn, once in a process, of a state_dict without a record, at the line that loads it."""
    global _has_warned
    if _has_warned:
        return
    _has_warned = True
    level, frame = 1, sys._getframe()
    while (behind := frame.f_back) is not None and _is_loading(frame):
        level, frame = level + 1, behind
    warnings.warn(
        f"Nothing in this state_dict says what the masks of {place} are. If another library wrote the weights, and their keys "
        f"were renamed, its masks are sigmoid and here {scale}*sigmoid, {scale:g} times as large: load "
        'convert_state_dict(state, source="mmcv", model=model), of deformconv.convert, with the state as it was saved, or '
        "build the layer with mask_scale=1.0. If this library wrote them, and the state_dict's metadata was lost on the way "
        "(in a safetensors file, or a dict made anew) or is of an older version: load convert_state_dict(state, "
        'source="deformconv", model=model), which notes it.',
        stacklevel=level,
    )


def _is_loading(frame: FrameType) -> bool:
    """Whether a frame is this file's or PyTorch's."""
    return str(frame.f_globals.get("__name__")).startswith((__name__, "torch."))
