"""Products of pairs of bfloat16 by AMX, as LLVM IR.

A processor with AMX has eight registers that hold a tile each, of up to 16 rows of 64 bytes: 16 rows of A with 16 pairs each,
16 pairs of rows of B with 16 columns each, or 16x16 sums in float32. One instruction adds the product of two such tiles to a
third one. How many rows and bytes a register has is told the processor beforehand, so there are no rests to fill up. A tile's
product is summed apart for the first and the second numbers of pairs, and both sums are added to what was there; what is
subnormal is taken for 0.

The panels of B are those of `runtime.pairs`. A pair of A is followed by the next one.
"""

from __future__ import annotations

import ctypes
import sys
from functools import partial
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from deformconv.runtime import pairs
from deformconv.runtime.simd import INT, VECTOR_BYTES, bytes_of, element, emits_for_tiles, for_each, host_features

__all__ = ["HAS_TILES", "are_permitted", "multiply_tiles"]

HAS_TILES = {"amx-tile", "amx-bf16"} <= host_features()
ROWS, PAIRS, COLUMNS = 16, 16, 16  # of a tile
_REQUEST, _TILE_DATA = 0x1023, 18  # of Linux: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
_ARCH_PRCTL = 158  # its number on x86-64
_BYTE, _SHORT, _WORD = ir.IntType(8), ir.IntType(16), pairs.WORD
_MEMORY = _BYTE.as_pointer()
# The tiles' registers: sums of two panels of columns, A, B's panels, and A and B of what is left of the depth.
_SUMS, _A, _B, _LAST_A, _LAST_B = (0, 1), 2, (3, 4), 5, (6, 7)


def are_permitted() -> bool:
    """Ask Linux for the tiles, whose contents it keeps for a thread only after that, and return whether it grants them.

    It does so for all threads of the process. Asked again it says yes again.
    """
    if sys.platform != "linux" or not HAS_TILES:
        return False
    return ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST, _TILE_DATA) == 0


class _Native:
    """Emits AMX's instructions."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder
        self.plan = cgutils.alloca_once(builder, ir.ArrayType(_BYTE, 64))

    def configure(self, sizes: dict[int, tuple[Any, Any]]) -> None:
        """Say how many rows and words a row each register has, and make zeros of all."""
        builder = self.builder
        builder.store(ir.Constant(self.plan.type.pointee, None), self.plan)
        builder.store(_BYTE(1), cgutils.gep_inbounds(builder, self.plan, 0, 0))
        for tile, (rows, words) in sizes.items():
            place = builder.bitcast(cgutils.gep_inbounds(builder, self.plan, 0, 16 + 2 * tile), _SHORT.as_pointer())
            builder.store(builder.shl(builder.trunc(words, _SHORT), _SHORT(2)), place)
            builder.store(builder.trunc(rows, _BYTE), cgutils.gep_inbounds(builder, self.plan, 0, 48 + tile))
        self._call("ldtilecfg", builder.bitcast(self.plan, _MEMORY))

    def zero(self, tile: int) -> None:
        self._call("tilezero", _BYTE(tile))

    def load(self, tile: int, place: Any, step: Any) -> None:
        """Rows that lie `step` bytes apart."""
        self._call("tileloadd64", _BYTE(tile), place, step)

    def store(self, tile: int, place: Any, step: Any) -> None:
        self._call("tilestored64", _BYTE(tile), place, step)

    def add_product(self, total: int, a: int, b: int) -> None:
        self._call("tdpbf16ps", _BYTE(total), _BYTE(a), _BYTE(b))

    def release(self) -> None:
        """Say that the registers hold nothing that is worth keeping."""
        self._call("tilerelease")

    def _call(self, name: str, *values: Any) -> None:
        kind = ir.FunctionType(ir.VoidType(), [value.type for value in values])
        self.builder.call(cgutils.get_or_insert_function(self.builder.module, kind, f"llvm.x86.{name}"), values)


class _Emulated:
    """Emits the same of plain operations, in memory: for tests where there is no AMX."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder
        self.sizes: dict[int, tuple[Any, Any]] = {}
        self.tiles = [cgutils.alloca_once(builder, ir.ArrayType(_WORD, ROWS * PAIRS)) for _ in range(8)]

    def configure(self, sizes: dict[int, tuple[Any, Any]]) -> None:
        self.sizes = sizes
        for tile in sizes:
            self.zero(tile)

    def zero(self, tile: int) -> None:
        self.builder.store(ir.Constant(self.tiles[tile].type.pointee, None), self.tiles[tile])

    def load(self, tile: int, place: Any, step: Any) -> None:
        def word(there: Any, here: Any) -> None:
            loaded = self.builder.load(there)
            loaded.align = 1
            self.builder.store(loaded, here)

        self._each_word(tile, place, step, word)

    def store(self, tile: int, place: Any, step: Any) -> None:
        def word(there: Any, here: Any) -> None:
            self.builder.store(self.builder.load(here), there).align = 1

        self._each_word(tile, place, step, word)

    def _each_word(self, tile: int, place: Any, step: Any, do: Any) -> None:
        builder, (rows, words) = self.builder, self.sizes[tile]

        def row(r: Any, _: Any) -> list[Any]:
            def column(w: Any, _: Any) -> list[Any]:
                far = builder.add(builder.mul(r, step), builder.mul(w, INT(4)))
                do(builder.bitcast(builder.gep(place, [far]), _WORD.as_pointer()), self._word(tile, r, w))
                return []

            for_each(builder, INT(0), words, 1, [], column)
            return []

        for_each(builder, INT(0), rows, 1, [], row)

    def _word(self, tile: int, row: Any, word: Any) -> Any:
        return cgutils.gep_inbounds(
            self.builder, self.tiles[tile], 0, self.builder.add(self.builder.mul(row, INT(PAIRS)), word)
        )

    def _number(self, word: Any, second: bool) -> Any:
        bits = self.builder.and_(word, _WORD(0xFFFF0000)) if second else self.builder.shl(word, _WORD(16))
        return self.builder.bitcast(bits, ir.FloatType())

    def add_product(self, total: int, a: int, b: int) -> None:
        builder, (rows, columns), (_, depth) = self.builder, self.sizes[total], self.sizes[a]

        def row(m: Any, _: Any) -> list[Any]:
            def column(n: Any, _: Any) -> list[Any]:
                def step(k: Any, sums: list[Any]) -> list[Any]:
                    left, right = builder.load(self._word(a, m, k)), builder.load(self._word(b, k, n))
                    numbers = [(self._number(left, second), self._number(right, second)) for second in (False, True)]
                    return [builder.fadd(builder.fmul(*pair), one) for pair, one in zip(numbers, sums, strict=True)]

                nothing = ir.Constant(ir.FloatType(), 0)
                _, low, high = for_each(builder, INT(0), depth, 1, [nothing, nothing], step)
                place = builder.bitcast(self._word(total, m, n), ir.FloatType().as_pointer())
                builder.store(builder.fadd(builder.load(place), builder.fadd(low, high)), place)
                return []

            for_each(builder, INT(0), columns, 1, [], column)
            return []

        for_each(builder, INT(0), rows, 1, [], row)

    def release(self) -> None:
        """There is nothing to let go of."""


@emits_for_tiles
def multiply_tiles(builder, _, a, rows, b, c, columns, accumulate):
    """`matmul.multiply` for panels of pairs. Unlike that it reads and writes no row beyond the last.

    Columns are rounded up to a vector.
    """
    lanes = VECTOR_BYTES // 4
    product = _Product(builder, a, b, c, accumulate)
    whole = builder.mul(builder.sdiv(rows, INT(ROWS)), INT(ROWS))
    rest = builder.srem(columns, INT(2 * lanes))
    # A last panel of at most a vector is as narrow as one.
    narrow = builder.and_(builder.icmp_signed(">", rest, INT(0)), builder.icmp_signed("<=", rest, INT(lanes)))
    wide_end = builder.select(narrow, builder.sub(columns, rest), builder.add(columns, INT(2 * lanes - 1)))
    narrow_end = builder.select(narrow, builder.add(builder.sub(columns, rest), INT(lanes)), INT(0))
    for width, start, end in ((2 * lanes, INT(0), wide_end), (lanes, builder.sub(columns, rest), narrow_end)):
        for first, after, count in ((INT(0), whole, INT(ROWS)), (whole, rows, builder.sub(rows, whole))):
            there_are = builder.and_(
                builder.icmp_signed("<", first, after), builder.icmp_signed("<=", builder.add(start, INT(width)), end)
            )
            with builder.if_then(there_are):
                product.blocks(width, (start, end), (first, after), count)
    product.tiles.release()


class _Product:
    """Emits the blocks of a product: up to 16 rows of a panel."""

    def __init__(self, builder: Any, a: Any, b: Any, c: Any, accumulate: Any) -> None:
        self.builder, self.a, self.b, self.c, self.accumulate = builder, a, b, c, accumulate
        self.tiles = _Native(builder) if HAS_TILES else _Emulated(builder)

    def blocks(self, width: int, columns: tuple[Any, Any], rows: tuple[Any, Any], count: Any) -> None:
        """All blocks of panels of `width` columns and of `count` rows."""
        builder, words = self.builder, INT(min(width, COLUMNS))
        self.panels = width // min(width, COLUMNS)
        self.left = builder.srem(self.a.run, INT(PAIRS))
        # A register has some rows or none that have some bytes; these two are not used then.
        left = builder.select(builder.icmp_signed("==", self.left, INT(0)), INT(1), self.left)
        sizes = {_A: (count, INT(PAIRS)), _LAST_A: (count, left)}
        for sums, whole, last in zip(_SUMS, _B, _LAST_B, strict=True):
            sizes |= {sums: (count, words), whole: (INT(PAIRS), words), last: (left, words)}
        self.tiles.configure(sizes)
        self.b_step = builder.select(builder.icmp_signed("==", self.b.row, INT(0)), INT(width), self.b.row)

        def panel(column: Any, _: Any) -> list[Any]:
            def block(row: Any, _: Any) -> list[Any]:
                self._block(row, column)
                return []

            # As many rows at a time as a tile has, and once if they are fewer.
            end = builder.select(builder.icmp_signed("==", count, INT(ROWS)), rows[1], builder.add(rows[0], INT(ROWS)))
            for_each(builder, rows[0], end, ROWS, [], block)
            return []

        for_each(builder, columns[0], columns[1], width, [], panel)

    def _block(self, row: Any, column: Any) -> None:
        builder, tiles, a, b, c = self.builder, self.tiles, self.a, self.b, self.c
        add, times = builder.add, builder.mul
        c_step = times(c.row, INT(4))
        places = [
            self._bytes(c.array, add(add(c.start, times(row, c.row)), add(column, INT(COLUMNS * p))))
            for p in range(self.panels)
        ]
        with builder.if_else(self.accumulate) as (adding, beginning):
            with adding:
                for sums, place in zip(_SUMS, places, strict=False):
                    tiles.load(sums, place, c_step)
            with beginning:
                for sums, _ in zip(_SUMS, places, strict=False):
                    tiles.zero(sums)
        a_start = add(a.start, times(row, a.row))
        b_start = add(add(b.start, times(column, b.column)), times(b.first, self.b_step))

        def run(i: Any, carried: list[Any]) -> list[Any]:
            start = add(a_start, times(i, a.jump))
            step, more = partial(self._step, start, _A, _B), partial(self._step, start, _LAST_A, _LAST_B)
            done, b_index = for_each(builder, INT(0), a.run, PAIRS, carried, step)
            with builder.if_then(builder.icmp_signed("<", done, a.run)):
                more(done, [b_index])
            return [add(b_index, times(self.left, self.b_step))]

        for_each(builder, INT(0), a.runs, 1, [b_start], run)
        for sums, place in zip(_SUMS, places, strict=False):
            tiles.store(sums, place, c_step)

    def _step(self, start: Any, left: int, right: tuple[int, int], k: Any, carried: list[Any]) -> list[Any]:
        """The product of a tile of A and those of B beside it."""
        builder, tiles, a = self.builder, self.tiles, self.a
        (b_index,) = carried
        tiles.load(left, self._bytes(a.array, builder.add(start, builder.mul(k, a.step))), self._scaled(a.array, a.row))
        for p in range(self.panels):
            place = self._bytes(self.b.array, builder.add(b_index, INT(COLUMNS * p)))
            tiles.load(right[p], place, builder.mul(self.b_step, INT(4)))
            tiles.add_product(_SUMS[p], left, right[p])
        return [builder.add(b_index, builder.mul(self.b_step, INT(PAIRS)))]

    def _bytes(self, data: Any, index: Any) -> Any:
        return self.builder.bitcast(element(self.builder, data, index), _MEMORY)

    def _scaled(self, data: Any, numbers: Any) -> Any:
        return self.builder.mul(numbers, INT(bytes_of(data.type.pointee)))
