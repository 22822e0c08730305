"""Deformable aggregation beside what there is without it: the operator of DCNv3 and DCNv4, on the shapes of their nets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from deformconv.bench.cases import away_from_integers
from deformconv.bench.peers import DIRECTIONS, Arrays, OperatorPeer, Ours
from deformconv.ops.window import by

__all__ = ["AGGREGATE_CASES", "AGGREGATE_PEERS", "TINY", "AggregateCase", "aggregate_arrays", "aggregate_case_of"]

WINDOW = {"kernel_size": 3, "stride": 1, "padding": 1, "dilation": 1}  # all layers of these nets have it


class AggregateCase(NamedTuple):
    """A map whose channels are cut into groups of `group_channels`, each with a mask and offsets of `sigma` pixels."""

    name: str
    channels: int
    size: tuple[int, ...]
    batch: int = 1
    group_channels: int = 16
    softmax: bool = True  # over the taps of a mask, as in DCNv3; DCNv4 bounds none
    sigma: float = 2.0

    @property
    def groups(self) -> int:
        return self.channels // self.group_channels

    @property
    def what(self) -> str:
        """The case in words."""
        return f"{self.batch}x{self.channels}x{by(self.size)}, {self.groups} groups of {self.group_channels}, 3x3"

    @property
    def tolerance(self) -> float:
        """How far a right library may be from the truth: positions in float32 are off by size * 2**-23 pixels."""
        return max(1e-4, max(self.size) * 2.0**-20)


CHANNELS = (64, 128, 256, 512)  # of InternImage-T's and FlashInternImage-T's stages
DETECTED = ((200, 334), (100, 167), (50, 84), (25, 42))  # their maps, of an image of 800x1333
AGGREGATE_CASES = (
    *(AggregateCase(f"intern-{56 >> stage}", width, (56 >> stage,) * 2) for stage, width in enumerate(CHANNELS)),
    *(AggregateCase(f"intern-{size[0]}", width, size) for size, width in zip(DETECTED, CHANNELS, strict=True)),
    # The table of DCNv4's paper, whose batch is 64, for a processor.
    *(
        AggregateCase(f"dcnv4-{side}-{width}", width, (side, side), 8, 32 if width == 768 else 16, softmax=False)
        for side, width in ((56, 128), (28, 256), (14, 512), (7, 1024), (14, 768))
    ),
)
TINY = AggregateCase("tiny", 8, (5, 6), 2, 4)  # after which all code is loaded


def aggregate_case_of(fields: dict[str, Any]) -> AggregateCase:
    """A case from its fields as JSON keeps them."""
    return AggregateCase(**{**fields, "size": tuple(fields["size"])})


def aggregate_arrays(case: AggregateCase) -> Arrays:
    """A case's input, offset, mask and gradient of the output, in float32, channels first."""
    random = np.random.default_rng(0)
    shape = (case.batch, case.groups, 9, *case.size)
    offset = away_from_integers(case.sigma * random.standard_normal((case.batch, case.groups * 18, *case.size)))
    mask = random.standard_normal(shape)
    if case.softmax:
        mask = np.exp(mask)
        mask /= mask.sum(2, keepdims=True)
    arrays = {
        "input": random.standard_normal((case.batch, case.channels, *case.size)),
        "offset": offset,
        "mask": mask.reshape(case.batch, -1, *case.size),
        "grad_output": random.standard_normal((case.batch, case.channels, *case.size)),
    }
    return {name: array.astype(np.float32) for name, array in arrays.items()}


class _AggregatePeer(OperatorPeer):
    """A library that adds up samples, on PyTorch's tensors; channels last in memory, as the nets have them."""

    given = ("input", "offset", "mask")
    read, arrays = staticmethod(aggregate_case_of), staticmethod(aggregate_arrays)
    channels_last = True

    def prepare(self, case: Any) -> None:
        super().prepare(case)
        if self.channels_last:
            form = self.torch.channels_last
            self.grad_output = self.grad_output.contiguous(memory_format=form)
            whole: dict[str, Any] = self.tensors
            self.tensors = {name: tensor.contiguous(memory_format=form) for name, tensor in whole.items()}


class DeformconvAggregate(Ours, _AggregatePeer):
    name, title = "deformconv-aggregate", "deformconv"

    def operator(self, case: Any) -> Callable[..., Any]:
        from deformconv.torch import deform_aggregate2d

        how = {**WINDOW, "offset_groups": case.groups, "backend": self.backend}
        return lambda input, offset, mask: deform_aggregate2d(input, offset, mask, **how)


class TruthAggregate(DeformconvAggregate):
    """What the results are compared with: array operations in float64, which share nothing with the kernels."""

    name, title = "truth-aggregate", "truth"
    backend, dtype = "portable", "float64"


class TorchvisionAggregate(_AggregatePeer):
    """torchvision's deformable convolution with a group for each channel and a weight of ones, which has no gradient."""

    name, title = "torchvision-aggregate", "torchvision, groups=C"
    packages = ("torch", "torchvision")
    channels_last = False  # it would copy them

    def operator(self, case: Any) -> Callable[..., Any]:
        from torchvision.ops import deform_conv2d

        ones = self.torch.ones(case.channels, 1, 3, 3)
        stride, padding, dilation = (WINDOW[name] for name in ("stride", "padding", "dilation"))
        return lambda input, offset, mask: deform_conv2d(input, offset, ones, None, stride, padding, dilation, mask)


class GridSampleAggregate(_AggregatePeer):
    """As the authors' DCNv3_pytorch, which needs no CUDA extension, computes it: PyTorch's grid_sample, all taps at once."""

    name, title = "grid_sample-aggregate", "grid_sample"

    def prepare(self, case: Any) -> None:
        super().prepare(case)
        self.tensors["offset"] = self._turned(self.tensors["offset"])  # x before y, as there

    def results(self, direction: str) -> Arrays:
        found = super().results(direction)
        if direction == DIRECTIONS[-1]:
            found["offset"] = self._turned(self.torch.from_numpy(found["offset"])).numpy()
        return found

    def _turned(self, offset: Any) -> Any:
        last = offset.unflatten(1, (-1, 2)).flip(2).flatten(1, 2)
        return last.contiguous(memory_format=self.torch.channels_last)

    def operator(self, case: Any) -> Callable[..., Any]:
        torch, grid_sample = self.torch, self.torch.nn.functional.grid_sample
        N, G, (height, width) = case.batch, case.groups, case.size
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        dy, dx = torch.meshgrid(torch.arange(-1, 2), torch.arange(-1, 2), indexing="ij")
        pixels = torch.stack([x, y], -1).reshape(1, -1, 1, 1, 2) + torch.stack([dx, dy], -1).reshape(1, 1, 1, 9, 2)
        size = torch.tensor([width, height])
        places = (2 * pixels + 1) / size - 1  # of the taps where they are not moved, from -1 to 1

        def call(input: Any, offset: Any, mask: Any) -> Any:
            offset, mask = (t.permute(0, 2, 3, 1).reshape(N, height * width, G, 9, -1) for t in (offset, mask))
            grid = (places + 2 * offset / size).transpose(1, 2).flatten(0, 1)  # (N*G, H*W, 9, 2)
            samples = grid_sample(input.reshape(N * G, -1, height, width), grid, align_corners=False)
            factors = mask.transpose(1, 2).reshape(N * G, 1, height * width, 9)
            output = (samples * factors).sum(-1).reshape(N, case.channels, height * width)
            return output.transpose(1, 2).contiguous().reshape(N, height, width, -1).permute(0, 3, 1, 2)

        return call


AGGREGATE_PEERS: dict[str, type[_AggregatePeer]] = {
    peer.name: peer for peer in (DeformconvAggregate, TorchvisionAggregate, GridSampleAggregate, TruthAggregate)
}
