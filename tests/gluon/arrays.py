"""Random calls of the operator, as NumPy arrays, and MXNet's own operators on them."""

from __future__ import annotations

from typing import Any, NamedTuple

import mxnet as mx
import numpy as np

NAMES = ("data", "offset", "weight", "bias", "mask")


class Call(NamedTuple):
    """Arguments of `deform_conv`; `arrays` are float64."""

    arrays: dict[str, Any]
    window: dict[str, Any]
    groups: int
    offset_groups: int

    @property
    def kernel(self) -> tuple[int, int]:
        return self.arrays["weight"].shape[2:]

    def numpy(self, dtype: str) -> dict[str, np.ndarray]:
        return {name: array.astype(dtype) for name, array in self.arrays.items()}

    def ndarrays(self, dtype: str = "float32", grad_req: str | None = None) -> dict[str, Any]:
        arrays = {name: mx.nd.array(array, dtype=dtype) for name, array in self.arrays.items()}
        if grad_req is not None:
            for array in arrays.values():
                array.attach_grad(grad_req)
        return arrays


def random_call(seed: int, masked: bool) -> Call:
    """Groups, offset groups, kernel, stride, padding and dilation vary; offsets reach over the border, some by far."""
    rng = np.random.default_rng([seed, masked])
    groups, offset_groups = (int(rng.choice([1, 2, 3])) for _ in range(2))
    channels = groups * offset_groups * int(rng.integers(1, 3))
    outputs = groups * offset_groups * int(rng.integers(1, 3))  # MXNet wants a multiple of both
    kernel, stride, dilation = (tuple(int(n) for n in rng.integers(1, 4, 2)) for _ in range(3))
    padding = tuple(int(n) for n in rng.integers(0, 3, 2))
    size = [dilation[i] * (kernel[i] - 1) + 1 + int(rng.integers(0, 8)) for i in range(2)]
    out = [(size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(2)]
    batch, taps = int(rng.integers(1, 4)), kernel[0] * kernel[1]
    offset = rng.standard_normal((batch, offset_groups * taps * 2, *out)) * rng.choice([0.5, 2, 6])
    # MXNet adds base and offset in float32. Away from integer positions that costs little.
    offset = np.floor(offset) + 0.1 + 0.8 * (offset - np.floor(offset))
    arrays = {
        "data": rng.standard_normal((batch, channels, *size)),
        "offset": offset,
        "weight": rng.standard_normal((outputs, channels // groups, *kernel)),
        "bias": rng.standard_normal(outputs),
    }
    if masked:
        arrays["mask"] = rng.random((batch, offset_groups * taps, *out))
    return Call(arrays, {"stride": stride, "padding": padding, "dilation": dilation}, groups, offset_groups)


def mxnet_operator(call: Call, arrays: dict[str, Any], F: Any = mx.nd) -> Any:
    """MXNet's own v1 or v2."""
    operator = F.contrib.ModulatedDeformableConvolution if "mask" in arrays else F.contrib.DeformableConvolution
    return operator(
        **arrays,
        kernel=call.kernel,
        stride=call.window["stride"],
        pad=call.window["padding"],
        dilate=call.window["dilation"],
        num_filter=call.arrays["weight"].shape[0],
        num_group=call.groups,
        num_deformable_group=call.offset_groups,
    )
