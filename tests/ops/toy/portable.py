"""The toy in the functions of the array-API standard."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

from tests.ops.toy.operator import ScaleSpec

TAKES: Literal["native"] = "native"
DETERMINISTIC = True


def reasons_against(spec: ScaleSpec, library: str, device: str, backward: bool) -> list[str]:
    return ["NumPy has no automatic derivative."] if backward and library == "numpy" else []


def how(spec: ScaleSpec, library: str, device: str, backward: bool) -> list[str]:
    return []


def computes_in(dtype: str, library: str) -> str:
    return "float32" if dtype in ("float16", "bfloat16") else dtype


def forward(spec: ScaleSpec, input: Any, mask: Any, bias: Any) -> Any:
    output = input * mask**spec.power
    return output if bias is None else output + bias[:, None]


def parts(spec: ScaleSpec, whole_images: bool = False) -> Iterator[tuple[slice, slice, ScaleSpec]]:
    """An image at a time."""
    for image in range(spec.batch):
        yield slice(image, image + 1), slice(None), replace(spec, batch=1)
