"""A picture in any form that people have, for drawing and for a model. Pillow and PyTorch are loaded when they are needed."""

from __future__ import annotations

import os
import sys
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from deformconv.errors import ShapeError
from deformconv.installation import command

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["model_input", "picture"]

Picture = npt.NDArray[np.float64]

FORMS = "(H, W), (H, W, 3), (H, W, 4), (1, H, W), (3, H, W), (4, H, W), or one of the latter as a batch of 1"
LUMINANCE = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601's, as Pillow's and torchvision's grey


def picture(image: Any) -> Picture:
    """A picture as numbers from 0 (black) to 1 (white), to draw on.

    uint8 is divided by 255 and uint16 by 65535, as are whole numbers of other dtypes that lie in 0..255 or, of integers, in
    0..65535. What lies in 0..1 stays. Of other numbers, such as those of a tensor that was normalised for a net, the smallest
    becomes 0 and the largest 1. What is transparent shows white. A file is turned upright, as viewers do it by the camera's
    note (EXIF); of a file with several pictures the first is taken.

    Args:
        image: (H, W), (H, W, 3), (H, W, 4), (1, H, W), (3, H, W), (4, H, W), or one of the latter with a batch axis of 1; a
            NumPy array, what becomes one, a tensor on any device, a PIL image of any mode, or the path of a file. Where both
            the first axis and the last could be channels, a tensor's are the first, and an array's the last.

    Returns:
        (H, W) if it is grey, else (H, W, 3): float64, in 0..1.

    Raises:
        ShapeError: it is no single picture of 1, 3 or 4 channels, or has no pixels.
        ValueError: it has NaN or infinite pixels; the file is no picture, is broken, or is too large.
        TypeError: its elements are no real numbers.
        FileNotFoundError: there is no file at that path.

    Example:
        >>> import numpy as np
        >>> picture(np.array([[0, 51], [102, 255]], np.uint8)).tolist()
        [[0.0, 0.2], [0.4, 1.0]]
        >>> picture(np.zeros((3, 40, 60))).shape
        (40, 60, 3)
    """
    values = _in_0_to_1(_laid_out(image))
    if values.shape[2] in (2, 4):
        alpha = values[..., -1:]
        if (alpha < 0).any() or (alpha > 1).any():
            low, high = alpha.min(), alpha.max()
            raise ValueError(f"`image` has an alpha channel from {low:.3g} to {high:.3g}; expected 0 (clear) to 1 (opaque).")
        values = values[..., :-1] * alpha + (1 - alpha)
    return values[..., 0] if values.shape[2] == 1 else values


def model_input(image: Any, model: Any) -> Tensor:
    """A picture as a model takes it: a batch of one, with the channels of the model's first convolution.

    The first convolution is the first in the order of `model.named_modules()`. A grey picture is repeated for 3 channels, a
    colour picture's luminance taken for 1. The numbers are `picture`'s, from 0 to 1; normalise them where the model was
    trained so. A floating-point tensor keeps its numbers.

    Args:
        image: as `picture`'s; a tensor with 4 axes, (N, C, H, W), is returned as it is.
        model: a torch.nn.Module.

    Returns:
        (1, C, H, W), of the dtype and on the device of the model's parameters.

    Raises:
        ShapeError: the model's first convolution takes channels that a picture does not have, or is not 2-D.
        TypeError: `model` is no torch.nn.Module.
        And what `picture` raises.

    Example:
        >>> import numpy as np
        >>> from torch import nn
        >>> model_input(np.zeros((40, 60), np.uint8), nn.Sequential(nn.Conv2d(3, 8, 3))).shape
        torch.Size([1, 3, 40, 60])
    """
    import torch

    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"`model` is of type {type(model).__name__}; expected a torch.nn.Module.")
    if isinstance(image, torch.Tensor) and image.ndim == 4:
        return image
    parameters = (one for one in model.parameters() if one.is_floating_point())
    like = next(parameters, torch.empty(0))
    name, wanted = _first_convolution(model)
    if isinstance(image, torch.Tensor) and image.ndim == 3 and image.shape[0] == wanted and image.is_floating_point():
        return image[None].to(like)
    values = _laid_out(image)
    if not (isinstance(image, torch.Tensor) and image.is_floating_point() and values.shape[2] in (1, 3)):
        values = np.atleast_3d(picture(image))
    has = values.shape[2]
    if wanted not in (None, 1, 3):
        raise ShapeError(
            f"The model's first convolution, '{name}', takes {wanted} channels, and a picture has 1 or 3: "
            f"pass a tensor of shape (1, {wanted}, H, W) with the channels that the model was trained with."
        )
    if wanted == 1 and has == 3:
        values = values @ LUMINANCE[:, None]
    elif wanted == 3 and has == 1:
        values = np.repeat(values, 3, axis=2)
    return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))[None].to(like)


def _first_convolution(model: Any) -> tuple[str, int | None]:
    """The name of a model's first convolution, of any library, and its channels; None if it takes what comes."""
    for name, module in model.named_modules():
        channels, kernel = getattr(module, "in_channels", None), getattr(module, "kernel_size", None)
        if isinstance(channels, int) and isinstance(kernel, tuple):
            if len(kernel) != 2:
                raise ShapeError(
                    f"The model's first convolution, '{name}', is {len(kernel)}-D; a picture is for 2-D models: "
                    "run the model on a tensor of your own."
                )
            return name, channels or None  # a lazy one has 0
    return "", None


def _laid_out(image: Any) -> npt.NDArray[Any]:
    """Any picture as finite numbers of its own scale, (H, W, C)."""
    values, of_tensor = _numbers(image), _is_tensor(image)
    if values.size == 0:
        raise ShapeError(f"`image` has shape {values.shape}, and so no pixels; expected {FORMS}.")
    shape, first = values.shape, of_tensor
    if values.ndim == 4:
        if len(values) > 1:
            raise ShapeError(
                f"`image` has shape {shape}: {shape[0]} pictures; expected one, {FORMS}. Of a batch pass one, as `image[0]`."
            )
        values, first = values[0], True
    if values.ndim == 2:
        values = values[..., None]
    elif values.ndim != 3:
        raise ShapeError(f"`image` has {values.ndim} axes, shape {shape}; expected {FORMS}.")
    else:
        channels = (1, 2, 3, 4) if _is_pillow(image) or isinstance(image, (str, os.PathLike)) else (1, 3, 4)
        fits = [axis for axis in ((0, 2) if first else (2, 0)) if values.shape[axis] in channels]
        if not fits:
            raise ShapeError(
                f"`image` has shape {shape}: neither its first axis nor its last can be channels, of which a picture has "
                f"1 (grey), 3 (colour) or 4 (colour and alpha); expected {FORMS}."
            )
        values = np.moveaxis(values, fits[0], 2)
    if values.dtype.kind == "f":
        wrong = values.size - np.count_nonzero(np.isfinite(values))
        if wrong:
            raise ValueError(f"`image` has {wrong} NaN or infinite numbers among its {values.size}; expected finite ones.")
    return values


def _in_0_to_1(values: npt.NDArray[Any]) -> Picture:
    """Numbers of any scale in 0..1, by the rules that `picture` states."""
    dtype, numbers = values.dtype, values.astype(np.float64)
    if dtype in (np.uint8, np.uint16):
        return numbers / np.iinfo(dtype).max
    low, high = numbers.min(), numbers.max()
    if low >= 0 and 1 < high <= (255 if dtype.kind == "f" else 65535) and (numbers == np.rint(numbers)).all():
        return numbers / (255 if high <= 255 else 65535)
    colours = numbers[..., : 3 if numbers.shape[2] > 2 else 1]
    low, high = colours.min(), colours.max()
    if low < 0 or high > 1:
        colours -= low
        colours /= (high - low) or 1
    return numbers


def _is_tensor(image: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(image, torch.Tensor)


def _is_pillow(image: Any) -> bool:
    module = sys.modules.get("PIL.Image")
    return module is not None and isinstance(image, module.Image)


def _numbers(image: Any) -> npt.NDArray[Any]:
    """Any picture as an array of real numbers, its axes as they come."""
    if isinstance(image, (str, os.PathLike)):
        return _of_pillow(_opened(os.fspath(image)))
    if _is_pillow(image):
        return _of_pillow(image)
    if _is_tensor(image):
        image = image.detach()
        if image.device.type == "meta":
            raise TypeError("`image` is a tensor on the device 'meta', which has a shape and no numbers.")
        image = image.to_dense().cpu()
        image = image.double() if image.is_floating_point() else image
        values = image.resolve_conj().resolve_neg().numpy()
    else:
        try:
            values = np.asarray(image)
        except ValueError as error:  # lists of several lengths
            raise ShapeError(f"`image` is of type {type(image).__name__} and becomes no array: {error}") from None
    if values.dtype.kind not in "biuf":
        raise TypeError(
            f"`image` is of type {type(image).__name__}, as an array of dtype {values.dtype}; expected real numbers (uint8, "
            "uint16, bool, float), a tensor, a PIL image, or the path of a file."
        )
    return values


def _pillow() -> Any:
    try:
        import PIL.Image
        import PIL.ImageOps
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "PIL":
            raise
        raise ModuleNotFoundError(
            f"Reading a picture's file needs Pillow, which is not installed: {command('plots', 'matplotlib')}", name="PIL"
        ) from None
    return PIL


def _opened(path: str | bytes) -> Any:
    """A file's picture, upright, as a PIL image that is loaded."""
    name = os.fsdecode(path)
    if os.path.isdir(path):
        raise IsADirectoryError(f"`image` is '{name}', which is a folder; expected the path of one picture.")
    if not os.path.exists(path):
        hint = " Download it first." if "://" in name else ""
        raise FileNotFoundError(f"`image` is '{name}', and there is no such file.{hint}")
    pil = _pillow()
    module = pil.Image
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", module.DecompressionBombWarning)
            with module.open(name) as opened:
                return pil.ImageOps.exif_transpose(opened)
    except pil.UnidentifiedImageError:
        raise ValueError(f"`image` is '{name}', and this file is no picture that Pillow can read.") from None
    except (module.DecompressionBombError, module.DecompressionBombWarning) as error:
        raise ValueError(
            f"`image` is '{name}', which has too many pixels: Pillow takes at most {module.MAX_IMAGE_PIXELS:,} "
            f"(PIL.Image.MAX_IMAGE_PIXELS), since a small file that becomes a huge picture may be an attack. {error}"
        ) from None
    except Exception as error:  # which one Pillow raises for a broken file depends on the file's format
        raise ValueError(f"`image` is '{name}', and Pillow cannot read it: {error}") from error


def _of_pillow(image: Any) -> npt.NDArray[Any]:
    """A PIL image of any mode as an array (H, W) or (H, W, C), C = 2 and 4 with alpha."""
    mode = image.mode
    try:
        image.load()
    except Exception as error:  # as above
        raise ValueError(f"`image` is a PIL image that Pillow cannot read: {error}") from error
    if mode in ("P", "1", "L", "RGB") and "transparency" in image.info:
        image = image.convert("RGBA")
    elif mode in ("1", "La", "RGBa", "PA"):
        image = image.convert({"1": "L", "La": "LA"}.get(mode, "RGBA"))
    elif mode not in ("L", "LA", "RGB", "RGBA", "F", "I") and not mode.startswith("I;16"):
        try:
            image = image.convert("RGB")
        except ValueError:
            raise ValueError(f"`image` is a PIL image of mode {mode}, which Pillow does not turn into RGB.") from None
    return np.asarray(image)
