"""MXNet's .params files, read and written without MXNet.

A file is little-endian: the list's magic number and 8 reserved bytes; the number of arrays; the arrays, each with a magic
number that is its version, how it is stored, its shape, the device it was on, its type and its numbers; the number of names;
the names.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from deformconv.convert.foreign import looks_like
from deformconv.errors import ShapeError

__all__ = ["read_params", "write_params"]

LIST_MAGIC = 0x112
# Version 0 has none: there the number of axes comes first. Sizes are 32 bits in version 0 and 64 bits in the others.
MAGIC = {0xF993FAC8: 1, 0xF993FAC9: 2, 0xF993FACA: 3}
WRITTEN = 0xF993FAC9  # which every MXNet since 1.0 reads
STORAGE = {1: "row_sparse", 2: "csr"}
DEVICES = (1, 2, 3, 5)  # cpu, gpu, pinned and shared memory
CPU = 1
TYPES = {0: "float32", 1: "float64", 2: "float16", 3: "uint8", 4: "int32", 5: "int8", 6: "int64", 7: "bool"}
BFLOAT16 = 12
MOST_AXES = 32


def read_params(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Read a .params file of MXNet, without MXNet.

    It reads what `save_parameters`, `collect_params().save`, `export`, `Module.save_params` and `mx.nd.save` of a dict write,
    and the two older versions of the format. bfloat16 becomes float32.

    Args:
        path: the file.

    Returns:
        The arrays by the names in the file, in its order; `export` and Module put "arg:" and "aux:" before the names.

    Raises:
        ValueError: the file is not of this format, is cut off or damaged, or holds sparse arrays or arrays without names.

    Example:
        >>> import numpy as np
        >>> from deformconv.convert import read_params, write_params
        >>> write_params("net.params", {"0.weight": np.ones((4, 3, 3, 3), np.float32)})
        >>> {name: array.shape for name, array in read_params("net.params").items()}
        {'0.weight': (4, 3, 3, 3)}
    """
    return _Reader(str(path), Path(path).read_bytes()).arrays()


def write_params(path: str | os.PathLike[str], arrays: Mapping[str, Any]) -> None:
    """Write a .params file that MXNet reads, without MXNet; the same bytes as `mx.nd.save` of a dict.

    Args:
        path: the file, which is replaced.
        arrays: arrays by name, of a float, integer or bool type that MXNet has: NumPy's, or PyTorch's tensors and parameters,
            of which bfloat16 becomes float32.

    Raises:
        ShapeError: an array has no axes or no elements, for which MXNet's files have no place.
        TypeError: an array's type is none of MXNet's.
    """
    numbers = {name: number for number, name in TYPES.items()}
    parts = [struct.pack("<QQQ", LIST_MAGIC, 0, len(arrays))]
    for name, value in arrays.items():
        array = as_array(value)
        if array.ndim == 0 or array.size == 0 or array.ndim > MOST_AXES:
            raise ShapeError(f"{name!r} has shape {array.shape}; a .params file takes 1 to {MOST_AXES} axes of at least 1.")
        if array.dtype.name not in numbers:
            raise TypeError(f"{name!r} is {array.dtype}; a .params file takes {', '.join(numbers)}.")
        header = struct.pack("<Iii", WRITTEN, 0, array.ndim) + struct.pack(f"<{array.ndim}q", *array.shape)
        header += struct.pack("<iii", CPU, 0, numbers[array.dtype.name])
        parts += [header, np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()]
    parts.append(struct.pack("<Q", len(arrays)))
    for name in arrays:
        encoded = name.encode()
        parts += [struct.pack("<Q", len(encoded)), encoded]
    Path(path).write_bytes(b"".join(parts))


def as_array(value: Any) -> np.ndarray:
    """The numbers of NumPy's, MXNet's or PyTorch's array."""
    if hasattr(value, "asnumpy"):
        value = value.asnumpy()
    elif hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if str(value.dtype) == "torch.bfloat16" else value
    return np.asarray(value)


class _Reader:
    """A file's bytes and the position reached in them."""

    def __init__(self, path: str, content: bytes) -> None:
        self.path, self.content, self.position, self.what = path, content, 0, "its head"

    def arrays(self) -> dict[str, np.ndarray]:
        if len(self.content) < 8 or struct.unpack_from("<Q", self.content)[0] != LIST_MAGIC:
            raise self._error(
                f"expected a .params file of MXNet, whose first 8 bytes are the number 0x112{looks_like(self.content)}"
            )
        (_, reserved, count) = self._take("<QQQ")
        self._check(reserved == 0, f"{reserved} in the reserved bytes; expected 0")
        self._check_room(count, 4, "arrays")
        arrays = []
        for number in range(count):
            self.what = f"array {number + 1} of {count}"
            arrays.append(self._array())
        names = self._names(count)
        self._check(self.position == len(self.content), f"{len(self.content) - self.position} more bytes after the last name")
        return dict(zip(names, arrays, strict=True))

    def _array(self) -> np.ndarray:
        (magic,) = self._take("<I")
        version = MAGIC.get(magic, 0)
        axes = magic
        if version >= 2:
            (storage,) = self._take("<i")
            if storage in STORAGE:
                raise self._error(
                    f"{self.what} is stored as {STORAGE[storage]}; expected a dense one: load the file in MXNet and save "
                    "`array.tostype('default')`"
                )
            self._check(storage == 0, f"{storage} as the kind of storage in {self.what}; expected 0, dense")
        if version:
            (axes,) = self._take("<i")
        self._check(-1 <= axes <= MOST_AXES, f"{axes} axes in {self.what}; expected at most {MOST_AXES}")
        if axes < 0 or (axes == 0 and version < 3):
            raise self._error(f"{self.what} has no shape: it was saved before it was initialised")
        shape = self._take(f"<{axes}{'q' if version else 'I'}")
        self._check(min(shape, default=1) >= 0, f"the shape {shape} in {self.what}; expected sizes of at least 0")
        device, _, kind = self._take("<iii")
        self._check(device in DEVICES, f"{device} as the kind of device in {self.what}; expected one of {DEVICES}")
        self._check(kind in TYPES or kind == BFLOAT16, f"{kind} as the type of {self.what}; expected 0 to 7 or {BFLOAT16}")
        dtype = np.dtype("<u2" if kind == BFLOAT16 else TYPES[kind]).newbyteorder("<")
        data = np.frombuffer(self._bytes(math.prod(shape) * dtype.itemsize), dtype).reshape(shape)
        if kind == BFLOAT16:
            return (data.astype(np.uint32) << 16).view(np.float32)
        return data.astype(dtype.newbyteorder("="))  # a copy, which may be written to

    def _names(self, count: int) -> list[str]:
        self.what = "the names"
        (found,) = self._take("<Q")
        if found == 0 and count:
            raise self._error("its arrays have no names: it was saved from a list; expected `mx.nd.save` of a dict")
        self._check(found == count, f"{found} names for {count} arrays")
        names = []
        for _ in range(count):
            (length,) = self._take("<Q")
            try:
                names.append(self._bytes(length).decode())
            except UnicodeDecodeError:
                raise self._error(f"damaged: name {len(names) + 1} of {count} is no text") from None
        self._check(len(set(names)) == count, "a name twice")
        return names

    def _take(self, layout: str) -> tuple[int, ...]:
        return struct.unpack(layout, self._bytes(struct.calcsize(layout)))

    def _bytes(self, length: int) -> bytes:
        left = len(self.content) - self.position
        if length > left:
            raise self._error(
                f"cut off: it ends after {len(self.content)} bytes, in {self.what}, which takes {length - left} more. Copy or "
                "download it again"
            )
        self.position += length
        return self.content[self.position - length : self.position]

    def _check_room(self, count: int, least: int, noun: str) -> None:
        self._check(count * least <= len(self.content), f"{count} {noun}, more than its {len(self.content)} bytes can hold")

    def _check(self, true: bool, found: str) -> None:
        if not true:
            raise self._error(f"damaged: it has {found}")

    def _error(self, text: str) -> ValueError:
        return ValueError(f"{self.path}: {text}.")
