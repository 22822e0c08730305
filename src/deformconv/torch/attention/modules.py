"""A layer of multi-scale deformable attention, with the parameters of Deformable DETR's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from deformconv.errors import ShapeError
from deformconv.ops.attention.spec import level_sizes
from deformconv.ops.window import count, n_of
from deformconv.ops.words import unexpected
from deformconv.torch import modes
from deformconv.torch.attention.functional import deform_attention
from deformconv.torch.observed import Observed
from deformconv.torch.predictor import VectorPredictor, check_dtype, project
from deformconv.torch.tensors import dtype_name

__all__ = ["DeformAttention"]


class _Predictor(VectorPredictor):
    """A predictor that computes in float32 where the net is in half precision, as `conv.modules.OffsetPredictor` does."""

    def forward(self, input: Tensor) -> Tensor:
        return project(input, self.weight, self.bias)


class _SamplingOffsets(_Predictor):
    """A predictor whose bias begins as each head's direction, times the point's number: in pixels of every level alike."""

    is_slow = True  # a tenth, in the paper too

    def __init__(self, embed_dim: int, heads: int, levels: int, points: int, device: Any, dtype: torch.dtype | None) -> None:
        super().__init__(embed_dim, heads * levels * points * 2, device, dtype)
        self.heads, self.levels, self.points = heads, levels, points
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Begin again with the heads' directions."""
        super().reset_parameters()
        angle = torch.arange(self.heads, dtype=torch.float32) * (2 * math.pi / self.heads)
        direction = torch.stack([angle.cos(), angle.sin()], -1)  # (heads, 2), x before y
        direction = direction / direction.abs().amax(-1, keepdim=True)  # onto the edge of a square
        number = torch.arange(1, self.points + 1, dtype=torch.float32)
        bias = direction[:, None, None] * number[:, None]  # (heads, 1, points, 2)
        with torch.no_grad():
            self.bias.copy_(bias.expand(-1, self.levels, -1, -1).flatten())


def _locations(offsets: Tensor, reference_points: Tensor, levels: tuple[tuple[int, int], ...]) -> Tensor:
    """Where points lie: offsets are pixels of a level, or parts of a box. A call to tracers, as `project` is."""
    if has_torch_function((offsets, reference_points)):
        operands = (offsets, reference_points)
        result: Tensor = handle_torch_function(_locations, operands, *operands, levels)
        return result
    centre = reference_points[:, :, None, :, None, :2]  # (N, Q, 1, levels, 1, 2)
    with modes.untraced():
        coordinates, points, sizes = reference_points.shape[-1], offsets.shape[-2], [pair[::-1] for pair in levels]
        scale = torch.tensor(sizes, dtype=torch.float32, device=offsets.device)[:, None]
    if coordinates == 4:
        return centre + offsets * reference_points[:, :, None, :, None, 2:] * (0.5 / points)
    return centre + offsets / scale


class DeformAttention(Observed, nn.Module):
    """Multi-scale deformable attention: each query looks at a few points around its reference point, in every level.

    Deformable DETR's MSDeformAttn. The points' offsets and weights are predicted from the query; `deform_attention` computes
    the sums. Parameters have the names and shapes of the authors' module, of transformers' and of mmcv's, so that their
    state_dicts load. A head of a fresh layer looks along one direction, 1, 2, ... pixels far, and weighs points alike.

    Args:
        embed_dim: channels of queries, values and the output (d_model of the authors' and transformers', embed_dims of mmcv's).
        num_levels: levels of the feature pyramid. It and what follows is given by name, since the libraries' orders differ.
        num_heads: heads, each of embed_dim / num_heads channels.
        num_points: points of a head in each level.
        device, dtype: of the parameters.

    Shape:
        query (N, Q, embed_dim), reference_points (N, Q, num_levels, 2 or 4), value (N, L, embed_dim); output (N, Q, embed_dim).

    Raises:
        ShapeError: a number is less than 1, or `embed_dim` is no multiple of `num_heads`.

    Example:
        >>> import torch
        >>> from deformconv.torch import DeformAttention
        >>> layer = DeformAttention(256, num_levels=2)
        >>> levels = [(8, 12), (4, 6)]                         # height and width, finest first
        >>> value = torch.rand(1, 8 * 12 + 4 * 6, 256)         # both maps' pixels, one map after the other
        >>> query = torch.rand(1, 300, 256)                    # with its positional embedding
        >>> reference_points = torch.rand(1, 300, 2, 2)        # x and y in 0..1, for each level
        >>> layer(query, reference_points, value, levels).shape
        torch.Size([1, 300, 256])

    Paper: arXiv 2010.04159, equation 3.
    """

    def __init__(
        self,
        embed_dim: int = 256,
        *,
        num_levels: int = 4,
        num_heads: int = 8,
        num_points: int = 4,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **unknown: NoReturn,
    ) -> None:
        if unknown:
            raise unexpected(DeformAttention.__init__, unknown, "DeformAttention")
        super().__init__()
        self.embed_dim, self.num_levels = count("embed_dim", embed_dim), count("num_levels", num_levels)
        self.num_heads, self.num_points = count("num_heads", num_heads), count("num_points", num_points)
        if self.embed_dim % self.num_heads:
            raise ShapeError(
                f"`embed_dim` is {self.embed_dim} and `num_heads` {self.num_heads}; expected a multiple: every head has "
                "embed_dim / num_heads channels."
            )
        heads, points = self.num_heads, self.num_levels * self.num_points
        self.sampling_offsets = _SamplingOffsets(embed_dim, heads, self.num_levels, self.num_points, device, dtype)
        self.attention_weights = _Predictor(embed_dim, heads * points, device, dtype)
        self.value_proj = nn.Linear(embed_dim, embed_dim, device=device, dtype=dtype)
        self.output_proj = nn.Linear(embed_dim, embed_dim, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Begin again as the authors' module does: the heads' directions, equal weights, and Xavier's projections."""
        self.sampling_offsets.reset_parameters()
        self.attention_weights.reset_parameters()
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        value: Tensor,
        spatial_shapes: Sequence[tuple[int, int]] | Tensor,
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend from queries to the pixels of all levels.

        Args:
            query: shape (N, Q, embed_dim), positional embeddings added.
            reference_points: shape (N, Q, num_levels, 2), x and y from 0 to 1 over a level's width and height, around which
                offsets are in pixels of the level; or boxes (N, Q, num_levels, 4), x and y of the centre, width and height,
                where an offset of num_points is half a box. An axis of 1 in the place of num_levels stands for equal ones.
            value: shape (N, L, embed_dim), the pixels of all levels, row by row, one level after the other.
            spatial_shapes: the levels' sizes (height, width), pairs or an integer tensor, as in `deform_attention`.
            padding_mask: shape (N, L), True where a pixel is padding: its value counts 0, after the projection. transformers'
                attention_mask is the reverse.

        Returns:
            The output, shape (N, Q, embed_dim).

        Raises:
            ShapeError: a shape does not fit the layer or another one.
            TypeError: a tensor has not the dtype of the layer's parameters; `padding_mask` is not of booleans.
        """
        levels = level_sizes(spatial_shapes)
        self._check(query, value, padding_mask)
        locations, weights = self.locations_and_weights(query, reference_points, levels)
        value = self.value_proj(value)
        if padding_mask is not None:
            value = value.masked_fill(padding_mask[..., None], 0.0)
        value = value.unflatten(-1, (self.num_heads, self.embed_dim // self.num_heads))
        projected: Tensor = self.output_proj(deform_attention(value, levels, locations, weights))
        if self._observers:
            self._show(reference_points, levels, locations, weights)
        return projected

    def locations_and_weights(
        self, query: Tensor, reference_points: Tensor, spatial_shapes: Sequence[tuple[int, int]] | Tensor
    ) -> tuple[Tensor, Tensor]:
        """Where queries look, (N, Q, num_heads, num_levels, num_points, 2), x before y in 0..1, and what each point weighs.

        The weights, (N, Q, num_heads, num_levels, num_points), add up to 1 over levels and points. Both are float32 at least.
        """
        levels = level_sizes(spatial_shapes)
        self._check_query(query, reference_points, levels)
        grid = (self.num_heads, self.num_levels, self.num_points)
        offsets = self.sampling_offsets(query).unflatten(-1, (*grid, 2))
        weights = self.attention_weights(query).unflatten(-1, (self.num_heads, -1)).softmax(-1).unflatten(-1, grid[1:])
        return _locations(offsets, reference_points, levels), weights

    def _check(self, query: Any, value: Any, padding_mask: Any) -> None:
        """Say what is wrong with the values; where shapes are being traced there is nothing to compare."""
        check_dtype(self, "value", value)
        if not isinstance(value, Tensor) or modes.traced():
            return
        shape = tuple(value.shape)
        if len(shape) != 3 or shape[2] != self.embed_dim:
            raise ShapeError(
                f"`value` has shape {shape}; expected (N, L, {self.embed_dim}): the pixels of all levels, with this layer's "
                "embed_dim channels."
            )
        if isinstance(query, Tensor) and query.ndim == 3 and query.shape[0] != shape[0]:
            raise ShapeError(
                f"`query` has {n_of(query.shape[0], 'image')}, shape {tuple(query.shape)}, and `value` {shape[0]}, shape "
                f"{shape}; expected as many."
            )
        if not isinstance(padding_mask, Tensor):
            return
        if padding_mask.dtype is not torch.bool:
            raise TypeError(
                f"`padding_mask` is {dtype_name(padding_mask.dtype)}; expected booleans, True where a pixel is padding."
            )
        if tuple(padding_mask.shape) != shape[:2]:
            raise ShapeError(
                f"`padding_mask` has shape {tuple(padding_mask.shape)}; expected (N, L) = {shape[:2]}, as `value` has."
            )

    def _check_query(self, query: Any, reference_points: Any, levels: Sequence[tuple[int, int]]) -> None:
        """Say what is wrong with queries, reference points or the number of levels."""
        if len(levels) != self.num_levels:
            raise ShapeError(
                f"`spatial_shapes` has {n_of(len(levels), 'level')}; this layer has num_levels={self.num_levels}: build it "
                f"with num_levels={len(levels)}."
            )
        check_dtype(self, "query", query)
        if not (isinstance(query, Tensor) and isinstance(reference_points, Tensor)) or modes.traced():
            return
        shape, points = tuple(query.shape), tuple(reference_points.shape)
        if len(shape) != 3 or shape[2] != self.embed_dim:
            raise ShapeError(
                f"`query` has shape {shape}; expected (N, Q, {self.embed_dim}), with this layer's embed_dim channels."
            )
        if len(points) != 4 or points[:2] != shape[:2] or points[2] not in (1, self.num_levels) or points[3] not in (2, 4):
            text = (
                f"`reference_points` has shape {points}; expected (N, Q, {self.num_levels}, 2), x and y for each level, or "
                f"(N, Q, {self.num_levels}, 4), boxes, with (N, Q) = {shape[:2]} as `query` has"
            )
            if len(points) == 3 and points[:2] == shape[:2]:
                text += ": for the same point in all levels pass `reference_points[:, :, None]`"
            raise ShapeError(text + ".")

    def __prepare_scriptable__(self) -> NoReturn:
        """torch.jit.script asks every module of a net for this before it compiles."""
        modes.refuse_script(self)

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, num_levels={self.num_levels}, num_heads={self.num_heads}, num_points={self.num_points}"
