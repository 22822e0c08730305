"""Triton's interpreter, made to do as a GPU does where it does something else, or to refuse.

| what Triton 3.8's interpreter does | what it does within `honest()` |
| --- | --- |
| loads 0 where a lane is masked off and `other` is not given | loads NaN: on a GPU it is whatever a register held |
| reads and writes any address | AssertionError, unless it lies within a tensor of the launch |
| runs programs in turn, so that none is too early | AssertionError where a kernel reads what it writes, or writes it twice |
| believes `multiple_of`, `max_contiguous`, `max_constancy` | AssertionError where they are untrue: loads would go astray |
| adds and multiplies bfloat16 by its bit patterns | AssertionError: kernels compute in float32 |
| cuts a float32 off where it makes a bfloat16 of it | rounds to the nearest |
| makes -2**31 of a float that is no int32 | AssertionError: GPUs make other numbers of it, of NaN as well |
| ignores `input_precision` | rounds a float32 product's operands where TF32 is asked for |
| rounds `fma` twice | rounds it once |
| takes a grid of any size | AssertionError beyond CUDA's limits |

It knows no registers, shared memory, tensor cores or pipelines all the same: see tests/compiled.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter

Array = np.ndarray[Any, Any]
GRID = (2**31 - 1, 2**16 - 1, 2**16 - 1)  # CUDA's programming guide: the most programs along each axis


@contextmanager
def honest() -> Iterator[None]:
    """Within it kernels that Triton interprets are checked as the module says."""
    builder = interpreter.InterpreterBuilder
    replaced = [
        (interpreter, "_patch_lang", _Patches(interpreter._patch_lang)),
        (interpreter, "_patch_lang_core", _with_hints(interpreter._patch_lang_core)),
        (interpreter.GridExecutor, "__call__", _launched(interpreter.GridExecutor.__call__)),
        (interpreter.ReduceScanOpInterface, "check_tensor", _reduced(interpreter.ReduceScanOpInterface.check_tensor)),
        (builder, "create_masked_load", _load),
        (builder, "create_masked_store", _store(builder.create_masked_store)),
        (builder, "cast_impl", _cast(builder.cast_impl)),
        (builder, "binary_op", _binary(builder.binary_op)),
        (builder, "create_dot", _dot(builder.create_dot)),
        (builder, "create_fma", _fma(builder.create_fma)),
        # It looks for overflow in each operation on integers, and then says nothing of it: a quarter of the time.
        (interpreter.interpreter_builder, "options", replace(interpreter.interpreter_builder.options, sanitize_overflow=False)),
    ]
    with ExitStack() as stack:
        for place, name, value in replaced:
            stack.enter_context(mock.patch.object(place, name, value))
        yield


class _Patches:
    """The language's functions are replaced once for a launch, and not again for each function that a kernel calls."""

    def __init__(self, patch: Any) -> None:
        self.patch = patch
        self.scopes: dict[int, Any] = {}

    def __call__(self, fn: Any) -> Any:
        first = not self.scopes
        module = id(fn.__globals__)
        if module not in self.scopes:
            self.scopes[module] = self.patch(fn)
        return SimpleNamespace(restore=self.restore if first else lambda: None)

    def restore(self) -> None:
        while self.scopes:
            self.scopes.popitem()[1].restore()


class _Launch:
    """The memory of a launch's tensors: (first byte, end), and which of it was read and written."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self.extents = sorted({_extent(tensor) for tensor in tensors if tensor.numel()})
        self.read: set[tuple[int, int]] = set()
        self.written: dict[tuple[int, int], list[Array]] = {}

    def extent(self, addresses: Array, size: int) -> tuple[int, int]:
        first, end = int(addresses.min()), int(addresses.max()) + size
        for extent in self.extents:
            if extent[0] <= first and end <= extent[1]:
                return extent
        raise AssertionError(f"bytes {first} to {end} are within none of the launch's tensors: {self.extents}")

    def check(self, name: str) -> None:
        for extent, parts in self.written.items():
            assert extent not in self.read, f"{name} reads a tensor that it writes"
            addresses = np.concatenate(parts)
            assert np.unique(addresses).size == addresses.size, f"{name} writes a place twice"


_launches: list[_Launch] = []  # the one that runs, last


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    reach = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + reach * tensor.element_size()


def _launched(run: Any) -> Any:
    def call(self: Any, *arguments: Any, **others: Any) -> None:
        grid = self.grid if isinstance(self.grid, tuple) else tuple(self.grid)
        for size, most in zip(grid, GRID, strict=False):
            assert size <= most, f"a grid of {grid} programs"
        _launches.append(_Launch([value for value in (*arguments, *others.values()) if isinstance(value, torch.Tensor)]))
        try:
            run(self, *arguments, **others)
            _launches[-1].check(self.fn.__name__)
        finally:
            _launches.pop()

    return call


def _load(self: Any, ptrs: Any, mask: Any, other: Any, cache: Any, eviction: Any, is_volatile: Any) -> Any:
    kind = ptrs.get_element_ty()
    dtype = np.dtype(interpreter._get_np_dtype(kind))
    there = np.broadcast_to(mask.data, ptrs.data.shape)
    if there.any():
        _launches[-1].read.add(_launches[-1].extent(ptrs.data[there], dtype.itemsize))
    if other is None:
        # Of a single number the interpreter drops an `other` of 0, so that nothing is to be told there.
        value = 0 if ptrs.data.size == 1 else _nothing(kind, dtype)
        other = interpreter.TensorHandle(np.full(ptrs.data.shape, value, dtype), kind)
    return interpreter.TensorHandle(interpreter._interpreter.load(ptrs.data, mask.data, other.data, dtype), kind)


def _nothing(kind: Any, dtype: Any) -> Any:
    if kind == tl.bfloat16:
        return 0x7FC0
    return np.nan if np.issubdtype(dtype, np.floating) else np.iinfo(dtype).max // 2


def _store(store: Any) -> Any:
    def call(self: Any, ptrs: Any, value: Any, mask: Any, cache: Any, eviction: Any) -> Any:
        addresses = ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape)]
        if addresses.size:
            size = ptrs.get_element_ty().primitive_bitwidth // 8
            extent = _launches[-1].extent(addresses, size)
            _launches[-1].written.setdefault(extent, []).append(addresses)
        return store(self, ptrs, value, mask, cache, eviction)

    return call


def _cast(cast: Any) -> Any:
    def call(self: Any, source: Any, to: Any) -> Any:
        old, new = source.dtype.scalar, to.scalar
        if old.is_floating() and new.is_int():
            limits, numbers = np.iinfo(interpreter._get_np_dtype(new)), np.asarray(source.data)
            inside = (numbers >= limits.min) & (numbers <= limits.max)  # False for NaN
            assert inside.all(), f"{numbers[~inside][:3]} become {new}"
        if (old, new) == (tl.float32, tl.bfloat16):
            halves = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.int16).numpy()
            return interpreter.TensorHandle(halves.view(np.uint16), tl.bfloat16)
        return cast(self, source, to)

    return call


def _binary(operate: Any) -> Any:
    def call(self: Any, left: Any, right: Any, function: Any) -> Any:
        assert tl.bfloat16 not in (left.dtype.scalar, right.dtype.scalar), f"{function.__name__} of bfloat16"
        return operate(self, left, right, function)

    return call


def _reduced(check: Any) -> Any:
    def call(self: Any, tensors: Any) -> None:
        check(self, tensors)
        assert not any(tensor.dtype.scalar == tl.bfloat16 for tensor in tensors), "a sum of bfloat16"

    return call


def _dot(dot: Any) -> Any:
    def call(self: Any, left: Any, right: Any, sums: Any, precision: Any, imprecise: Any) -> Any:
        assert left.dtype.scalar != tl.bfloat16, "a product of bfloat16"
        if left.dtype.scalar == tl.float32 and precision == ir.INPUT_PRECISION.TF32:
            left, right = (interpreter.TensorHandle(_tf32(one.data), tl.float32) for one in (left, right))
        return dot(self, left, right, sums, precision, imprecise)

    return call


def _fma(fma: Any) -> Any:
    def call(self: Any, left: Any, right: Any, added: Any) -> Any:
        if added.dtype.scalar != tl.float32:
            return fma(self, left, right, added)
        exact = left.data.astype(np.float64) * right.data.astype(np.float64)  # which float64 has all bits of
        return interpreter.TensorHandle((exact + added.data).astype(np.float32), tl.float32)

    return call


def _tf32(numbers: Array) -> Array:
    """Float32 with ten bits of mantissa, rounded to the nearest; NaN and infinities as they are."""
    bits = np.ascontiguousarray(numbers).view(np.uint32)
    rounded = ((bits + np.uint32(1 << 12)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(numbers), rounded, numbers)


def _with_hints(patch: Any) -> Any:
    def call(lang: Any, scope: Any) -> None:
        patch(lang, scope)
        for name, holds in (("multiple_of", _is_multiple), ("max_contiguous", _is_contiguous), ("max_constancy", _is_constant)):
            scope.set_attr(lang, name, _checked(name, holds))

    return call


def _checked(name: str, holds: Any) -> Any:
    def call(input: Any, values: Any, **others: Any) -> Any:
        if isinstance(input, tl.tensor):
            values = values if isinstance(values, (list, tuple)) else [values]
            values = [int(getattr(value, "value", value)) for value in values]
            numbers = input.handle.data
            for axis, value in enumerate(values):
                assert holds(np.moveaxis(numbers, axis, -1), value), f"{name}({numbers}, {values})"
        return input

    return call


def _groups(numbers: Array, size: int) -> Array:
    """Along the last axis in groups of `size` numbers; all in one where they are fewer."""
    return numbers.reshape(*numbers.shape[:-1], -1, min(size, numbers.shape[-1]))


def _is_multiple(numbers: Array, value: int) -> bool:
    """Of a number, or of the first of those that follow one another."""
    follows = np.zeros(numbers.shape, bool)
    follows[..., 1:] = np.diff(numbers, axis=-1) == 1
    follows[..., ::value] = False
    return bool((follows | (numbers % value == 0)).all())


def _is_contiguous(numbers: Array, value: int) -> bool:
    return bool((np.diff(_groups(numbers, value), axis=-1) == 1).all())


def _is_constant(numbers: Array, value: int) -> bool:
    return bool((_groups(numbers, value) == _groups(numbers, value)[..., :1]).all())


class LastProgram:
    """A kernel of whose programs a launch runs the last alone."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **others: Any) -> None:
            def number(self: Any, axis: int) -> Any:
                return interpreter.TensorHandle(np.array([grid[axis] - 1 if axis < len(grid) else 0], np.int32), tl.int32)

            with mock.patch.object(interpreter.InterpreterBuilder, "create_get_program_id", number):
                self.kernel[(1, 1, 1)](*arguments, **others)

        return launch
