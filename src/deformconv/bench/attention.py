"""Multi-scale deformable attention beside other libraries': the operator of Deformable DETR's encoder and decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from deformconv.bench.cases import away_from_integers
from deformconv.bench.peers import DIRECTIONS, Arrays, OperatorPeer, Ours

__all__ = ["ATTENTION_CASES", "ATTENTION_PEERS", "TINY", "AttentionCase", "attention_arrays", "attention_case_of"]

DETR = ((100, 167), (50, 84), (25, 42), (13, 21))  # of an image of 800x1333, by strides of 8 to 64


class AttentionCase(NamedTuple):
    """Queries on the maps of a detector's backbone; points lie `sigma` pixels of a map around the query's own place."""

    name: str
    queries: int | None = None  # None: each pixel of all maps is one, as in an encoder
    levels: tuple[tuple[int, int], ...] = DETR
    batch: int = 1
    heads: int = 8
    channels: int = 32
    points: int = 4
    sigma: float = 2.0

    @property
    def tokens(self) -> int:
        return sum(height * width for height, width in self.levels)

    @property
    def what(self) -> str:
        """The case in words."""
        maps = ", ".join(f"{height}x{width}" for height, width in self.levels)
        queries = self.tokens if self.queries is None else self.queries
        return (
            f"{self.batch}x{queries:,} queries, {self.heads} heads of {self.channels}, {self.points} points on each of {maps}"
        )

    @property
    def tolerance(self) -> float:
        """How far a right library may be from the truth: positions in float32 are off by size * 2**-23 pixels."""
        return max(1e-4, max(map(max, self.levels)) * 2.0**-20)


ATTENTION_CASES = (AttentionCase("detr-decoder", 300), AttentionCase("detr-encoder"))
TINY = AttentionCase("tiny", 5, ((4, 6), (2, 3)), heads=2, channels=4, points=2)  # after which all code is loaded


def attention_case_of(fields: dict[str, Any]) -> AttentionCase:
    """A case from its fields as JSON keeps them."""
    return AttentionCase(**{**fields, "levels": tuple(map(tuple, fields["levels"]))})


def attention_arrays(case: AttentionCase) -> Arrays:
    """A case's value, locations, weights and gradient of the output, in float32.

    No point lies within a hundredth of a row or column of pixels, where the derivative jumps: there who computes positions in
    float32 would rightly find another one.
    """
    random = np.random.default_rng(0)
    sizes = np.array([(width, height) for height, width in case.levels])[:, None]
    if case.queries is None:
        grids = [np.indices(level)[::-1].reshape(2, -1).T for level in case.levels]  # x before y
        places = np.concatenate([(grid + 0.5) / size for grid, size in zip(grids, sizes, strict=True)])
    else:
        places = random.uniform(0, 1, (case.queries, 2))
    shape = (case.batch, len(places), case.heads, len(case.levels), case.points)
    pixels = places[:, None, None, None] * sizes - 0.5 + case.sigma * random.standard_normal((*shape, 2))
    weights = np.exp(random.standard_normal(shape))
    channels = case.heads * case.channels
    arrays = {
        "value": random.standard_normal((case.batch, case.tokens, case.heads, case.channels)),
        "locations": (away_from_integers(pixels) + 0.5) / sizes,
        "weights": weights / weights.sum((-2, -1), keepdims=True),
        "grad_output": random.standard_normal((case.batch, len(places), channels)),
    }
    return {name: array.astype(np.float32) for name, array in arrays.items()}


class _AttentionPeer(OperatorPeer):
    """A library that attends to points, on PyTorch's tensors."""

    given = ("value", "locations", "weights")
    read, arrays = staticmethod(attention_case_of), staticmethod(attention_arrays)


class DeformconvAttention(Ours, _AttentionPeer):
    name, title = "deformconv-attention", "deformconv"

    def operator(self, case: Any) -> Callable[..., Any]:
        from deformconv.torch import deform_attention

        return lambda value, locations, weights: deform_attention(value, case.levels, locations, weights, backend=self.backend)


class TruthAttention(DeformconvAttention):
    """What the results are compared with: array operations in float64, which share nothing with the kernels.

    Some queries at a time, since they need much memory.
    """

    name, title = "truth-attention", "truth"
    backend, dtype = "portable", "float64"
    at_once = 1024

    def results(self, direction: str) -> Arrays:
        parts: dict[str, list[Any]] = {"output": []}
        sums: dict[str, Any] = {}
        for start in range(0, self.grad_output.shape[1], self.at_once):
            some = slice(start, start + self.at_once)
            whole: dict[str, Any] = self.tensors
            leaves = {name: (tensor if name == "value" else tensor[:, some]).detach() for name, tensor in whole.items()}
            for leaf in leaves.values():
                leaf.requires_grad_(direction == DIRECTIONS[-1])
            output = self.operate(**leaves)
            parts["output"].append(output.detach())
            if direction != DIRECTIONS[-1]:
                continue
            gradients = self.torch.autograd.grad(output, list(leaves.values()), self.grad_output[:, some])
            for name, gradient in zip(leaves, gradients, strict=True):
                if name == "value":  # every query reads it
                    sums[name] = sums[name] + gradient if name in sums else gradient
                else:
                    parts.setdefault(name, []).append(gradient)
        joined = {name: self.torch.cat(found, 1) for name, found in parts.items()} | sums
        return {name: tensor.numpy() for name, tensor in joined.items()}


class TransformersAttention(_AttentionPeer):
    """transformers' own code, the same in all its models: PyTorch's grid_sample, level by level."""

    name, title = "transformers-attention", "transformers, eager"
    packages = ("torch", "transformers")

    def operator(self, case: Any) -> Callable[..., Any]:
        from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention

        attention, sizes = MultiScaleDeformableAttention(), self.torch.tensor(case.levels)
        areas = sizes.prod(1)
        levels, starts = [*case.levels], areas.cumsum(0) - areas
        return lambda value, locations, weights: attention(value, sizes, levels, starts, locations, weights, 64)


class KorniaAttention(_AttentionPeer):
    """The function of kornia's RT-DETR: grid_sample, level by level."""

    name, title = "kornia-attention", "kornia"
    packages = ("torch", "kornia")

    def operator(self, case: Any) -> Callable[..., Any]:
        from kornia.models.rt_detr.architecture.rtdetr_head import _deformable_attention_kernel as attention

        levels = [*case.levels]
        return lambda value, locations, weights: attention(value, levels, locations, weights)


class MmcvAttention(_AttentionPeer):
    """mmcv's function for CPUs, which mmcv-lite has as well: grid_sample, level by level."""

    name, title = "mmcv-attention", "mmcv, on a CPU"
    packages = ("torch", "torchvision", "mmcv")
    installs = "mmcv-lite"

    def operator(self, case: Any) -> Callable[..., Any]:
        from deformconv.convert.mmcv import accelerate_mmcv

        with accelerate_mmcv():  # without its extension, mmcv.ops can be imported only so
            from mmcv.ops import multi_scale_deform_attn as theirs
        attention, levels = theirs.multi_scale_deformable_attn_pytorch, [*case.levels]  # its own again, not ours
        return lambda value, locations, weights: attention(value, levels, locations, weights)


ATTENTION_PEERS: dict[str, type[_AttentionPeer]] = {
    peer.name: peer for peer in (DeformconvAttention, TransformersAttention, KorniaAttention, MmcvAttention, TruthAttention)
}
