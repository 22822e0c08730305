"""XLA's foreign function interface, read by ctypes: Python functions that XLA calls with its own buffers, without a copy.

The structs are those of jaxlib's `include/xla/ffi/api/c_api.h`, major version 0.
"""

from __future__ import annotations

import atexit
import ctypes
import time
from collections.abc import Callable
from contextlib import suppress
from ctypes import Structure, c_char_p, c_int32, c_int64, c_uint32
from functools import cache
from math import prod
from typing import Any

import jax
import numpy as np

__all__ = ["memory", "register"]

# (the attribute's bytes, the addresses of the arguments, those of the results) -> None
Call = Callable[[bytes, "list[int]", "list[int]"], None]

# Every struct begins with its size, which tells an older reader from a newer writer, and a list of extensions. Addresses are
# integers here: reading one through a typed pointer takes ctypes several times as long.
_HEAD = [("struct_size", c_int64), ("extension", c_int64)]


class Frame(Structure):
    """XLA_FFI_CallFrame; the structs of arguments, results and attributes lie within it."""

    _fields_ = [
        *_HEAD, ("api", c_int64), ("context", c_int64), ("stage", c_int32),
        ("args_size", c_int64), ("args_extension", c_int64), ("args", c_int64), ("arg_types", c_int64), ("arg_items", c_int64),
        ("rets_size", c_int64), ("rets_extension", c_int64), ("rets", c_int64), ("ret_types", c_int64), ("ret_items", c_int64),
        ("attrs_size", c_int64), ("attrs_extension", c_int64), ("attrs", c_int64), ("attr_types", c_int64),
        ("attr_names", c_int64), ("attr_items", c_int64),
    ]  # fmt: skip


class Buffer(Structure):
    """XLA_FFI_Buffer."""

    _fields_ = [*_HEAD, ("dtype", c_int32), ("data", c_int64), ("rank", c_int64), ("dims", c_int64)]


class Span(Structure):
    """XLA_FFI_ByteSpan."""

    _fields_ = [("data", c_int64), ("size", c_int64)]


class Version(Structure):
    """XLA_FFI_Api_Version."""

    _fields_ = [*_HEAD, ("major", c_int32), ("minor", c_int32)]


class ErrorArgs(Structure):
    """XLA_FFI_Error_Create_Args."""

    _fields_ = [*_HEAD, ("message", c_char_p), ("code", c_int32)]


class Api(Structure):
    """XLA_FFI_Api, as far as the first of its functions."""

    _fields_ = [*_HEAD, ("version", Version), ("internal", c_int64), ("create_error", c_int64)]


class Extension(Structure):
    """XLA_FFI_Metadata_Extension."""

    _fields_ = [*_HEAD[:1], ("type", c_int32), ("next", c_int64), ("metadata", c_int64)]


class Metadata(Structure):
    """XLA_FFI_Metadata, as far as its traits."""

    _fields_ = [("struct_size", c_int64), ("version", Version), ("traits", c_uint32)]


_METADATA = 1  # an extension's type: XLA asks which version a handler was written for
_CANCELLED, _INVALID_ARGUMENT, _RESOURCE_EXHAUSTED, _INTERNAL = 1, 3, 8, 13  # XLA's codes of errors

_create_error = ctypes.CFUNCTYPE(c_int64, c_int64)
_handlers: list[Any] = []  # XLA keeps their addresses for ever
_running: set[object] = set()


def register(name: str, call: Call) -> None:
    """Make `call` XLA's target `name` on the CPU; the call has one attribute, which is text."""

    def handle(address: int) -> int:
        frame = Frame.from_address(address)
        if frame.extension and _answered(frame):
            return 0
        _running.add(token := object())
        try:
            span = Span.from_address(_addresses(frame.attr_items, 1)[0])
            attribute = ctypes.string_at(span.data, span.size)
            call(attribute, _data(frame.arg_items, frame.args), _data(frame.ret_items, frame.rets))
        except BaseException as error:
            return _error(frame, error)
        finally:
            _running.discard(token)
        return 0

    handler = ctypes.CFUNCTYPE(c_int64, c_int64)(handle)
    _handlers.append(handler)
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(ctypes.cast(handler, ctypes.c_void_p).value), platform="cpu")


def _answered(frame: Frame) -> bool:
    """Answer XLA's question for the version that handlers are written for, if that is why they are called."""
    extension = Extension.from_address(frame.extension)
    if extension.type != _METADATA:
        return False
    metadata = Metadata.from_address(extension.metadata)
    # XLA takes every version from 0.1 to its own; the oldest do not say which theirs is.
    metadata.version.major, metadata.version.minor = 0, Api.from_address(frame.api).version.minor if frame.api else 1
    metadata.traits = 0
    return True


@cache
def _words(count: int) -> Any:
    return c_int64 * count


def _addresses(address: int, count: int) -> Any:
    return _words(count).from_address(address)


def _data(address: int, count: int) -> list[int]:
    """The addresses of the numbers of so many buffers."""
    return [Buffer.from_address(buffer).data for buffer in _addresses(address, count)] if count else []


def _error(frame: Frame, error: BaseException) -> int:
    """Make an error of XLA's of an exception; JAX raises it with this text."""
    code = _INVALID_ARGUMENT if isinstance(error, (TypeError, ValueError)) else _INTERNAL
    code = _RESOURCE_EXHAUSTED if isinstance(error, MemoryError) else code
    code = _CANCELLED if isinstance(error, KeyboardInterrupt) else code
    text = f"{type(error).__name__}: {error}".encode(errors="replace")
    found = ErrorArgs(ctypes.sizeof(ErrorArgs), 0, text, code)
    create = _create_error(Api.from_address(frame.api).create_error)
    return int(create(ctypes.addressof(found)))


@atexit.register
def _settle() -> None:
    """Wait for what XLA still has to run: after Python's end it would wait for the GIL for ever, and the process for it."""
    for array in jax.live_arrays():
        with suppress(Exception):
            array.block_until_ready()
    for device in jax.local_devices(backend="cpu"):
        (jax.device_put(0.0, device) + 0).block_until_ready()
    quiet = 0
    while quiet < 5:  # calls from other threads, whose results nobody kept
        quiet = 0 if _running else quiet + 1
        time.sleep(0.001)


@cache
def _bytes(count: int) -> Any:
    return ctypes.c_char * count


def memory(address: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """The numbers at an address as an array, without a copy."""
    size = prod(shape) * dtype.itemsize
    if size == 0:
        return np.empty(shape, dtype)  # XLA may give it no address
    return np.ndarray(shape, dtype, _bytes(size).from_address(address))
