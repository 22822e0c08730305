"""MXNet's arrays, read and written in place as NumPy's."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from mxnet.base import _LIB, check_call

from deformconv.ops.operator import Operand

__all__ = ["device", "operand", "view", "write"]

# The types of devices whose memory the CPU reads and writes like its own.
_CPU = ("cpu", "cpu_pinned", "cpu_shared")


class _Memory:
    """What NumPy asks of an object whose memory it shares."""

    def __init__(self, array: Any, address: int) -> None:
        self.array = array  # whose memory must live as long as the view
        self.__array_interface__ = {
            "shape": array.shape,
            "typestr": np.dtype(array.dtype).str,
            "data": (address, False),
            "version": 3,
        }


def view(array: Any) -> np.ndarray:
    """A NumPy array in the memory of a dense NDArray on the CPU, once MXNet has computed it."""
    array.wait_to_read()
    address = ctypes.c_void_p()
    check_call(_LIB.MXNDArrayGetData(array.handle, ctypes.byref(address)))
    if not address.value:  # an array without elements
        return np.empty(array.shape, array.dtype)
    return np.asarray(_Memory(array, address.value))


def write(array: Any, request: str, values: np.ndarray) -> None:
    """Put `values` into an array as MXNet requests it: "write" and "inplace" replace, "add" adds."""
    destination = view(array)
    if request == "add":
        destination += values
    else:
        np.copyto(destination, values)


def operand(array: Any) -> Operand:
    """What the checks need to know of an NDArray."""
    return Operand(tuple(array.shape), np.dtype(array.dtype).name, device(array.context))


def device(context: Any) -> str:
    """The device's name for the checks and for `dispatch`; MXNet numbers even the CPU's."""
    if context.device_type in _CPU:
        return "cpu" if context.device_id == 0 else f"cpu({context.device_id})"
    return str(context)
