"""Pictures of what deformable layers do. The extra `plots` brings matplotlib."""

from deformconv.plots.draw import draw_sampling_points
from deformconv.plots.points import regular_points, sampling_points

__all__ = ["draw_sampling_points", "regular_points", "sampling_points"]
