"""Vectors of the host's width: what kernels emit as LLVM IR where no loop that Numba compiles is vectorised reliably.

A vector has VECTOR_BYTES, chosen from the host's features. LLVM turns the same IR into AVX-512, AVX2, SSE or NEON.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils, config
from numba.extending import intrinsic

from deformconv.runtime import half, pairs
from deformconv.runtime.cache import device

__all__ = [
    "INT",
    "VECTOR_BYTES",
    "Lanes",
    "Rows",
    "add_lanes",
    "bytes_of",
    "call_vector",
    "data_and_type",
    "element",
    "emits",
    "emits_result",
    "for_channels",
    "for_chunks",
    "for_each",
    "for_positions",
    "for_usual_widths",
    "host_features",
    "host_processor",
    "lanes_of",
    "named",
    "numbers_in",
    "prefetch",
    "read",
    "round_up",
    "row_writer",
    "transpose_block",
    "write",
    "write_number",
    "write_row",
]

INT = ir.IntType(64)


class Rows(NamedTuple):
    """Rows of numbers in flat memory: row r begins at `start + r * row`."""

    array: Any
    start: Any
    row: Any


def host_features() -> frozenset[str]:
    """The vector extensions that Numba generates code for, as LLVM names them."""
    chosen = config.CPU_FEATURES
    if chosen is None:
        return frozenset(name for name, on in llvm.get_host_cpu_features().items() if on)
    return frozenset(name[1:] for name in chosen.split(",") if name.startswith("+"))


def host_processor() -> str:
    """LLVM's name of the processor that Numba generates code for."""
    return config.CPU_NAME or str(llvm.get_host_cpu_name())


def _vector_bytes(features: frozenset[str]) -> int:
    if "avx512f" in features:
        return 64
    return 32 if {"avx", "avx2"} & features else 16


VECTOR_BYTES = _vector_bytes(host_features())
# Vectors that are worked on at once, at the most: those of 256 bytes, but never more than half of 16 registers.
_CHUNK = min(8, 256 // VECTOR_BYTES)
# Whether the processor converts float16. For others LLVM would call functions that are not there.
CONVERTS = not {"f16c", "avx512f", "neon"}.isdisjoint(host_features())
# The dtype of words of pairs that are multiplied by tiles; others are uint32.
FOR_TILES = types.int32
# Whether it multiplies pairs of bfloat16, and rounds to bfloat16.
MULTIPLIES_PAIRS = {"avx512f", "avx512bf16"} <= host_features()


def data_and_type(context: Any, builder: Any, array_type: Any, array: Any) -> tuple[Any, Any]:
    return context.make_array(array_type)(context, builder, array).data, context.get_data_type(array_type.dtype)


def element(builder: Any, data: Any, index: Any) -> Any:
    """The address of `data[index]`."""
    return builder.gep(data, [index], inbounds=True)


class Lanes:
    """Emits operations on vectors of `width` numbers, of which loads and stores take the first `lanes`; the others are 0.

    Half precision in memory is float32 in a vector.
    """

    def __init__(self, builder: Any, scalar: Any, width: int, lanes: int | None = None) -> None:
        self.builder, self.scalar, self.width, self.lanes = builder, scalar, width, lanes or width
        self.type = ir.VectorType(scalar, width)
        self.zero = ir.Constant(self.type, None)

    def _pick(self, value: Any, lanes: list[int]) -> Any:
        return self.builder.shuffle_vector(value, ir.Constant(value.type, None), _mask(lanes))

    def load(self, data: Any, index: Any) -> Any:
        if self.lanes == 1:
            number = self.number(data, index)
            return self.builder.insert_element(self.zero, number, _lane(0)) if self.width > 1 else self._one(number)
        place, stored = element(self.builder, data, index), data.type.pointee
        value = self.builder.load(self.builder.bitcast(place, ir.VectorType(stored, self.lanes).as_pointer()))
        value.align = bytes_of(stored)
        value = value if stored == self.scalar else half.widened(self.builder, value, CONVERTS)
        rest = range(self.lanes, self.width)
        return value if not rest else self._pick(value, [*range(self.lanes), *(self.lanes for _ in rest)])

    def number(self, data: Any, index: Any) -> Any:
        """One number."""
        number = self.builder.load(element(self.builder, data, index))
        return number if number.type == self.scalar else half.widened(self.builder, number, CONVERTS)

    def store(self, value: Any, data: Any, index: Any) -> None:
        value, stored = self._used(value), data.type.pointee
        value = value if stored == self.scalar else half.narrowed(self.builder, value, stored, CONVERTS)
        self._put(value, data, index)

    def store_factors(self, value: Any, data: Any, index: Any) -> None:
        """As `store`, of factors of a product: where they are bfloat16, what is subnormal may become 0."""
        value, stored = self._used(value), data.type.pointee
        self._put(value if stored == self.scalar else pairs.narrowed(self.builder, value, MULTIPLIES_PAIRS), data, index)

    def store_in_pairs(self, value: Any, data: Any, index: Any, second: Any) -> None:
        """Store numbers in words as the first ones of pairs; or, if `second` is 1, as those beside first ones."""
        value = pairs.narrowed(self.builder, self._used(value), MULTIPLIES_PAIRS)
        words = pairs.WORD if self.lanes == 1 else ir.VectorType(pairs.WORD, self.lanes)
        before = self.builder.load(self.builder.bitcast(element(self.builder, data, index), words.as_pointer()))
        before.align = bytes_of(pairs.WORD)
        self._put(pairs.joined(self.builder, value, before, second), data, index)

    def _used(self, value: Any) -> Any:
        """The first lanes of a vector; one of them as a number."""
        if self.lanes == 1:
            return self.builder.extract_element(value, _lane(0))
        return value if self.lanes == self.width else self._pick(value, list(range(self.lanes)))

    def _put(self, value: Any, data: Any, index: Any) -> None:
        place = self.builder.bitcast(element(self.builder, data, index), value.type.as_pointer())
        self.builder.store(value, place).align = bytes_of(data.type.pointee)

    def _one(self, number: Any) -> Any:
        return self.builder.insert_element(ir.Constant(self.type, ir.Undefined), number, _lane(0))

    def spread(self, number: Any) -> Any:
        """A vector of the same number."""
        return self.builder.shuffle_vector(self._one(number), self.zero, _mask([0] * self.width))

    def constant(self, number: float) -> Any:
        return ir.Constant(self.type, [number] * self.width)

    def multiply(self, a: Any, b: Any) -> Any:
        return self.builder.fmul(a, b, flags=("contract",))

    def multiply_add(self, a: Any, b: Any, c: Any) -> Any:
        return self.builder.fadd(self.multiply(a, b), c, flags=("contract",))


def bytes_of(scalar: Any) -> int:
    """The size of a number."""
    sizes = {ir.HalfType(): 2, ir.FloatType(): 4, ir.DoubleType(): 8}
    return sizes[scalar] if scalar in sizes else scalar.width // 8


def _lane(number: int) -> Any:
    return ir.Constant(ir.IntType(32), number)


def _mask(lanes: list[int]) -> Any:
    return ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes)


def for_each(builder: Any, start: Any, stop: Any, step: int, sums: list[Any], body: Any) -> list[Any]:
    """Emit a loop that runs `body(index, sums) -> sums` from `start` while a whole step fits before `stop`.

    Returns where it ended, and the sums.
    """
    entry = builder.block
    head, inside, done = (builder.append_basic_block(name) for name in ("loop", "step", "done"))
    builder.branch(head)
    builder.position_at_end(head)
    index = builder.phi(INT)
    index.add_incoming(start, entry)
    running = [builder.phi(value.type) for value in sums]
    for phi, value in zip(running, sums, strict=True):
        phi.add_incoming(value, entry)
    after = builder.add(index, INT(step))
    builder.cbranch(builder.icmp_signed("<=", after, stop), inside, done)
    builder.position_at_end(inside)
    for phi, value in zip(running, body(index, running), strict=True):
        phi.add_incoming(value, builder.block)
    index.add_incoming(after, builder.block)
    builder.branch(head)
    builder.position_at_end(done)
    return [index, *running]


def emits(emit: Any) -> Any:
    """Make an intrinsic without a result of the function that emits its code, `emit(builder, scalar, *operands)`.

    Of an array `emit` gets the address of its numbers, of a tuple its elements, under their names if they have some, and of
    anything else the value. `scalar` is the type of the arrays' reals, and float32 if all of them are half precision.
    """
    return _intrinsic(types.void, emit)


def emits_result(kind: Any) -> Any:
    """As `emits`, for a function that returns a result of this type."""
    return functools.partial(_intrinsic, kind)


def emits_for_tiles(emit: Any) -> Any:
    """As `emits`; it emits nothing where no operand is an array of words for tiles."""
    return _intrinsic(types.void, emit, FOR_TILES)


def _intrinsic(result: Any, emit: Any, only_with: Any = None) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if only_with is not None and only_with not in _dtypes(signature.args):
            return context.get_dummy_value()
        pairs = zip(signature.args, arguments, strict=True)
        scalar = _reals(context, signature.args) or ir.FloatType()
        value = emit(builder, scalar, *(_operand(context, builder, *pair) for pair in pairs))
        return context.get_dummy_value() if result is types.void else value

    def define(typing: Any, *kinds: Any) -> Any:
        return result(*(types.int64 if isinstance(kind, types.Integer) else kind for kind in kinds)), generate

    functools.update_wrapper(define, emit)
    # Numba reads the operands' names behind the first parameter, its typing context.
    own = inspect.signature(emit)
    define.__signature__ = own.replace(parameters=list(own.parameters.values())[1:])  # type: ignore[attr-defined]
    return intrinsic(define)


def _dtypes(kinds: Any) -> Iterator[Any]:
    """The dtypes of all arrays, those in tuples too."""
    for kind in kinds:
        if isinstance(kind, types.Array):
            yield kind.dtype
        elif isinstance(kind, types.BaseTuple):
            yield from _dtypes(kind.types)


def _operand(context: Any, builder: Any, kind: Any, value: Any) -> Any:
    if isinstance(kind, types.Array):
        return half.address(builder, kind.dtype, data_and_type(context, builder, kind, value)[0])
    if not isinstance(kind, types.BaseTuple):
        return value
    pairs = zip(kind.types, cgutils.unpack_tuple(builder, value), strict=True)
    operands = [_operand(context, builder, *pair) for pair in pairs]
    return kind.instance_class(*operands) if isinstance(kind, types.BaseNamedTuple) else operands


def _reals(context: Any, kinds: Any) -> Any:
    """The type of the reals in the first array of reals; None if there is none."""
    for kind in kinds:
        if isinstance(kind, types.Array) and isinstance(kind.dtype, types.Float):
            return context.get_data_type(kind.dtype)
        found = _reals(context, kind.types) if isinstance(kind, types.BaseTuple) else None
        if found is not None:
            return found
    return None


def lanes_of(scalar: Any) -> int:
    """How many numbers a vector holds."""
    return VECTOR_BYTES // bytes_of(scalar)


def for_channels(builder: Any, scalar: Any, width: Any, sums: list[Any], body: Any) -> list[Any]:
    """Emit `body(lanes, channel, sums) -> sums` over `width` channels: whole vectors, then ever shorter ones."""
    whole = lanes_of(scalar)
    loop = functools.partial(_channel_loop, builder, scalar, whole, body)
    channel, *sums = loop(whole, INT(0), width, sums)
    entry = builder.block
    rest, done = builder.append_basic_block("rest"), builder.append_basic_block("done")
    builder.cbranch(builder.icmp_signed("<", channel, width), rest, done)
    builder.position_at_end(rest)
    left, lanes = sums, whole // 2
    while lanes:
        channel, *left = loop(lanes, channel, width, left)
        lanes //= 2
    last = builder.block
    builder.branch(done)
    builder.position_at_end(done)
    results = []
    for before, after in zip(sums, left, strict=True):
        phi = builder.phi(before.type)
        phi.add_incoming(before, entry)
        phi.add_incoming(after, last)
        results.append(phi)
    return results


def _channel_loop(
    builder: Any, scalar: Any, width: int, body: Any, lanes: int, start: Any, stop: Any, sums: list[Any]
) -> list[Any]:
    do = Lanes(builder, scalar, width, lanes)
    return for_each(builder, start, stop, lanes, sums, functools.partial(body, do))


def for_chunks(builder: Any, scalar: Any, width: Any, body: Any) -> None:
    """Emit `body(lanes, vectors, channel)` over `width` channels: a few vectors at a time, one, then ever shorter ones."""
    whole, channel = lanes_of(scalar), INT(0)
    sizes = [(whole, vectors) for vectors in (8, 4, 2, 1) if vectors <= _CHUNK]
    lanes = whole // 2
    while lanes:
        sizes.append((lanes, 1))
        lanes //= 2
    for lanes, vectors in sizes:
        do = Lanes(builder, scalar, whole, lanes)

        def step(do: Any, vectors: int, channel: Any, _: Any) -> list[Any]:
            body(do, vectors, channel)
            return []

        (channel,) = for_each(builder, channel, width, lanes * vectors, [], functools.partial(step, do, vectors))


def for_usual_widths(builder: Any, whole: int, width: Any, body: Any) -> None:
    """Emit `body(vectors)` for widths of one, two and four vectors, without a loop over them, and `body(0)` for all others."""
    done = builder.append_basic_block("done")
    for vectors in (1, 2, 4):
        usual, other = builder.append_basic_block("usual"), builder.append_basic_block("other")
        builder.cbranch(builder.icmp_signed("==", width, INT(vectors * whole)), usual, other)
        builder.position_at_end(usual)
        body(vectors)
        builder.branch(done)
        builder.position_at_end(other)
    body(0)
    builder.branch(done)
    builder.position_at_end(done)


def for_positions(builder: Any, scalar: Any, count: Any, step: Any) -> None:
    """Emit `step(lanes, t)` for t < count: whole vectors of positions, then one position at a time."""

    def body(do: Any, t: Any, _: Any) -> list[Any]:
        step(do, t)
        return []

    t = INT(0)
    for lanes in (lanes_of(scalar), 1):
        do = Lanes(builder, scalar, lanes)
        (t,) = for_each(builder, t, count, lanes, [], functools.partial(body, do))


def call_vector(builder: Any, name: str, value: Any) -> Any:
    """Call an LLVM intrinsic, "llvm.floor" say, on a vector."""
    bits = 8 * bytes_of(value.type.element)
    function = ir.FunctionType(value.type, [value.type])
    full_name = f"{name}.v{value.type.count}f{bits}"
    return builder.call(cgutils.get_or_insert_function(builder.module, function, full_name), [value])


def add_lanes(builder: Any, values: list[Any]) -> list[Any]:
    """The sum of each vector's lanes; 2^D vectors are folded into one another, and not each on its own."""
    count, width = len(values), values[0].type.count
    stay = 1  # lanes that hold one vector's partial sums lie `stay` vectors apart
    while len(values) > 1 and width // stay > 1:
        half = len(values) // 2
        # Of a pair, one gives up its odd runs and the other its even ones.
        values = [_fold(builder, values[i], values[i + half], width, stay) for i in range(half)]
        stay *= 2
    totals, folded = [], count // len(values)
    for value in values:
        step = stay
        while step < width:
            turned = builder.shuffle_vector(value, value, _mask([(lane + step) % width for lane in range(width)]))
            value = builder.fadd(value, turned)
            step *= 2
        totals.append(value)
    return [builder.extract_element(totals[i % len(totals)], _lane(_place(i // len(totals), folded))) for i in range(count)]


def _place(number: int, count: int) -> int:
    """In which lane `_fold` leaves the sum of a vector: bits of its number from the highest down."""
    lane, bit, half = 0, 1, count // 2
    while half:
        lane += bit if number & half else 0
        bit, half = bit * 2, half // 2
    return lane


def _fold(builder: Any, a: Any, b: Any, width: int, stay: int) -> Any:
    """Lanes whose bit `stay` is 0 hold sums of a's pairs of lanes, the others those of b's."""
    low = [lane if not lane & stay else width + (lane ^ stay) for lane in range(width)]
    high = [(lane | stay) if not lane & stay else width + lane for lane in range(width)]
    return builder.fadd(builder.shuffle_vector(a, b, _mask(low)), builder.shuffle_vector(a, b, _mask(high)))


@intrinsic
def named(typing, kind, numbers):
    """The numbers of an int64 array under the names of a NamedTuple's class."""
    result = types.NamedUniTuple(types.int64, len(kind.instance_class._fields), kind.instance_class)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data, _ = data_and_type(context, builder, signature.args[1], arguments[1])
        values = [builder.load(element(builder, data, INT(number))) for number in range(len(result))]
        return context.make_tuple(builder, result, values)

    return result(kind, numbers), generate


@intrinsic
def read(typing, array, index):
    """The number `array[index]`, which is not counted from the end; half precision as float32."""
    result = types.float32 if half.is_half(array.dtype) else array.dtype

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = _operand(context, builder, signature.args[0], arguments[0])
        return Lanes(builder, context.get_data_type(result), 1).number(data, arguments[1])

    return result(array, types.int64), generate


@intrinsic
def write(typing, array, index, number):
    """`array[index] = number`, rounded where the array holds half precision."""
    given = types.float32 if half.is_half(array.dtype) else array.dtype

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = _operand(context, builder, signature.args[0], arguments[0])
        do = Lanes(builder, context.get_data_type(given), 1)
        do.store(do.spread(arguments[2]), data, arguments[1])
        return context.get_dummy_value()

    return types.void(array, types.int64, given), generate


@emits
def transpose_block(builder, scalar, source, start, row, into, into_start, into_row, bias, bias_start, biased):
    """into[c, r] = source[r, c] for a square of a vector's lanes, plus bias[c] if `biased`.

    Row r of the source begins at `start + r * row`, row c of the result at `into_start + c * into_row`.
    """
    width = lanes_of(scalar)
    do = Lanes(builder, scalar, width)
    rows = [do.load(source, builder.add(start, builder.mul(INT(r), row))) for r in range(width)]
    step = 1
    while step < width:  # swap the off-diagonal quarters of ever larger squares
        low = [lane if not lane & step else width + (lane ^ step) for lane in range(width)]
        high = [(lane | step) if not lane & step else width + lane for lane in range(width)]
        for r in range(width):
            if not r & step:
                a, b = rows[r], rows[r | step]
                rows[r] = builder.shuffle_vector(a, b, _mask(low))
                rows[r | step] = builder.shuffle_vector(a, b, _mask(high))
        step *= 2
    places = [builder.add(into_start, builder.mul(INT(c), into_row)) for c in range(width)]
    with builder.if_else(biased) as (adding, copying):
        with adding:
            for c, (value, place) in enumerate(zip(rows, places, strict=True)):
                number = do.number(bias, builder.add(bias_start, INT(c)))
                do.store(builder.fadd(value, do.spread(number)), into, place)
        with copying:
            for value, place in zip(rows, places, strict=True):
                do.store(value, into, place)


def row_writer(builder: Any, rows: Any, row: Any) -> Any:
    """What stores factors of a product into a row of Rows: (lanes, vector, index in the row).

    In an array of words two rows that follow each other are a row of pairs (`runtime.pairs`), the first of them written first.
    """
    if pairs.are_in(rows.array):
        start = builder.add(rows.start, builder.mul(builder.lshr(row, INT(1)), rows.row))
        second = builder.and_(row, INT(1))
        return lambda do, value, index: do.store_in_pairs(value, rows.array, builder.add(start, index), second)
    start = builder.add(rows.start, builder.mul(row, rows.row))
    return lambda do, value, index: do.store_factors(value, rows.array, builder.add(start, index))


@emits
def write_row(builder, scalar, source, start, into, row, width):
    """Write `width` factors of a product, those of `source` from `start` on, into a row of Rows, as `row_writer` does."""
    store = row_writer(builder, into, row)

    def channels(do, channel, _):
        store(do, do.load(source, builder.add(start, channel)), channel)
        return []

    for_channels(builder, scalar, width, [], channels)


@emits
def write_number(builder, scalar, into, row, number):
    """As `write_row`, of the first number of a row."""
    do = Lanes(builder, scalar, 1)
    row_writer(builder, into, row)(do, do.spread(number), INT(0))


@intrinsic
def numbers_in(typing, array):
    """How many numbers an element of an array is that holds factors of a product: 2 of a pair, else 1."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return INT(2 if array.dtype in (types.uint32, FOR_TILES) else 1)

    return types.int64(array), generate


@intrinsic
def are_for_tiles(typing, array):
    """Whether an array's words are pairs that are multiplied by tiles (`runtime.amx`)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.IntType(1)(array.dtype == FOR_TILES)

    return types.boolean(array), generate


@emits
def prefetch(builder, _, array, index):
    """Ask for the cache line of `array[index]`, into the second-level cache."""
    place = builder.bitcast(element(builder, array, index), ir.IntType(8).as_pointer())
    number = ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [place.type, number, number, number])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [place, number(0), number(2), number(1)])


@device
def round_up(number, multiple):
    """The smallest multiple of `multiple` that is not below `number`."""
    return (number + multiple - 1) // multiple * multiple
