"""Pickles of tensors and arrays, read without running anything that they ask for.

`pickletools` takes a pickle apart into its operations, and the few that tables of numbers are made of are done here. Names of
functions and classes become what the tables below have for them: records of what a tensor was made of, which are checked when
the tensor is made. A name that is in no table is refused. What a checkpoint holds besides tensors, such as a training program's
log, becomes `INERT`.

Python's `pickle` with a `find_class` of one's own, and `torch.load(weights_only=True)`, run nothing either. But they
allocate what a number in the file says (`bytearray(2**40)`, the place 2**31 in the memo), and the hash of a tuple
in a tuple in a tuple ... overflows the stack.
"""

from __future__ import annotations

import pickletools
from collections import OrderedDict
from collections.abc import Callable
from typing import IO, Any, BinaryIO, NamedTuple, cast

from deformconv.convert.foreign import CheckpointError

__all__ = ["INERT", "Array", "DType", "Span", "Storage", "StorageType", "StridedTensor", "Unreadable", "read_pickle"]

Shape = tuple[int, ...]
# A pickle's operation makes an object of up to some 250 bytes out of one byte. So as many are done as a file of tensors needs
# by far, and the objects take some 60 MB and what the file takes.
FREE_OPERATIONS = 250_000
BYTES_AN_OPERATION = 256


class Span:
    """A part of an open file, as a file that ends there; it never asks for more bytes than there are."""

    def __init__(self, file: BinaryIO, start: int, end: int) -> None:
        self.file, self.end = file, end
        file.seek(start)

    def read(self, size: int) -> bytes:
        return self.file.read(max(0, min(size, self.end - self.file.tell())))

    def readline(self) -> bytes:
        return self.file.readline(max(0, self.end - self.file.tell()))


class _Inert:
    """What stands for everything that is no tensor; whatever a pickle does to it, it stays as it is."""


INERT = _Inert()


class Unreadable(NamedTuple):
    """A value that would be a tensor, of a kind that is not read; `kind` is a noun for a sentence."""

    kind: str


class StorageType(NamedTuple):
    """The class of a storage of PyTorch, or a dtype; the name is that of the dtype."""

    dtype: str


class Storage(NamedTuple):
    """A storage of PyTorch: where its bytes are is for the file's reader to know."""

    dtype: str
    key: str
    elements: int


class StridedTensor(NamedTuple):
    """A tensor of PyTorch, of numbers that a storage has."""

    storage: Storage
    offset: int
    shape: Shape
    strides: Shape
    dtype: str


class DType:
    """A dtype of NumPy: its code without the order of bytes, and that order."""

    def __init__(self, code: Any) -> None:
        self.code, self.order = code, "="

    def set_state(self, state: Any) -> None:
        _, self.order, *rest = state
        if any(part is not None for part in rest[:3]):  # fields, or an array as an element
            self.code = "V"


class Array:
    """An array of NumPy: what a pickle said of it, of which nothing is checked yet."""

    def __init__(self) -> None:
        self.shape: Any = None
        self.dtype: Any = None
        self.fortran: Any = False
        self.content: Any = None

    def set_state(self, state: Any) -> None:
        _, self.shape, self.dtype, self.fortran, self.content = state


# What a pickle may call, by name. Nothing here copies what an argument holds, since one argument can be used a million times;
# a list that is copied is emptied.
def _array(*arguments: Any) -> Array:
    return Array()


def _array_from_buffer(content: Any, dtype: Any, shape: Any, order: Any) -> Array:
    array = Array()
    array.set_state((1, shape, dtype, order == "F", content))
    return array


def _scalar(dtype: Any, content: Any = b"") -> Array:
    array = Array()
    array.set_state((1, (), dtype, False, content))
    return array


def _dtype(code: Any, *flags: Any) -> DType:
    return DType(code)


def _encode(text: Any, encoding: Any) -> Any:
    """The text itself: as in pickles of Python 2, a text stands for bytes where bytes are needed."""
    return text


def _bytes(*content: Any) -> Any:
    return INERT if content else b""


def _tuple(*content: Any) -> Any:
    """`tuple` and `torch.Size` of a tuple, which is that tuple, or of a list."""
    (values,) = content or ((),)
    return tuple(_taken(values)) if isinstance(values, list) else values


def _dict(*content: Any) -> OrderedDict[str, Any]:
    found: OrderedDict[str, Any] = OrderedDict()
    for key, value in _taken(content[0]) if content and isinstance(content[0], list) else ():
        _put(found, key, value)
    return found


def _taken(values: list[Any]) -> list[Any]:
    taken, values[:] = values[:], []
    return taken


def _inert(*arguments: Any) -> _Inert:
    return INERT


def _tensor(storage: Storage, offset: int, shape: Shape, strides: Shape, *rest: Any) -> StridedTensor:
    """`_rebuild_tensor`, and `_rebuild_tensor_v2` with more behind."""
    return StridedTensor(storage, offset, shape, strides, storage.dtype)


def _tensor_of_dtype(
    storage: Storage, offset: int, shape: Shape, strides: Shape, grad: Any, hooks: Any, dtype: StorageType, *rest: Any
) -> StridedTensor:
    """`_rebuild_tensor_v3`, whose storage is of bytes."""
    return StridedTensor(storage, offset, shape, strides, dtype.dtype)


def _parameter(data: Any, *rest: Any) -> Any:
    return data


def _tensor_of_type(function: Any, kind: Any, arguments: Any, state: Any) -> Any:
    """A tensor with attributes, or of a class made of `torch.Tensor`."""
    if function in (_tensor, _tensor_of_dtype, _parameter) and isinstance(arguments, tuple):
        return function(*arguments)
    return Unreadable("a tensor of a kind that is not known here")


def _sparse(*arguments: Any) -> Unreadable:
    return Unreadable("a sparse tensor; expected a dense one: `tensor.to_dense()`")


def _quantised(*arguments: Any) -> Unreadable:
    return Unreadable("a quantised tensor; expected one of plain numbers: `tensor.dequantize()`")


def _without_numbers(*arguments: Any) -> Unreadable:
    return Unreadable("a tensor on the device meta, which has a shape and no numbers")


STORAGES = {
    "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64", "Int": "int32",
    "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool", "ComplexDouble": "complex128",
    "ComplexFloat": "complex64", "Untyped": "uint8",
}  # fmt: skip
DTYPES = (
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64",
    "bool", "complex128", "complex64", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz",
)  # fmt: skip
NUMPY: dict[str, Any] = {
    "multiarray._reconstruct": _array,
    "multiarray.scalar": _scalar,
    "numeric._frombuffer": _array_from_buffer,
}
KNOWN: dict[str, Any] = {
    **{f"{core}.{name}": value for core in ("numpy.core", "numpy._core") for name, value in NUMPY.items()},
    "numpy.dtype": _dtype,
    "_codecs.encode": _encode,
    "builtins.bytes": _bytes,
    "builtins.tuple": _tuple,
    "builtins.dict": _dict,
    "collections.OrderedDict": _dict,
    "collections.defaultdict": _dict,
    "torch.Size": _tuple,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_dtype,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _tensor_of_type,
    "torch._utils._rebuild_sparse_tensor": _sparse,
    "torch._utils._rebuild_qtensor": _quantised,
    "torch._utils._rebuild_meta_tensor_no_storage": _without_numbers,
    **{f"torch.{name}Storage": StorageType(dtype) for name, dtype in STORAGES.items()},
    **{f"torch.storage.{name}Storage": StorageType("uint8") for name in ("Untyped", "_Untyped")},
    **{f"torch.{name}": StorageType(name) for name in DTYPES},
}
# Classes and functions of which training programs keep objects next to the weights. Nothing of them is called.
INERT_NAMES = {
    "argparse.Namespace",
    "builtins.bytearray", "builtins.complex", "builtins.float", "builtins.frozenset", "builtins.int", "builtins.list",
    "builtins.object", "builtins.range", "builtins.set", "builtins.slice", "builtins.str",
    "collections.Counter", "collections.deque",
    "copyreg._reconstructor",
    "datetime.date", "datetime.datetime", "datetime.timedelta",
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "mmcv.utils.config.ConfigDict",
    "mmengine.config.config.ConfigDict",
    "mmengine.logging.history_buffer.HistoryBuffer",
    "numpy.ndarray",
    "pathlib.Path", "pathlib.PosixPath", "pathlib.PurePosixPath", "pathlib.PureWindowsPath", "pathlib.WindowsPath",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "torch.Tensor", "torch.device", "torch.nn.parameter.Buffer", "torch.nn.parameter.Parameter",
    "torch.serialization._get_layout",
}  # fmt: skip
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
        Numbers, texts, lists, tuples and OrderedDicts, whose names are texts; and the records of this module. An OrderedDict
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
            f"{path} is damaged, or no whole file of tensors: its pickle does not make sense ({type(error).__name__})."
        ) from None


def _put(target: Any, key: Any, value: Any) -> None:
    """Names are kept: they are all that matters, and their hashes, unlike those of numbers and tuples, cannot be chosen."""
    if isinstance(target, OrderedDict):
        if type(key) is str:
            target[key] = value
    elif target is not INERT:
        raise TypeError(type(target).__name__)


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
            raise CheckpointError(
                f"{self.path} has the pickle operation {name}, which files of tensors do not; it was not done."
            )

    def marked(self) -> list[Any]:
        """What is above the last mark, which goes away with it."""
        found: list[Any] = []
        while (value := self.stack.pop()) is not _MARK:
            found.append(value)
        return found[::-1]

    def named(self, name: str) -> Any:
        module, _, rest = name.partition(" ")
        name = f"{RENAMED.get(module, module)}.{rest}"
        if name in INERT_NAMES:
            return _inert
        if name not in KNOWN:
            shown = name if len(name) < 100 and name.isprintable() else "a name"
            raise CheckpointError(
                f"{self.path} holds more than tensors: it asks for {shown}, which could run code from the file, so it was not "
                "read. If you trust the file, load it with the program that wrote it and save its state_dict alone."
            )
        return KNOWN[name]

    def global_(self, argument: Any) -> None:
        self.stack.append(self.named(argument))

    def stack_global(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if type(name) is not str or type(module) is not str:
            raise TypeError("a name")
        self.stack.append(self.named(f"{module} {name}"))

    def persistent(self, _: Any) -> None:
        reference = self.stack.pop()
        if self.storage is None:
            raise CheckpointError(f"{self.path} is a pickle that refers to data outside of it; expected one with its arrays.")
        self.stack.append(self.storage(reference))

    def call(self, _: Any) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not callable(function) or type(arguments) is not tuple:
            raise TypeError("a call")
        self.stack.append(function(*arguments))

    def new(self, _: Any) -> None:
        _, kind = self.stack.pop(), self.stack.pop()
        if kind is not _inert:
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
        _put(self.stack[-1], key, value)

    def set_items(self, _: Any) -> None:
        values = self.marked()
        for key, value in zip(values[::2], values[1::2], strict=True):
            _put(self.stack[-1], key, value)

    def list_(self, _: Any) -> None:
        self.stack.append(self.marked())

    def dict_(self, _: Any) -> None:
        values = self.marked()
        self.stack.append(_dict(list(zip(values[::2], values[1::2], strict=True))))

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
