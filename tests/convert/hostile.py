"""Files that would run code, or fill the memory, in a reader that believes them."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections.abc import Iterator

import numpy as np

STATE = pickle.dumps({"state_dict": {"w": np.arange(6, dtype="float32")}}, 2)[2:-1]  # without its head and its end
LEGACY_HEAD = b"".join(
    pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True})
)


def zipped(content: bytes, **entries: bytes) -> bytes:
    """A file of torch.save with this pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3\n")
        for name, entry in entries.items():
            archive.writestr(f"archive/data/{name.removeprefix('_')}", entry)
    return file.getvalue()


def legacy(content: bytes, **storages: bytes) -> bytes:
    """A file of torch.save of before PyTorch 1.6 with this pickle, and storages of float32."""
    keys = pickle.dumps([name.removeprefix("_") for name in storages], 2)
    return LEGACY_HEAD + content + keys + b"".join(struct.pack("<q", len(each) // 4) + each for each in storages.values())


CONTAINERS = {"zip": zipped, "legacy": legacy, "pickle": bytes}


def named(name: str) -> bytes:
    return b"c" + name.replace(" ", "\n").encode() + b"\n"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def called(name: str, *arguments: bytes) -> bytes:
    return named(name) + b"(" + b"".join(arguments) + b"tR"


def beside(value: bytes) -> bytes:
    """A pickle of weights with one more value in it."""
    return b"\x80\x04" + STATE + text("meta") + value + b"s."


def instead(value: bytes) -> bytes:
    """A pickle of one weight, which is this value."""
    return b"\x80\x04}" + text("state_dict") + b"}" + text("w") + value + b"ss."


def that_run(marker: str) -> dict[str, bytes]:
    """Pickles that create a file, or call `os.system`, in Python's own reader or where a table of names is too kind."""
    shell, python = text(f"touch {marker}"), text(f"open({marker!r}, 'w').close()")
    inner = pickle.dumps(None, 2)[:-1] + b"0" + called("os system", shell) + b"."
    values = {
        "os.system": called("os system", shell),
        "posix.system": called("posix system", shell),
        "stack_global": text("os") + text("system") + b"\x93" + shell + b"\x85R",
        "stack_global of the memo": text("os") + b"q\x050h\x05" + text("system") + b"\x93" + shell + b"\x85R",
        "eval": called("builtins eval", python),
        "exec": called("builtins exec", python),
        "eval of Python 2": called("__builtin__ eval", python),
        "getattr": called("builtins getattr", named("builtins __import__"), text("__call__")),
        "import": called("builtins __import__", text("os")),
        "Popen": called("subprocess Popen", b"]" + text("touch") + b"a" + text(marker) + b"a"),
        "pathlib's touch": called("pathlib Path.touch", called("pathlib Path", text(marker))),
        "nested pickle": called("pickle loads", b"B" + struct.pack("<I", len(inner)) + inner),
        "numpy.load": called("numpy load", text(marker), b"N\x88"),
        "numpy's runner": called("numpy.testing._private.utils runstring", python, b"}"),
        "torch.load": called("torch load", text(marker)),
        "torch.hub": called("torch.hub load", text(marker), text("net")),
        "torch's shell": called("torch.utils.collect_env run", shell),
        "compiled": called("torch._inductor.codecache compile_file", text(marker), text(marker), b"]"),
        "name with points": called("torch storage.os.system", shell),
        "partial": called("functools partial", named("os system"), shell),
        "map": called("builtins list", called("builtins map", named("os system"), b"]" + shell + b"a")),
        "inst": b"(" + shell + b"ios\nsystem\n",
        "obj": b"(" + named("os system") + shell + b"o",
        "newobj": named("os system") + shell + b"\x85\x81",
        "newobj_ex": named("os system") + shell + b"\x85}\x92",
        "extension 1": b"\x82\x01",
        "extension 2": b"\x83\x01\x00",
        "extension 4": b"\x84\x01\x00\x00\x00",
        "persistent text": b"Pos.system\n",
        "out of band": b"\x97",
        "copyreg": called("copyreg __newobj__", named("os system"), shell),
        "array of objects": called(
            "numpy.core.multiarray scalar", called("numpy dtype", text("O8")), called("os system", shell)
        ),
        "tensor of a type": called(
            "torch._tensor _rebuild_from_type_v2", named("os system"), named("torch Tensor"), shell + b"\x85}"
        ),
    }
    return {name: beside(value) for name, value in values.items()}


def array(shape: bytes, content: bytes, code: str = "f4", order: str = "<") -> bytes:
    """NumPy's pickle of an array, with any shape, type and bytes."""
    blank = called("numpy.core.multiarray _reconstruct", named("numpy ndarray"), b"K\x00\x85", b"C\x01b")
    dtype = (
        called("numpy dtype", text(code), b"\x89\x88") + b"(K\x03" + text(order) + b"NNN" + number(-1) + number(-1) + b"K\x00tb"
    )
    return blank + b"(K\x01" + shape + dtype + b"\x89" + b"B" + struct.pack("<I", len(content)) + content + b"tb"


def tensor(offset: int, shape: tuple[int, ...], strides: tuple[int, ...], elements: int = 2) -> bytes:
    """torch.save's pickle of a tensor of the storage "0"."""
    kind = named("torch FloatStorage")
    storage = b"(" + text("storage") + kind + text("0") + text("cpu") + number(elements) + b"tQ"
    sizes = b"".join(b"(" + b"".join(map(number, values)) + b"t" for values in (shape, strides))
    return called("torch._utils _rebuild_tensor_v2", storage, number(offset), sizes, b"\x89", called("collections OrderedDict"))


def bombs() -> Iterator[tuple[str, bytes]]:
    """Small files that take gigabytes, overflow a stack or never end in some reader."""
    far, blank = number(2**40), called("numpy.core.multiarray _reconstruct")
    values = {
        "bytearray of a length": called("builtins bytearray", far),
        "bytes of a length": called("builtins bytes", far),
        "range": called("builtins list", called("builtins range", far)),
        "numpy's blank": called("numpy.core.multiarray _reconstruct", named("numpy ndarray"), far + b"\x85", b"C\x01b"),
        "numpy's object": called("numpy ndarray", far + b"\x85"),
        "place in the memo": b"Nr" + struct.pack("<I", 2**32 - 1),
        "place in the memo, as text": b"Np99999999999999999999\n",
        "bytes": b"B" + struct.pack("<I", 2**32 - 1),
        "long bytes": b"\x8e" + struct.pack("<Q", 2**60),
        "long text": b"\x8d" + struct.pack("<Q", 2**60),
        "long bytearray": b"\x96" + struct.pack("<Q", 2**40),
        "frame": b"\x95" + struct.pack("<Q", 2**60) + b"N",
        "number": b"\x8b" + struct.pack("<i", 2**31 - 1),
        "digits": b"I" + b"9" * 100_000 + b"\n",
        "deep tuple": b")" + b"\x85" * 50_000,
        "deep list": b"]" * 30_000 + b"a" * 29_999,
        "deep dict": b"}" + (text("a") + b"}") * 20_000 + b"s" * 20_000,
        "deep array": blank + (b"(K\x01NNN" + blank) * 8_000 + b"tb" * 8_000,
        "deep key": b"})" + b"\x85" * 50_000 + b"Ns",
        "doubling key": b"})" + b"q\x01h\x01\x86" * 60 + b"Ns",
        "doubling member": b"\x8f()" + b"q\x01h\x01\x86" * 60 + b"\x90",
        "doubling list": b"]q\x010" + b"]h\x01ah\x01aq\x010" * 60 + b"h\x01",
        "a list copied again and again": b"](" + b"K\x01" * 40_000 + b"eq\x010("
        + (named("builtins tuple") + b"h\x01\x85R") * 5_000 + b"l",
        "a text copied again and again": text("x" * 500_000) + b"q\x010("
        + (named("_codecs encode") + b"h\x01" + text("latin1") + b"\x86R") * 2_000 + b"l",
        "arguments copied again and again": b"(" + b"K\x01" * 40_000 + b"tq\x010("
        + (named("argparse Namespace") + b"h\x01R") * 5_000 + b"l",
        "numbers with one hash": b"}(" + b"".join(number((2**61 - 1) * k) + b"N" for k in range(1, 30_000)) + b"u",
        "a million dicts": b"}" * 1_000_000,
    }  # fmt: skip
    for name, value in values.items():
        for container, wrapped in CONTAINERS.items():
            if len(value) < 20_000 or container == "pickle":
                yield f"{name}, {container}", wrapped(beside(value))
    arrays = {
        "shape": array(far + b"\x85", b"1234"),
        "negative shape": array(number(-4) + number(-1) + b"\x86", b"1234567890123456"),
        "empty side": array(b"K\x00" + number(2**62) + number(2**62) + b"\x87", b""),
        "many axes": array(b"(" + b"K\x01" * 100_000 + b"t", b"1234"),
        "too few bytes": array(b"K\x02\x85", b"1234"),
        "wide element": array(b"K\x01\x85", b"1234", code="V1099511627776"),
        "objects": array(b"K\x01\x85", b"12345678", code="O8", order="|"),
        "wide text": array(b"K\x00\x85", b"", code="U536870911"),
        "one array a thousand times": array(number(50_000) + b"\x85", bytes(200_000)) + b"q\x01"
        + b"".join(b"s" + text(f"w{k}") + b"h\x01" for k in range(1000)),
    }  # fmt: skip
    for name, value in arrays.items():
        yield f"array: {name}", instead(value)
    eight = struct.pack("<2f", 1, 2)
    tensors = {
        "expanded": tensor(0, (2**40,), (0,)),
        "behind its storage": tensor(0, (3,), (1,)),
        "far behind its storage": tensor(0, (2**40,), (1,)),
        "offset": tensor(2, (1,), (1,)),
        "negative offset": tensor(-1, (1,), (1,)),
        "negative stride": tensor(1, (2,), (-1,)),
        "wide stride": tensor(0, (2,), (2**40,)),
        "overflow": tensor(0, (2**32, 2**32, 2**32), (2**32, 2**32, 2**32)),
        "empty side": tensor(0, (0, 2**62, 2**62), (1, 1, 1)),
        "one stride": tensor(0, (1,), ()),
        "storage": tensor(0, (2**40,), (1,), elements=2**40),
        "negative storage": tensor(0, (1,), (1,), elements=-1),
        "one tensor a million times": tensor(0, (2**19,), (0,)) + b"q\x01"
        + b"".join(b"s" + text(f"w{k}") + b"h\x01" for k in range(2000)),
    }  # fmt: skip
    for name, value in tensors.items():
        yield f"tensor: {name}, zip", zipped(instead(value), _0=eight)
        yield f"tensor: {name}, legacy", legacy(instead(value), _0=eight)
    yield "legacy: storage", legacy(instead(tensor(0, (2,), (1,))), _0=eight)[:-16] + struct.pack("<q", 2**40) + eight
    yield from archives()
    yield from safetensors()


def archives() -> Iterator[tuple[str, bytes]]:
    good = zipped(instead(tensor(0, (2,), (1,))), _0=struct.pack("<2f", 1, 2))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", beside(b"N" + b"0N" * 2_000_000), compresslevel=1)
    yield "zip: deflated", file.getvalue()
    directory = good.index(b"PK\x01\x02")
    where = good.index(b"archive/data/0", directory) - 46
    size = struct.pack("<2I", 2**31, 2**31)
    yield "zip: long entry", good[: where + 20] + size + good[where + 28 :]
    end = good.index(b"PK\x05\x06")
    start = good[: end + 12] + struct.pack("<2I", 2**31, 0) + good[end + 20 :]
    yield "zip: long list", start
    entries = good[directory:end]
    count = (9 << 20) // len(entries)
    lengths = struct.pack("<2H2I", 9, 9, count * len(entries), directory)
    yield "zip: many entries", good[:directory] + entries * count + good[end : end + 8] + lengths + good[end + 20 :]
    yield "zip: entries before the file", good[: end + 16] + struct.pack("<I", directory + 1000) + good[end + 20 :]
    yield "zip: an entry twice", _twice(good, directory, end)


def _twice(good: bytes, directory: int, end: int) -> bytes:
    entries = good[directory:end] * 2
    counts = struct.pack("<2H2I", 6, 6, len(entries), directory)
    return good[:directory] + entries + good[end : end + 8] + counts + good[end + 20 :]


def safetensors() -> Iterator[tuple[str, bytes]]:
    def file(header: str, content: bytes = bytes(8), length: int | None = None) -> bytes:
        return struct.pack("<Q", len(header) if length is None else length) + header.encode() + content

    one = '{{"w":{{"dtype":"F32","shape":[{shape}],"data_offsets":[{begin},{end}]}}}}'
    yield "safetensors: long header", file('{"w":1}', length=2**60)
    yield "safetensors: no JSON", file('{"w":')
    yield "safetensors: shape", file(one.format(shape=2**40, begin=0, end=8))
    yield "safetensors: overflow", file(one.format(shape=f"{2**32},{2**32}", begin=0, end=8))
    yield "safetensors: offsets", file(one.format(shape=2**38, begin=0, end=2**40))
    two = '{"v":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    yield "safetensors: two in one place", file(two)
