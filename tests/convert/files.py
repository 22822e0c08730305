"""A writer of MXNet's file format, apart from ours, for every version of it."""

from __future__ import annotations

import struct

import numpy as np

MAGIC = {1: 0xF993FAC8, 2: 0xF993FAC9, 3: 0xF993FACA}
TYPES = ("float32", "float64", "float16", "uint8", "int32", "int8", "int64", "bool")


def written(arrays: dict[str, np.ndarray], version: int) -> bytes:
    content = struct.pack("<QQQ", 0x112, 0, len(arrays))
    for array in arrays.values():
        content += struct.pack("<I", MAGIC[version]) if version else b""
        content += struct.pack("<i", 0) if version >= 2 else b""
        content += struct.pack("<I", array.ndim) + b"".join(struct.pack("<q" if version else "<I", n) for n in array.shape)
        content += struct.pack("<iii", 1, 0, TYPES.index(array.dtype.name)) + array.tobytes()
    content += struct.pack("<Q", len(arrays))
    for name in arrays:
        content += struct.pack("<Q", len(name.encode())) + name.encode()
    return content
