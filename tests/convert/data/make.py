"""Write the .params files and outputs of this folder with MXNet 1.9.1: MXNet's own blocks, operators and numbers.

.venv-gluon/bin/python tests/convert/data/make.py
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    import mxnet as mx
    from mxnet import gluon
    from mxnet.gluon.contrib import cnn

HERE = Path(__file__).parent
V1, V2 = cnn.DeformableConvolution, cnn.ModulatedDeformableConvolution
BLOCKS = {
    "v1": (V1, {"channels": 5, "kernel_size": 3, "padding": 1}),
    "v2": (V2, {"channels": 5, "kernel_size": 3, "padding": 1}),
    "v1_groups": (V1, {"channels": 6, "kernel_size": 3, "groups": 2, "use_bias": False, "offset_use_bias": False}),
    "v2_groups": (V2, {"channels": 6, "kernel_size": 3, "padding": 1, "groups": 2, "num_deformable_group": 2}),
    "v2_window": (
        V2,
        {
            "channels": 4,
            "kernel_size": (3, 2),
            "strides": (2, 1),
            "padding": (1, 0),
            "dilation": (1, 2),
            "num_deformable_group": 4,
        },
    ),
}


def data(rng):
    return mx.nd.array(rng.standard_normal((2, 4, 7, 8)).astype("float32"))


def varied(net, rng):
    """Random parameters, such that offsets reach over the border."""
    for parameter in net.collect_params().values():
        size = 0.3 if parameter.name.endswith("weight") else 1
        parameter.set_data(mx.nd.array(size * rng.standard_normal(parameter.shape)))


def blocks(results):
    """A file of `save_parameters` for each of MXNet's blocks."""
    for number, (name, (block, keywords)) in enumerate(BLOCKS.items()):
        rng = np.random.default_rng(number)
        x, net = data(rng), block(**keywords)
        net.initialize()
        net(x)
        varied(net, rng)
        net.save_parameters(str(HERE / f"{name}.params"))
        results |= {f"{name}.input": x.asnumpy(), f"{name}.output": net(x).asnumpy()}


def net(results):
    """A net's files by `save_parameters` and by `export`."""
    rng = np.random.default_rng(10)
    layers = gluon.nn.HybridSequential(prefix="net_")
    with layers.name_scope():
        layers.add(gluon.nn.Conv2D(6, 3, activation="relu"), V1(6, 3, padding=1, activation="relu"), V2(4, 3))
        layers.add(gluon.nn.Dense(3))
    x = data(rng)
    layers.initialize()
    layers(x)
    varied(layers, rng)
    layers.save_parameters(str(HERE / "net.params"))
    results |= {"net.input": x.asnumpy(), "net.output": layers(x).asnumpy()}
    layers.hybridize()
    layers(x)
    layers.export(str(HERE / "exported"))
    (HERE / "exported-symbol.json").unlink()


def symbols(results):
    """A checkpoint of symbols named as in Deformable-ConvNets, v1 with 2 offset groups, then v2."""
    rng = np.random.default_rng(20)
    x = mx.sym.var("data")
    offset = mx.sym.Convolution(x, kernel=(3, 3), pad=(2, 2), dilate=(2, 2), num_filter=36, name="res5a_branch2b_offset")
    y = mx.sym.contrib.DeformableConvolution(
        x, offset, kernel=(3, 3), pad=(2, 2), dilate=(2, 2), num_filter=8, num_deformable_group=2, no_bias=True,
        name="res5a_branch2b",
    )  # fmt: skip
    raw = mx.sym.Convolution(y, kernel=(3, 3), pad=(1, 1), num_filter=27, name="res5b_branch2b_offset")
    offset, mask = (mx.sym.slice_axis(raw, axis=1, begin=begin, end=end) for begin, end in ((0, 18), (18, None)))
    z = mx.sym.contrib.ModulatedDeformableConvolution(
        y, offset, 2 * mx.sym.sigmoid(mask),
        kernel=(3, 3), pad=(1, 1), num_filter=4, num_group=2, name="res5b_branch2b",
    )  # fmt: skip
    values = data(rng)
    module = mx.mod.Module(mx.sym.Group([y, z]), ["data"], [])
    module.bind([("data", values.shape)], for_training=False)
    module.init_params()
    arrays = {
        name: mx.nd.array((0.3 if name.endswith("weight") else 1) * rng.standard_normal(array.shape))
        for name, array in sorted(module.get_params()[0].items())
    }
    module.set_params(arrays, {})
    module.save_params(str(HERE / "symbols.params"))
    module.forward(mx.io.DataBatch([values]), is_train=False)
    first, second = (output.asnumpy() for output in module.get_outputs())
    results |= {"symbols.input": values.asnumpy(), "symbols.first": first, "symbols.second": second}


if __name__ == "__main__":
    results: dict[str, np.ndarray] = {}
    blocks(results)
    net(results)
    symbols(results)
    np.savez_compressed(HERE / "expected.npz", **results)
