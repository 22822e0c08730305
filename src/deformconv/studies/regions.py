"""`python -m deformconv.studies.regions`: train the net that `deformconv look` shows when it is given none.

The net learns to paint each place with the mean colour of its region, from photographs inside the wheels of scikit-image and
scikit-learn, divided by Felzenszwalb and Huttenlocher's method (IJCV 59, 2004), and from collages of their parts. Three terms
are made small: the error of what is painted, where the colours to sample are under noise, so that only the mean of many is
good; the distance of samples from the region of the place that they are for; and, less, the offsets' lengths, so that windows
keep their form where nothing is in the way. Of these terms only the first compares a net with a plain one.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
import numpy.typing as npt
import skimage.data
import torch
from scipy import ndimage
from skimage.segmentation import expand_labels, felzenszwalb
from skimage.transform import resize
from skimage.util import img_as_float32
from sklearn.datasets import load_sample_image  # type: ignore[import-untyped]
from torch import Tensor
from torch.nn.functional import interpolate, mse_loss

from deformconv.files import whole_file
from deformconv.plots.example import DILATION, FILE, STEP, ExampleNet, example_net, save
from deformconv.plots.points import regular_points, sampling_points

__all__ = ["HELD_OUT", "Report", "Scene", "material", "regions", "report", "scene", "train"]

Pixels = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

_TEXTURES = ("brick", "grass", "gravel")  # each of them one region
_OBJECTS = (
    "astronaut", "camera", "cell", "coins", "horse", "hubble_deep_field", "immunohistochemistry", "moon", "retina",
    "stereo_motorcycle", "china.jpg", "flower.jpg",
)  # fmt: skip
HELD_OUT = ("coffee", "chelsea", "rocket")
SIDES = (240, 360, 520)  # pixels of a photograph's longer side
SIDE = 96  # pixels of a scene's sides
REACH = 20.0  # pixels: colours of a region count by a Gaussian of this deviation around the place that is painted
NOISE = 0.15  # the deviation of the noise over the colours, of which half the variance is constant over
_GRAINS = (4, 12)  # squares of so many pixels
# The cost of a sample a cell away from its region, and of an offset of a cell, beside squared errors of colours in 0 to 1.
_OUTSIDE, _OFFSET = 0.04, 0.004
_BATCH, _LEARNING_RATE = 8, 2e-3


class Scene(NamedTuple):
    """A picture (H, W, 3) in 0 to 1, and each pixel's region (H, W)."""

    image: Pixels
    regions: Labels


def material(names: Sequence[str] = _TEXTURES + _OBJECTS, sides: Sequence[int] = SIDES) -> list[Scene]:
    """Photographs by name, each at every size, and their regions; without those in which no scene has room."""
    scenes = [_photograph(name, side) for name in names for side in sides]
    return [scene for scene in scenes if min(scene.regions.shape) >= SIDE]


def _photograph(name: str, side: int) -> Scene:
    """A photograph whose longer side has so many pixels."""
    image = load_sample_image(name) if name.endswith(".jpg") else getattr(skimage.data, name)()
    image = np.asarray(image[0] if isinstance(image, tuple) else image)  # of two views, the left one
    image = img_as_float32(np.repeat(image[..., None], 3, 2) if image.ndim == 2 else image)
    height, width = (max(1, round(length * side / max(image.shape[:2]))) for length in image.shape[:2])
    image = np.asarray(resize(image, (height, width), anti_aliasing=True), np.float32)
    return Scene(image, np.zeros((height, width), np.int64) if name in _TEXTURES else regions(image))


def regions(image: Pixels) -> Labels:
    """Divide a picture (H, W, 3) into regions (H, W), of which none is a mere seam along another's edge."""
    fine = felzenszwalb(image, scale=150, sigma=0.7, min_size=60)
    cores = np.zeros(fine.shape, np.int64)
    for label in range(fine.max() + 1):
        cores[ndimage.binary_erosion(fine == label, np.ones((3, 3)), iterations=2, border_value=1)] = label + 1
    return np.asarray(expand_labels(cores, max(cores.shape)) if cores.any() else fine, np.int64)


def scene(random: np.random.Generator, photographs: Sequence[Scene], side: int = SIDE) -> Scene:
    """A part of a photograph, often with up to three blobs in it that are filled from others, and a little noise."""
    image, labels = _part(random, photographs, side)
    for _ in range(int(random.integers(1, 4)) if random.random() < 0.6 else 0):
        blob = _blob(random, side)
        other = _part(random, photographs, side)
        edge: Pixels = ndimage.gaussian_filter(blob.astype(np.float32), random.uniform(0.3, 1.0))[..., None]
        image = image + edge * (other.image - image)
        labels = np.where(blob, other.regions + labels.max() + 1, labels)
    noise = random.normal(size=image.shape) * random.uniform(0, 0.06)
    return Scene((image + noise).astype(np.float32), labels)


def _part(random: np.random.Generator, photographs: Sequence[Scene], side: int) -> Scene:
    """A square part of a photograph, turned, mirrored, and in other colours."""
    image, labels = photographs[int(random.integers(len(photographs)))]
    top, left = (int(random.integers(length - side + 1)) for length in labels.shape)
    turns, mirror = int(random.integers(4)), int(random.choice([-1, 1]))
    image = np.rot90(image[top : top + side, left : left + side], turns)[:, ::mirror, random.permutation(3)]
    labels = np.rot90(labels[top : top + side, left : left + side], turns)[:, ::mirror]
    image = 1 - image if random.random() < 0.2 else image
    return Scene(image ** np.exp(random.uniform(-0.4, 0.4, 3)).astype(np.float32), labels)


def _blob(random: np.random.Generator, side: int) -> npt.NDArray[np.bool_]:
    """Where (side, side) something lies in a scene: an ellipse, a rhombus, or clouds."""
    clouds = ndimage.gaussian_filter(random.normal(size=(side, side)), random.uniform(4, 12))
    clouds = clouds / clouds.std()
    if random.random() < 0.5:
        return np.asarray(clouds > random.uniform(0.2, 1))
    angle, middle = random.uniform(0, np.pi), random.uniform(0, side, 2)
    y, x = np.indices((side, side)) - middle[:, None, None]
    along = np.abs(y * np.cos(angle) + x * np.sin(angle)) / random.uniform(0.06 * side, 0.4 * side)
    across = np.abs(x * np.cos(angle) - y * np.sin(angle)) / random.uniform(0.05 * side, 0.3 * side)
    far = np.hypot(along, across) if random.random() < 0.5 else along + across
    return np.asarray(far + (0.15 * clouds if random.random() < 0.5 else 0) < 1)


class _Batch(NamedTuple):
    images: Tensor  # (N, 3, H, W)
    painted: Tensor  # (N, 3, h, w), what the net is to paint
    away: Tensor  # (N, R, h, w), the distance of each cell from each of an image's regions, in cells
    own: Tensor  # (N, h, w), each cell's region


def _batch(scenes: Sequence[Scene]) -> _Batch:
    images = torch.from_numpy(np.stack([scene.image.transpose(2, 0, 1) for scene in scenes]))
    painted, away, own = [], [], []
    for image, scene in zip(images, scenes, strict=True):
        found, of_cells = np.unique(scene.regions[::STEP, ::STEP], return_inverse=True)
        of_cells = of_cells.reshape(scene.regions[::STEP, ::STEP].shape)
        cells = torch.from_numpy(of_cells)
        painted.append(_painted(image, torch.from_numpy(scene.regions == found[:, None, None]), cells))
        away.append(
            torch.from_numpy(np.stack([ndimage.distance_transform_edt(of_cells != region) for region in range(len(found))]))
        )
        own.append(cells)
    rows = max(len(each) for each in away)
    filled = torch.zeros(len(away), rows, *own[0].shape)
    for i, each in enumerate(away):
        filled[i, : len(each)] = each
    return _Batch(images, torch.stack(painted), filled, torch.stack(own))


def _painted(image: Tensor, inside: Tensor, own: Tensor) -> Tensor:
    """The mean colour (3, h, w) around each cell within its region; `inside` (R, H, W) says where each region lies."""
    blurs = []
    for length in image.shape[1:]:
        pixels = torch.arange(length, dtype=torch.float32)
        blurs.append(torch.exp(-0.5 * ((pixels[::STEP, None] - pixels) / REACH) ** 2))
    share = inside[:, None].to(image.dtype)
    sums = blurs[0] @ torch.cat([share * image, share], 1) @ blurs[1].T  # (R, 4, h, w)
    colours = sums.gather(0, own[None, None].expand(1, 4, -1, -1))[0]
    return colours[:3] / colours[3:]


def _spoiled(images: Tensor) -> Tensor:
    """Images under noise that only the mean of a large area is free of."""
    height, width = images.shape[2:]
    for grain in _GRAINS:
        coarse = torch.randn(len(images), 3, height // grain + 2, width // grain + 2)
        top, left = torch.randint(grain, (2,)).tolist()
        noise = interpolate(coarse, scale_factor=grain)[:, :, top : top + height, left : left + width]
        images = images + NOISE / len(_GRAINS) ** 0.5 * noise
    return images


def _outside(offset: Tensor, away: Tensor, own: Tensor) -> Tensor:
    """How far each sample (N, 9, h, w) lies outside its unit's region, in cells."""
    height, width = own.shape[1:]
    regular = torch.from_numpy(regular_points((height, width), 3, padding=DILATION, dilation=DILATION)).to(offset.dtype)
    y, x = (offset.unflatten(1, (9, 2)) + regular).unbind(2)
    y_inside, x_inside = y.clamp(0, height - 1), x.clamp(0, width - 1)
    top, left = (each.detach().floor() for each in (y_inside.clamp(max=height - 1.001), x_inside.clamp(max=width - 1.001)))
    down, right = y_inside - top, x_inside - left
    corner = (own[:, None] * height + top.long()) * width + left.long()

    def at(further: int) -> Tensor:
        return away.flatten(1).gather(1, (corner + further).flatten(1)).view_as(corner)

    upper, lower = (at(row) * (1 - right) + at(row + 1) * right for row in (0, width))
    return upper * (1 - down) + lower * down + (y - y_inside).abs() + (x - x_inside).abs()


def train(
    photographs: Sequence[Scene], steps: int, seed: int, *, deformable: bool = True, progress: bool = False
) -> ExampleNet:
    """Train a net, or the same one whose offsets are held at zero; the same seed gives the same scenes to both."""
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    net = ExampleNet(deformable=deformable)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=steps)
    started, recent = time.perf_counter(), []
    for step in range(1, steps + 1):
        images, painted, away, own = _batch([scene(random, photographs) for _ in range(_BATCH)])
        found, offsets = net.paint(images, _spoiled(images))
        error = mse_loss(found, painted)
        outside = torch.stack([_outside(offset, away, own) for offset in offsets]).mean()
        length = torch.stack([(offset.square() + 0.01).sqrt() for offset in offsets]).mean()
        optimizer.zero_grad()
        (error + _OUTSIDE * outside + _OFFSET * length).backward()
        optimizer.step()
        scheduler.step()
        recent.append((error.item(), outside.item()))
        if progress and (step % 250 == 0 or step == steps):
            mean_error, mean_outside = np.mean(recent, axis=0)
            seconds = time.perf_counter() - started
            click.echo(f"  step {step}: error {1e4 * mean_error:.1f}e-4, outside {mean_outside:.3f} cells, {seconds:.0f} s")
            recent.clear()
    return net.eval()


@dataclass(frozen=True)
class Report:
    """What a net does on a photograph."""

    name: str
    error: float  # mean square of the painted colours' errors
    share: tuple[float, ...]  # of each deformable layer's samples, those in their unit's region
    share_regular: float  # the same for the undeformed windows
    length: tuple[float, ...]  # mean of each layer's offsets, image pixels


@torch.no_grad()
def report(net: ExampleNet, name: str, side: int = 320) -> Report:
    """Look at what a net in evaluation mode does on a photograph whose longer side has so many pixels."""
    photograph = _photograph(name, side)
    images, painted, _, own = _batch([photograph])
    found, offsets = net.paint(images, images)
    size, window = tuple(own.shape[1:]), {"padding": DILATION, "dilation": DILATION}
    points = [sampling_points(offset.numpy(), 3, **window)[0, 0] for offset in offsets]
    share = [_share(STEP * each, photograph.regions) for each in (*points, regular_points(size, 3, **window))]
    length = (STEP * float(offset.unflatten(1, (9, 2)).norm(dim=2).mean()) for offset in offsets)
    return Report(name, float(mse_loss(found, painted)), tuple(share[:-1]), share[-1], tuple(length))


def _share(points: npt.NDArray[np.float64], labels: Labels) -> float:
    """The share of the points (K, 2, h, w), in image pixels, that lie in the region of their unit's pixel."""
    nearest = np.rint(points).astype(np.int64)
    last = np.reshape(labels.shape, (2, 1, 1)) - 1
    within = ((nearest >= 0) & (nearest <= last)).all(1)
    y, x = np.moveaxis(nearest.clip(0, last), 1, 0)
    return float((within & (labels[y, x] == labels[::STEP, ::STEP])).mean())


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--steps", type=click.IntRange(2), default=2000, help="How long to train.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Of the net and of the scenes.")
@click.option("--plain", is_flag=True, help="Hold the offsets at zero, for comparison, and write nothing.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=FILE,
    show_default="the package's own",
    help="The file.",
)
def main(steps: int, seed: int, plain: bool, output: Path) -> None:
    """Train the net, write it, and say what it does on photographs that it has not seen."""
    torch.set_num_threads(1)  # sums in the same order anywhere
    net = train(material(), steps, seed, deformable=not plain, progress=True)
    if not plain:
        with whole_file(output) as part:
            save(net, part)
        click.echo(f"{output}: {output.stat().st_size / 1e3:.0f} kB")
        net = example_net(output)  # as rounded
    for name in HELD_OUT:
        found = report(net, name)
        share, length = (" ".join(f"{each:.2f}" for each in row) for row in (found.share, found.length))
        click.echo(
            f"{name}: error {1e4 * found.error:.1f}e-4; samples in their region {share}, of undeformed windows "
            f"{found.share_regular:.2f}; offsets {length} pixels"
        )


if __name__ == "__main__":
    main()
