"""MXNet's operators by their own names: the calls that exist in old code give what they gave."""

from __future__ import annotations

import inspect

import mxnet as mx
import pytest
from mxnet import gluon
from tests.gluon.arrays import mxnet_operator, random_call
from tests.tolerances import assert_close

import deformconv
from deformconv.gluon import contrib

NAMES = ["DeformableConvolution", "ModulatedDeformableConvolution"]


class Ours:
    """Stands where `mxnet.nd` or `mxnet.sym` stood."""

    contrib = contrib


@pytest.mark.parametrize("name", NAMES)
def test_the_arguments_are_mxnets(name):
    ours = inspect.signature(getattr(contrib, name)).parameters
    theirs = inspect.signature(getattr(mx.sym.contrib, name)).parameters
    assert [p for p in ours if p != "boundary"] == [p for p in theirs if p not in ("attr", "out", "kwargs")]


@pytest.mark.parametrize("masked", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("seed", range(8))
def test_arrays(seed, masked):
    call = random_call(seed, masked)
    arrays = call.ndarrays()
    assert_close(mxnet_operator(call, arrays, Ours).asnumpy(), mxnet_operator(call, arrays).asnumpy(), "float32")


@pytest.mark.parametrize("name", NAMES)
def test_symbols_make_and_name_their_variables(name):
    made = []
    for F in (mx.sym, Ours):
        with mx.name.NameManager():
            operands = [mx.sym.var(key) for key in ("data", "offset", "mask")[: 2 + name.startswith("M")]]
            operator = getattr(F.contrib, name)
            named = operator(*operands, kernel=(3, 3), pad=(1, 1), num_filter=8, num_group=2, name="res5a_branch2b")
            unnamed = operator(*operands, kernel=(3, 3), num_filter=8, no_bias=True, num_deformable_group=2)
        shapes = {"data": (2, 4, 9, 9), "offset": (2, 18, 9, 9), "mask": (2, 9, 9, 9)}
        shapes = {key: shapes[key] for key in named.list_inputs() if key in shapes}
        inferred = named.infer_shape(**shapes)[:2]
        made.append((named.list_arguments(), named.name, unnamed.list_arguments(), unnamed.name, inferred))
    assert made[0] == made[1]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("given", [(), ("data",), ("offset",), ("weight",), ("mask", "bias")], ids=str)
def test_inputs_that_are_not_passed_become_variables(name, given):
    """In the order of MXNet's, so that arrays may be bound by position."""
    operands = {key: mx.sym.var(f"my_{key}") for key in given if key != "mask" or name.startswith("M")}
    for arguments in ({"name": "dc"}, {"name": "dc", "no_bias": "bias" not in given}, {}):
        found = []
        for F in (mx.sym, Ours):
            with mx.name.NameManager():
                symbol = getattr(F.contrib, name)(num_filter=3, kernel=(3, 3), **operands, **arguments)
                found.append((symbol.list_arguments(), symbol.list_outputs()))
        assert found[0] == found[1]
    assert contrib.DeformableConvolution(num_filter=3, kernel=(3, 3), name="dc").list_arguments() == [
        "dc_data", "dc_offset", "dc_weight", "dc_bias",
    ]  # fmt: skip


@pytest.mark.parametrize("masked", [False, True], ids=["v1", "v2"])
def test_arrays_are_bound_by_position(masked):
    shapes = {"data": (2, 4, 9, 9), "offset": (2, 18, 7, 7), "mask": (2, 9, 7, 7), "weight": (9, 4, 3, 3), "bias": (9,)}
    arrays = [mx.nd.random.normal(shape=shape) for key, shape in shapes.items() if masked or key != "mask"]
    outputs = []
    for F in (mx.sym, Ours):
        symbol = getattr(F.contrib, NAMES[masked])(num_filter=9, kernel=(3, 3), name="dc")
        outputs.append(symbol.bind(mx.cpu(), arrays).forward()[0].asnumpy())
    assert_close(outputs[1], outputs[0], "float32")


@pytest.mark.filterwarnings("ignore:Cannot decide type|:UserWarning:mxnet.gluon.block")
def test_the_threads_symbol_block_with_the_import_changed():
    blocks = []
    for F in (mx.sym, Ours):
        data, offset = mx.sym.var("data"), mx.sym.var("offset")
        symbol = F.contrib.DeformableConvolution(
            data=data, offset=offset, num_deformable_group=1, num_group=1, no_bias=True, num_filter=3, kernel=(3, 3),
            pad=(1, 1), name="conv",
        )  # fmt: skip
        block = gluon.SymbolBlock(symbol, [data, offset])
        block.initialize(mx.init.One())
        blocks.append(block)
    x, offset = mx.nd.random.normal(shape=(10, 3, 100, 100)), mx.nd.random.normal(shape=(10, 18, 100, 100)) + 0.123
    theirs, ours = (block(x, offset).asnumpy() for block in blocks)
    assert_close(ours, theirs, "float32")
    assert list(blocks[0].collect_params()) == list(blocks[1].collect_params()) == ["conv_weight"]


def test_a_module_trains_v2():
    data, label = mx.sym.var("data"), mx.sym.var("label")
    raw = mx.sym.Convolution(data, kernel=(3, 3), pad=(1, 1), num_filter=27, name="res_offset")
    offset = mx.sym.slice_axis(raw, axis=1, begin=0, end=18)
    mask = 2 * mx.sym.sigmoid(mx.sym.slice_axis(raw, axis=1, begin=18, end=None))
    deformed = contrib.ModulatedDeformableConvolution(data, offset, mask, kernel=(3, 3), pad=(1, 1), num_filter=4, name="res")
    pooled = mx.sym.Pooling(mx.sym.relu(deformed), global_pool=True, kernel=(1, 1), pool_type="avg")
    net = mx.sym.SoftmaxOutput(mx.sym.FullyConnected(pooled, num_hidden=2, name="dense"), label, name="softmax")
    module = mx.mod.Module(net, ["data"], ["label"])
    module.bind([("data", (4, 2, 8, 8))], [("label", (4,))])
    module.init_params(mx.init.Xavier())
    module.init_optimizer("adam", optimizer_params={"learning_rate": 0.02})
    mx.random.seed(0)
    batch = mx.io.DataBatch([mx.nd.random.normal(shape=(4, 2, 8, 8))], [mx.nd.array([0, 1, 0, 1])])
    for _ in range(150):
        module.forward_backward(batch)
        module.update()
    module.forward(batch, is_train=False)
    assert module.get_outputs()[0].asnumpy().argmax(axis=1).tolist() == [0, 1, 0, 1]
    assert set(module.get_params()[0]) == {
        "res_offset_weight", "res_offset_bias", "res_weight", "res_bias", "dense_weight", "dense_bias",
    }  # fmt: skip


def test_mistakes():
    x, offset, weight = mx.nd.ones((1, 3, 8, 8)), mx.nd.zeros((1, 18, 8, 8)), mx.nd.ones((4, 3, 3, 3))
    call = contrib.DeformableConvolution
    with pytest.raises(TypeError, match="`kernel` is missing; expected it, as MXNet's operator does"):
        call(x, offset, weight, num_filter=4, no_bias=True)
    with pytest.raises(TypeError, match="`num_filter` is missing"):
        call(x, offset, weight, kernel=(3, 3), no_bias=True)
    with pytest.raises(TypeError, match="`bias` is missing; expected it, or no_bias=True"):
        call(x, offset, weight, kernel=(3, 3), pad=(1, 1), num_filter=4)
    with pytest.raises(TypeError, match="`data` is None; expected an MXNet NDArray"):
        call(offset=offset, weight=weight, kernel=(3, 3), pad=(1, 1), num_filter=4, no_bias=True)
    with pytest.raises(TypeError, match="`weight` is None; expected an MXNet NDArray"):
        call(x, offset, kernel=(3, 3), pad=(1, 1), num_filter=4, no_bias=True)
    with pytest.raises(deformconv.ShapeError) as raised:
        call(x, offset, weight, kernel=(3, 3), pad=(1, 1), num_filter=5, no_bias=True)
    assert str(raised.value) == (
        "`weight` has shape (4, 3, 3, 3); expected (5, C_in/num_group, 3, 3), from num_filter=5 and kernel=(3, 3)."
    )
    with pytest.raises(deformconv.ShapeError, match=r"`pad` has 3 entries, \(1, 1, 1\); a 2-D call takes"):
        call(x, offset, weight, kernel=(3, 3), pad=(1, 1, 1), num_filter=4, no_bias=True)
    with pytest.raises(deformconv.ShapeError, match="27 = 18 offsets \\+ 9 masks"):
        call(x, mx.nd.zeros((1, 27, 8, 8)), weight, kernel=(3, 3), pad=(1, 1), num_filter=4, no_bias=True)
    output = call(x, offset, weight, kernel=(3, 3), pad=(1, 1), num_filter=4, no_bias=True, boundary="zeros")
    assert output.shape == (1, 4, 8, 8)
