"""One call from a model and a picture to all that there is to see: a page, or pictures."""

from __future__ import annotations

import html
import os
from collections.abc import Callable
from math import isqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deformconv.errors import ShapeError
from deformconv.files import whole_file
from deformconv.plots.images import model_input, picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor, nn

    from deformconv.plots.trace import Trace

__all__ = ["Look", "look"]

SUFFIXES = (".html", ".png", ".svg", ".gif")
VIEWS = ("all", "points", "erf", "locations", "saliency", "flow")
# Receptive fields of a page: sums over channels for each, backward passes for all, and units a side for a layer.
CHANNELS, PASSES, SIDE = 4, 100, 5


def check_output(suffix: str, view: str | None, layers: int | None = None) -> None:
    """Raise ValueError for a file's suffix that nothing is written as, and for a view or `layers` that it does not have."""
    if suffix not in SUFFIXES:
        raise ValueError(f"a file ending in {suffix or 'nothing'!r} cannot be written; expected one of {', '.join(SUFFIXES)}.")
    has = VIEWS if suffix in (".png", ".svg") else ("points",) if suffix == ".gif" else ()
    if view is not None and view not in has:
        there = f"has {', '.join(has)}" if has else "has all views, to choose from"
        raise ValueError(f"`view` is {view!r}, and a {suffix} file {there}.")
    if layers is not None and suffix != ".gif" and view not in ("points", "locations"):
        raise ValueError(
            f"`layers` is {layers!r}, a depth for samples; expected it with the view 'points' or 'locations', or a .gif file."
        )


class Look:
    """What a model's deformable layers see in a picture: what `deformconv.look` returns.

    It shows itself in a notebook, `save` writes it to a file, and `trace` has the numbers for every function of
    `deformconv.plots`.

    Attributes:
        trace: what was recorded, a `deformconv.plots.Trace`.
        image: the picture, (H, W) or (H, W, 3) float64 from 0 to 1, pixel for pixel the image that the model got.
        layer: the name of the layer that is shown first.
        at: the position that is shown first, (y, x) in the image's pixels.
    """

    def __init__(
        self, trace: Trace, image: Any, layer: str, at: tuple[float, ...], *, title: str, fields: int | None, progress: bool
    ):
        self.trace, self.image, self.layer, self.at = trace, image, layer, at
        self._title, self._fields, self._progress = title, fields, progress
        self._page: str | None = None

    @property
    def is_attention(self) -> bool:
        """Whether `layer` is deformable attention, of which there are pictures and no page."""
        return self.layer in self.trace.attention_layers

    def html(self) -> str:
        """The page: one file without anything from elsewhere, at most 3 MB."""
        if self._page is None:
            from deformconv.plots.page import build, page

            if self.is_attention:
                raise ValueError(
                    f"layer {self.layer!r} is deformable attention, and a page shows the windows of deformable layers; "
                    "expected a picture, as .save('look.png') writes it, or the numbers: deformconv.plots.query_points."
                )
            self.trace[self.layer]  # it says what is wrong with one that is not deformable, before minutes of computing
            try:
                fields = _receptive_fields(self.trace, self._fields, self._progress)
            except ValueError as error:
                raise ValueError(f"{error} A page without receptive fields needs no gradient: fields=0.") from None
            start = self.layer, (self.at[0], self.at[1])
            self._page = page(build(self.trace, self.image, receptive_fields=fields, start=start, title=self._title))
        return self._page

    def draw(self, view: str = "all", layers: int | None = None) -> Figure:
        """Draw what is to be seen at `layer` and `at`.

        Args:
            view: "points", "erf" (effective receptive field), "locations", "saliency", "flow", or "all" in one picture; of
                deformable attention "points", which "all" is as well.
            layers: through how many deformable layers the points go, 1 to 3, and of which of them the locations are, where 1
                is `layer`; as many as there are by default.

        Returns:
            A matplotlib Figure.

        Raises:
            ValueError: there is no such view, it has no `layers`, or there are not so many.
        """
        check_output(".png", view, layers)
        from deformconv.plots.overview import draw_view

        return draw_view(self.trace, self.image, self.layer, self.at, view, layers=layers, progress=self._progress)

    def save(self, path: str | os.PathLike[str], view: str | None = None, layers: int | None = None) -> Path:
        """Write a file, whole or not at all.

        Args:
            path: its suffix decides: .html is the page, .png and .svg are a picture, .gif shows the offsets grow.
            view, layers: of a picture, as `draw`'s; `layers` of a .gif as well.

        Returns:
            The path.

        Raises:
            ValueError: another suffix, or a view or `layers` that the suffix does not have.
        """
        path = Path(path)
        kind = path.suffix.lower()
        check_output(kind, view, layers)
        with whole_file(path) as part:
            if kind == ".html":
                part.write_text(self.html(), encoding="utf-8")
            elif kind == ".gif":
                self._animate(part, layers)
            else:
                from deformconv.plots import style

                style.save(self.draw(view or "all", layers), part)
        return path

    def _animate(self, path: Path, layers: int | None) -> None:
        from deformconv.plots.animation import animate_unit_points
        from deformconv.plots.overview import stack_depth
        from deformconv.plots.stack import unit_points

        layers = stack_depth(self.trace, self.layer, 0) if layers is None else layers
        scales = [step / 16 for step in range(17)]
        views = [unit_points(self.trace, self.layer, self.at, layers=layers, scale=scale) for scale in scales]
        animate_unit_points(views, self.image, path)

    def _repr_html_(self) -> str:
        """The page in a frame, for notebooks: several do not disturb one another. Of attention a picture."""
        if self.is_attention:
            from deformconv.plots.style import embedded

            return embedded(self.draw())
        text = html.escape(self.html(), quote=True)
        style = "width:100%;height:820px;border:0"
        return f'<iframe title="{html.escape(self._title)}" style="{style}" sandbox="allow-scripts" srcdoc="{text}"></iframe>'

    def __repr__(self) -> str:
        at = ", ".join(f"{value:g}" for value in self.at)
        return f"Look at {self.layer or 'the layer'!r}, position ({at})\n{self.trace!r}"


def look(
    model: nn.Module,
    image: Any,
    *,
    layer: str | None = None,
    at: tuple[float, float] | None = None,
    preprocess: Callable[[Tensor], Tensor] | None = None,
    fields: int | None = None,
    title: str | None = None,
    progress: bool = True,
) -> Look:
    """Show where the deformable layers of a model look in a picture: in a notebook, as a page, or as pictures.

    The model runs once on the picture, in evaluation mode and without gradients, and is left as it was. Where its layers'
    cells lie in the picture is found from the model.

    Args:
        model: a module with deformable layers over two axes, or deformable attention, as `record` takes them. It is called
            with one (1, C, H, W) tensor; one of torchvision's detectors with a list of one (C, H, W).
        image: the picture: (H, W), (H, W, 3) or (3, H, W), an array, a tensor, a PIL image or a file's path. A (1, C, H, W)
            tensor goes into the model as it is; all else is brought to the channels of the model's first convolution and to
            values from 0 to 1.
        layer: the name of the layer to show first. Default: the last deformable one that is no attention, if there is one.
        at: the position to show first, (y, x) in the picture's pixels. Default: the middle.
        preprocess: from the (1, C, H, W) tensor to what the model gets, of the same height and width: a normalisation.
        fields: how many receptive fields of each layer are computed for the page, at most; each takes four backward passes.
            Default: 100 passes for all layers together, and at most 25 fields a layer.
        title: the page's; by default the model's class.
        progress: whether a terminal shows how far it is.

    Returns:
        A Look: shows itself in a notebook, `.save("look.html")`, `.save("look.png")`, and `.trace` with the numbers.

    Raises:
        TypeError, ValueError: a picture that is none, a model without deformable layers, a layer that it does not have, a
            position outside the picture.

    Example:
        >>> import torch
        >>> import deformconv
        >>> from deformconv.torch import DeformConv2d
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, stride=2, padding=1), DeformConv2d(4, 4, 3, padding=1))
        >>> seen = deformconv.look(net, torch.rand(3, 32, 48), progress=False)
        >>> seen.layer, seen.at, seen.trace.geometry("1").step
        ('1', (15.5, 23.5), (2.0, 2.0))

    Paper: arXiv 1811.11168, section 2.1.
    """
    import deformconv.torch  # noqa: F401  (it says what to install where PyTorch is missing)

    # isort: split
    from torch import Tensor, no_grad

    from deformconv.plots.recording import record
    from deformconv.plots.rerun import undisturbed
    from deformconv.torch.surgery import check_model

    check_model(model)
    if fields is not None and not (isinstance(fields, int) and fields >= 0):
        raise ValueError(f"`fields` is {fields!r}; expected an integer, 0 or more, or None.")
    if preprocess is not None and not callable(preprocess):
        raise TypeError(f"`preprocess` is of type {type(preprocess).__name__}; expected a function of a tensor (1, C, H, W).")
    if not isinstance(image, Tensor):
        image = picture(image)  # a file is read once, for the model and for the page
    given = model_input(image, model)
    if len(given) != 1:
        raise ShapeError(f"`image` has {len(given)} pictures, shape {tuple(given.shape)}; expected one, such as image[:1].")
    tensor = given if preprocess is None else _preprocessed(preprocess, given)
    with undisturbed(model), record(model) as trace, no_grad():
        _call(model, tensor)
    chosen = [*trace.attention_layers, *trace.layers][-1] if layer is None else layer
    flat = [call.layer for call in trace if call.D != 2]
    if flat:
        raise ValueError(
            f"layer {flat[0]!r} of `model` has {trace[flat[0]].D} spatial axes; expected 2: a page shows pictures."
        )
    _check_place(trace, chosen, at)
    position = tuple((size - 1) / 2 for size in trace.size) if at is None else tuple(map(float, at))
    name = type(model).__name__ if title is None else title
    return Look(trace, _shown(image, given), chosen, position, title=name, fields=fields, progress=progress)


def _check_place(trace: Trace, layer: str, at: tuple[float, float] | None) -> None:
    """Say what is wrong with a layer and a position."""
    if layer in trace.attention_layers:
        from deformconv.plots.query import query_points

        query_points(trace, layer, at)
    else:
        trace.unit(layer, at)


def _preprocessed(preprocess: Callable[[Tensor], Tensor], given: Tensor) -> Tensor:
    """What a user's function makes of the picture, checked."""
    from torch import Tensor

    tensor = preprocess(given)
    if not isinstance(tensor, Tensor) or tensor.ndim != 4 or tensor.shape[2:] != given.shape[2:]:
        shape = f"shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else f"type {type(tensor).__name__}"
        raise ShapeError(
            f"`preprocess` returned what has {shape}; expected a tensor (1, C, H, W) of the picture's size, "
            f"{given.shape[2]}x{given.shape[3]}: resize the picture before."
        )
    return tensor


def _call(model: nn.Module, tensor: Tensor) -> None:
    """Call a model with a picture: one of torchvision's detectors takes a list."""
    is_detector = any(kind.__module__.startswith("torchvision.models.detection") for kind in type(model).__mro__)
    model(list(tensor) if is_detector else tensor)


def _shown(image: Any, given: Tensor) -> Any:
    """The picture to draw on, of the size that the model got."""
    from torch import Tensor

    if isinstance(image, Tensor) and image.ndim == 4:
        first = image[0].detach()
        return picture(first if len(first) in (1, 3) else first.mean(dim=0))
    return picture(image)


def _receptive_fields(trace: Trace, most: int | None, progress: bool) -> dict[tuple[str, int], list[Any]]:
    """Receptive fields of some units of every layer, spread over its map, for a page."""
    from deformconv.plots.page import spread_units
    from deformconv.plots.progress import bar
    from deformconv.plots.receptive import each_receptive_field

    keys = list(dict.fromkeys((call.layer, call.index) for call in trace))
    number = PASSES // (CHANNELS * len(keys)) if most is None else most
    side = min(isqrt(max(number, 1)), SIDE) if most is None else isqrt(most)
    units = {key: spread_units(trace[key].output_size, side) for key in keys} if side else {}
    with bar("Receptive fields", sum(map(len, units.values())), shown=progress) as advance:
        found: dict[tuple[str, int], list[Any]] = {}
        for (layer, index), chosen in units.items():
            fields = found[layer, index] = []
            for field in each_receptive_field(trace, layer, chosen, channels=CHANNELS, index=index):
                fields.append(field)
                advance()
    return found
