"""Deformable RoI pooling beside torchvision's RoI align, which moves no bin: the pooling of a detector's 512 boxes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import numpy as np

from deformconv.bench.peers import Arrays, OperatorPeer, Ours

__all__ = ["ROI_CASES", "ROI_PEERS", "RoiCase", "roi_arrays", "roi_case_of"]


class RoiCase(NamedTuple):
    """Boxes on maps of a detector's backbone; offsets are `sigma` times gamma times a box's size."""

    name: str
    boxes: int = 512
    batch: int = 2
    channels: int = 256
    size: tuple[int, ...] = (50, 84)
    bins: int = 7
    sampling: int = 2
    stride: int = 16
    sigma: float = 1.0

    @property
    def what(self) -> str:
        """The case in words."""
        maps = "x".join(map(str, (self.batch, self.channels, *self.size)))
        return f"{self.boxes} boxes on {maps}, {self.bins}x{self.bins} bins of {self.sampling}x{self.sampling} samples"

    @property
    def tolerance(self) -> float:
        """How far a right library may be from the truth: positions in float32 are off by size * 2**-23 pixels."""
        return max(1e-4, max(self.size) * 2.0**-20)


ROI_CASES = (
    RoiCase("box head"),
    RoiCase("box head, 4x4 samples", sampling=4),
    RoiCase("mask head", boxes=128, bins=14),
    RoiCase("few boxes", boxes=16),
)


def roi_case_of(fields: dict[str, Any]) -> RoiCase:
    """A case from its fields as JSON keeps them."""
    return RoiCase(**{**fields, "size": tuple(fields["size"])})


def roi_arrays(case: RoiCase) -> Arrays:
    """A case's input, boxes, offset, mask and gradient of the output, in float32."""
    random = np.random.default_rng(0)
    height, width = (length * case.stride for length in case.size)
    corner = random.uniform(0, 0.8, (case.boxes, 2)) * (width, height)
    size = np.exp(random.uniform(np.log(32), np.log(400), (case.boxes, 2)))
    ends = np.minimum(corner + size, (width, height))
    image = np.sort(random.integers(0, case.batch, (case.boxes, 1)), axis=0)
    bins = (case.bins, case.bins)
    arrays = {
        "input": random.standard_normal((case.batch, case.channels, *case.size)),
        "boxes": np.concatenate([image, corner, ends], axis=1),
        "offset": case.sigma * random.standard_normal((case.boxes, 2, *bins)),
        "mask": random.uniform(0, 2, (case.boxes, 1, *bins)),
        "grad_output": random.standard_normal((case.boxes, case.channels, *bins)),
    }
    return {name: array.astype(np.float32) for name, array in arrays.items()}


class _RoiPeer(OperatorPeer):
    """A library that pools boxes of PyTorch's tensors."""

    given: ClassVar[tuple[str, ...]] = ("input", "offset", "mask")
    read, arrays = staticmethod(roi_case_of), staticmethod(roi_arrays)


class DeformconvRoi(Ours, _RoiPeer):
    name, title = "deformconv-roi", "deformconv"

    def operator(self, case: Any) -> Callable[..., Any]:
        from deformconv.torch import deform_roi_pool

        def call(input: Any, offset: Any, mask: Any) -> Any:
            return deform_roi_pool(
                input, self.others["boxes"], offset, mask, case.bins, 1 / case.stride, case.sampling,
                convention="unaligned", backend=self.backend,
            )  # fmt: skip

        return call


class TruthRoi(DeformconvRoi):
    """What the results are compared with: array operations in float64, which share nothing with the kernels."""

    name, title = "truth-roi", "truth"
    backend, dtype = "portable", "float64"


class TorchvisionRoi(_RoiPeer):
    """torchvision's RoI align: no offsets, no masks, and no gradients of them."""

    name, title = "torchvision-roi", "torchvision's roi_align"
    packages = ("torch", "torchvision")
    given = ("input",)
    deforms = False

    def operator(self, case: Any) -> Callable[..., Any]:
        from torchvision.ops import roi_align

        return lambda input: roi_align(input, self.others["boxes"], case.bins, 1 / case.stride, case.sampling, False)


ROI_PEERS: dict[str, type[_RoiPeer]] = {peer.name: peer for peer in (DeformconvRoi, TorchvisionRoi, TruthRoi)}
