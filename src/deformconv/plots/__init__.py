"""Where deformable layers look, as numbers and as pictures.

`record` catches what a model's layers predict in a forward pass, and finds where their cells lie in the picture. There are five
views of it, each with a function that returns numbers and one that draws: `unit_points` (where a unit samples, through up to
three layers), `receptive_field`, `sampling_locations`, `saliency_region` (arXiv 1811.11168, section 2.1), `offset_field` with
`offset_statistics`. Of deformable attention `query_points` has where a query samples. `OffsetMonitor` watches offsets in
training. `deformconv.look` makes a page of all that.

Positions are in the image's pixels, whose middles are whole numbers, y before x. PyTorch is loaded by what needs it; drawing
functions take axes of matplotlib, which the extra `plots` brings.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from deformconv.plots.points import regular_points, sampling_points

if TYPE_CHECKING:
    from deformconv.plots.animation import animate_unit_points
    from deformconv.plots.draw import draw_sampling_points
    from deformconv.plots.draw_fields import draw_offset_field, draw_receptive_field, draw_saliency_region
    from deformconv.plots.draw_points import draw_query_points, draw_sampling_locations, draw_unit_points
    from deformconv.plots.draw_statistics import draw_offset_statistics
    from deformconv.plots.fields import OffsetField, OffsetStatistics, offset_field, offset_statistics
    from deformconv.plots.geometry import Geometry
    from deformconv.plots.images import model_input, picture
    from deformconv.plots.locations import SamplingLocations, sampling_locations
    from deformconv.plots.looking import Look
    from deformconv.plots.monitor import OffsetMonitor
    from deformconv.plots.query import QueryPoints, query_points
    from deformconv.plots.receptive import ReceptiveField, receptive_field
    from deformconv.plots.recording import record
    from deformconv.plots.saliency import SaliencyRegion, saliency_region
    from deformconv.plots.stack import UnitPoints, unit_points
    from deformconv.plots.trace import AttentionCall, Call, Trace

__all__ = [
    "AttentionCall",
    "Call",
    "Geometry",
    "Look",
    "OffsetField",
    "OffsetMonitor",
    "OffsetStatistics",
    "QueryPoints",
    "ReceptiveField",
    "SaliencyRegion",
    "SamplingLocations",
    "Trace",
    "UnitPoints",
    "animate_unit_points",
    "draw_offset_field",
    "draw_offset_statistics",
    "draw_query_points",
    "draw_receptive_field",
    "draw_saliency_region",
    "draw_sampling_locations",
    "draw_sampling_points",
    "draw_unit_points",
    "model_input",
    "offset_field",
    "offset_statistics",
    "picture",
    "query_points",
    "receptive_field",
    "record",
    "regular_points",
    "saliency_region",
    "sampling_locations",
    "sampling_points",
    "unit_points",
]

_WHERE = {
    "AttentionCall": "trace",
    "Call": "trace",
    "Geometry": "geometry",
    "Look": "looking",
    "OffsetField": "fields",
    "OffsetMonitor": "monitor",
    "OffsetStatistics": "fields",
    "QueryPoints": "query",
    "ReceptiveField": "receptive",
    "SaliencyRegion": "saliency",
    "SamplingLocations": "locations",
    "Trace": "trace",
    "UnitPoints": "stack",
    "animate_unit_points": "animation",
    "draw_offset_field": "draw_fields",
    "draw_offset_statistics": "draw_statistics",
    "draw_query_points": "draw_points",
    "draw_receptive_field": "draw_fields",
    "draw_saliency_region": "draw_fields",
    "draw_sampling_locations": "draw_points",
    "draw_sampling_points": "draw",
    "draw_unit_points": "draw_points",
    "model_input": "images",
    "offset_field": "fields",
    "offset_statistics": "fields",
    "picture": "images",
    "query_points": "query",
    "receptive_field": "receptive",
    "record": "recording",
    "saliency_region": "saliency",
    "sampling_locations": "locations",
    "unit_points": "stack",
}


def __getattr__(name: str) -> Any:
    """Load what is asked for, and what it needs."""
    if name not in _WHERE:
        raise AttributeError(f"module 'deformconv.plots' has no attribute {name!r}")
    try:
        found = getattr(import_module(f"deformconv.plots.{_WHERE[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name == "torch":
            import deformconv.torch  # noqa: F401  (it says what to install)
        raise
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
