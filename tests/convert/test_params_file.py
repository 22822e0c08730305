"""MXNet's .params files: what MXNet wrote is read, what it did not write is refused with a sentence that helps."""

from __future__ import annotations

import doctest
import struct
from pathlib import Path

import numpy as np
import pytest
from tests.convert.files import written

import deformconv
from deformconv.convert import params_file, read_params, write_params

DATA = Path(__file__).parent / "data"
FILES = sorted(DATA.glob("*.params"))


def test_doctests(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(params_file)
    assert result.failed == 0 and result.attempted >= 4


def test_there_are_files():
    assert len(FILES) == 9


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_what_mxnet_wrote_is_read_and_written_again_byte_for_byte(file, tmp_path):
    arrays = read_params(file)
    assert all(array.dtype == np.float32 and np.isfinite(array).all() and array.flags.writeable for array in arrays.values())
    write_params(tmp_path / "again.params", arrays)
    assert (tmp_path / "again.params").read_bytes() == file.read_bytes()


def test_known_numbers():
    arrays = read_params(str(DATA / "v1.params"))
    assert list(arrays) == ["offset_weight", "offset_bias", "deformable_conv_weight", "deformable_conv_bias"]
    rng = np.random.default_rng(0)  # the script's
    rng.standard_normal((2, 4, 7, 8))
    assert (arrays["offset_weight"] == (0.3 * rng.standard_normal((18, 4, 3, 3))).astype("float32")).all()


@pytest.mark.parametrize("version", [0, 1, 2, 3])
def test_every_version(version, tmp_path):
    arrays = {"arg:w": np.arange(6, dtype="float32").reshape(2, 3), "aux:ü": np.array([1.5, -2], "float64")}
    (tmp_path / "old.params").write_bytes(written(arrays, version))
    found = read_params(tmp_path / "old.params")
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype and found[name].tobytes() == array.tobytes()


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "uint8", "int8", "int32", "int64", "bool"])
def test_every_type(dtype, tmp_path):
    array = np.array([[0, 1, 1], [1, 0, 1]], dtype)
    write_params(tmp_path / "a.params", {"a": array, "b": array[:, ::2]})
    found = read_params(tmp_path / "a.params")
    assert found["a"].dtype == array.dtype and (found["a"] == array).all() and (found["b"] == array[:, ::2]).all()


def test_bfloat16_becomes_float32(tmp_path):
    content = written({"w": np.array([1, 2], "uint8")}, 2)
    content = content.replace(struct.pack("<iii", 1, 0, 3) + b"\1\2", struct.pack("<iiiHH", 1, 0, 12, 0x3F80, 0xC000))
    (tmp_path / "b.params").write_bytes(content)
    assert read_params(tmp_path / "b.params")["w"].tolist() == [1.0, -2.0]


def test_a_scalar_and_an_empty_array_of_the_numpy_like_api(tmp_path):
    arrays = {"scalar": np.array(3.0, "float32"), "empty": np.zeros((2, 0, 3), "float32")}
    (tmp_path / "np.params").write_bytes(written(arrays, 3))
    found = read_params(tmp_path / "np.params")
    assert found["scalar"] == 3 and found["scalar"].shape == () and found["empty"].shape == (2, 0, 3)


def test_no_array_at_all(tmp_path):
    write_params(tmp_path / "none.params", {})
    assert read_params(tmp_path / "none.params") == {}


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "the number 0x112; it is empty."),
        (b"PK\x03\x04" + b"x" * 20, "it looks like a zip archive, as torch.save and numpy.savez write."),
        (b"\x89HDF\r\n\x1a\n", "it looks like an HDF5 file."),
        (b"\x93NUMPY\x01\x00", "it looks like an array of numpy.save."),
        (b"\x80\x02}q\x00." * 3, "it looks like a pickle."),
        (b'{"nodes": []}', "it looks like JSON, perhaps the net's -symbol.json."),
        (b"version https://git-lfs.github.com/spec/v1\n", "it looks like a pointer of Git LFS: fetch the file itself."),
        (b"<!DOCTYPE html>", "it looks like a web page, perhaps the answer to a download that failed."),
        (b"\x1f\x8b\x08\x00\x00\x00\x00\x00", "it looks like a gzip archive: unpack it."),
        (b"abcdefghij", "expected a .params file of MXNet, whose first 8 bytes are the number 0x112."),
    ],
    ids=lambda value: str(value)[:12],
)
def test_another_kind_of_file(content, message, tmp_path):
    path = tmp_path / "x.params"
    path.write_bytes(content)
    with pytest.raises(ValueError) as raised:
        read_params(path)
    assert str(raised.value).startswith(f"{path}: expected a .params file") and str(raised.value).endswith(message)


def test_a_file_that_is_cut_off_anywhere(tmp_path):
    content = (DATA / "v1_groups.params").read_bytes()
    path = tmp_path / "cut.params"
    for end in [*range(9, 80), *range(80, len(content), 37), len(content) - 1]:
        path.write_bytes(content[:end])
        with pytest.raises(ValueError, match=f"cut off: it ends after {end} bytes, in .* more. Copy or download it again"):
            read_params(path)
    path.write_bytes(content[:100])
    with pytest.raises(ValueError, match=r"in array 1 of 2, which takes 1276 more"):
        read_params(path)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c + b"\0", "damaged: it has 1 more bytes after the last name."),
        (lambda c: c[:8] + struct.pack("<Q", 5) + c[16:], "damaged: it has 5 in the reserved bytes; expected 0."),
        (lambda c: c[:16] + struct.pack("<Q", 1 << 60) + c[24:], f"damaged: it has {1 << 60} arrays, more than its"),
        (lambda c: c[:28] + struct.pack("<i", 7) + c[32:], "it has 7 as the kind of storage in array 1 of 2; expected 0"),
        (lambda c: c[:28] + struct.pack("<i", 1) + c[32:], "array 1 of 2 is stored as row_sparse; expected a dense one: load"),
        (lambda c: c[:28] + struct.pack("<i", 2) + c[32:], "array 1 of 2 is stored as csr; expected a dense one: load"),
        (lambda c: c[:32] + struct.pack("<i", 99) + c[36:], "it has 99 axes in array 1 of 2; expected at most 32."),
        (lambda c: c[:32] + struct.pack("<i", 0) + c[36:], "array 1 of 2 has no shape: it was saved before it was initi"),
        (lambda c: c[:36] + struct.pack("<q", -2) + c[44:], "it has the shape (-2, 3) in array 1 of 2; expected sizes"),
        (lambda c: c[:36] + struct.pack("<q", 1 << 50) + c[44:], "cut off: it ends after"),
        (lambda c: c[:52] + struct.pack("<i", 9) + c[56:], "it has 9 as the kind of device in array 1 of 2; expected one of"),
        (lambda c: c[:60] + struct.pack("<i", 8) + c[64:], "it has 8 as the type of array 1 of 2; expected 0 to 7 or 12."),
        (lambda c: c.replace(b"two", b"\xff\xfe!"), "damaged: name 2 of 2 is no text."),
        (lambda c: c.replace(b"two", b"one"), "damaged: it has a name twice."),
        (lambda c: c[: -8 - 2 * 11] + bytes(8), "its arrays have no names: it was saved from a list; expected"),
        (lambda c: c[: -8 - 2 * 11] + struct.pack("<Q", 3) + c[-22:], "damaged: it has 3 names for 2 arrays."),
        (lambda c: c[:24] + struct.pack("<I", 0xF993FACB) + c[28:], "axes in array 1 of 2; expected at most 32."),
    ],
)
def test_a_damaged_file(change, message, tmp_path):
    content = written({"one": np.zeros((2, 3), "float32"), "two": np.ones(4, "float32")}, 2)
    path = tmp_path / "x.params"
    path.write_bytes(change(content))
    with pytest.raises(ValueError) as raised:
        read_params(path)
    assert message in str(raised.value) and str(raised.value).startswith(f"{path}: ")


def test_damaged_bytes_never_end_otherwise(tmp_path):
    """Any byte may be wrong: the file is read or refused, and nothing else happens."""
    content = written({"one": np.zeros((2, 3), "float32"), "two": np.ones(4, "float32")}, 2)
    path = tmp_path / "x.params"
    for place in range(len(content)):
        for value in (0, 1, 0x7F, 0xFF):
            path.write_bytes(content[:place] + bytes([value]) + content[place + 1 :])
            try:
                read_params(path)
            except ValueError as error:
                assert str(error).startswith(f"{path}: ")


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_params(tmp_path / "none.params")


def test_what_cannot_be_written(tmp_path):
    for array in (np.array(1.0), np.zeros((2, 0))):
        with pytest.raises(deformconv.ShapeError, match=r"'w' has shape .*; a \.params file takes 1 to 32 axes of at least 1"):
            write_params(tmp_path / "w.params", {"w": array})
    with pytest.raises(TypeError, match=r"'w' is complex128; a \.params file takes float32, float64, float16"):
        write_params(tmp_path / "w.params", {"w": np.ones(2, complex)})
    assert not (tmp_path / "w.params").exists()
