"""The forward pass of a small call, of which Python took more time than the kernel: from the addresses of its arrays alone.

Arrays are made of addresses by machine code, and the caller's thread does all the work.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import numpy as np

from deformconv.ops.conv.cpu_kernels import ForwardArrays
from deformconv.ops.conv.cpu_kernels import forward as forward_kernel
from deformconv.ops.conv.cpu_plan import Forward
from deformconv.ops.conv.spec import ConvSpec
from deformconv.runtime.addresses import address_of, array_at, call_at, machine_code
from deformconv.runtime.arrays import none_of
from deformconv.runtime.cache import kernel
from deformconv.runtime.memory import arena, room
from deformconv.runtime.simd import named
from deformconv.runtime.threads import counters

__all__ = ["small_forward"]


class Sizes(NamedTuple):
    """How many numbers the arrays of a call have, and where in its memory lie those that are its own, in bytes."""

    items: Any
    input: Any
    offset: Any
    weight: Any
    bias: Any
    mask: Any
    output: Any
    x: Any
    packed: Any
    reals: Any
    integers: Any
    x_at: Any
    packed_at: Any
    reals_at: Any
    integers_at: Any


@kernel
def forward(function, counter, plan, order, sizes, none, memory, addresses):
    """`cpu_kernels.forward`, whose machine code is at the address `function`, on the caller's thread.

    `sizes` are a Sizes, as an int64 array, `none` an empty array of the call's dtype, `memory` an array of bytes, and
    `addresses` those of the contiguous arrays output, input, offset, weight, bias and mask.
    """
    size, own = named(Sizes, sizes), address_of(memory)
    output, input, offset, weight, bias, mask = addresses
    arrays = (
        array_at(input, (size.input,), none.dtype),
        array_at(own + size.x_at, (size.x,), none.dtype),
        array_at(offset, (size.offset,), none.dtype),
        array_at(mask, (size.mask,), none.dtype),
        array_at(weight, (size.weight,), none.dtype),
        array_at(own + size.packed_at, (size.packed,), none.dtype),
        array_at(bias, (size.bias,), none.dtype),
        array_at(output, (size.output,), none.dtype),
        none,
        none,
    )
    reals = array_at(own + size.reals_at, (1, size.reals), none.dtype)
    integers = array_at(own + size.integers_at, (1, size.integers), np.int32)
    call_at(function, (counter, size.items, 0, plan, order, arrays, reals, integers))


def small_forward(spec: ConvSpec, cut: Forward) -> Callable[..., None]:
    """What computes a call of one thread: (the addresses of output, input, offset, weight, bias, mask), 0 for None."""
    shared = cut.share
    shapes = {"output": spec.output_shape, **spec.shapes}
    numbers = {name: prod(shape) for name, shape in shapes.items()}
    own = {"x": cut.x_size, "packed": cut.weight_size, "reals": shared.reals, "integers": shared.integers}
    places, end = {}, 0
    for name, size in own.items():
        places[f"{name}_at"] = end
        end += room(size, "int32" if name == "integers" else spec.dtype)
    given = dict.fromkeys(("bias", "mask"), 0) | numbers
    sizes = np.array(Sizes(items=shared.items, **given, **own, **places), np.int64)
    order = False, False, False, numbers["offset"] // spec.batch, given["mask"] // spec.batch
    none, integers = none_of(spec.dtype), np.empty((1, 0), np.int32)
    reals = np.empty((1, 0), spec.dtype)
    arrays = tuple(none for _ in ForwardArrays._fields)
    function = machine_code(forward_kernel, (counters(), 1, 0, cut.arguments, order, arrays, reals, integers))

    def compute(*addresses: int) -> None:
        with arena(end) as memory:
            forward(function, counters(), cut.arguments, order, sizes, none, memory.bytes, addresses)

    return compute
