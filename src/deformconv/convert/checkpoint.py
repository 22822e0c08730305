"""Trained weights from the files of other programs, read without running anything in them."""

from __future__ import annotations

import os
import struct
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, BinaryIO

from deformconv.convert.foreign import CheckpointError, looks_like
from deformconv.convert.params_file import LIST_MAGIC, read_params
from deformconv.convert.pickles import Span, read_pickle
from deformconv.convert.tensors import TensorMaker, kind_of
from deformconv.convert.torch_file import LEGACY_MAGIC, read_legacy, read_zip
from deformconv.installation import import_for

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CheckpointError", "load_checkpoint"]

# Under which training programs keep a model's weights, the first that is there first.
WRAPPERS = (
    "state_dict",  # mmengine, mmcv, Lightning, timm, CenterNet
    "model",  # detectron2, DETR, torchvision's references
    "params",  # BasicSR
    "params_ema",
    "model_state_dict",
    "model_state",  # pycls
    "state",
    "net",
    "network",
    "weights",
    "blobs",  # Caffe2
    "state_dict_ema",
    "ema_state_dict",
    "model_ema",
    "ema",
)
MOST_WRAPPERS = 4
PADDLE_NAMES = "StructuredToParameterName@@"  # a dict of names next to the tensors
PADDLE_SLICES = "UnpackBigParamInfor@@"
PREFIX = "module."  # DataParallel's
MOST_NOTES = 64  # in a module's part of `_metadata`


def load_checkpoint(path: str | os.PathLike[str], *, key: str | None = None) -> OrderedDict[str, Tensor]:
    """Read the weights in a file of another program. No code from the file is run, and its libraries are not needed.

    The kind of file is found by its content: `torch.save`'s (mmengine, mmcv, mmdetection, detectron2, CenterNet, BasicSR,
    Lightning, ...), of today and of before PyTorch 1.6; pickles of NumPy's arrays (detectron2's and Caffe2's .pkl, Paddle's
    .pdparams); .safetensors, for which the package safetensors must be installed; MXNet's .params.

    A hostile file cannot fill the memory. A file is refused, before what is too much is allocated, whose tensors take more than
    1 MiB and 4 times its size in all, or whose pickle makes more objects than files of tensors have (some 60 MB).

    Args:
        path: the file.
        key: the name under which the file keeps the weights, such as "params_ema" or "discriminator". None takes the first
            that is there of "state_dict", "model", "params", "params_ema", "model_state_dict", "model_state", "state", "net",
            "network", "weights", "blobs", "state_dict_ema", "ema_state_dict", "model_ema" and "ema", else the whole file.

    Returns:
        The tensors by name, in the file's order: dense ones on the CPU, contiguous, each with memory of its own. Names are the
        file's, without "module." where all begin with it (DataParallel); MXNet's keep "arg:" and "aux:". Where the file is of
        a state_dict with `_metadata`, the result has the numbers and texts of it. Paddle's uint16 is bfloat16.

    Raises:
        CheckpointError: there is no such file; it is of another kind, cut off or damaged; it holds more than tensors and what
            training programs are known to keep next to them; or a value is a sparse or quantised tensor.
        ModuleNotFoundError: PyTorch, or for its files safetensors, is not installed.

    Example:
        >>> import torch
        >>> from deformconv.convert import load_checkpoint
        >>> net = torch.nn.DataParallel(torch.nn.Conv2d(3, 8, 3))
        >>> torch.save({"epoch": 12, "state_dict": net.state_dict()}, "run.pth")
        >>> {name: tuple(tensor.shape) for name, tensor in load_checkpoint("run.pth").items()}
        {'weight': (8, 3, 3, 3), 'bias': (8,)}
    """
    import_for("load_checkpoint", "torch", "torch")
    shown = os.fspath(path)
    if not os.path.exists(path):
        raise CheckpointError(f"{shown}: there is no such file.")
    if not os.path.isfile(path):
        raise CheckpointError(f"{shown} is {'a folder' if os.path.isdir(path) else 'no file'}; expected a file of weights.")
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        start = file.read(64)
        head = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else 0
        if head == LIST_MAGIC or (2 <= head <= size - 8 and start[8:9] == b"{"):
            if key is not None:
                raise CheckpointError(f"{shown} has no {key!r}: files of its kind hold tensors alone; leave `key` out.")
            return _without_prefix(_mxnet(shown) if head == LIST_MAGIC else _safetensors(shown))
        loaded, maker = _loaded(shown, file, size, start)
        return _made(_unwrapped(loaded, key, shown), maker)


def _loaded(path: str, file: BinaryIO, size: int, start: bytes) -> tuple[Any, TensorMaker]:
    """What the pickle in a file describes, and what makes its tensors."""
    if start.startswith(b"PK\x03\x04"):
        return read_zip(path, file, size)
    if not start.startswith(b"\x80"):
        raise CheckpointError(
            f"{path}: expected a file of torch.save, a pickle of arrays (.pkl, .pdparams), safetensors or MXNet's .params"
            f"{looks_like(start)}."
        )
    loaded = read_pickle(Span(file, 0, size), path, None, size)
    if type(loaded) is int and loaded == LEGACY_MAGIC:
        return read_legacy(path, file, size)
    return loaded, TensorMaker(path, file, size)


def _mxnet(path: str) -> dict[str, Any]:
    import torch

    try:
        return {name: torch.from_numpy(array) for name, array in read_params(path).items()}
    except ValueError as error:
        raise CheckpointError(str(error)) from None


def _safetensors(path: str) -> dict[str, Any]:
    safetensors = import_for("load_checkpoint of a .safetensors file", "safetensors", "safetensors")
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name).clone() for name in file.offset_keys()}
    except (safetensors.SafetensorError, RuntimeError, ValueError, OSError) as error:
        raise CheckpointError(f"{path} is cut off or damaged: safetensors says {str(error)[:200]!r}.") from None


def _unwrapped(loaded: Any, key: str | None, path: str) -> OrderedDict[str, Any]:
    """The state_dict in what training programs wrap around it."""
    if key is not None:
        if not isinstance(loaded, OrderedDict) or not isinstance(loaded.get(key), OrderedDict):
            raise CheckpointError(f"{path} has no weights under {key!r}{_found(loaded)}.")
        loaded = loaded[key]
    for _ in range(MOST_WRAPPERS):  # a dict may hold itself
        inner = next(
            (name for name in WRAPPERS if isinstance(loaded, OrderedDict) and isinstance(loaded.get(name), OrderedDict)), None
        )
        if inner is None:
            break
        loaded = loaded[inner]
    if not isinstance(loaded, OrderedDict):
        raise CheckpointError(f"{path} holds {kind_of(loaded)}; expected a state_dict: names and tensors.")
    if not loaded:
        raise CheckpointError(f"{path} holds a dict without tensors; expected a state_dict: names and tensors.")
    if PADDLE_SLICES in loaded:
        raise CheckpointError(
            f"{path} has tensors in slices, as Paddle writes those over 1 GiB in old pickles; save it with paddle.save("
            "state, path, protocol=4)."
        )
    if any(isinstance(value, OrderedDict) for name, value in loaded.items() if name != PADDLE_NAMES):
        raise CheckpointError(f"{path} holds no state_dict at its top{_found(loaded)}; `key` takes one of these.")
    return loaded


def _found(loaded: Any) -> str:
    """The end of a sentence about the names of dicts."""
    names = (
        [name for name, value in loaded.items() if isinstance(value, OrderedDict)] if isinstance(loaded, OrderedDict) else []
    )
    return f"; it has dicts under {', '.join(repr(name[:40]) for name in names[:12])}" if names else ""


def _made(state: OrderedDict[str, Any], maker: TensorMaker) -> OrderedDict[str, Tensor]:
    """The tensors that a state_dict's records describe."""
    maker.bfloat16_as_uint16 = PADDLE_NAMES in state
    made = {name: maker.make(name, value) for name, value in state.items() if name != PADDLE_NAMES}
    found = _without_prefix(made)
    notes = getattr(state, "_metadata", None)
    if notes is not None:
        found._metadata = _notes(notes, PREFIX if found.keys() != made.keys() else "")  # type: ignore[attr-defined]
    return found


def _without_prefix(state: dict[str, Any]) -> OrderedDict[str, Tensor]:
    prefix = PREFIX if all(name.startswith(PREFIX) for name in state) else ""
    return OrderedDict((name.removeprefix(prefix), tensor) for name, tensor in state.items())


def _notes(notes: OrderedDict[str, Any], prefix: str) -> OrderedDict[str, dict[str, Any]]:
    """A state_dict's `_metadata`: of each module, by its name without the prefix, the numbers and texts."""
    found: OrderedDict[str, dict[str, Any]] = OrderedDict()
    for name, values in notes.items():
        if isinstance(values, OrderedDict) and len(values) <= MOST_NOTES and f"{name}.".startswith(prefix):
            plain = {key: value for key, value in values.items() if type(value) in (int, float, str, bool, type(None))}
            found[f"{name}.".removeprefix(prefix).removesuffix(".")] = plain
    return found
