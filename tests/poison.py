"""Memory that PyTorch gives out, filled with NaN: what a kernel leaves unwritten, or reads before, shows itself."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
EMPTY = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}


class Poisoned(TorchDispatchMode):
    """Within it uninitialised tensors begin as NaN, integers as a number that is no pixel's, position's or channel's."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in EMPTY and result.numel() and result.device.type != "meta":
            if result.is_floating_point():
                result.fill_(torch.nan)
            elif result.dtype in (torch.int16, torch.int32, torch.int64):
                largest = torch.iinfo(result.dtype).max
                result.fill_(largest if result.dtype == torch.int16 else largest // 2)
        return result
