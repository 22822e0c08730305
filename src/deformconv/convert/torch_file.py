"""Files of `torch.save`: a zip archive of a pickle and storages, or, before PyTorch 1.6, pickles and storages one by one."""

from __future__ import annotations

import os
import struct
import zipfile
from typing import IO, Any, BinaryIO, NamedTuple, cast

from deformconv.convert.foreign import CheckpointError
from deformconv.convert.pickled_names import Storage, StorageType
from deformconv.convert.pickles import Span, read_pickle
from deformconv.convert.tensors import TensorMaker

__all__ = ["LEGACY_MAGIC", "read_legacy", "read_zip"]

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
MOST_DIRECTORY = 8 << 20  # bytes of a zip archive's list of its entries: room for 80,000 of them
LOCAL_HEADER = struct.Struct("<4s5H3I2H")


class _Entry(NamedTuple):
    """Where an entry's header is in the archive, and how many bytes are in it."""

    header: int
    size: int


def read_zip(path: str, file: BinaryIO, size: int) -> tuple[Any, TensorMaker]:
    """What the pickle in a zip archive describes, and what makes its tensors."""
    entries = _entries(path, file)
    pickles = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if not pickles:
        raise CheckpointError(f"{path} is {_archive(entries)}; expected one that torch.save has written.")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in entries:
        raise CheckpointError(
            f"{path} is a program of TorchScript, with code in it; expected a state_dict: "
            "torch.save(torch.jit.load(path).state_dict(), new_path) writes one."
        )

    def span(name: str) -> Span:
        start, length = _place(path, file, size, entries, name)
        return Span(file, start, start + length)

    if f"{root}byteorder" in entries and span(f"{root}byteorder").read(6) != b"little":
        raise CheckpointError(f"{path} was written by a big-endian machine, and is not read; expected little-endian.")
    loaded = read_pickle(span(pickles[0]), path, _storage, size)
    return loaded, TensorMaker(path, file, size, lambda found: _place(path, file, size, entries, f"{root}data/{found.key}"))


def _entries(path: str, file: BinaryIO) -> dict[str, _Entry]:
    """The entries of an archive, all of which are stored as they are."""
    try:
        found = zipfile.ZipFile(cast(IO[bytes], _Limited(path, file))).infolist()
    except CheckpointError:
        raise
    except (zipfile.BadZipFile, EOFError, NotImplementedError, OSError, OverflowError, ValueError, struct.error):
        raise CheckpointError(
            f"{path} is no whole file of torch.save: it begins as a zip archive does, and its end is missing or damaged. Copy "
            "or download it again."
        ) from None
    entries = {entry.filename: _Entry(entry.header_offset, entry.file_size) for entry in found}
    if len(entries) != len(found):
        raise CheckpointError(f"{path} is damaged: its zip archive has an entry twice.")
    packed = [entry.filename for entry in found if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1]
    if packed and any(name.endswith("data.pkl") for name in entries):
        raise CheckpointError(f"{path} has compressed or encrypted entries; torch.save stores them as they are.")
    return entries


class _Limited:
    """A file for `zipfile`, which reads the list of the entries at once, however long that says it is."""

    def __init__(self, path: str, file: BinaryIO) -> None:
        self.path, self.file, self.seek, self.tell = path, file, file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if size > MOST_DIRECTORY:
            raise CheckpointError(f"{self.path} has a zip archive's list of {size} bytes; expected at most {MOST_DIRECTORY}.")
        return self.file.read(size)


def _archive(names: dict[str, Any]) -> str:
    if names and all(name.endswith(".npy") for name in names):
        return "an archive of numpy.savez, which numpy.load(path, allow_pickle=False) reads"
    return "a zip archive without a pickle of tensors"


def _place(path: str, file: BinaryIO, size: int, entries: dict[str, _Entry], name: str) -> tuple[int, int]:
    """Where the bytes of an entry begin, and how many they are."""
    if name not in entries:
        raise CheckpointError(f"{path} is damaged: its pickle asks for the entry {name[-40:]!r}, which is not there.")
    header, length = entries[name]
    file.seek(max(0, header))
    content = file.read(LOCAL_HEADER.size) if header >= 0 else b""
    if len(content) < LOCAL_HEADER.size or not content.startswith(b"PK\x03\x04"):
        raise CheckpointError(f"{path} is damaged: the entry {name[-40:]!r} of its zip archive is not where it should be.")
    *_, name_length, extra_length = LOCAL_HEADER.unpack(content)
    start = header + LOCAL_HEADER.size + name_length + extra_length
    if start + length > size:
        raise CheckpointError(f"{path} is cut off or damaged: the entry {name[-40:]!r} goes on behind the file's end.")
    return start, length


def _storage(reference: Any) -> Storage:
    """The storage that `torch.save` writes as ("storage", its class, key, device, number of elements) and, once, more."""
    kind, storage_type, key, _, count, *view = reference
    sound = kind == "storage" and isinstance(storage_type, StorageType) and type(key) is str and type(count) is int
    if not sound or view not in ([], [None]) or count < 0:
        raise ValueError("a storage")
    return Storage(storage_type.dtype, key, count)


def read_legacy(path: str, file: BinaryIO, size: int) -> tuple[Any, TensorMaker]:
    """What the fourth pickle of a file describes, and what makes its tensors."""
    import torch

    span = Span(file, 0, size)
    magic, version, system = (read_pickle(span, path, None, size) for _ in range(3))
    if magic != LEGACY_MAGIC or version != LEGACY_PROTOCOL or not isinstance(system, dict):
        raise CheckpointError(f"{path} is damaged: it begins as a file of torch.save does, and goes on in another way.")
    if system.get("little_endian") is not True:
        raise CheckpointError(f"{path} was written by a big-endian machine, and is not read; expected little-endian.")
    storages: dict[str, Storage] = {}

    def storage(reference: Any) -> Storage:
        found = _storage(reference)
        storages.setdefault(found.key, found)
        return found

    loaded = read_pickle(span, path, storage, size)
    keys = read_pickle(span, path, None, size)
    places: dict[str, tuple[int, int]] = {}
    for key in keys if isinstance(keys, list) else ():
        if type(key) is not str or key not in storages or key in places:
            raise CheckpointError(f"{path} is damaged: the list of its storages does not fit its tensors.")
        content = file.read(8)
        count = struct.unpack("<q", content)[0] if len(content) == 8 else -1
        length = count * getattr(torch, storages[key].dtype).itemsize
        start = file.tell()
        if count < 0 or start + length > size:
            raise CheckpointError(f"{path} is cut off or damaged: a storage goes on behind the file's end. Copy it again.")
        places[key] = start, length
        file.seek(length, os.SEEK_CUR)
    if storages.keys() != places.keys():
        raise CheckpointError(f"{path} is cut off or damaged: the list of its storages does not fit its tensors.")
    return loaded, TensorMaker(path, file, size, lambda found: places[found.key])
