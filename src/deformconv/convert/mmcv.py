"""Our kernels as the entries of mmcv's extension: mmdetection's deformable models on a CPU, without a compiler."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NoReturn

from deformconv.convert.acceleration import Acceleration, Place
from deformconv.installation import import_for

__all__ = ["accelerate_mmcv"]

_NAME = "mmcv._ext"
_COMPUTED = "deform_conv2d, modulated_deform_conv2d, deform_roi_pool, roi_align, nms, soft_nms and sigmoid_focal_loss"


def accelerate_mmcv() -> Acceleration:
    """Put this library's kernels under `mmcv.ops`, so that mmdetection's DCN models run and train without a compiled mmcv.

    `mmcv-lite`, which pip installs anywhere, has mmcv's Python and no extension: there `import mmcv.ops` works after this call
    and not before. `deform_conv2d`, `modulated_deform_conv2d` and `deform_roi_pool`, with the layers of these names and their
    `Pack`s, are this library's operators then, forward and backward, on CPUs and GPUs. So is `roi_align`; torchvision computes
    `nms` and PyTorch's operations `soft_nms` and `sigmoid_focal_loss`. Faster R-CNN, Mask R-CNN, Cascade R-CNN, RetinaNet and
    RepPoints ask for no more. Any other operator raises a sentence when it is called. Multi-scale deformable attention
    on a CPU is mmcv's own, which needs no extension.

    Where mmcv has its compiled extension, the three deformable operators are this library's for tensors on a CPU, and all else
    is left alone. It lasts until `undo()` of the result, or until the end of its `with` block, for the whole process.

    The gradient of `deform_roi_pool`'s offsets is exact also where a sample lies beyond the map's border, where that of mmcv's
    CUDA kernel is not. Tried with mmdet 3.3.0, which takes mmcv below 2.2, with mmcv-lite 2.1.0 and 2.2.0, and with the Python
    of mmcv 1.7.2.

    Returns:
        An Acceleration, with `undo()`, to be used as a context manager or not.

    Raises:
        ModuleNotFoundError: PyTorch, torchvision or mmcv is not installed.

    Example:
        >>> import torch
        >>> from deformconv.convert.mmcv import accelerate_mmcv
        >>> acceleration = accelerate_mmcv()
        >>> from mmcv.ops import ModulatedDeformConv2dPack
        >>> layer = ModulatedDeformConv2dPack(3, 8, kernel_size=3, padding=1)
        >>> y = layer(torch.rand(2, 3, 9, 9))
        >>> y.sum().backward()
        >>> layer.conv_offset.weight.grad.shape
        torch.Size([27, 3, 3, 3])
        >>> acceleration.undo()
    """
    import deformconv.torch  # noqa: F401  (it says what to install where PyTorch is missing)

    import_for("accelerate_mmcv", "torchvision", "torchvision")
    if find_spec("mmcv") is None:
        raise ModuleNotFoundError(
            "accelerate_mmcv needs mmcv, which is not installed: pip install mmcv-lite==2.1.0 (it has no extension to compile; "
            "mmdet 3.3.0 takes this version)",
            name="mmcv",
        )
    return Acceleration(_MMCV)


def _put() -> Callable[[], None]:
    """Our entries in mmcv's extension, or in a module in its place, until what is returned is called."""
    extension = _compiled()
    return _put_into(extension) if extension is not None else _put_stand_in()


def _compiled() -> ModuleType | None:
    """mmcv's own extension, loaded, where there is one."""
    found = sys.modules.get(_NAME)
    if found is not None:
        return None if isinstance(found, _Extension) else found
    package = find_spec("mmcv")
    if package is None or PathFinder.find_spec(_NAME, package.submodule_search_locations) is None:
        return None
    return importlib.import_module(_NAME)


def _put_into(extension: ModuleType) -> Callable[[], None]:
    """Our deformable operators in mmcv's own extension, for tensors on a CPU."""
    from deformconv.convert.mmcv_kernels import DEFORMABLE, on_cpu

    theirs = {name: getattr(extension, name) for name in DEFORMABLE}
    for name, entry in DEFORMABLE.items():
        setattr(extension, name, on_cpu(entry, theirs[name]))

    def take_away() -> None:
        for name, entry in theirs.items():
            setattr(extension, name, entry)

    return take_away


def _put_stand_in() -> Callable[[], None]:
    """All entries that are ours in a module that mmcv finds as its extension."""
    from deformconv.convert.mmcv_kernels import DEFORMABLE, OTHERS

    extension: Any = sys.modules.setdefault(_NAME, _EXTENSION)
    vars(extension).update(DEFORMABLE | OTHERS)
    extension.begun = True

    def take_away() -> None:
        extension.begun = False
        for name in (*DEFORMABLE, *OTHERS):
            delattr(extension, name)
        if "mmcv.ops" not in sys.modules:
            del sys.modules[_NAME]

    return take_away


class _Extension(ModuleType):
    """A module in the place of mmcv's extension: mmcv asks whether it has an entry, and every entry that it lacks refuses."""

    begun = False

    def __getattr__(self, name: str) -> Callable[..., NoReturn]:
        if name.startswith("_"):
            raise AttributeError(f"module {_NAME!r} has no attribute {name!r}")

        def refuse(*arguments: Any, **keywords: Any) -> NoReturn:
            raise NotImplementedError(_why_not(name, self.begun))

        return refuse


def _why_not(name: str, begun: bool) -> str:
    """Why an entry of a name does not compute."""
    needs = f"mmcv's operator {name!r} needs mmcv's compiled extension, which mmcv-lite has not."
    if name.startswith("ms_deform_attn"):
        return (
            f"{needs} On a CPU mmcv.ops.MultiScaleDeformableAttention needs none; on other devices call "
            "mmcv.ops.multi_scale_deform_attn.multi_scale_deformable_attn_pytorch."
        )
    ended = "" if begun else ", which has ended or not begun,"
    return f"{needs} deformconv.convert.accelerate_mmcv(){ended} computes {_COMPUTED}."


_EXTENSION = _Extension(_NAME)
# Without a loader: mmcv and mmengine ask for it to learn whether mmcv was compiled.
_EXTENSION.__spec__ = ModuleSpec(_NAME, None)
_MMCV = Place(_put)
