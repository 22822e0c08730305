"""Pickles of tensors and arrays, read without running anything that they ask for.

`pickletools` takes a pickle apart into its operations, and the few that tables of numbers are made of are done here. Names of
functions and classes become what `pickled_names` has for them, and a name that it does not have is refused.

Why not `torch.load(weights_only=True)`, or Python's `pickle` with a `find_class` of one's own: up to PyTorch 2.5 the first can
be made to run code (CVE-2025-32434), and both believe the numbers in a file. `bytearray(2**40)` and the place 2**31 in the memo
are allocated, and the hash of a tuple in a tuple in a tuple ... overflows the stack and ends the process.
"""

from __future__ import annotations

import pickletools
from collections import OrderedDict
from collections.abc import Callable
from typing import IO, Any, BinaryIO, cast

from deformconv.convert.foreign import CheckpointError
from deformconv.convert.pickled_names import INERT, Array, DType, Storage, inert, named, put_item

__all__ = ["Span", "read_pickle"]

# A pickle's operation makes an object of up to some 250 bytes out of one byte. So as many are done as a file of tensors needs
# by far, and the objects take some 60 MB and what the file takes.
FREE_OPERATIONS = 250_000
BYTES_AN_OPERATION = 256
MOST_ARGUMENTS = 32


class Span:
    """A part of an open file, as a file that ends there; it never asks for more bytes than there are."""

    def __init__(self, file: BinaryIO, start: int, end: int) -> None:
        self.file, self.left = file, end - start
        file.seek(start)

    def read(self, size: int) -> bytes:
        return self._counted(self.file.read(min(size, self.left)))

    def readline(self) -> bytes:
        return self._counted(self.file.readline(self.left))

    def _counted(self, content: bytes) -> bytes:
        self.left -= len(content)
        return content


RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # from Python 2, whose names protocols 0 to 2 keep
_MARK = object()


def read_pickle(span: Span, path: str, storage: Callable[[Any], Storage] | None, size: int) -> Any:
    """The object that a pickle describes.

    Args:
        span: where the pickle begins; afterwards at its end.
        path: the file's name, for errors.
        storage: makes a storage from what `torch.save` writes in its place; None where no pickle has any.
        size: the file's, in bytes, which limits how many objects there may be.

    Returns:
        Numbers, texts, lists, tuples and OrderedDicts, whose names are texts; and records of `pickled_names`. An OrderedDict
        has `_metadata` where PyTorch's state_dict had it.
    """
    machine = _Machine(path, storage)
    left = FREE_OPERATIONS + size // BYTES_AN_OPERATION
    try:
        for operation, argument, _ in pickletools.genops(cast(IO[bytes], span)):
            left -= 1
            if left < 0:
                raise CheckpointError(f"{path} describes more objects than its size allows; files of tensors have few.")
            machine.do(operation.name, argument)
        return machine.stack.pop()
    except CheckpointError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged or cut off: its pickle makes no sense ({type(error).__name__}). Copy or download it again."
        ) from None


class _Machine:
    """The stack of a pickle, its memo, and the operations on them."""

    def __init__(self, path: str, storage: Callable[[Any], Storage] | None) -> None:
        self.path, self.storage = path, storage
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def do(self, name: str, argument: Any) -> None:
        if name in PUSHED:
            self.stack.append(argument)
        elif name in CONSTANTS:
            self.stack.append(CONSTANTS[name])
        elif name in EMPTY:
            self.stack.append(EMPTY[name]())
        elif name in ACTIONS:
            ACTIONS[name](self, argument)
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise CheckpointError(f"{self.path} has the pickle operation {name}, which files of tensors lack; it was not done.")

    def marked(self) -> list[Any]:
        """What is above the last mark, which goes away with it."""
        found: list[Any] = []
        while (value := self.stack.pop()) is not _MARK:
            found.append(value)
        return found[::-1]

    def find(self, name: str) -> Any:
        module, _, rest = name.partition(" ")
        name = f"{RENAMED.get(module, module)}.{rest}"
        found = named(name)
        if found is None:
            raise self.refusal(name if len(name) < 100 and name.isprintable() else "a name")
        return found

    def refusal(self, asked: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} holds more than tensors: it asks for {asked}, which could run code from the file, so it was not "
            "read. If you trust the file, load it with the program that wrote it and save its state_dict alone."
        )

    def global_(self, argument: Any) -> None:
        self.stack.append(self.find(argument))

    def stack_global(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if type(name) is not str or type(module) is not str:
            raise TypeError("a name")
        self.stack.append(self.find(f"{module} {name}"))

    def persistent(self, _: Any) -> None:
        reference = self.stack.pop()
        if self.storage is None:
            raise CheckpointError(f"{self.path} is a pickle that refers to data outside of it; expected one with its arrays.")
        self.stack.append(self.storage(reference))

    def call(self, _: Any) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if function is INERT:
            raise self.refusal("a call of an object's method")
        if not callable(function) or type(arguments) is not tuple or len(arguments) > MOST_ARGUMENTS:
            raise TypeError("a call")
        self.stack.append(function(*arguments))

    def new(self, _: Any) -> None:
        _, kind = self.stack.pop(), self.stack.pop()
        if kind is not inert:
            raise TypeError("a class")
        self.stack.append(INERT)

    def new_with_names(self, _: Any) -> None:
        self.stack.pop()
        self.new(None)

    def build(self, _: Any) -> None:
        state, value = self.stack.pop(), self.stack[-1]
        if isinstance(value, (Array, DType)):
            value.set_state(state)
        elif isinstance(value, OrderedDict):
            if isinstance(state, OrderedDict) and isinstance(state.get("_metadata"), OrderedDict):
                value._metadata = state["_metadata"]  # type: ignore[attr-defined]
        elif value is not INERT:
            raise TypeError(type(value).__name__)

    def put(self, index: int) -> None:
        if not 0 <= index < 2**32:
            raise ValueError(index)
        self.memo[index] = self.stack[-1]

    def memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    def mark(self, _: Any) -> None:
        self.stack.append(_MARK)

    def pop(self, _: Any) -> None:
        self.stack.pop()

    def pop_mark(self, _: Any) -> None:
        self.marked()

    def append(self, _: Any) -> None:
        value = self.stack.pop()
        self._extend([value])

    def appends(self, _: Any) -> None:
        self._extend(self.marked())

    def _extend(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target += values
        elif target is not INERT:
            raise TypeError(type(target).__name__)

    def set_item(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        put_item(self.stack[-1], key, value)

    def set_items(self, _: Any) -> None:
        self._set(self.marked())

    def _set(self, values: list[Any]) -> None:
        for key, value in zip(values[::2], values[1::2], strict=True):
            put_item(self.stack[-1], key, value)

    def list_(self, _: Any) -> None:
        self.stack.append(self.marked())

    def dict_(self, _: Any) -> None:
        values = self.marked()
        self.stack.append(OrderedDict())
        self._set(values)

    def tuple_(self, _: Any) -> None:
        self.stack.append(tuple(self.marked()))

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise IndexError(count)
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def frozen_set(self, _: Any) -> None:
        self.marked()
        self.stack.append(INERT)


PUSHED = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": (), "EMPTY_SET": INERT}
EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_LIST": list, "EMPTY_DICT": OrderedDict}
ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "GLOBAL": _Machine.global_,
    "STACK_GLOBAL": _Machine.stack_global,
    "BINPERSID": _Machine.persistent,
    "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.new,
    "NEWOBJ_EX": _Machine.new_with_names,
    "BUILD": _Machine.build,
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Machine.put),
    "MEMOIZE": _Machine.memoize,
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.get),
    "MARK": _Machine.mark,
    "POP": _Machine.pop,
    "POP_MARK": _Machine.pop_mark,
    "APPEND": _Machine.append,
    **dict.fromkeys(("APPENDS", "ADDITEMS"), _Machine.appends),
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "LIST": _Machine.list_,
    "DICT": _Machine.dict_,
    "TUPLE": _Machine.tuple_,
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "FROZENSET": _Machine.frozen_set,
}
