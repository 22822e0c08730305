"""The blocks stand where MXNet's stood: constructor, parameters, files and numbers."""

from __future__ import annotations

import inspect

import mxnet as mx
import numpy as np
import pytest
from mxnet import gluon
from mxnet.base import MXNetError
from mxnet.gluon.contrib import cnn
from tests.frontends.suite import LayerSuite
from tests.tolerances import assert_close, error

import deformconv
from deformconv.gluon import DeformableConvolution, ModulatedDeformableConvolution, blocks, deform_conv

PAIRS = [
    (DeformableConvolution, cnn.DeformableConvolution),
    (ModulatedDeformableConvolution, cnn.ModulatedDeformableConvolution),
]
both = pytest.mark.parametrize("ours, theirs", PAIRS, ids=["v1", "v2"])
either = pytest.mark.parametrize("block", [DeformableConvolution, ModulatedDeformableConvolution], ids=["v1", "v2"])
undecided_type = pytest.mark.filterwarnings("ignore:Cannot decide type|:UserWarning:mxnet.gluon.block")

CONFIGURATIONS = [
    {"channels": 5, "kernel_size": 3, "padding": 1},
    {"channels": 6, "kernel_size": (3, 2), "strides": (2, 1), "padding": (1, 0), "dilation": (1, 2)},
    {"channels": 6, "kernel_size": 3, "padding": [1, 1], "groups": 2, "num_deformable_group": 2},
    {"channels": 4, "kernel_size": 3, "groups": 4, "num_deformable_group": 4, "use_bias": False},
    {"channels": 8, "kernel_size": 3, "num_deformable_group": 4, "offset_use_bias": False, "activation": "relu"},
    {"channels": 3},
]
configured = pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=range(len(CONFIGURATIONS)))


def data(*shape):
    return mx.nd.array(np.random.default_rng(0).standard_normal(shape or (2, 8, 9, 10)))


def varied(net):
    """Parameters that reach over the border: predicted offsets of a pixel or two."""
    rng = np.random.default_rng(1)
    for parameter in net.collect_params().values():
        size = 0.3 if parameter.name.endswith(("offset_weight", "conv_weight")) else 1
        values = size * rng.standard_normal(parameter.shape)
        parameter.set_data(mx.nd.array(np.abs(values) if parameter.name.endswith("var") else values))
    return net


def made(block, configuration, dtype="float32"):
    net = block(**configuration, in_channels=8)
    net.initialize()
    net.cast(dtype)
    net(data().astype(dtype))  # MXNet defers a parameter even so
    return varied(net)


class TestLayers(LayerSuite):
    module = blocks
    examples = 5
    ranks = (2,)
    input = "data"
    words = {"out_channels": "channels", "stride": "strides", "offset_groups": "num_deformable_group"}  # noqa: RUF012

    def array(self, array):
        return mx.nd.array(array, dtype=array.dtype)

    def numpy(self, array):
        return array.asnumpy()

    def layer(self, rank, *, modulated, bias=True, **arguments):
        named = {self.words.get(name, name): value for name, value in arguments.items()}
        layer = PAIRS[modulated][0](**named, use_bias=bias)
        layer.initialize()
        layer.cast("float64")
        layer(self.array(self.image(2)))  # MXNet defers a parameter even so
        return layer

    def weights(self, layer):
        names = {"weight": "deformable_conv_weight", "bias": "deformable_conv_bias"}
        parameters = {key: getattr(layer, names.get(key, key)) for key in ("weight", "bias", "offset_weight", "offset_bias")}
        return {name: None if p is None else p.data().asnumpy() for name, p in parameters.items()}

    def set_predictor(self, layer, weight, bias):
        layer.offset_weight.set_data(self.array(weight))
        layer.offset_bias.set_data(self.array(bias))

    def own_boundary(self, modulated):
        return "zeros" if modulated else "inside"


@both
def test_the_constructor_is_mxnets(ours, theirs):
    mine, other = (inspect.signature(block).parameters for block in (ours, theirs))
    assert list(mine) == [*other, "boundary", "unknown"] and mine["boundary"].kind is inspect.Parameter.KEYWORD_ONLY
    for word, here in (("offset_groups", "num_deformable_group"), ("stride", "strides"), ("out_channels", "channels")):
        with pytest.raises(TypeError, match=rf"{ours.__name__}\(\) got .* argument '{word}'; here: {here}\."):
            ours(4, 3, **{word: 1})
    for name in other:
        if name != "op_name":  # MXNet does not look at it
            assert mine[name].default == other[name].default, name
            assert mine[name].kind == other[name].kind, name
    assert issubclass(ours, theirs)
    positional = (4, 3, 1, 1, 1, 1, 1, "NCHW", True, 2, "relu", "ones", "ones", "zeros", "zeros", True, "n", None, "p_", None)
    assert list(ours(*positional).collect_params()) == list(theirs(*positional).collect_params())


@both
@configured
def test_parameters_have_mxnets_names_shapes_and_first_values(ours, theirs, configuration):
    nets = []
    for block in (ours, theirs):
        mx.random.seed(3)
        with mx.name.NameManager():
            net = block(**configuration)
        net.initialize(mx.init.Xavier())
        net(data())
        nets.append({name: parameter.data().asnumpy() for name, parameter in net.collect_params().items()})
    mine, other = ({name.partition("conv")[2].lstrip("0123456789"): value for name, value in net.items()} for net in nets)
    assert list(mine) == list(other)
    for name in other:
        assert mine[name].tobytes() == other[name].tobytes() and mine[name].shape == other[name].shape, name


@both
@configured
def test_old_files_load_and_ours_load_there(ours, theirs, configuration, tmp_path):
    old = made(theirs, configuration)
    expected = old(data()).asnumpy()
    old.save_parameters(str(tmp_path / "old.params"))
    new = ours(**configuration)
    new.load_parameters(str(tmp_path / "old.params"))
    assert error(new(data()).asnumpy(), expected) < 1e-5
    new.save_parameters(str(tmp_path / "new.params"))
    back = theirs(**configuration)
    back.load_parameters(str(tmp_path / "new.params"))
    for kept, first in zip(back.collect_params().values(), old.collect_params().values(), strict=True):
        assert (kept.data().asnumpy() == first.data().asnumpy()).all(), first.name
    assert_close(back(data()).asnumpy(), expected, "float32")


@both
def test_a_whole_net_changes_one_import(ours, theirs, tmp_path):
    def net(block):
        layers = gluon.nn.HybridSequential()
        layers.add(gluon.nn.Conv2D(8, 3), block(6, 3, padding=1), gluon.nn.BatchNorm(), block(4, 3, num_deformable_group=2))
        layers.add(gluon.nn.Dense(3))
        return layers

    old = net(theirs)
    old.initialize()
    old(data())
    varied(old)
    expected = old(data()).asnumpy()
    old.save_parameters(str(tmp_path / "net.params"))
    old.collect_params().save(str(tmp_path / "full.params"))
    new = net(ours)
    new.load_parameters(str(tmp_path / "net.params"))
    assert error(new(data()).asnumpy(), expected) < 2e-5
    old.hybridize()
    old(data())
    old.export(str(tmp_path / "exported"))
    new.initialize(force_reinit=True)
    new.load_parameters(str(tmp_path / "net.params"))
    assert error(new(data()).asnumpy(), expected) < 2e-5


@both
def test_gradients_through_the_block(ours, theirs):
    """MXNet's v1 is the measure of v1; v2 has the reference's, through NumPy."""
    configuration = CONFIGURATIONS[2]
    x = data().astype("float64")
    x.attach_grad()
    net = made(ours, configuration, "float64")
    with mx.autograd.record():
        loss = (net(x) ** 2).sum()
    loss.backward()
    found = {name: parameter.grad().asnumpy() for name, parameter in net.collect_params().items()}
    found["x"] = x.grad.asnumpy()
    if theirs is cnn.DeformableConvolution:
        other = made(theirs, configuration, "float64")
        with mx.autograd.record():
            loss = (other(x) ** 2).sum()
        loss.backward()
        expected = [p.grad().asnumpy() for p in other.collect_params().values()] + [x.grad.asnumpy()]
    else:
        expected = []
        for array in [*(p.data() for p in net.collect_params().values()), x]:
            direction = np.random.default_rng(4).standard_normal(array.shape)
            kept, step, values = array.copy(), 1e-6, []
            for sign in (1, -1):
                array[:] = kept + sign * step * mx.nd.array(direction, dtype="float64")
                values.append((net(x) ** 2).sum().asscalar())
            array[:] = kept
            expected.append((direction, (values[0] - values[1]) / (2 * step)))
    for (name, gradient), value in zip(found.items(), expected, strict=True):
        if isinstance(value, tuple):
            direction, slope = value
            assert (gradient * direction).sum() == pytest.approx(slope, rel=1e-5), name
        else:
            assert error(gradient, value) < 1e-5, name


@either
@configured
def test_hybridized_it_gives_the_same_numbers(block, configuration):
    results = []
    for options in (None, {}, {"static_alloc": True}, {"static_alloc": True, "static_shape": True}):
        net = made(block, configuration)
        if options is not None:
            net.hybridize(**options)
        for _ in range(2):
            x = data()
            x.attach_grad()
            with mx.autograd.record():
                y = net(x)
            y.backward()
        results.append([a.asnumpy() for a in (y, x.grad, *(p.grad() for p in net.collect_params().values()))])
    for other in results[1:]:
        for found, expected in zip(other, results[0], strict=True):
            assert_close(found, expected, "float32")


@either
@pytest.mark.parametrize("hybridized", [False, True])
def test_in_channels_are_deferred(block, hybridized):
    net = block(6, 3, padding=1, groups=2, num_deformable_group=2)
    net.initialize()
    net.hybridize(hybridized)
    assert net(data()).shape == (2, 6, 9, 10)
    assert net.deformable_conv_weight.shape == (6, 4, 3, 3) and net.offset_weight.shape[1] == 4
    assert net(data(1, 8, 5, 5)).shape == (1, 6, 5, 5)


@either
@undecided_type
def test_export_and_import(block, tmp_path):
    net = made(block, CONFIGURATIONS[2])
    net.hybridize()
    expected = net(data()).asnumpy()
    net.export(str(tmp_path / "net"), epoch=3)
    loaded = gluon.SymbolBlock.imports(str(tmp_path / "net-symbol.json"), ["data"], str(tmp_path / "net-0003.params"))
    assert_close(loaded(data()).asnumpy(), expected, "float32")
    x = data()
    x.attach_grad()
    with mx.autograd.record():
        y = loaded(x)
    y.backward()
    assert float(abs(x.grad).sum().asscalar()) > 0


@either
def test_in_a_sequential_net_with_a_summary(block, capsys):
    net = gluon.nn.HybridSequential()
    net.add(block(4, 3, padding=1, activation="relu"), gluon.nn.MaxPool2D(), block(6, 3, strides=2))
    net.initialize()
    net.summary(data())
    summary = capsys.readouterr().out
    assert f"{block.__name__}-" in summary and "(2, 4, 9, 10)" in summary and "(2, 6, 1, 2)" in summary
    plain = net(data()).asnumpy()
    net.hybridize()
    assert (net(data()).asnumpy() == plain).all()
    assert [child.name.rstrip("0123456789") for child in net._children.values()] == [
        net[0].prefix.rstrip("_0123456789"), net[1].name.rstrip("0123456789"), net[0].prefix.rstrip("_0123456789"),
    ]  # fmt: skip


def test_repr_is_mxnets_and_says_more():
    others = {"strides": (2, 2), "dilation": (3, 3), "use_bias": False, "activation": "relu"}
    for arguments in ({}, {"padding": (1, 1)}, others):
        ours, theirs = (kind(4, (3, 3), **arguments) for kind in (DeformableConvolution, cnn.DeformableConvolution))
        assert repr(ours) == repr(theirs)
        assert repr(ModulatedDeformableConvolution(4, (3, 3), **arguments)) == f"Modulated{ours!r}"
    net = gluon.nn.HybridSequential()
    net.add(
        ModulatedDeformableConvolution(
            8, 3, 1, 1, groups=2, num_deformable_group=2, use_bias=False, in_channels=4, activation="relu",
            offset_use_bias=False, boundary="inside",
        ),
        DeformableConvolution(8, 3, boundary="zeros"),
    )  # fmt: skip
    assert repr(net) == (
        "HybridSequential(\n"
        "  (0): ModulatedDeformableConvolution(4 -> 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), groups=2, "
        "num_deformable_group=2, bias=False, offset_use_bias=False, boundary='inside', Activation(relu))\n"
        "  (1): DeformableConvolution(None -> 8, kernel_size=(3, 3), stride=(1, 1), boundary='zeros')\n)"
    )
    net.initialize()
    net(data(2, 4, 9, 9))
    assert "(1): DeformableConvolution(8 -> 8, kernel" in repr(net)


@either
def test_backward_of_one_block_after_forward_of_another(block):
    """MXNet keeps one record of which arrays a backward pass reads, for all operators of this kind."""
    nets = [made(kind, CONFIGURATIONS[i]) for kind in (block, *(pair[0] for pair in PAIRS)) for i in (0, 3)]
    for net in nets:
        net.hybridize()
    x = data()
    with mx.autograd.record():
        outputs = [net(x) for net in nets]
    mx.autograd.backward(outputs)
    mx.nd.waitall()
    for net in nets:
        assert np.abs(net.offset_weight.grad().asnumpy()).sum() > 0


@either
@pytest.mark.parametrize("options", [None, {}, {"static_alloc": True, "static_shape": True}], ids=["plain", "hybrid", "static"])
def test_between_convolutions_of_onednn(block, options):
    """They leave arrays in blocked order, which MXNet would hand to an operator in Python in memory that it has freed."""
    net = gluon.nn.HybridSequential()
    net.add(gluon.nn.Conv2D(16, 3, padding=1), block(16, 3, padding=1, num_deformable_group=2))
    net.add(gluon.nn.Conv2D(16, 3, padding=1), gluon.nn.MaxPool2D(), block(32, 3, padding=1), gluon.nn.Conv2D(8, 3))
    net.initialize()
    x = data(4, 3, 20, 20)
    net(x)
    varied(net)
    if options is not None:
        net.hybridize(**options)
    x.attach_grad()
    first = None
    for _ in range(60):
        with mx.autograd.record():
            y = net(x)
        y.backward()
        results = [y, x.grad, *(parameter.grad() for parameter in net.collect_params().values())]
        for _ in range(3):
            mx.nd.random.normal(shape=(4, 16, 20, 20))  # which takes what is free
        results = [result.asnumpy() for result in results]
        first = first or results
        for found, expected in zip(results, first, strict=True):
            assert_close(found, expected, "float32")


def test_a_weight_that_a_convolution_of_onednn_shares():
    """Outside of training it reorders its weight where it lies."""
    x, weight = data(4, 16, 20, 20), mx.nd.random.normal(shape=(32, 16, 3, 3))
    offset = mx.nd.random.normal(shape=(4, 18, 20, 20))
    expected = deform_conv(x, offset, weight, padding=1).asnumpy()
    symbols = {name: mx.sym.var(name) for name in ("data", "offset", "weight")}
    plain = mx.sym.Convolution(symbols["data"], symbols["weight"], kernel=(3, 3), pad=(1, 1), num_filter=32, no_bias=True)
    both = mx.sym.Group([plain, deform_conv(**symbols, padding=1)])
    executor = both.bind(mx.cpu(), {"data": x, "offset": offset, "weight": weight})
    for _ in range(40):
        mx.nd.Convolution(x, weight, kernel=(3, 3), pad=(1, 1), num_filter=32, no_bias=True)
        assert (deform_conv(x, offset, weight, padding=1).asnumpy() == expected).all()
        assert (executor.forward(is_train=False)[1].asnumpy() == expected).all()


@either
def test_it_trains(block):
    mx.random.seed(5)
    net = gluon.nn.HybridSequential()
    net.add(block(4, 3, padding=1, activation="relu"), gluon.nn.GlobalAvgPool2D(), gluon.nn.Dense(2))
    net.initialize(mx.init.Xavier())
    net.hybridize()
    net(data())
    net.collect_params(".*_offset_(weight|bias)").setattr("lr_mult", 0.1)
    trainer = gluon.Trainer(net.collect_params(), "adam", {"learning_rate": 0.02})
    loss_of, labels, losses = gluon.loss.SoftmaxCrossEntropyLoss(), mx.nd.array([0, 1]), []
    for _ in range(40):
        with mx.autograd.record():
            loss = loss_of(net(data()), labels)
        loss.backward()
        trainer.step(2)
        losses.append(loss.mean().asscalar())
    assert losses[-1] < 0.2 < losses[0]
    assert np.abs(net[0].offset_weight.data().asnumpy()).max() > 0


@either
@pytest.mark.parametrize("hybridized", [False, True])
def test_parameters_grad_req(block, hybridized):
    net = made(block, CONFIGURATIONS[0])
    net.hybridize(hybridized)
    with mx.autograd.record():
        y = net(data())
    y.backward()
    once = net.deformable_conv_weight.grad().asnumpy()
    net.collect_params().setattr("grad_req", "add")
    net.offset_weight.grad_req = "null"
    net.collect_params().zero_grad()
    for _ in range(2):
        with mx.autograd.record():
            y = net(data())
        y.backward()
    assert_close(net.deformable_conv_weight.grad().asnumpy(), 2 * once, "float32")


@either
def test_two_contexts(block):
    net = block(4, 3, padding=1)
    net.initialize(mx.init.Xavier(), ctx=[mx.cpu(0), mx.cpu(1)])
    outputs = [net(part) for part in gluon.utils.split_and_load(data(), [mx.cpu(0), mx.cpu(1)])]
    assert [output.context for output in outputs] == [mx.cpu(0), mx.cpu(1)]
    whole = net(data()).asnumpy()
    assert_close(np.concatenate([output.asnumpy() for output in outputs]), whole, "float32")


@either
def test_the_boundary_can_be_chosen(block):
    x = data()
    own, other = ("inside", "zeros") if block is DeformableConvolution else ("zeros", "inside")
    results = {}
    for boundary in (None, own, other):
        net = made(block, {"channels": 5, "kernel_size": 3, "padding": 1, "boundary": boundary})
        results[boundary] = net(x).asnumpy()
        offset, mask = net.offsets_and_mask(x)
        weight, bias = net.deformable_conv_weight.data(), net.deformable_conv_bias.data()
        expected = deform_conv(x, offset, weight, bias, padding=1, mask=mask, boundary=boundary or own)
        assert_close(results[boundary], expected.asnumpy(), "float32")
    assert_close(results[None], results[own], "float32")
    assert error(results[None], results[other]) > 1e-3


@either
def test_what_a_block_predicts(block):
    net = block(4, 3, padding=1, num_deformable_group=2)
    net.initialize()
    offset, mask = net.offsets_and_mask(data())  # deferred until now
    assert offset.shape == (2, 36, 9, 10) and (offset.asnumpy() == 0).all()
    if block is DeformableConvolution:
        assert mask is None
    else:
        assert mask.shape == (2, 18, 9, 10) and (mask.asnumpy() == 1).all()


@either
@pytest.mark.parametrize("hybridized", [False, True])
def test_a_wrong_array_raises_our_sentence(block, hybridized):
    net, unpadded = made(block, CONFIGURATIONS[2]), made(block, CONFIGURATIONS[3])
    net.hybridize(hybridized)
    with pytest.raises(
        deformconv.ShapeError, match=r"`data` has 5 channels, shape \(2, 5, 9, 9\); this layer has in_channels=8\."
    ):
        net(data(2, 5, 9, 9))
    with pytest.raises(deformconv.ShapeError, match=r"`data` has 3 axes, shape \(8, 9, 9\); a weight with 4 axes takes 4"):
        net(data(8, 9, 9))
    with pytest.raises(deformconv.ShapeError, match=r"`weight` has a kernel of size 3x3; along height it spans"):
        unpadded.offsets_and_mask(data(1, 8, 2, 9))
    with pytest.raises(TypeError, match=r"`weight` is float32 and `data` is float64; expected one dtype"):
        net(data().astype("float64"))
    with pytest.raises(TypeError, match="`data` is stored as csr"):
        net(mx.nd.ones((2, 8)).tostype("csr"))


@either
def test_within_a_hybridized_net_mxnet_raises_and_nothing_is_computed(block):
    net = gluon.nn.HybridSequential()
    net.add(made(block, CONFIGURATIONS[0]))
    net.hybridize()
    with pytest.raises((MXNetError, ValueError, AssertionError)):
        net(data(2, 5, 9, 9)).asnumpy()


@either
def test_a_wrong_constructor_call(block):
    for keywords, message in [
        ({"boundary": "border"}, "`boundary` is 'border'; expected 'zeros' or 'inside'."),
        ({"layout": "NHWC"}, "`layout` is 'NHWC'; expected 'NCHW', the only one that MXNet's own operator runs as well."),
        ({"groups": 3}, "`groups` is 3; expected a divisor of channels = 4."),
        ({"groups": 2, "in_channels": 3}, "`groups` is 2; expected a divisor of in_channels = 3."),
        ({"kernel_size": (3,)}, "`kernel_size` has 1 entry"),
    ]:
        with pytest.raises(ValueError) as raised:
            block(**({"channels": 4, "kernel_size": 3} | keywords))
        assert str(raised.value).startswith(message)


def test_v2s_predictor_must_divide_into_the_groups():
    with pytest.raises(deformconv.ShapeError) as raised:
        ModulatedDeformableConvolution(4, 3, groups=2)
    assert str(raised.value) == (
        "`groups` is 2; in MXNet's block the predictor has as many groups, so it must divide its channels, "
        "num_deformable_group x 27 = 27: expected num_deformable_group to be a multiple of 2."
    )
    DeformableConvolution(4, 3, groups=2)
    ModulatedDeformableConvolution(4, 3, groups=2, num_deformable_group=2)


@either
def test_a_subclass_and_a_loader_with_processes(block):
    class Mine(block):
        def __init__(self, channels):
            super().__init__(channels, 3, padding=1)

    net = Mine(4)
    net.initialize()
    dataset = gluon.data.ArrayDataset(np.ones((8, 2, 6, 6), np.float32))
    for workers in (0, 2):  # two are processes, forked while this library's threads wait
        loader = gluon.data.DataLoader(dataset, batch_size=4, num_workers=workers)
        assert [net(batch).shape for batch in loader] == [(4, 4, 6, 6)] * 2
    assert list(inspect.signature(Mine).parameters) == ["channels"]
