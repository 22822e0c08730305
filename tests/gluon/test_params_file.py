"""Our reader and writer of .params files beside MXNet's own."""

from __future__ import annotations

import mxnet as mx
import numpy as np
import pytest
from tests.convert.files import written

from deformconv.convert import mxnet_layers, read_params, write_params

TYPES = ["float32", "float64", "float16", "uint8", "int32", "int8", "int64", "bool"]


def arrays():
    rng = np.random.default_rng(0)
    shapes = [(3,), (2, 3), (4, 2, 3, 3), (1, 2, 1, 3, 1), (5, 1), (2, 2), (7,), (3, 1)]
    return {f"arg:{t}_ü": (3 * rng.random(shape)).astype(t) for t, shape in zip(TYPES, shapes, strict=True)}


def test_we_read_what_mxnet_wrote_and_write_the_same_bytes(tmp_path):
    mx.nd.save(str(tmp_path / "theirs.params"), {name: mx.nd.array(a, dtype=a.dtype) for name, a in arrays().items()})
    found = read_params(tmp_path / "theirs.params")
    for name, array in arrays().items():
        assert found[name].dtype == array.dtype and (found[name] == array).all(), name
    write_params(tmp_path / "ours.params", arrays())
    assert (tmp_path / "ours.params").read_bytes() == (tmp_path / "theirs.params").read_bytes()


def test_mxnet_reads_what_we_wrote(tmp_path):
    write_params(tmp_path / "ours.params", arrays())
    found = mx.nd.load(str(tmp_path / "ours.params"))
    for name, array in arrays().items():
        assert found[name].dtype == array.dtype and (found[name].asnumpy() == array).all(), name


@pytest.mark.parametrize("version", [0, 1, 2])
def test_older_versions_as_mxnet_reads_them(version, tmp_path):
    path = tmp_path / "old.params"
    path.write_bytes(written(arrays(), version))
    theirs, ours = mx.nd.load(str(path)), read_params(path)
    assert list(theirs) == list(ours)
    for name in theirs:
        assert (theirs[name].asnumpy() == ours[name]).all(), name


def test_the_newest_version_which_the_numpy_like_api_writes(tmp_path):
    path = str(tmp_path / "new.params")
    with mx.util.np_shape(True), mx.util.np_array(True):
        mx.npx.save(path, {"empty": mx.np.ones((2, 0, 3)), "matrix": mx.np.ones((2, 3)), "scalar": mx.np.array(3.0)})
    found = read_params(path)
    assert found["scalar"].shape == () and found["scalar"] == 3
    assert found["empty"].shape == (2, 0, 3) and (found["matrix"] == 1).all()


def test_arrays_of_another_context_and_lists_and_sparse_ones(tmp_path):
    path = str(tmp_path / "x.params")
    mx.nd.save(path, {"w": mx.nd.ones((2,), ctx=mx.cpu(1))})
    assert read_params(path)["w"].tolist() == [1, 1]
    mx.nd.save(path, [mx.nd.ones((2,))])
    with pytest.raises(ValueError, match="have no names: it was saved from a list"):
        read_params(path)
    for kind in ("row_sparse", "csr"):
        mx.nd.save(path, {"w": mx.nd.ones((2,)), "s": mx.nd.ones((2, 3)).tostype(kind)})
        with pytest.raises(ValueError, match=f"array 2 of 2 is stored as {kind}"):
            read_params(path)


def test_layers_of_a_loaded_dict(tmp_path):
    from deformconv.gluon import ModulatedDeformableConvolution

    net = mx.gluon.nn.HybridSequential()
    net.add(mx.gluon.nn.Conv2D(4, 3), ModulatedDeformableConvolution(4, 3))
    net.initialize()
    net(mx.nd.ones((1, 2, 8, 8)))
    net.save_parameters(str(tmp_path / "net.params"))
    assert mxnet_layers(mx.nd.load(str(tmp_path / "net.params"))) == mxnet_layers(tmp_path / "net.params") == ["1"]
