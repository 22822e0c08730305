"""`deformconv look`: a photograph and a model, as a page or a picture."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from deformconv.cli.models import model_of
from deformconv.plots.images import picture
from deformconv.plots.looking import check_output, look

__all__ = ["run"]

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and deviation of its photographs' red, green and blue


def run(
    photo: Path,
    *,
    model: str | None,
    weights: Path | None,
    layer: str | None,
    at: tuple[float, float] | None,
    view: str | None,
    depth: int | None,
    fields: int | None,
    out: Path,
    size: int,
    imagenet: bool,
) -> int:
    """Read, compute, write; return the exit code."""
    with _said():
        check_output(out.suffix.lower(), view, depth)
        image = _read(photo)
        net = model_of(model, weights)
    prepared = _normalised if imagenet else None
    size_of_photo = image.shape[:2]
    image = _scaled(image, size)
    place = None if at is None else _position(at, size_of_photo, image.shape[:2])
    with _said(), _of_the_model(image.shape[:2]), _without_code():
        seen = look(net, image, layer=layer, at=place, preprocess=prepared, fields=fields, title=photo.name)
    try:
        with _said(), _of_the_model(image.shape[:2]), _without_code():
            written = seen.save(out, view, depth)
    except OSError as error:
        raise click.ClickException(f"cannot write {out}: {error.strerror or error}") from None
    click.echo(repr(seen))
    click.echo(f"Written: {written}")
    return 0


@contextmanager
def _without_code() -> Iterator[None]:
    """Warnings are said without the line of code that gives them."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: click.echo(f"Warning: {message}", err=True)
        yield


def _read(photo: Path) -> Any:
    """The photograph's pixels."""
    try:
        return picture(photo)
    except OSError as error:
        raise click.ClickException(str(error)) from None


@contextmanager
def _said() -> Iterator[None]:
    """Errors that are sentences for the user end the command with them."""
    try:
        yield
    except ValueError as error:
        raise click.ClickException(str(error)) from None


@contextmanager
def _of_the_model(size: tuple[int, int]) -> Iterator[None]:
    """What else a model raises, on its way forward or back, is told with the picture's size, which often is why."""
    try:
        yield
    except (click.ClickException, ValueError, OSError):
        raise
    except Exception as error:
        shown = f"{type(error).__name__}: {error}".splitlines()[0]
        raise click.ClickException(f"the model failed on a picture of {size[0]}x{size[1]}: {shown}") from error


def _scaled(image: Any, size: int) -> Any:
    """A picture whose longer side has at most `size` pixels."""
    height, width = image.shape[:2]
    factor = size / max(height, width)
    if factor >= 1:
        return image
    new = max(1, round(width * factor)), max(1, round(height * factor))
    small = Image.fromarray(np.round(image * 255).astype(np.uint8)).resize(new, Image.Resampling.LANCZOS)
    return np.asarray(small, np.float64) / 255


def _position(at: tuple[float, float], photo: tuple[int, int], shown: tuple[int, int]) -> tuple[float, float]:
    """A position in the photograph as one in the picture that is shown: the middles of pixels are whole numbers in both."""
    for value, size, name in zip(at, photo, ("down", "to the right"), strict=True):
        if not -0.5 <= value <= size - 0.5:
            raise click.BadParameter(f"{value:g} pixels {name} are outside the photograph, which has {size}", param_hint="--at")
    y, x = ((value + 0.5) * new / old - 0.5 for value, old, new in zip(at, photo, shown, strict=True))
    return min(max(y, 0), shown[0] - 1), min(max(x, 0), shown[1] - 1)


def _normalised(image: Tensor) -> Tensor:
    """The picture as ImageNet's models expect it."""
    if image.shape[1] != 3:
        raise click.ClickException(f"--imagenet is for colours, and the model takes {image.shape[1]} channels.")
    mean, deviation = (torch.tensor(values)[:, None, None] for values in IMAGENET)
    return (image - mean) / deviation
