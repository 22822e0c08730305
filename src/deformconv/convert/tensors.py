"""Tensors made of what a file says of them, which take no more memory than a small multiple of the file's size."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from deformconv.convert.foreign import CheckpointError
from deformconv.convert.pickled_names import Array, DType, Storage, StridedTensor, Unreadable

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["TensorMaker", "kind_of"]

MOST_AXES = 64
# Tensors that share numbers in the file get numbers of their own, and so can take more than the file.
MOST_TIMES = 4
FREE_BYTES = 1 << 20
CODES = re.compile("b1|[iu][1248]|f[248]")

Place = Callable[[Storage], tuple[int, int]]  # where a storage's bytes begin in the file, and how many there are


class TensorMaker:
    """Makes tensors of the records of one file, and counts what they take."""

    def __init__(self, path: str, file: BinaryIO, size: int, place: Place | None = None) -> None:
        self.path, self.file, self.place = path, file, place
        self.left = MOST_TIMES * size + FREE_BYTES
        self.bfloat16_as_uint16 = False  # as in Paddle's files, NumPy having no bfloat16

    def make(self, name: str, value: Any) -> Tensor:
        """The tensor of an entry: on the CPU, contiguous, with memory of its own."""
        if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], Array):  # Paddle's tensor: a name, an array
            self.bfloat16_as_uint16, value = True, value[1]
        if isinstance(value, StridedTensor):
            return self._strided(name, value)
        if isinstance(value, Array):
            return self._array(name, value)
        kind = value.kind if isinstance(value, Unreadable) else f"no tensor but {kind_of(value)}"
        raise CheckpointError(f"{self.path}: {_shown(name)} is {kind}.")

    def _strided(self, name: str, tensor: StridedTensor) -> Tensor:
        import torch

        storage, offset, shape, strides, _ = tensor
        sound = isinstance(storage, Storage) and _are_counts(shape) and _are_counts(strides) and _are_counts((offset,))
        self._check(sound and len(shape) == len(strides), name, "it has no shape that makes sense")
        assert self.place is not None  # since where storages are made, there is a place for them
        dtype = self._torch_dtype(name, tensor.dtype)
        count = math.prod(shape)
        reach = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + 1 if count else 0
        start, length = self.place(storage)
        length = min(length, storage.elements * self._torch_dtype(name, storage.dtype).itemsize)
        end = (offset + reach) * dtype.itemsize
        self._check(end <= length, name, f"it takes {end} bytes of a storage that has {length}")
        self._charge(name, max(reach, count) * dtype.itemsize)
        content = torch.empty(reach * dtype.itemsize, dtype=torch.uint8)
        self.file.seek(start + offset * dtype.itemsize)
        self._check(self.file.readinto(content.numpy()) == len(content), name, "the file is cut off in its numbers")  # type: ignore[attr-defined]
        numbers = content.ne(0) if dtype == torch.bool else content.view(dtype)
        return numbers.as_strided(shape, strides).contiguous()

    def _array(self, name: str, array: Array) -> Tensor:
        import torch

        dtype_of = array.dtype if isinstance(array.dtype, DType) else DType("")
        code, order = dtype_of.code, dtype_of.order
        if not isinstance(code, str) or not CODES.fullmatch(code) or order not in ("<", ">", "|", "="):
            kind = "objects" if code == "O8" else f"the type {code[:20]!r}" if isinstance(code, str) else "no type"
            raise CheckpointError(
                f"{self.path}: {_shown(name)} is an array of {kind}; expected booleans, integers, or floats of up to 64 bits."
            )
        dtype = np.dtype("u1" if code == "b1" else code).newbyteorder("<" if order == "=" else order)  # type: ignore[arg-type]
        content = array.content
        self._check(_are_counts(array.shape), name, "it has no shape that makes sense")
        self._check(isinstance(content, (bytes, bytearray, str)), name, "its numbers are no bytes")
        needed = math.prod(array.shape) * dtype.itemsize
        self._check(needed == len(content), name, f"an array of {needed} bytes has {len(content)} in the file")
        self._charge(name, needed)
        if isinstance(content, str):
            content = content.encode("latin-1", "ignore")
            self._check(needed == len(content), name, "its numbers are a text")
        numbers = np.ndarray(array.shape, dtype, content, order="F" if array.fortran in (True, 1) else "C")
        numbers = numbers != 0 if code == "b1" else numbers.astype(dtype.newbyteorder("="), order="C")
        tensor = torch.from_numpy(np.asarray(numbers))
        return tensor.view(torch.bfloat16) if code == "u2" and self.bfloat16_as_uint16 else tensor

    def _torch_dtype(self, name: str, dtype: str) -> Any:
        import torch

        if not hasattr(torch, dtype):
            raise CheckpointError(
                f"{self.path}: {_shown(name)} is of {dtype}, which this PyTorch, {torch.__version__}, does not have."
            )
        return getattr(torch, dtype)

    def _charge(self, name: str, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise CheckpointError(
                f"{self.path}: with {_shown(name)} its tensors take more than {MOST_TIMES} times the file's size, so it was "
                "not read: they share numbers in the file, and a hostile file fills the memory so."
            )

    def _check(self, true: bool, name: str, found: str) -> None:
        if not true:
            raise CheckpointError(f"{self.path} is damaged at {_shown(name)}: {found}.")


def _are_counts(values: Any) -> bool:
    """Whether these are numbers of elements, whose product an array can have."""
    if not isinstance(values, tuple) or len(values) > MOST_AXES or not all(type(n) is int and n >= 0 for n in values):
        return False
    return math.prod(max(n, 1) for n in values) < 2**60


def _shown(name: str) -> str:
    return repr(name if len(name) <= 200 else f"{name[:200]}...")


def kind_of(value: Any) -> str:
    """The noun for a value that a pickle has."""
    if isinstance(value, (StridedTensor, Array, Unreadable)):
        return "a tensor alone"
    if isinstance(value, (int, float, str, bytes, list, tuple, dict)):
        return {"OrderedDict": "a dict", "int": "an int"}.get(type(value).__name__, f"a {type(value).__name__}")
    return "something else"
