"""The toy on the caller's own arrays, half precision as it is: what a GPU's backend would be."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

from tests.ops.toy.operator import Gradients, ScaleSpec

TAKES: Literal["native"] = "native"
DETERMINISTIC = False
seen: list[Any] = []  # the arrays of each call, and grad_output


def reasons_against(spec: ScaleSpec, library: str, device: str, backward: bool) -> list[str]:
    return [] if library == "torch" else [f"it takes PyTorch's tensors, not {library}'s arrays"]


def how(spec: ScaleSpec, library: str, device: str, backward: bool) -> list[str]:
    return []


def computes_in(dtype: str, library: str) -> str:
    return dtype


def forward(spec: ScaleSpec, input: Any, mask: Any, bias: Any) -> Any:
    seen.append((input, mask, bias))
    output = input * mask**spec.power
    return output if bias is None else output + bias[:, None]


def backward(spec: ScaleSpec, grad_output: Any, input: Any, mask: Any, wanted: Collection[str]) -> Gradients:
    seen.append((grad_output, input, mask))
    found = {
        "input": grad_output * mask**spec.power,
        "mask": (grad_output * input * spec.power * mask ** (spec.power - 1)).sum(1, keepdim=True),
        "bias": grad_output.sum((0, 2)),
    }
    return Gradients(**{name: gradient for name, gradient in found.items() if name in wanted})
