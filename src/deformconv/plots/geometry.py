"""Where the cells of a layer's maps lie in the image that the model was given, found from the model itself.

Pixel centres are whole numbers, the first pixel's is 0 on every axis; axes go depth, height, width. A cell i lies at
`origin + step*i` image pixels. An output of a convolution or pooling lies at the middle of its window.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from deformconv.ops.window import n_of
from deformconv.plots.centroid import centroid, fitted
from deformconv.plots.graph import Follower
from deformconv.plots.inputs import Inputs
from deformconv.plots.observe import Event, observe
from deformconv.plots.places import Along, Place, windowed
from deformconv.plots.rerun import Probe, leads_to, rerun, undisturbed

__all__ = ["Geometry", "Survey", "of_input", "of_output", "survey", "through_window", "position_text"]

NEAR = 4  # cells on each axis whose gradient a geometry is compared with, or one less where the map's size is odd


@dataclass(frozen=True)
class Geometry:
    """Where the cells of a map lie in the image: cell i at `origin + step*i` image pixels, on each axis.

    Attributes:
        origin, step: one number for each axis, image pixels; axes go depth, height, width.
        source: "graph" if the operations between the image and the map were followed, "gradient" if the gradient's centroid
            was taken, since one of them is not known.
        difference: how far the gradient's centroid lies from where "graph" says, image pixels, the largest of the axes; None
            where it was not measured.

    Example:
        >>> from deformconv.plots import Geometry
        >>> geometry = Geometry(origin=(0.5, 0.5), step=(2.0, 2.0), source="graph")    # after a pooling of 2 x 2
        >>> geometry.to_image([[0, 0], [3, 10]]).tolist()
        [[0.5, 0.5], [6.5, 20.5]]
    """

    origin: tuple[float, ...]
    step: tuple[float, ...]
    source: str
    difference: float | None = None

    def to_image(self, cells: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Image pixels, (..., D), of cells, (..., D)."""
        return np.asarray(cells, np.float64) * self.step + self.origin

    def to_cells(self, pixels: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Cells, (..., D), of image pixels, (..., D); they need not be whole."""
        return (np.asarray(pixels, np.float64) - self.origin) / self.step


def through_window(geometry: Geometry, layer: Any) -> Geometry:
    """The geometry of a convolution's outputs, from its input's: the middle of the window without offsets."""
    windows = zip(layer.kernel_size, layer.stride, layer.padding, layer.dilation, strict=True)
    middles = [d * (k - 1) / 2 - before for k, _, (before, _), d in windows]
    origin = tuple(float(x) for x in geometry.to_image(middles))
    return replace(geometry, origin=origin, step=tuple(s * t for s, t in zip(geometry.step, layer.stride, strict=True)))


Key = tuple[str, int]  # a layer's name, and which of its calls


class _Seen(NamedTuple):
    order: int
    rank: int
    place: Place | None
    input: Tensor
    sources: frozenset[Key]
    drift: float  # how far offsets move samples on average, input pixels


class Survey(NamedTuple):
    """What one forward pass says of all layers: geometries or, where there is none, the reason; and what depends on what."""

    inputs: dict[Key, Geometry | str]
    outputs: dict[Key, tuple[Place | None, tuple[int, ...]]]
    before: dict[Key, list[Key]]
    measured: dict[Key, Geometry]  # of outputs that could not be followed, as they are asked for


def survey(model: nn.Module, inputs: Inputs, rank: int) -> Survey:
    """Run the model once more on the recorded image, and follow it."""
    image = inputs.picture(0).requires_grad_()
    seen: dict[Key, _Seen] = {}
    outputs: dict[Key, tuple[Place | None, tuple[int, ...]]] = {}
    follower = Follower()

    def watch(event: Event) -> None:
        key = event.name, sum(name == event.name for name, _ in seen)
        layer_rank = len(event.layer.kernel_size)
        place = follower.place(event.input) if layer_rank == rank else None
        drift = float(event.offset.detach().float().abs().mean()) if event.offset.numel() else 0.0
        batch = event.input if event.input.ndim == layer_rank + 2 else event.input[None]
        seen[key] = _Seen(len(seen), layer_rank, place, batch, follower.sources(event.input), drift)
        passed = None
        if place is not None and follower.place(event.output) is None:  # its kernel is none of PyTorch's operations
            layer = event.layer
            before = [pair[0] for pair in layer._pairs]
            passed = windowed(place, event.output.shape, layer.kernel_size, layer.stride, before, layer.dilation)
        follower.put(event.output, passed, seen[key].sources | {key})

    def until(stack: ExitStack, stop: BaseException, pictures: list[Tensor]) -> None:
        stack.enter_context(observe(model, watch))
        for name, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):  # it takes no hooks
                continue
            stack.callback(module.register_forward_hook(_noting(name, follower, outputs)).remove)
        for picture in pictures:
            follower.put_image(picture, rank)
        stack.enter_context(follower)

    rerun(model, inputs, image, 0, until)
    with undisturbed(model):  # checkpointed parts of a model run again for their gradients
        return Survey(_geometries(seen, image, rank), outputs, _chains(seen), {})


def _noting(name: str, follower: Follower, outputs: dict[Key, Any]) -> Any:
    """A hook that notes where a module's output lies."""

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            index = sum(key[0] == name for key in outputs)
            outputs[name, index] = follower.place(output), tuple(output.shape)

    return note


def _chains(seen: dict[Key, _Seen]) -> dict[Key, list[Key]]:
    """For each call the calls before it, each the latest that the one after it depends on."""
    chains: dict[Key, list[Key]] = {}
    for key, call in seen.items():
        latest = max(call.sources, key=lambda source: seen[source].order, default=None)
        chains[key] = [] if latest is None else [latest, *chains[latest]]
    return chains


def _geometries(seen: dict[Key, _Seen], image: Tensor, rank: int) -> dict[Key, Geometry | str]:
    found: dict[Key, Geometry | str] = {}
    kept: dict[Any, Geometry | str] = {}  # layers in the same place are measured once
    for key, call in reversed(seen.items()):
        along = None if call.place is None else call.place.spatial(rank)
        same = key if along is None or call.place is None else (tuple(along), call.place.doubt, len(call.input))
        if same not in kept:
            kept[same] = _geometry(key[0], call, image, rank, seen)
        found[key] = kept[same]
    return found


def _geometry(name: str, call: _Seen, image: Tensor, rank: int, seen: dict[Key, _Seen]) -> Geometry | str:
    """The geometry of a call's input map, or why there is none."""
    if call.rank != rank:
        return f"it has {n_of(call.rank, 'spatial axis')} and the image {rank}."
    if len(call.input) != 1:
        return f"it gets {len(call.input)} maps for one image, as layers that work on regions do, which have no common place."
    along = _axes(call.place, rank)
    if isinstance(along, str):
        return along
    if along is None or call.place is None or call.place.doubt:
        return _measured(call.input, image, along)
    geometry = Geometry(tuple(float(a.origin) for a in along), tuple(float(a.step) for a in along), "graph")
    try:
        spot = centroid(call.input, image, _middle(call.input.shape[2:])) if leads_to(call.input, image) else None
    except RuntimeError:  # PyTorch's, for a part of the model that has no derivative
        spot = None
    if spot is None:
        return geometry
    expected = geometry.to_image([(size - 1) / 2 for size in call.input.shape[2:]])
    apart = np.abs(expected - spot.middle)
    drift = sum(seen[source].drift for source in call.sources)
    allowed = (NEAR / 2 + drift) * np.abs(geometry.step) + spot.radius / 2
    if (apart > allowed).any():
        warnings.warn(
            f"layer {name!r}: by the model's operations the middle of its input map lies at image pixel "
            f"{position_text(expected)}, and by the gradient at {position_text(spot.middle)}. The former is used; the layer "
            "may look at the image from far aside.",
            stacklevel=2,
        )
    return replace(geometry, difference=float(apart.max()))


def _middle(sizes: Sequence[int]) -> list[slice]:
    """The few cells in the middle of a map: of more, those that respond to the picture may all lie on one side."""
    return [slice((n - cells) // 2, (n + cells) // 2) for n in sizes for cells in [min(n, NEAR - n % 2)]]


def position_text(position: Sequence[float] | npt.NDArray[np.float64]) -> str:
    return "(" + ", ".join(f"{x:.1f}" for x in position) + ")"


def _axes(place: Place | None, rank: int) -> list[Along] | str | None:
    """The axes of a map along the image's; None if nothing is known, and the reason if they are others."""
    along = None if place is None else place.spatial(rank)
    if place is not None and along is None and not place.doubt:
        return "the last axes of its map are not the image's, in the image's order; expected (N, C) and then these."
    return along


def _measured(features: Tensor, image: Tensor, along: list[Along] | None) -> Geometry | str:
    """The geometry of a map (1, C, *O) by the gradient's centroid; the reason if there is none."""
    reason = "an operation before it could not be followed, and "
    if not leads_to(features, image):
        return (
            f"{reason}there is no gradient, since the model runs under torch.no_grad() or torch.inference_mode(), detaches a "
            "tensor, or leaves PyTorch on the way there."
        )
    try:
        line = fitted(features, image, None if along is None else [abs(a.step) for a in along])
    except RuntimeError as error:  # PyTorch's, for a part of the model that has no derivative
        return f"{reason}the gradient with respect to the image could not be computed: {error}"
    if line is None:
        return f"{reason}the gradient with respect to the image is 0 or not finite."
    return Geometry(*line, "gradient")


def of_input(found: Survey, layer: str, index: int) -> Geometry:
    """The geometry of a deformable layer's input in a survey."""
    geometry = found.inputs.get((layer, index))
    if geometry is None:
        raise ValueError(
            f"layer {layer!r} has no call {index} in a forward pass in evaluation mode, from which geometries are found; "
            "expected a model that was recorded in it, after model.eval()."
        )
    return _found(layer, geometry)


def _found(layer: str, geometry: Geometry | str) -> Geometry:
    if isinstance(geometry, str):
        raise ValueError(f"where layer {layer!r} lies in the image could not be found: {geometry}")
    return geometry


def of_output(trace: Any, found: Survey, layer: str, index: int) -> Geometry:
    """The geometry of any module's output in a trace's survey."""
    if layer not in dict(trace.model.named_modules()):
        raise ValueError(f"the model has no layer {layer!r}; its deformable layers are {', '.join(map(repr, trace.layers))}.")
    place, shape = found.outputs.get((layer, index), (None, ()))
    rank = len(trace.size)
    if len(shape) not in (rank + 1, rank + 2):
        what = f"an output of shape {shape}" if shape else f"no call {index} that returns one tensor, in evaluation mode"
        raise ValueError(f"layer {layer!r} has {what}; expected one that returns a map, (N, C) and {rank} axes of cells.")
    along = _axes(place, rank)
    if isinstance(along, str):
        return _found(layer, along)
    if along is not None and place is not None and not place.doubt:
        return Geometry(tuple(float(a.origin) for a in along), tuple(float(a.step) for a in along), "graph")
    if (layer, index) not in found.measured:
        probe = Probe(trace, layer, index)
        image = probe.image.requires_grad_()
        features = probe.features(image)
        geometry = _measured(features if features.ndim == rank + 2 else features[None], image, along)
        found.measured[layer, index] = _found(layer, geometry)
    return found.measured[layer, index]
