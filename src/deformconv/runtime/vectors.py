"""The matrix product inside the kernels: one register block, written for the host's vector unit.

A block of C = A @ B is held in vector registers while the whole depth streams past it: for every step one row of B is loaded as
a few vectors, one number of A per block row is broadcast, and rows x vectors multiply-adds follow. It is emitted as LLVM IR
because no loop that Numba compiles is kept in registers reliably. LLVM turns the same IR into AVX-512, AVX2 or NEON.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils, config
from numba.extending import intrinsic

from deformconv.runtime.cache import device

_INT = ir.IntType(64)


class BlockShape(NamedTuple):
    """Rows and vectors of the register block, and the bytes of a vector."""

    rows: int
    vectors: int
    bytes: int


def host_features() -> frozenset[str]:
    """The vector extensions that Numba generates code for, as LLVM names them."""
    chosen = config.CPU_FEATURES
    if chosen is None:
        return frozenset(name for name, on in llvm.get_host_cpu_features().items() if on)
    return frozenset(name[1:] for name in chosen.split(",") if name.startswith("+"))


def _block_shape(features: frozenset[str]) -> BlockShape:
    # rows * vectors accumulators, the vectors of B and one broadcast must fit the registers: 32 of them, or 16.
    if "avx512f" in features:
        return BlockShape(12, 2, 64)
    if {"avx", "avx2"} & features:
        return BlockShape(6, 2, 32)
    if "neon" in features:
        return BlockShape(8, 2, 16)
    return BlockShape(4, 2, 16)


BLOCK = _block_shape(host_features())
ROWS, VECTORS, VECTOR_BYTES = BLOCK


def _data_and_type(context: Any, builder: Any, array_type: Any, array: Any) -> tuple[Any, Any]:
    return context.make_array(array_type)(context, builder, array).data, context.get_data_type(array_type.dtype)


def _register_block(vectors: int) -> Any:
    """The intrinsic for a block of ROWS rows and `vectors` vectors."""

    @intrinsic
    def multiply_block(typing, a, a_start, a_row, a_step, b, b_start, b_step, c, c_start, c_row, depth, accumulate):
        signature = types.void(a, *[types.int64] * 3, b, *[types.int64] * 2, c, *[types.int64] * 3, types.boolean)

        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            a, a_start, a_row, a_step, b, b_start, b_step, c, c_start, c_row, depth, accumulate = arguments
            a_data, scalar = _data_and_type(context, builder, signature.args[0], a)
            b_data, _ = _data_and_type(context, builder, signature.args[4], b)
            c_data, _ = _data_and_type(context, builder, signature.args[7], c)
            item = signature.args[0].dtype.bitwidth // 8
            lanes = VECTOR_BYTES // item
            vector = ir.VectorType(scalar, lanes)
            zero = ir.Constant(vector, None)

            def vector_at(data: Any, index: Any, v: int) -> Any:
                place = builder.gep(data, [builder.add(index, _INT(v * lanes))], inbounds=True)
                return builder.bitcast(place, vector.as_pointer())

            def load(data: Any, index: Any, v: int) -> Any:
                value = builder.load(vector_at(data, index, v))
                value.align = item
                return value

            def store(value: Any, row: Any, v: int) -> None:
                builder.store(value, vector_at(c_data, row, v)).align = item

            rows_of_a = [builder.add(a_start, builder.mul(_INT(r), a_row)) for r in range(ROWS)]
            rows_of_c = [builder.add(c_start, builder.mul(_INT(r), c_row)) for r in range(ROWS)]
            zeros = [zero] * (ROWS * vectors)
            entry = builder.block
            loop = builder.append_basic_block("depth")
            done = builder.append_basic_block("store")
            builder.cbranch(builder.icmp_signed(">", depth, _INT(0)), loop, done)
            builder.position_at_end(loop)
            step = builder.phi(_INT)
            a_offset = builder.phi(_INT)
            b_index = builder.phi(_INT)
            sums = [builder.phi(vector) for _ in zeros]
            row_of_b = [load(b_data, b_index, v) for v in range(vectors)]
            results = []
            for r in range(ROWS):
                number = builder.load(builder.gep(a_data, [builder.add(rows_of_a[r], a_offset)], inbounds=True))
                single = builder.insert_element(ir.Constant(vector, ir.Undefined), number, ir.IntType(32)(0))
                shuffle = ir.Constant(ir.VectorType(ir.IntType(32), lanes), None)
                broadcast = builder.shuffle_vector(single, ir.Constant(vector, ir.Undefined), shuffle)
                for v in range(vectors):
                    product = builder.fmul(broadcast, row_of_b[v], flags=("contract",))
                    results.append(builder.fadd(sums[r * vectors + v], product, flags=("contract",)))
            following = builder.add(step, _INT(1))
            for phi, start, update in [
                (step, _INT(0), following),
                (a_offset, _INT(0), builder.add(a_offset, a_step)),
                (b_index, b_start, builder.add(b_index, b_step)),
                *zip(sums, zeros, results, strict=True),
            ]:
                phi.add_incoming(start, entry)
                phi.add_incoming(update, builder.block)
            last = builder.block
            builder.cbranch(builder.icmp_signed("<", following, depth), loop, done)

            builder.position_at_end(done)
            totals = []
            for result in results:
                total = builder.phi(vector)
                total.add_incoming(zero, entry)
                total.add_incoming(result, last)
                totals.append(total)
            # What C held is added last: a sum over many calls then loses no more than a sum of their results. And where C is
            # overwritten it is never read: it may be fresh, unwritten memory.
            places = [(row, v) for row in rows_of_c for v in range(vectors)]
            with builder.if_else(accumulate) as (adding, overwriting):
                with adding:
                    for (row, v), total in zip(places, totals, strict=True):
                        store(builder.fadd(load(c_data, row, v), total), row, v)
                with overwriting:
                    for (row, v), total in zip(places, totals, strict=True):
                        store(total, row, v)
            return context.get_dummy_value()

        return signature, emit

    return multiply_block


_multiply_wide = _register_block(VECTORS)
_multiply_narrow = _register_block(1)


@device
def _multiply_panel(a, a_start, a_row, a_step, rows, b, b_start, b_step, c, c_start, c_row, narrow, depth, accumulate):
    for row in range(0, rows, ROWS):
        a_block, c_block = a_start + row * a_row, c_start + row * c_row
        if narrow:
            _multiply_narrow(a, a_block, a_row, a_step, b, b_start, b_step, c, c_block, c_row, depth, accumulate)
        else:
            _multiply_wide(a, a_block, a_row, a_step, b, b_start, b_step, c, c_block, c_row, depth, accumulate)


@device
def multiply_packed(
    a,
    a_start,
    a_row,
    a_step,
    rows,
    b,
    b_start,
    b_rows,
    b_first,
    c,
    c_start,
    c_row,
    columns,
    depth,
    accumulate,
):
    """C (+)= A @ B for flat arrays, `rows` and `columns` rounded up to whole blocks, for which C (and A in its rows) has room.

    Element (r, s) of A is `a[a_start + r * a_row + s * a_step]`. B lies in panels of VECTORS vectors, the last one of a single
    vector if that is enough; a panel has `b_rows` rows, of which the product takes `depth` from `b_first` on.
    """
    lanes = VECTOR_BYTES // a.itemsize
    for column in range(0, columns, VECTORS * lanes):
        narrow = columns - column <= lanes
        width = lanes if narrow else VECTORS * lanes
        start = b_start + column * b_rows + b_first * width
        _multiply_panel(
            a,
            a_start,
            a_row,
            a_step,
            rows,
            b,
            start,
            width,
            c,
            c_start + column,
            c_row,
            narrow,
            depth,
            accumulate,
        )


@device
def multiply_rows(a, a_start, a_row, a_step, rows, b, b_start, b_row, c, c_start, c_row, columns, depth, accumulate):
    """The same for a B of plain rows, `b_row` apart, that may be read up to a whole vector."""
    lanes = VECTOR_BYTES // a.itemsize
    for column in range(0, columns, VECTORS * lanes):
        narrow = columns - column <= lanes
        start = b_start + column
        _multiply_panel(
            a,
            a_start,
            a_row,
            a_step,
            rows,
            b,
            start,
            b_row,
            c,
            c_start + column,
            c_row,
            narrow,
            depth,
            accumulate,
        )


class _Lanes:
    """How to emit a step of a loop over channels: a whole vector of them, or with `lanes` of 1 a single one."""

    def __init__(self, builder: Any, scalar: Any, item: int, lanes: int) -> None:
        self.builder, self.item, self.lanes = builder, item, lanes
        self.type = scalar if lanes == 1 else ir.VectorType(scalar, lanes)

    def _place(self, data: Any, index: Any) -> Any:
        return self.builder.bitcast(self.builder.gep(data, [index], inbounds=True), self.type.as_pointer())

    def load(self, data: Any, index: Any) -> Any:
        value = self.builder.load(self._place(data, index))
        value.align = self.item
        return value

    def store(self, value: Any, data: Any, index: Any) -> None:
        self.builder.store(value, self._place(data, index)).align = self.item

    def spread(self, number: Any) -> Any:
        if self.lanes == 1:
            return number
        undefined = ir.Constant(self.type, ir.Undefined)
        single = self.builder.insert_element(undefined, number, ir.IntType(32)(0))
        return self.builder.shuffle_vector(single, undefined, ir.Constant(ir.VectorType(ir.IntType(32), self.lanes), None))

    def multiply(self, a: Any, b: Any) -> Any:
        return self.builder.fmul(a, b, flags=("contract",))

    def multiply_add(self, a: Any, b: Any, c: Any) -> Any:
        return self.builder.fadd(self.multiply(a, b), c, flags=("contract",))


def _for_channels(builder: Any, start: Any, stop: Any, lanes: int, sums: list[Any], step: Any) -> list[Any]:
    """Emit a loop that runs `step(channel, sums) -> sums` from `start` while a further `lanes` channels fit before `stop`."""
    entry = builder.block
    head, body, done = (builder.append_basic_block(name) for name in ("channels", "step", "done"))
    builder.branch(head)
    builder.position_at_end(head)
    channel = builder.phi(_INT)
    channel.add_incoming(start, entry)
    running = [builder.phi(value.type) for value in sums]
    for phi, value in zip(running, sums, strict=True):
        phi.add_incoming(value, entry)
    after = builder.add(channel, _INT(lanes))
    builder.cbranch(builder.icmp_signed("<=", after, stop), body, done)
    builder.position_at_end(body)
    for phi, value in zip(running, step(channel, running), strict=True):
        phi.add_incoming(value, builder.block)
    channel.add_incoming(after, builder.block)
    builder.branch(head)
    builder.position_at_end(done)
    return [channel, *running]


def _row_operation(result: Any, emit: Any) -> Any:
    """A code generator that runs `emit(lanes, arrays and numbers, channel, sums)` over the `width` channels of some rows.

    The last argument is `width`. Whole vectors first, then one channel at a time.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        operands = []
        for kind, argument in zip(signature.args, arguments, strict=True):
            if isinstance(kind, types.Array):
                argument, scalar = _data_and_type(context, builder, kind, argument)
                item = kind.dtype.bitwidth // 8
            elif isinstance(kind, types.BaseTuple):
                argument = cgutils.unpack_tuple(builder, argument)
            operands.append(argument)
        *operands, width = operands
        channel, total = _INT(0), [ir.Constant(scalar, 0.0)] * result
        for lanes in (VECTOR_BYTES // item, 1):
            do = _Lanes(builder, scalar, item, lanes)
            sums = [ir.Constant(do.type, None) if lanes > 1 else value for value in total]
            step = functools.partial(emit, do, *operands)
            channel, *sums = _for_channels(builder, channel, width, lanes, sums, step)
            total = [_add_lanes(builder, value, lanes) for value in sums]
        if result:
            return context.make_tuple(builder, signature.return_type, total)
        return context.get_dummy_value()

    return generate


def _add_lanes(builder: Any, value: Any, lanes: int) -> Any:
    while lanes > 1:
        lanes //= 2
        parts = [
            builder.shuffle_vector(
                value,
                value,
                ir.Constant(ir.VectorType(ir.IntType(32), lanes), list(range(first, first + lanes))),
            )
            for first in (0, lanes)
        ]
        value = builder.fadd(*parts)
        if lanes == 1:
            value = builder.extract_element(value, ir.IntType(32)(0))
    return value


@intrinsic
def blend_rows(typing, x, starts, channel, weights, scale, out, out_start, width):
    """out[out_start + c] = scale * sum over i of weights[i] * x[starts[i] + channel + c] for c < width."""

    def emit(do, x, starts, channel, weights, scale, out, out_start, c, sums):
        add = do.builder.add
        place, total = add(channel, c), None
        for start, weight in zip(starts, weights, strict=True):
            weight, value = do.spread(weight), do.load(x, add(start, place))
            total = do.multiply(weight, value) if total is None else do.multiply_add(weight, value, total)
        do.store(do.multiply(do.spread(scale), total), out, add(out_start, c))
        return sums

    return types.void(x, starts, channel, weights, scale, out, out_start, width), _row_operation(0, emit)


@intrinsic
def scatter_rows(typing, d, d_start, weights, scale, out, starts, channel, width):
    """out[starts[i] + channel + c] += scale * weights[i] * d[d_start + c], one i after the other: two rows may be the same."""

    def emit(do, d, d_start, weights, scale, out, starts, channel, c, sums):
        add = do.builder.add
        value = do.multiply(do.spread(scale), do.load(d, add(d_start, c)))
        for start, weight in zip(starts, weights, strict=True):
            place = add(start, add(channel, c))
            do.store(do.multiply_add(do.spread(weight), value, do.load(out, place)), out, place)
        return sums

    return types.void(d, d_start, weights, scale, out, starts, channel, width), _row_operation(0, emit)


@intrinsic
def dot_rows(typing, d, d_start, x, starts, channel, width):
    """The dot products of d[d_start:] with each x[starts[i] + channel:] over `width` channels, as a tuple."""

    def emit(do, d, d_start, x, starts, channel, c, sums):
        add = do.builder.add
        value, place = do.load(d, add(d_start, c)), add(channel, c)
        return [do.multiply_add(value, do.load(x, add(start, place)), total) for start, total in zip(starts, sums, strict=True)]

    result = types.UniTuple(d.dtype, len(starts))
    return result(d, d_start, x, starts, channel, width), _row_operation(len(starts), emit)


@intrinsic
def fetch_add(typing, counter):
    """The next number of a shared counter (an int64 array of length 1), each given out once."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data, _ = _data_and_type(context, builder, signature.args[0], arguments[0])
        return builder.atomic_rmw("add", data, _INT(1), "monotonic")

    return types.int64(counter), emit


@device
def round_up(number, multiple):
    """The smallest multiple of `multiple` that is not below `number`."""
    return (number + multiple - 1) // multiple * multiple
