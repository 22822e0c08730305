"""What a file is that is not of the kind that was expected, by its first bytes; and the error that says so."""

from __future__ import annotations

__all__ = ["CheckpointError", "looks_like"]

FOREIGN: tuple[tuple[bytes | tuple[bytes, ...], str], ...] = (
    (b"PK\x03\x04", "a zip archive, as torch.save and numpy.savez write"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x93NUMPY", "an array of numpy.save"),
    ((b"\x89PNG", b"\xff\xd8\xff"), "a picture"),
    (b"\x80", "a pickle"),
    (b"{", "JSON, perhaps the net's -symbol.json"),
    (b"version https://git-lfs", "a pointer of Git LFS: fetch the file itself"),
    (b"<", "a web page, perhaps the answer to a download that failed"),
    (b"\x1f\x8b", "a gzip archive: unpack it"),
    # The field 1 of a message, the version of ONNX's format, and the field 2, the name of the program that wrote it.
    (tuple(bytes((8, version, 0x12)) for version in range(3, 32)), "an ONNX model"),
)


class CheckpointError(ValueError):
    """A file that cannot be read as a checkpoint; the text is a sentence that says why, and often what to do.

    Example:
        >>> from deformconv.convert.checkpoint import CheckpointError, load_checkpoint
        >>> try:
        ...     load_checkpoint("not_there.pth")
        ... except CheckpointError as error:
        ...     print(error)
        not_there.pth: there is no such file.
    """


def looks_like(content: bytes) -> str:
    """The end of a sentence about a file that begins so: "; it looks like ...", "; it is empty", or nothing."""
    if not content:
        return "; it is empty"
    return next((f"; it looks like {kind}" for start, kind in FOREIGN if content.startswith(start)), "")
