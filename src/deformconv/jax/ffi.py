"""XLA's foreign function interface, read by ctypes: Python functions that XLA calls with its own buffers, without a copy.

The structs are those of jaxlib's `include/xla/ffi/api/c_api.h`, major version 0.
"""

from __future__ import annotations

import _thread
import atexit
import ctypes
import re
import threading
from collections.abc import Callable
from contextlib import suppress
from ctypes import Structure, c_char_p, c_int32, c_int64, c_uint32
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import jax
import jaxlib
import numpy as np

from deformconv.jax.gate import DONE, close, gate

__all__ = ["memory", "reason_against", "register"]

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


MAJOR = 0  # the version of XLA's interface that all of this is written for
_METADATA = 1  # an extension's type: XLA asks which version a handler was written for
_CANCELLED, _INVALID_ARGUMENT, _RESOURCE_EXHAUSTED, _INTERNAL = 1, 3, 8, 13  # XLA's codes of errors

_create_error = ctypes.CFUNCTYPE(c_int64, c_int64)
_asked = False  # whether XLA computes on the CPU in this process


@cache
def reason_against() -> str | None:
    """Why the handlers of this file cannot be called by the installed jaxlib; None if they can.

    It is not left to XLA: that asks when it begins to compute on the CPU, and does not begin if the answer is wrong.
    """
    header = Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h")
    text = header.read_text(errors="replace") if header.is_file() else ""
    found = re.search(r"^#define XLA_FFI_API_MAJOR (\d+)", text, re.MULTILINE)
    if found is None or int(found[1]) == MAJOR:
        return None
    version = f"jaxlib {jaxlib.__version__} calls compiled functions by version {found[1]} of XLA's interface"
    return f"{version}, and deformconv knows {MAJOR}"


def register(name: str, call: Call) -> None:
    """Make `call` XLA's target `name` on the CPU; the call has one attribute, which is text."""

    def handle(address: int) -> int:
        frame = Frame.from_address(address)
        if frame.extension and _answered(frame):
            return DONE
        try:
            span = Span.from_address(c_int64.from_address(frame.attr_items).value)
            attribute = ctypes.string_at(span.data, span.size)
            call(attribute, _data(frame.arg_items, frame.args), _data(frame.ret_items, frame.rets))
        except BaseException as error:
            return _error(frame, error)
        return DONE

    refusal = _error_args("Python was interrupted, or has ended, before this was computed", _CANCELLED)
    address = gate(handle, (Frame.api.offset, Api.create_error.offset), refusal)
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(address), platform="cpu")


def _answered(frame: Frame) -> bool:
    """Answer XLA's question for the version that handlers are written for, if that is why they are called."""
    global _asked
    extension = Extension.from_address(frame.extension)
    if extension.type != _METADATA:
        return False
    metadata = Metadata.from_address(extension.metadata)
    # XLA takes every version from 0.1 to its own; the oldest do not say which theirs is.
    metadata.version.major, metadata.version.minor = MAJOR, Api.from_address(frame.api).version.minor if frame.api else 1
    metadata.traits = 0
    _asked = True
    return True


def _data(address: int, count: int) -> list[int]:
    """The addresses of the numbers of so many buffers, whose own addresses lie side by side."""
    return [Buffer.from_address(buffer).data for buffer in _words(count).from_address(address)] if count else []


@cache
def _words(count: int) -> Any:
    return c_int64 * count


def _error(frame: Frame, error: BaseException) -> int:
    """Make an error of XLA's of an exception; JAX raises it with this text."""
    code = _INVALID_ARGUMENT if isinstance(error, (TypeError, ValueError)) else _INTERNAL
    code = _RESOURCE_EXHAUSTED if isinstance(error, MemoryError) else code
    if isinstance(error, KeyboardInterrupt):
        code = _CANCELLED
        _interrupt_again()
    text = f"{type(error).__name__}: {error}"
    create = _create_error(Api.from_address(frame.api).create_error)
    given = _error_args(text, code)  # which must live until XLA has copied the text
    return int(create(ctypes.addressof(given)))


def _interrupt_again() -> None:
    """Raise Ctrl-C's KeyboardInterrupt once more, since JAX makes an error of it, after which programs may go on.

    Not at once: within XLA, an exception that begins while another is made ends the process.
    """
    timer = threading.Timer(0.05, _thread.interrupt_main)
    timer.daemon = True
    timer.start()


def _error_args(text: str, code: int) -> ErrorArgs:
    return ErrorArgs(ctypes.sizeof(ErrorArgs), 0, text.encode(errors="replace"), code)


@atexit.register
def _settle() -> None:
    """Wait for the arrays that somebody still has. What nobody has need not be computed."""
    if not _asked:
        return
    try:
        for array in jax.live_arrays("cpu"):
            with suppress(Exception):  # an error of a computation, which nobody has asked for
                array.block_until_ready()
    finally:
        close()


def memory(shape: tuple[int, ...], dtype: str, channels_last: bool = False) -> Callable[[int], np.ndarray]:
    """What makes an array of the numbers at an address, without a copy; there its channels, the second axis, may come last."""
    kind, size = np.dtype(dtype), prod(shape)
    if size == 0:
        return lambda address: np.empty(shape, kind)  # XLA may give it no address
    within: Callable[[int], Any] = (ctypes.c_char * (size * kind.itemsize)).from_address
    if not channels_last:
        return lambda address: np.ndarray(shape, kind, within(address))
    strides = np.empty((shape[0], *shape[2:], shape[1]), kind).strides
    strides = (strides[0], strides[-1], *strides[1:-1])
    return lambda address: np.ndarray(shape, kind, within(address), 0, strides)
