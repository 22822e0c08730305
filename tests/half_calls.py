"""A call of an operator in half precision, and the same numbers in float64."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any, NamedTuple

import torch


class HalfCall(NamedTuple):
    """A call in half precision, and the same numbers in float64."""

    spec: Any
    tensors: dict[str, Any]  # the arguments and grad_output
    exact: Any


def halved(call: Any, arguments: Collection[str], precise: Collection[str], half: str, mixed: bool, device: str) -> HalfCall:
    """A call's `arguments` in half precision; `mixed`: those that are `precise` in float32, as positions should be."""
    tensors, exact = {}, {}
    for name in (*arguments, "grad_output"):
        array = getattr(call, name)
        if array is None:
            tensors[name] = exact[name] = None
            continue
        tensor = torch.from_numpy(array)
        tensor = tensor if mixed and name in precise else tensor.to(getattr(torch, half))
        tensors[name], exact[name] = tensor.to(device), tensor.double().numpy()
    return HalfCall(replace(call.spec, dtype=half), tensors, call.but(**exact))
