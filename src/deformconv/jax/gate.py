"""C functions that call Python's, until Python ends.

XLA computes on threads of its own, and has work left when a program's last line is reached. A function of ctypes that is called
after Python's end waits for the GIL for ever, and the process for it. And after an exception, as Ctrl-C may raise anywhere,
ctypes returns whatever its memory held. So there is a gate before each: a few instructions that count who is inside, that turn
everybody away once the gate is closed, and that tell a failure from success.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import Any

__all__ = ["DONE", "close", "gate"]

DONE = 1  # what a function returns that has nothing to say
_INSIDE, _CLOSED = range(2)
_state = (ctypes.c_int64 * 2)()


def gate(function: Callable[[int], int], way: tuple[int, int], refusal: ctypes.Structure) -> int:
    """The address of a C function, of an address and to an address, that is `function` while the gate is open.

    It returns NULL for DONE. If the gate is closed, or `function` has not returned, it is a function of the caller's, of the
    address of `refusal`. `way` leads there: the struct at the address that it is called with has, at way[0], the address of
    another, and this has the function's at way[1].
    """
    from llvmlite import binding

    def inside(address: int, result: int) -> None:
        ctypes.c_int64.from_address(result).value = function(address)

    inner = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64)(inside)
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    module = binding.parse_assembly(str(_module(_address(inner), way, ctypes.addressof(refusal))))
    module.verify()
    machine = binding.Target.from_default_triple().create_target_machine()
    engine = binding.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    _keep(inner, refusal, engine, _state)
    return int(engine.get_function_address("gate"))


def close() -> None:
    """Turn everybody away from now on, and wait for those inside."""
    _state[_CLOSED] = 1
    while True:
        try:
            # First of all, so that a processor that has not seen the gate closed has counted whoever it let in.
            time.sleep(0.001)
            if not _state[_INSIDE]:
                return
        except KeyboardInterrupt:  # whoever is inside would wait for ever
            continue


def _keep(*objects: Any) -> None:
    """Keep objects beyond Python's end."""
    for kept in objects:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def _module(inner: int, way: tuple[int, int], refusal: int) -> Any:
    from llvmlite import ir

    number = ir.IntType(64)
    of_address = ir.FunctionType(number, [number])
    of_two = ir.FunctionType(ir.VoidType(), [number, number])
    function = ir.Function(ir.Module("gate"), of_address, "gate")
    builder = ir.IRBuilder(function.append_basic_block())

    def at(address: Any, kind: Any = number) -> Any:
        return builder.inttoptr(address, kind.as_pointer())

    def is_(value: Any, other: int) -> Any:
        return builder.icmp_signed("==", value, number(other))

    inside, closed = (at(number(ctypes.addressof(_state) + 8 * which)) for which in (_INSIDE, _CLOSED))
    result = builder.alloca(number)
    builder.store(number(0), result)
    builder.atomic_rmw("add", inside, number(1), "seq_cst")
    with builder.if_then(is_(builder.load_atomic(closed, "seq_cst", 8), 0), likely=True):
        builder.call(at(number(inner), of_two), [function.args[0], builder.ptrtoint(result, number)])
    builder.atomic_rmw("sub", inside, number(1), "seq_cst")
    found = builder.load(result)
    with builder.if_then(is_(found, 0), likely=False):
        place = function.args[0]
        for offset in way:
            place = builder.load(at(builder.add(place, number(offset))))
        builder.ret(builder.call(at(place, of_address), [number(refusal)]))
    builder.ret(builder.select(is_(found, DONE), number(0), found))
    return function.module
