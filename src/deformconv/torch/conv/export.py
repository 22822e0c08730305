"""Deformable convolution in ONNX: torch.onnx.export writes standard DeformConv nodes, with no table of translations to pass."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from deformconv.errors import BackendError
from deformconv.ops.conv.spec import ConvSpec
from deformconv.torch.registry import Export, check_opset
from deformconv.torch.tensors import HALF

__all__ = ["EXPORT", "deform_conv"]

_FIRST_RUNTIME = (1, 25)
_warned_of_runtime = False


def deform_conv(
    spec: ConvSpec, input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None
) -> Tensor:
    """The call as a DeformConv node: 1-D as 2-D of height 1, half precision in float32, as this library computes it."""
    _check(spec)
    if spec.rank == 1:
        return _as_2d(spec, input, offset, weight, bias, mask).squeeze(2)
    dtype = input.dtype
    operands: list[Tensor | None] = [input, weight, offset, bias, mask]  # the standard's order
    if dtype in HALF:
        operands = [None if tensor is None else tensor.float() for tensor in operands]
    attributes: dict[str, Any] = {
        "kernel_shape": list(spec.kernel_size),
        "strides": list(spec.stride),
        "pads": [before for before, _ in spec.padding] + [after for _, after in spec.padding],
        "dilations": list(spec.dilation),
        "group": spec.groups,
        "offset_group": spec.offset_groups,
    }
    result: Tensor = torch.onnx.ops.symbolic(
        "DeformConv", operands, attributes, dtype=torch.float32 if dtype in HALF else dtype, shape=spec.output_shape
    )
    return result.to(dtype) if dtype in HALF else result


EXPORT = Export(deform_conv, first_opset=19)


def _as_2d(spec: ConvSpec, input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
    spec = replace(
        spec,
        rank=2,
        input_size=(1, *spec.input_size),
        kernel_size=(1, *spec.kernel_size),
        stride=(1, *spec.stride),
        dilation=(1, *spec.dilation),
        output_size=(1, *spec.output_size),
        padding=((0, 0), *spec.padding),
    )
    dx = offset.unsqueeze(2)  # (N, offset_groups*K, 1, O)
    both = torch.cat([torch.zeros_like(dx), dx], 2)
    offset = both.flatten(1, 2).unsqueeze(2)  # (N, offset_groups*K*2, 1, O)
    mask = None if mask is None else mask.unsqueeze(2)
    return deform_conv(spec, input.unsqueeze(2), offset, weight.unsqueeze(2), bias, mask)


def _check(spec: ConvSpec) -> None:
    if spec.boundary != "zeros":
        raise BackendError(f'boundary="{spec.boundary}" cannot be exported: ONNX\'s DeformConv knows boundary="zeros" only.')
    check_opset(EXPORT.first_opset, "DeformConv")
    if spec.rank == 3:
        warnings.warn(
            "This export has a DeformConv node over 3 axes. The ONNX standard allows it, but ONNX Runtime runs "
            "DeformConv over 2 axes only.",
            stacklevel=2,
        )
    else:
        _warn_of_runtime()


def _warn_of_runtime() -> None:
    """Warn, once in a process, of an installed ONNX Runtime that has no DeformConv; none at all is no mistake."""
    global _warned_of_runtime
    for package in ("onnxruntime", "onnxruntime-gpu"):
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
        if not _warned_of_runtime and tuple(map(int, re.findall(r"\d+", version)[:2])) < _FIRST_RUNTIME:
            _warned_of_runtime = True
            warnings.warn(
                f"This export has a DeformConv node, and the installed {package} is {version}; expected 1.25 or newer to run "
                "it: older ones answer NOT_IMPLEMENTED. The file itself is as good with any.",
                stacklevel=2,
            )


_warn_of_runtime._dynamo_marked_constant = True  # type: ignore[attr-defined]  # for a compiler: see `modes.exporting`
