"""The toy on NumPy's memory: a backend is one file and one line of the operator's list."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

import numpy as np
from tests.ops.toy.operator import Gradients, ScaleSpec

TAKES: Literal["numpy"] = "numpy"
DETERMINISTIC = True
asked: list[str] = []  # whose arrays it computed


def reasons_against(spec: ScaleSpec, library: str, device: str, backward: bool) -> list[str]:
    reasons = [] if device == "cpu" else [f"it runs on the CPU, not on {device}"]
    if spec.power > 3:
        reasons.append(f"it counts to 3, not to {spec.power}")
    return reasons


def how(spec: ScaleSpec, library: str, device: str, backward: bool) -> list[str]:
    return [f"it multiplies {spec.power} times"]


def computes_in(dtype: str, library: str) -> str:
    return "float32" if dtype in ("float16", "bfloat16") and library == "torch" else dtype


def forward(spec: ScaleSpec, input: Any, mask: Any, bias: Any, library: str = "numpy") -> Any:
    asked.append(library)
    output = input * mask**spec.power
    return output if bias is None else output + bias[:, None]


def backward(
    spec: ScaleSpec, grad_output: Any, input: Any, mask: Any, wanted: Collection[str], library: str = "numpy"
) -> Gradients:
    asked.append(library)
    found = {}
    if "input" in wanted:
        found["input"] = grad_output * mask**spec.power
    if "mask" in wanted:
        found["mask"] = (grad_output * input * spec.power * mask ** (spec.power - 1)).sum(axis=1, keepdims=True)
    if "bias" in wanted:
        found["bias"] = grad_output.sum(axis=(0, 2))
    return Gradients(**{name: np.ascontiguousarray(gradient) for name, gradient in found.items()})
