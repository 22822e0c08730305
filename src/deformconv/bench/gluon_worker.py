"""A process that runs MXNet's operators or ours, for `deformconv.bench.gluon`: requests and answers are lines of JSON."""

from __future__ import annotations

import json
import sys
import time
from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from deformconv.bench.peers import DIRECTIONS
from deformconv.bench.rois import ROI_CASES, roi_arrays

__all__ = ["KINDS", "ROI_CASE", "ROI_KINDS", "ROI_WORDS"]

SHAPE, CHANNELS = (2, 64, 56, 56), 64  # N, C, H, W and C_out
KINDS = ("mxnet v1", "deformconv v1", "deformconv v2")

# A detector's 512 boxes, as `deformconv bench rois` has them, with one class of offsets and without masks. MXNet's operator is
# position-sensitive by its `group_size`; at 1 every bin reads all channels, as in that case.
ROI_CASE = ROI_CASES[0]
ROI_KINDS = ("mxnet pooling", "deformconv pooling")
ROI_WORDS = {
    "spatial_scale": 1 / ROI_CASE.stride, "output_dim": ROI_CASE.channels, "group_size": 1, "pooled_size": ROI_CASE.bins,
    "part_size": ROI_CASE.bins, "sample_per_part": ROI_CASE.sampling, "trans_std": 0.1,
}  # fmt: skip


class _Subject(ABC):
    """What a process measures."""

    @abstractmethod
    def forward(self) -> Any:
        """The output, which may not be computed yet."""

    @abstractmethod
    def gradients(self) -> dict[str, Any]:
        """MXNet's arrays that `backward` filled, by name."""

    def backward(self, output: Any) -> None:
        output.backward()


class _Block(_Subject):
    """A Gluon block: the gradients of its input and parameters."""

    def __init__(self, kind: str) -> None:
        import mxnet as mx
        from mxnet.gluon.contrib import cnn

        import deformconv.gluon as ours

        library, number = kind.split()
        name = "DeformableConvolution" if number == "v1" else "ModulatedDeformableConvolution"
        random = np.random.default_rng(0)
        self.x = mx.nd.array(random.standard_normal(SHAPE))
        self.x.attach_grad()
        self.net = getattr(cnn if library == "mxnet" else ours, name)(CHANNELS, kernel_size=3, padding=1)
        self.net.initialize()
        self.net(self.x)
        for name, parameter in sorted(self.net._reg_params.items()):
            size = {"offset_weight": 0.04, "deformable_conv_weight": 0.04}.get(name, 0.3)
            parameter.set_data(mx.nd.array(size * random.standard_normal(parameter.shape)))

    def forward(self) -> Any:
        return self.net(self.x)

    def gradients(self) -> dict[str, Any]:
        return {"x": self.x.grad, **{name: parameter.grad() for name, parameter in self.net._reg_params.items()}}


class _Pooling(_Subject):
    """A library's DeformablePSROIPooling: the gradients of data and offsets."""

    def __init__(self, kind: str, dtype: str) -> None:
        import mxnet as mx

        from deformconv.gluon import contrib

        arrays = {name: mx.nd.array(array, dtype=dtype) for name, array in roi_arrays(ROI_CASE).items()}
        self.operator = (mx.nd.contrib if kind == ROI_KINDS[0] else contrib).DeformablePSROIPooling
        self.data, self.rois, self.trans, self.grad_output = (
            arrays[name] for name in ("input", "boxes", "offset", "grad_output")
        )
        for array in (self.data, self.trans):
            array.attach_grad()

    def forward(self) -> Any:
        return self.operator(self.data, self.rois, self.trans, **ROI_WORDS)

    def backward(self, output: Any) -> None:
        output.backward(self.grad_output)

    def gradients(self) -> dict[str, Any]:
        return {"data": self.data.grad, "trans": self.trans.grad}


class _Worker:
    """What the process can be asked."""

    subject: _Subject

    def prepare(self, kind: str, dtype: str) -> None:
        import mxnet as mx

        self.mx, self.subject = mx, _Pooling(kind, dtype) if kind in ROI_KINDS else _Block(kind)

    def results(self, file: str) -> None:
        output = self.call(DIRECTIONS[1])
        found = {name: gradient.asnumpy() for name, gradient in self.subject.gradients().items()}
        np.savez(file, output=output.asnumpy(), **found)

    def call(self, direction: str) -> Any:
        if direction == DIRECTIONS[0]:
            output = self.subject.forward()
        else:
            with self.mx.autograd.record():
                output = self.subject.forward()
            self.subject.backward(output)
        self.mx.nd.waitall()
        return output

    def time(self, calls: int, direction: str) -> list[float]:
        seconds = []
        for _ in range(calls):
            began = time.perf_counter()
            self.call(direction)
            seconds.append(time.perf_counter() - began)
        return seconds


def main() -> None:
    worker = _Worker()
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(getattr(worker, request.pop("do"))(**request)), flush=True)


if __name__ == "__main__":
    main()
