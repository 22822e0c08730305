"""One HTML file in which somebody looks around: picture, offsets and program in it, nothing fetched from anywhere.

`build` makes the document, a dictionary that JSON can hold, from what `record` recorded; `page` puts it into the file. The
document of version 1:

    title        what the page is called
    image        width, height: of the picture that the model got, in pixels; src: a data URI; alt: what it shows
    layers       one entry a recorded call, in their order:
        name, index, kernel, stride, padding (before), dilation, groups (offset groups), input, output   as the call's
        origin, step     where the layer's input map lies in the image: cell i at pixel origin + step*i
        reads            what samples read, the input with its padding if that is not of zeros: before (padding), size
        before           numbers in `layers` of the deformable calls that it sees the image through, nearest first
        every            positions were kept at rows and columns 0, every, 2*every, ...
        offset           dtype, scale, shape (groups, K, 2, rows, columns), data: offset = scale*integer, in input pixels
        mask             None, or the same with shape (groups, K, rows, columns)
        fields           None, or receptive fields: units, shape (fields, rows, columns), origin (of each), step and radius in
                         image pixels, data: bytes, 255 for each field's maximum
        statistics       mean (y, x), deviation, largest (on an axis): offsets in image pixels; outside, mask_mean
    start        layer: a number in `layers`; at: a position in image pixels
    left_out     layers that the file had no room for

`data` is base64 of a raw deflate stream, in which the integers' low bytes come first, then the next bytes: apart, they take
less room than side by side. The smallest integer of its dtype stands for an offset that is no number.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from string import Template
from typing import Any

import numpy as np
import numpy.typing as npt

from deformconv.errors import ShapeError
from deformconv.plots.packing import TOLERANCE, Packing
from deformconv.plots.stack import of_the_last_pass

__all__ = ["LIMIT", "build", "page", "spread_units"]

LIMIT = 3_000_000
"""The most bytes that a file takes."""
_TOLERANCES = (0.002, 0.01, TOLERANCE)  # the first that leaves the file small enough: in a stack of layers errors grow
_LONGEST_SIDE = 1024
_SCRIPTS = ("rule.js", "draw.js", "scene.js", "look.js")


def page(document: Mapping[str, Any]) -> str:
    """One HTML file, whole in itself, that shows a document.

    Args:
        document: what `build` returned.

    Returns:
        The text of the file. It runs from disk, in a frame and without a network, which its policy forbids it to use.

    Raises:
        ValueError: there is no layer in the document, or it is of another version.
    """
    if document.get("version") != 1:
        raise ValueError(f"`document` has version {document.get('version')!r}; a page shows version 1, which `build` makes")
    if not document.get("layers"):
        raise ValueError("`document` has no layers, so that there is nothing to look at: `build` it from a trace with a call")
    web = files("deformconv.plots") / "web"
    style = (web / "look.css").read_text(encoding="utf-8")
    script = "\n".join((web / name).read_text(encoding="utf-8") for name in _SCRIPTS)
    # A title from anywhere could otherwise end the script element, or begin a comment.
    data = json.dumps(document, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    template = Template((web / "page.html").read_text(encoding="utf-8"))
    title = html.escape(str(document["title"]))
    return template.substitute(title=title, policy=policy, style=style, script=script, data=data)


def _digest(text: str) -> str:
    """The name by which a policy allows one inline text and no other."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def spread_units(output_size: Sequence[int], most: int = 5) -> list[tuple[int, int]]:
    """Units spread evenly over a map, `most` a side where it has as many: those whose receptive fields a page shows.

    Example:
        >>> spread_units((3, 1))
        [(0, 0), (1, 0), (2, 0)]
    """
    rows, columns = (
        sorted({int((part + 0.5) * size / min(most, size)) for part in range(min(most, size))}) for size in output_size
    )
    return [(row, column) for row in rows for column in columns]


def build(
    trace: Any,
    image: npt.ArrayLike,
    *,
    receptive_fields: Mapping[Any, Sequence[Any]] | None = None,
    start: tuple[str, tuple[float, float]] | None = None,
    title: str = "Where it looks",
    alt: str = "The picture that the model got",
    limit: int = LIMIT,
) -> dict[str, Any]:
    """The document of a page about a recorded forward pass: its last one, and the first picture of the batch.

    Offsets are kept to 0.002 image pixels, or to 0.01 or 0.05 where the file would be larger than `limit`. Where that is not
    enough, the largest layers keep positions and receptive fields at every second, then every fourth place, and a layer of
    which hardly any position would be left is left out.

    Args:
        trace: what `record` returned; its layers are two-dimensional.
        image: (H, W) or (H, W, 3), what to look at: integers from 0 to 255 or floats from 0 to 1.
        receptive_fields: `ReceptiveField`s of some units (`spread_units` chooses some) for each layer: the key is its name, or
            its name and the call's index.
        start: a layer and a position (y, x) in image pixels to begin with; the last layer and the image's middle without.
        title, alt: of the page; what the picture shows, for those who do not see it.
        limit: bytes that the file may take.

    Raises:
        ShapeError: a layer of the trace has other than 2 axes, or the image another shape.
        ValueError: nothing was recorded, `start` names no layer, or `limit` is too small for any layer.

    Example:
        >>> import torch
        >>> from deformconv.plots import record
        >>> from deformconv.plots.page import build, page
        >>> from deformconv.torch import DeformConv2d
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, stride=2, padding=1), DeformConv2d(8, 8, 3, padding=1))
        >>> image = torch.rand(1, 3, 48, 64)
        >>> with record(net) as trace:
        ...     _ = net(image)
        >>> document = build(trace, image[0].permute(1, 2, 0), title="Noise")
        >>> document["layers"][0]["name"], document["layers"][0]["step"], document["start"]
        ('1', [2.0, 2.0], {'layer': 0, 'at': [23.5, 31.5]})
        >>> page(document)[:15]
        '<!doctype html>'
    """
    calls = _calls(trace)
    width, height = int(trace.size[1]), int(trace.size[0])
    document: dict[str, Any] = {
        "version": 1, "title": title, "layers": [{}], "left_out": [],
        "image": {"width": width, "height": height, "src": _source(image), "alt": alt},
        "start": {"layer": 0, "at": [(height - 1) / 2, (width - 1) / 2]},
    }  # fmt: skip
    packings = [Packing(call, trace.geometry(call.layer, call.index), _fields_of(receptive_fields, call)) for call in calls]
    first = len(calls) - 1 if start is None else _number(start[0], calls)
    room = limit - len(page(document).encode())
    entries = _within(packings, room, first)
    kept = list(entries)
    if not kept:
        raise ValueError(f"`limit` = {limit} bytes has no room for any of the layers: a page without one takes {limit - room}")
    place = {(calls[number].layer, calls[number].index): new for new, number in enumerate(kept)}
    document["layers"] = [entries[number] for number in kept]
    for entry in document["layers"]:
        before = trace.before(entry["name"], entry["index"])
        entry["before"] = [place[tuple(key)] for key in before if tuple(key) in place]
    document["left_out"] = [call.layer for number, call in enumerate(calls) if number not in kept]
    document["start"]["layer"] = kept.index(first)
    if start is not None:
        document["start"]["at"] = [float(value) for value in start[1]]
    return document


def _calls(trace: Any) -> list[Any]:
    """The calls of the last forward pass."""
    calls = list(trace.calls)
    if not calls:
        raise ValueError("`trace` has no calls: run the model within `with record(model) as trace:`")
    for call in calls:
        if len(call.kernel_size) != 2:
            raise ShapeError(
                f"the layer {call.layer!r} has {len(call.kernel_size)} axes, and a page shows pictures, which have 2: "
                "`unit_points` and `offset_field` have its numbers"
            )
    return of_the_last_pass(calls)


def _number(name: str, calls: Sequence[Any]) -> int:
    """The number of a layer's first call."""
    names = [call.layer for call in calls]
    if name not in names:
        raise ValueError(f"`start` names the layer {name!r}; recorded were {', '.join(map(repr, dict.fromkeys(names)))}")
    return names.index(name)


def _source(image: npt.ArrayLike) -> str:
    """The picture as a data URI, no side longer than 1024 pixels."""
    from PIL import Image, features

    pixels = np.asarray(image)
    if pixels.ndim not in (2, 3) or pixels.shape[2:] not in ((), (3,)) or 0 in pixels.shape:
        raise ShapeError(f"`image` has shape {pixels.shape}; expected (H, W) or (H, W, 3)")
    most = 255 if pixels.dtype.kind in "iu" else 1
    bytes_of = np.round(np.clip(np.nan_to_num(pixels.astype(np.float64)), 0, most) * (255 / most)).astype(np.uint8)
    picture = Image.fromarray(bytes_of)
    picture.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE), Image.Resampling.LANCZOS)
    kind = "WEBP" if features.check("webp") else "JPEG"
    if picture.width * picture.height <= 128 * 128:
        kind = "PNG"  # without loss: a digit's pixels are seen one by one
    buffer = io.BytesIO()
    picture.save(buffer, kind, quality=86)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _fields_of(receptive_fields: Mapping[Any, Sequence[Any]] | None, call: Any) -> list[Any]:
    """Those of a call."""
    given = receptive_fields or {}
    return list(given.get((call.layer, call.index), given.get(call.layer, ()) if call.index == 0 else ()))


def _within(packings: Sequence[Packing], room: int, first: int) -> dict[int, dict[str, Any]]:
    """The entries by their numbers, made coarser until they fit into the room, or left out: `first` after all others."""
    for tolerance in _TOLERANCES:
        packed = {number: replace(packing, tolerance=tolerance) for number, packing in enumerate(packings)}
        entries = {number: packing.entry() for number, packing in packed.items()}
        sizes = {number: _size(entry) for number, entry in entries.items()}
        if sum(sizes.values()) <= room:
            break
    while sizes and sum(sizes.values()) > room:
        number = max(sizes, key=sizes.__getitem__)
        coarser = packed[number].coarser(entries[number])
        if coarser is None:
            number = max(sizes, key=lambda other: (other != first, sizes[other]))
            del entries[number], sizes[number]
        else:
            packed[number], entries[number] = coarser, coarser.entry()
            sizes[number] = _size(entries[number])
    return entries


def _size(entry: Mapping[str, Any]) -> int:
    """Bytes that an entry takes in the file, or a little more: the numbers of other layers come later."""
    return len(json.dumps(entry)) + 1000
