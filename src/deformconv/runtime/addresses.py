"""Arrays made of addresses, and machine code called at one, within kernels."""

from __future__ import annotations

from typing import Any

import numba
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import make_array, populate_array

from deformconv.runtime.simd import INT, data_and_type

__all__ = ["address_of", "array_at", "call_at", "machine_code"]


def machine_code(compiled: Any, arguments: tuple[Any, ...]) -> int:
    """Where the machine code of a kernel for arguments of these types lies; it is compiled, or loaded, if need be."""
    signature = tuple(map(numba.typeof, arguments))
    compiled.compile(signature)
    found = compiled.overloads[signature]
    return int(found.library.get_pointer_to_function(found.fndesc.llvm_func_name))


@intrinsic
def address_of(typing, array):
    """Where an array's numbers begin."""

    def emit(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        return builder.ptrtoint(data_and_type(context, builder, signature.args[0], given[0])[0], INT)

    return types.int64(array), emit


@intrinsic
def array_at(typing, address, shape, dtype):
    """The contiguous, aligned array of this shape whose numbers begin at an address."""
    result = types.Array(dtype.dtype, len(shape), "C")

    def emit(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        address, shape, _ = given
        array, kind = make_array(result)(context, builder), context.get_data_type(result.dtype)
        sizes, step = cgutils.unpack_tuple(builder, shape), INT(context.get_abi_sizeof(kind))
        strides = [step]
        for size in reversed(sizes[1:]):
            strides.insert(0, builder.mul(strides[0], size))
        data = builder.inttoptr(address, kind.as_pointer())
        populate_array(array, data=data, shape=sizes, strides=strides, itemsize=step, meminfo=None)
        return array._getvalue()

    return result(types.int64, types.UniTuple(types.int64, len(shape)), dtype), emit


@intrinsic
def call_at(typing, address, arguments):
    """Call the kernel whose machine code is at an address, and raise what it raises."""

    def emit(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        kinds = signature.args[1].types
        kind = context.call_conv.get_function_type(types.none, kinds)
        function = builder.inttoptr(given[0], kind.as_pointer())
        values = cgutils.unpack_tuple(builder, given[1])
        status, _ = context.call_conv.call_function(builder, function, types.none, kinds, values)
        with builder.if_then(status.is_error, likely=False):
            context.call_conv.return_status_propagate(builder, status)
        return context.get_dummy_value()

    return types.none(types.int64, arguments), emit
