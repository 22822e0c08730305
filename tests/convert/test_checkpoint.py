"""Checkpoints: each library's files are read as they are, other files are explained, and a hostile file does nothing."""

from __future__ import annotations

import argparse
import contextlib
import doctest
import io
import os
import pickle
import random
import struct
import subprocess
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tests.convert import hostile  # noqa: E402
from tests.convert.files import written  # noqa: E402
from torch import nn  # noqa: E402

from deformconv.convert import checkpoint, foreign, pickled_names  # noqa: E402
from deformconv.convert.checkpoint import CheckpointError, load_checkpoint  # noqa: E402

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))


def same(found, expected):
    assert isinstance(found, OrderedDict) and list(found) == list(expected)
    for name, tensor in expected.items():
        tensor = torch.as_tensor(tensor)
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert found[name].tolist() == tensor.tolist(), name


def test_doctests():
    for module in (checkpoint, foreign):
        result = doctest.testmod(module)
        assert result.failed == 0 and result.attempted


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("new", [True, False])
def test_a_state_dict_of_torch_save(new, protocol):
    state = net().state_dict()
    torch.save(state, "a.bin", _use_new_zipfile_serialization=new, pickle_protocol=protocol)
    found = load_checkpoint("a.bin")
    same(found, state)
    assert found._metadata == state._metadata
    net().load_state_dict(found)


class HistoryBuffer:
    """In mmengine's layout."""

    def __init__(self):
        self.max_length = 1_000_000
        self._log_history, self._count_history = np.array([0.5, 0.25]), np.array([1, 1])
        self.statistics_methods = {"min": HistoryBuffer.min, "mean": HistoryBuffer.mean}

    def min(self):
        raise AssertionError

    def mean(self):
        raise AssertionError


def mmengine(monkeypatch, protocol=2):
    """What a runner of mmengine saves, with objects of a class of that module."""
    module = types.ModuleType("mmengine.logging.history_buffer")
    module.HistoryBuffer = HistoryBuffer
    for owner in (HistoryBuffer, HistoryBuffer.min, HistoryBuffer.mean):
        monkeypatch.setattr(owner, "__module__", module.__name__)
    for name in ("mmengine", "mmengine.logging", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    meta = {
        "epoch": 12,
        "cfg": "model = dict()",
        "seed": np.int64(3),
        "loss": np.float32(2),
        "dataset_meta": {"CLASSES": ("a",)},
    }
    scalars = OrderedDict({"train/loss": HistoryBuffer()})
    hub = {"log_scalars": scalars, "runtime_info": OrderedDict(lr=np.array([0.1])), "resumed_keys": OrderedDict(a=True)}
    state = net().state_dict()
    optimizer = {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 0.02, "params": [0]}]}
    saved = {"meta": meta, "state_dict": state, "message_hub": hub, "optimizer": optimizer}
    torch.save(saved | {"param_schedulers": [{"last_step": 12, "gammas": {1, 2}}]}, "epoch_12.pth", pickle_protocol=protocol)
    for name in ("mmengine", "mmengine.logging", module.__name__):
        monkeypatch.delitem(sys.modules, name)
    return state


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_file_of_mmengine(monkeypatch, protocol):
    state = mmengine(monkeypatch, protocol)
    found = load_checkpoint("epoch_12.pth")
    same(found, state)
    assert found._metadata == state._metadata and "mmengine" not in sys.modules


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda state: {
            "model": state,
            "iteration": 90,
            "optimizer": {"state": {0: {"step": 1}}, "param_groups": [{"lr": 0.1}]},
        },
        lambda state: {"model": state, "args": argparse.Namespace(lr=1e-4, device=torch.device("cpu"), path=Path("out"))},
        lambda state: {"epoch": 3, "state_dict": state, "pytorch-lightning_version": "2.0", "callbacks": {}, "loops": [None]},
        lambda state: {"params": state},
        lambda state: {"params_ema": state},
        lambda state: {"params_ema": {"other": torch.ones(1)}, "params": state},
        lambda state: {"state_dict_ema": {"other": torch.ones(1)}, "state_dict": state},
        lambda state: {"kind": "v2", "state": state},
        lambda state: {"state_dict": {"model": state}},
        lambda state: {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}},
        lambda state: {"ema_state_dict": {"steps": torch.tensor(3)} | {f"module.{name}": t for name, t in state.items()}},
        lambda state: {"state_dict": {}, "model": state},
    ],
)
def test_what_training_programs_wrap_around_a_state_dict(wrapped):
    torch.save(wrapped(net().state_dict()), "a.pth")
    same(load_checkpoint("a.pth"), net().state_dict())


def test_a_wrapper_by_its_name():
    torch.save(
        {"params": {"a": torch.ones(1)}, "params_ema": {"b": torch.ones(2)}, "g": {"state_dict": {"c": torch.ones(3)}}}, "a"
    )
    assert [list(load_checkpoint("a", key=key)) for key in (None, "params_ema", "g")] == [["a"], ["b"], ["c"]]
    with pytest.raises(CheckpointError, match="a has no weights under 'd'; it has dicts under 'params', 'params_ema', 'g'"):
        load_checkpoint("a", key="d")
    torch.save({"generator": {"a": torch.ones(1)}, "discriminator": {"b": torch.ones(2)}}, "b")
    with pytest.raises(
        CheckpointError, match="no state_dict at its top; it has dicts under 'generator', 'discriminator'; `key`"
    ):
        load_checkpoint("b")
    assert list(load_checkpoint("b", key="discriminator")) == ["b"]


def test_the_prefix_of_data_parallel_goes_from_names_and_metadata():
    state = nn.DataParallel(net()).state_dict()
    torch.save(state, "a.pth")
    found = load_checkpoint("a.pth")
    same(found, net().state_dict())
    assert found._metadata == net().state_dict()._metadata
    torch.save({"module.a": torch.ones(1), "b": torch.ones(1)}, "b.pth")
    assert list(load_checkpoint("b.pth")) == ["module.a", "b"]


def test_the_counter_of_a_moving_average_goes_with_its_prefix():
    averaged = torch.optim.swa_utils.AveragedModel(net())
    averaged.update_parameters(net())
    torch.save(averaged.state_dict(), "a.pth")
    found = load_checkpoint("a.pth")
    same(found, averaged.module.state_dict())
    assert found._metadata == net().state_dict()._metadata
    torch.save({"steps": torch.ones(1), "a": torch.ones(1)}, "b.pth")
    assert list(load_checkpoint("b.pth")) == ["steps", "a"]


def test_of_metadata_the_numbers_and_texts_are_kept():
    state = net().state_dict()
    state._metadata["0"].update(mask_scale=2.0, kind="sigmoid", none=None, list=[1], tensor=torch.ones(1))
    state._metadata["1"] = {str(k): k for k in range(1000)}
    torch.save(state, "a.pth")
    found = load_checkpoint("a.pth")._metadata
    assert found == {"": {"version": 1}, "0": {"version": 1, "mask_scale": 2.0, "kind": "sigmoid", "none": None}}


DTYPES = (
    "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool uint16 uint32 uint64 complex64 complex128 float8_e5m2"
)


@pytest.mark.parametrize("new", [True, False])
def test_every_dtype_of_torch(new):
    state = {name: torch.tensor([[1, 0, 3]]).to(getattr(torch, name)) for name in DTYPES.split()}
    state |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(2, 0, 3), "parameter": nn.Parameter(torch.ones(2))}
    torch.save(state, "a.pth", _use_new_zipfile_serialization=new)
    found = load_checkpoint("a.pth")
    assert {name: (t.dtype, t.shape, t.tolist()) for name, t in found.items() if "float8" not in name} == {
        name: (t.dtype, t.shape, t.tolist()) for name, t in state.items() if "float8" not in name
    }
    assert found["float8_e5m2"].float().tolist() == [[1, 0, 3]] and not found["parameter"].requires_grad


@pytest.mark.parametrize("new", [True, False])
def test_tensors_are_contiguous_and_have_memory_of_their_own(new):
    base = torch.arange(60.0).reshape(3, 4, 5)
    state = {"a": base, "b": base, "row": base[1], "column": base[:, 1:3, ::2], "turned": base.permute(2, 0, 1)}
    state |= {"wide": torch.ones(1).expand(7, 3), "last": torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last)}
    torch.save(state, "a.pth", _use_new_zipfile_serialization=new)
    found = load_checkpoint("a.pth")
    same(found, state)
    for name, tensor in found.items():
        assert tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * 4, name
        tensor.zero_()
    assert len({tensor.data_ptr() for tensor in found.values()}) == len(found)


def test_a_tensor_with_attributes():
    tensor = torch.arange(3.0)
    tensor.note = "mine"
    torch.save({"a": tensor}, "a.pth")
    same(load_checkpoint("a.pth"), {"a": torch.arange(3.0)})


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_file_of_detectron2s_zoo(protocol):
    arrays = {"w": np.float32([[1, 2], [3, 4]]), "f": np.asfortranarray(np.arange(6.0).reshape(2, 3)), "n": np.array(7)}
    arrays |= {"big": np.arange(3, dtype=">f4"), "half": np.ones(2, "f2"), "flag": np.array([True, False])}
    arrays |= {"none": np.ones((2, 0), "f4"), "u": np.uint16([1, 2]), "scalar": np.float32(1.5), "strided": np.arange(9)[::2]}
    Path("a.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "us", "matching_heuristics": True}, protocol))
    found = load_checkpoint("a.pkl")
    same(
        found, {name: np.ascontiguousarray(a).astype(a.dtype.newbyteorder("=")).reshape(a.shape) for name, a in arrays.items()}
    )
    found["w"].zero_()
    assert not hasattr(found, "_metadata")


def test_names_of_numpy_before_and_after_its_version_2():
    for module in ("numpy.core", "numpy._core"):
        content = hostile.instead(hostile.array(b"K\x01\x85", struct.pack("<f", 3))).replace(b"numpy.core", module.encode())
        Path("a.pkl").write_bytes(content)
        same(load_checkpoint("a.pkl"), {"w": torch.tensor([3.0])})


def test_a_file_of_caffe2_that_python_2_wrote():
    """Its texts and its bytes are of one type."""

    def old(value):
        return b"U" + bytes([len(value)]) + value

    content = np.float32([1.5, -2]).tobytes()
    blank = hostile.called("numpy.core.multiarray _reconstruct", hostile.named("numpy ndarray"), b"K\x00\x85", old(b"b"))
    dtype = hostile.called("numpy dtype", old(b"f4"), b"K\x00", b"K\x01") + b"(K\x03" + old(b"<") + b"NNN"
    dtype += hostile.number(-1) * 2 + b"K\x00tb"
    array = blank + b"(K\x01K\x02\x85" + dtype + b"\x89T" + struct.pack("<I", len(content)) + content + b"tb"
    Path("a.pkl").write_bytes(b"\x80\x02}" + old(b"blobs") + b"}" + old(b"conv1_w") + array + b"ss.")
    same(load_checkpoint("a.pkl"), {"conv1_w": torch.tensor([1.5, -2])})


class PaddleTensor:
    """It is pickled as Paddle pickles its own: a call of `tuple` with a name and an array."""

    def __init__(self, name, array):
        self.parts = (name, array)

    def __reduce__(self):
        return tuple, (self.parts,)


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_a_file_of_paddle(protocol):
    half = np.float32([1, -2, 3.5]).view(np.uint32) >> 16
    state = {"conv.weight": np.ones((2, 3), "f4"), "half": half.astype(np.uint16)}
    named = {**state, "StructuredToParameterName@@": {"conv.weight": "conv2d_0.w_0", "half": "b_0"}}
    tuples = {"model": {name: PaddleTensor("linear_0.w_0", array) for name, array in state.items()}}
    for saved in (named, tuples):
        Path("a.pdparams").write_bytes(pickle.dumps(saved, protocol))
        expected = {"conv.weight": torch.ones(2, 3), "half": torch.tensor([1, -2, 3.5]).bfloat16()}
        same(load_checkpoint("a.pdparams"), expected)
    Path("a.pdparams").write_bytes(pickle.dumps({**named, "UnpackBigParamInfor@@": {}}, protocol))
    with pytest.raises(CheckpointError, match=r"tensors in slices.*paddle\.save\(state, path, protocol=4\)"):
        load_checkpoint("a.pdparams")


def test_a_file_of_safetensors():
    writer = pytest.importorskip("safetensors.torch")
    state = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(2, dtype=torch.bfloat16)}
    writer.save_file(state, "a.bin", {"format": "pt"})
    found = load_checkpoint("a.bin")
    same(found, state)
    assert [tensor.untyped_storage().nbytes() for tensor in found.values()] == [24, 4]
    found["b"].zero_()
    same(load_checkpoint("a.bin"), state)
    with pytest.raises(CheckpointError, match=r"a\.bin has no 'model': files of its kind hold tensors alone"):
        load_checkpoint("a.bin", key="model")


def test_a_file_of_mxnet():
    state = {"arg:w": np.arange(6, dtype="f4").reshape(2, 3), "aux:m": np.ones(2, "f4")}
    Path("a.params").write_bytes(written(state, 2))
    same(load_checkpoint("a.params"), state)
    Path("a.params").write_bytes(written(state, 2)[:-5])
    with pytest.raises(CheckpointError, match=r"a\.params: cut off: it ends after"):
        load_checkpoint(Path("a.params"))


def test_files_without_a_tensor():
    writer = pytest.importorskip("safetensors.torch")
    writer.save_file({}, "a.safetensors")
    Path("a.params").write_bytes(written({}, 2))
    for path in ("a.safetensors", "a.params"):
        with pytest.raises(CheckpointError, match=rf"{path} holds no tensors; expected a state_dict: names and tensors\."):
            load_checkpoint(path)


@pytest.mark.parametrize("package", ["torch", "safetensors"])
def test_what_is_not_installed(package, monkeypatch):
    Path("a.safetensors").write_bytes(dict(hostile.safetensors())["safetensors: no JSON"])
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ModuleNotFoundError, match=f"load_checkpoint.* needs {package}, which is not installed: pip install {package}"
    ):
        load_checkpoint("a.safetensors")


LIKE = "expected a file of torch.save, a pickle of arrays (.pkl, .pdparams), safetensors or MXNet's .params"


def npz():
    file = io.BytesIO()
    np.savez(file, a=np.ones(2))
    return file.getvalue()


def zipped(*names):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, b"big" if "byteorder" in name else b"")
    return file.getvalue()


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", f"{LIKE}; it is empty."),
        (b"\x89HDF\r\n\x1a\n", f"{LIKE}; it looks like an HDF5 file."),
        (b"version https://git-lfs.github.com/spec/v1\n", "; it looks like a pointer of Git LFS: fetch the file itself."),
        (b"<!DOCTYPE html>", "; it looks like a web page, perhaps the answer to a download that failed."),
        (b"\x1f\x8b\x08\x00\x00\x00\x00\x00", "; it looks like a gzip archive: unpack it."),
        (b"\x93NUMPY\x01\x00", "; it looks like an array of numpy.save."),
        (b"\x08\x0a\x12\x07pytorch", "; it looks like an ONNX model."),
        (b'{"nodes": []}', "; it looks like JSON, perhaps the net's -symbol.json."),
        (b"\xff\xd8\xff\xe0 a photograph", f"{LIKE}; it looks like a picture."),
        (b"nothing known", f"{LIKE}."),
        (npz(), "is an archive of numpy.savez, which numpy.load(path, allow_pickle=False) reads; expected one that torch.save"),
        (zipped("a.txt"), "is a zip archive without a pickle of tensors; expected one that torch.save has written."),
        (
            zipped("a/data.pkl", "a/constants.pkl"),
            "is a program of TorchScript, with code in it; expected a state_dict: torch.",
        ),
        (zipped("a/data.pkl", "a/byteorder"), "was written by a big-endian machine, and is not read; expected little-endian."),
        (hostile.LEGACY_HEAD.replace(b"\x88", b"\x89"), "was written by a big-endian machine, and is not read; expected litt"),
        (hostile.LEGACY_HEAD.replace(b"\xe9\x03", b"\xe9\x04"), "begins as a file of torch.save does, and goes on in another"),
        (hostile.LEGACY_HEAD, "is damaged or cut off: its pickle makes no sense (ValueError). Copy or download it again."),
        (
            hostile.zipped(hostile.instead(hostile.tensor(0, (2,), (1,)))),
            "its pickle asks for the entry 'archive/data/0', which",
        ),
        (hostile.legacy(hostile.instead(hostile.tensor(0, (2,), (1,)))), "the list of its storages does not fit its tensors."),
        (
            hostile.legacy(hostile.instead(hostile.tensor(0, (2,), (1,))), _1=b""),
            "the list of its storages does not fit its te",
        ),
        (
            hostile.instead(hostile.tensor(0, (2,), (1,))),
            "is a pickle that refers to data outside of it; expected one with its",
        ),
        (pickle.dumps(3), "holds an int; expected a state_dict: names and tensors."),
        (pickle.dumps(np.ones(2)), "holds a tensor alone; expected a state_dict: names and tensors."),
        (pickle.dumps([1]), "holds a list; expected a state_dict: names and tensors."),
        (pickle.dumps({}), "holds a dict without tensors; expected a state_dict: names and tensors."),
        (pickle.dumps({"model": {"lr": 0.1}}), "'lr' is no tensor but a float."),
        (pickle.dumps({"model": {"a": [1]}}), "'a' is no tensor but a list."),
        (pickle.dumps({"model": {"a" * 300: None}}), f"'{'a' * 200}...' is no tensor but something else."),
        (
            pickle.dumps({"a": np.array(["x"])}),
            "'a' is an array of the type 'U1'; expected booleans, integers, or floats of up",
        ),
        (
            pickle.dumps({"a": np.array([None])}),
            "'a' is an array of objects; expected booleans, integers, or floats of up to 64",
        ),
        (pickle.dumps({"a": np.zeros(2, "c8")}), "'a' is an array of the type 'c8'; expected booleans, integers, or floats of"),
        (pickle.dumps({"a": np.zeros(2, [("x", "f4")])}), "'a' is an array of the type 'V'; expected booleans, integers, or"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_another_kind_of_file(content, message):
    Path("x.bin").write_bytes(content)
    with pytest.raises(CheckpointError) as raised:
        load_checkpoint("x.bin")
    assert message in str(raised.value) and str(raised.value).startswith("x.bin")


def test_no_file():
    with pytest.raises(CheckpointError, match=r"^no\.pth: there is no such file\.$"):
        load_checkpoint("no.pth")
    with pytest.raises(CheckpointError, match=r" is a folder; expected a file of weights\.$"):
        load_checkpoint(Path.cwd())
    if hasattr(os, "mkfifo"):
        os.mkfifo("pipe")
        with pytest.raises(CheckpointError, match=r"^pipe is no file; expected a file of weights\.$"):
            load_checkpoint("pipe")


def test_tensors_that_are_not_dense():
    cases = {
        "is a sparse tensor; expected a dense one: `tensor.to_dense": torch.eye(2).to_sparse(),
        "is a tensor on the device meta, which has a shape and no numbers": torch.ones(2, device="meta"),
    }
    for message, tensor in cases.items():
        torch.save({"state_dict": {"a": tensor}}, "a.pth")
        with pytest.raises(CheckpointError, match=f"a.pth: 'a' {message}"):
            load_checkpoint("a.pth")
    quantised = hostile.called("torch._utils _rebuild_qtensor", b"N")
    kind = hostile.called("torch._tensor _rebuild_from_type_v2", hostile.named("torch Tensor"), b"N", b")", b"N")
    for message, value in {
        "quantised tensor; expected one of plain": quantised,
        "tensor of a kind that is not known": kind,
    }.items():
        Path("a.pth").write_bytes(hostile.zipped(hostile.instead(value)))
        with pytest.raises(CheckpointError, match=f"a.pth: 'w' is a {message}"):
            load_checkpoint("a.pth")


def test_a_dtype_that_this_torch_does_not_have(monkeypatch):
    torch.save({"a": torch.ones(1)}, "a.pth")
    monkeypatch.setitem(pickled_names.KNOWN, "torch.FloatStorage", pickled_names.StorageType("float2"))
    with pytest.raises(CheckpointError, match=r"a\.pth: 'a' is of float2, which this PyTorch, .*, does not have"):
        load_checkpoint("a.pth")


@pytest.mark.parametrize("new", [True, False])
def test_a_whole_model_is_refused(new):
    torch.save(net(), "a.pth", _use_new_zipfile_serialization=new)
    with pytest.raises(CheckpointError, match=r"holds more than tensors: it asks for .*save its state_dict alone"):
        load_checkpoint("a.pth")


def test_a_dict_may_hold_itself():
    Path("a.pkl").write_bytes(b"\x80\x04}q\x00" + hostile.text("model") + b"h\x00s.")
    with pytest.raises(CheckpointError, match="holds no state_dict at its top; it has dicts under 'model'"):
        load_checkpoint("a.pkl")


@pytest.mark.parametrize("container", hostile.CONTAINERS)
@pytest.mark.parametrize("name", hostile.that_run(""))
def test_nothing_runs(name, container, monkeypatch):
    called = []
    for module, function in ((os, "system"), (subprocess, "Popen"), (torch, "load"), (pickle, "loads"), (np, "load")):
        monkeypatch.setattr(module, function, lambda *arguments: called.append(arguments))
    Path("bad.pth").write_bytes(hostile.CONTAINERS[container](hostile.that_run("ran")[name]))
    with pytest.raises(CheckpointError, match=r"could run code from the file|which files of tensors lack; it was not done"):
        load_checkpoint("bad.pth")
    assert not called and not Path("ran").exists()


@pytest.mark.parametrize("name", ["os.system", "stack_global", "eval", "nested pickle", "inst", "obj", "array of objects"])
def test_the_files_that_run_nothing_here_would_run_in_pythons_reader(name):
    with contextlib.suppress(TypeError):  # NumPy's, when the array of objects has been read
        pickle.loads(hostile.that_run("ran")[name])
    assert Path("ran").exists()


# In a process of its own: a file may end it, or take memory that the next test would not have.
READER = """
import resource, sys
from pathlib import Path
import safetensors, torch
from tests.convert import hostile
from deformconv.convert.checkpoint import CheckpointError, load_checkpoint

path = Path("bomb.bin")
path.write_bytes(hostile.beside(b"N"))
assert load_checkpoint(path)["w"].tolist() == [0, 1, 2, 3, 4, 5]
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
limit = used + (160 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    bytearray(200 << 20)
    print("there is no limit")
except MemoryError:
    pass
for name, content in hostile.bombs():
    path.write_bytes(content)
    del content
    try:
        print(name, "|", load_checkpoint(path)["w"].tolist())
    except CheckpointError as error:
        print(name, "|", error)
    except BaseException as error:
        print(name, "|", "FAILED", type(error), error)
print("whole")
"""


# Of those that have weights besides, which are read if the rest harms nothing.
REFUSED = ("tensor", "a million", "arguments copied", "place in the memo, as text", "long bytes", "digits")


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="needs Linux, which limits a process's memory and says what it has"
)
def test_a_file_takes_no_more_memory_than_it_should():
    pytest.importorskip("safetensors")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}", "OMP_NUM_THREADS": "1"}
    process = subprocess.run([sys.executable, "-c", READER], capture_output=True, text=True, env=environment, timeout=300)
    *lines, last = process.stdout.splitlines()
    assert process.returncode == 0 and last == "whole", process.stdout[-500:] + process.stderr[-500:]
    found = dict(line.split(" | ", 1) for line in lines)
    assert len(found) == len(lines) > 100
    for name, outcome in found.items():
        assert outcome.startswith(("bomb.bin", "[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]")), f"{name}: {outcome}"
        if not name.endswith(("zip", "legacy", "pickle")) or name.startswith(REFUSED):
            assert outcome.startswith("bomb.bin"), f"{name}: {outcome}"
    assert "more objects than its size allows" in found["a million dicts, pickle"]
    assert "has a zip archive's list of" in found["zip: many entries"]


def whole_files():
    """A small file of each kind."""
    state = {"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2)}
    plain = {name: tensor.numpy() for name, tensor in state.items()}
    torch.save({"state_dict": state}, "zip")
    torch.save({"state_dict": state}, "legacy", _use_new_zipfile_serialization=False)
    yield Path("zip").read_bytes()
    yield Path("legacy").read_bytes()
    yield pickle.dumps({"model": plain, "__author__": "us"}, 2)
    yield pickle.dumps({**plain, "StructuredToParameterName@@": {"w": "w_0"}}, 4)
    yield written(plain, 2)
    header = b'{"w":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}'
    yield struct.pack("<Q", len(header)) + header + plain["w"].tobytes()


def test_damaged_bytes_never_end_otherwise():
    """A file is read or refused, wherever it is cut off and whatever bytes are wrong; nothing else happens."""
    pytest.importorskip("safetensors")
    rng = random.Random(0)
    path = Path("a.bin")
    outcomes = []
    for content in whole_files():
        for number in range(120):
            damaged = bytearray(content)
            if number % 3 == 0:
                del damaged[rng.randrange(len(content)) :]
            for _ in range(rng.randint(1, 3)):
                if damaged:
                    damaged[rng.randrange(len(damaged))] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
            path.write_bytes(damaged)
            try:
                found = load_checkpoint(path)
                assert all(type(name) is str and isinstance(tensor, torch.Tensor) for name, tensor in found.items())
                outcomes.append(True)
            except CheckpointError as error:
                assert str(error).startswith("a.bin")
                outcomes.append(False)
    assert 60 < sum(outcomes) < len(outcomes) - 200
