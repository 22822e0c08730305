"""What pickles of tensors and arrays may name, and the records that are made of it instead.

A record is what a pickle says of a tensor. Nothing in it is checked, since only those of the weights that are asked for become
tensors: the checks are where they do.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

__all__ = ["INERT", "Array", "DType", "Storage", "StorageType", "StridedTensor", "Unreadable", "inert", "named", "put_item"]

Shape = tuple[int, ...]


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
        self.order = state[1]
        if any(part is not None for part in state[2:5]):  # fields, or an array as an element
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


def put_item(target: Any, key: Any, value: Any) -> None:
    """Names are kept: they are all that matters, and their hashes, unlike those of numbers and tuples, cannot be chosen."""
    if isinstance(target, OrderedDict):
        if type(key) is str:
            target[key] = value
    elif target is not INERT:
        raise TypeError(type(target).__name__)


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
        put_item(found, key, value)
    return found


def _taken(values: list[Any]) -> list[Any]:
    taken, values[:] = values[:], []
    return taken


def inert(*arguments: Any) -> _Inert:
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
    "addict.addict.Dict",
    "argparse.Namespace",
    "builtins.bytearray", "builtins.complex", "builtins.float", "builtins.frozenset", "builtins.int", "builtins.list",
    "builtins.object", "builtins.range", "builtins.set", "builtins.slice", "builtins.str",
    "collections.Counter", "collections.deque",
    "copyreg._reconstructor",
    "datetime.date", "datetime.datetime", "datetime.timedelta",
    "easydict.EasyDict",
    "fvcore.common.config.CfgNode",
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "mmcv.utils.config.ConfigDict",
    "mmengine.config.config.ConfigDict",
    "mmengine.logging.history_buffer.HistoryBuffer",
    "numpy.ndarray",
    "pathlib.Path", "pathlib.PosixPath", "pathlib.PurePosixPath", "pathlib.PureWindowsPath", "pathlib.WindowsPath",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "torch.Tensor", "torch.device", "torch.nn.parameter.Buffer", "torch.nn.parameter.Parameter",
    "torch.serialization._get_layout",
    "yacs.config.CfgNode",
}  # fmt: skip


def named(name: str) -> Any:
    """What stands for a function or a class, or None if it is one that has no business in a file of tensors."""
    return inert if name in INERT_NAMES else KNOWN.get(name)
