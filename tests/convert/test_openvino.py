"""OpenVINO, by every road to it: the same numbers in its runtime, from files that need nothing of ours."""

from __future__ import annotations

import doctest
import sys
import warnings
from importlib import metadata

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
openvino = pytest.importorskip("openvino")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from tests import old_openvino, signal_stack  # noqa: E402
from tests.tolerances import assert_close  # noqa: E402
from tests.torch.nets import aggregate, any_size, attention, four_layers  # noqa: E402
from torch import nn  # noqa: E402

from deformconv.convert import openvino as rules  # noqa: E402
from deformconv.convert import openvino_extensions, to_torchvision  # noqa: E402
from deformconv.torch import DeformConv2d, DeformConv3d, deform_aggregate3d, deform_conv2d  # noqa: E402
from deformconv.vision import DCNv3, DCNv4  # noqa: E402

# What PyTorch's exporters and OpenVINO warn of on their own account.
pytestmark = [
    pytest.mark.slow,  # exporters and compilers take seconds to begin
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]

VERSION = tuple(map(int, metadata.version("openvino").split(".")[:2]))
# They read no exported program with circular padding or in half precision.
READS_LESS = VERSION < (2025, 1)
UNREAD = "Converting input model|Model wasn't fully converted"
# It says of an exported program that a rule refuses only that an argument is None: what the rule said is lost.
HIDES_REASONS = VERSION < (2024, 5)
HIDDEN = "Requested None inlined input for op deformconv.deform_"


def by_tracing(net, x, _):
    return openvino.convert_model(net, example_input=x, extension=openvino_extensions())


def by_export(net, x, _):
    program = torch.export.export(net, (x,), dynamic_shapes=any_size(x))
    return openvino.convert_model(program, extension=openvino_extensions())


def by_onnx(net, x, folder):
    torch.onnx.export(net, (x,), folder / "net.onnx", dynamo=True, dynamic_shapes=any_size(x), verbose=False)
    return openvino.convert_model(folder / "net.onnx", extension=openvino_extensions())


def by_torchvision(net, x, _):
    return openvino.convert_model(to_torchvision(net), example_input=x)


def run(model, *inputs):
    # Where the processor can, OpenVINO would compute in bfloat16 by itself.
    compiled = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return np.array(compiled([x.numpy() for x in inputs])[0])


@pytest.mark.parametrize("road", [by_tracing, by_export, by_onnx, by_torchvision])
@pytest.mark.parametrize("rank", [1, 2])
def test_the_same_outputs_of_any_size(rank, road, tmp_path):
    if rank == 1 and road is by_torchvision:
        pytest.skip("torchvision has no 1-D")
    net, x, larger = four_layers(rank)
    openvino.save_model(road(net, x, tmp_path), tmp_path / "net.xml", compress_to_fp16=False)
    model = openvino.Core().read_model(tmp_path / "net.xml")  # with no rules
    assert sum(node.get_type_name() == "DeformableConvolution" for node in model.get_ops()) == 4
    for image in (x, larger):
        assert_close(run(model, image), net(image).detach(), "float32")


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("road", [by_tracing, by_export, by_onnx, by_torchvision])
def test_padding_modes(road, mode, tmp_path):
    net, x, larger = four_layers(2, padding_mode=mode)
    if (road, mode) == (by_onnx, "circular"):
        with pytest.raises(Exception, match=r"Unsupported padding mode: \[wrap\]"):
            road(net, x, tmp_path)
        return
    if (road, mode) == (by_export, "circular") and READS_LESS:
        with pytest.raises(Exception, match=UNREAD):
            road(net, x, tmp_path)
        return
    model = road(net, x, tmp_path)
    for image in (x, larger):
        assert_close(run(model, image), net(image).detach(), "float32")


@pytest.mark.parametrize("road", [by_tracing, by_export, by_onnx, by_torchvision])
def test_half_precision(road, tmp_path):
    net, x, larger = four_layers(2)
    net.half()
    if road is by_export and READS_LESS:
        with pytest.raises(Exception, match=UNREAD):
            road(net, x.half(), tmp_path)
        return
    found = run(road(net, x.half(), tmp_path), larger.half())
    expected = net(larger.half()).detach()
    # Four layers of float32 each, rounded between them; OpenVINO does not round.
    assert np.abs(found - expected.numpy()).max() < 8e-3 * expected.abs().max().item()


@pytest.mark.parametrize("road", ["the net", "a program", "an ONNX file"])
def test_attention(road, tmp_path):
    net, call, more, dynamic = attention()
    rules = openvino_extensions()
    if road == "the net":
        model = openvino.convert_model(net, example_input=call, extension=rules)
    elif road == "a program":
        model = openvino.convert_model(torch.export.export(net, call, dynamic_shapes=dynamic), extension=rules)
    else:
        torch.onnx.export(net, call, tmp_path / "net.onnx", dynamo=True, dynamic_shapes=dynamic, verbose=False)
        model = openvino.convert_model(tmp_path / "net.onnx")
    for inputs in (call, more):
        assert_close(run(model, *inputs), net(*inputs).detach(), "float32")


@pytest.mark.parametrize("exported", [False, True])
def test_attention_in_half_precision(exported):
    net, call, *_ = attention()
    net.half()
    call = tuple(tensor.half() for tensor in call)
    if exported and READS_LESS:
        with pytest.raises(Exception, match=UNREAD):
            openvino.convert_model(torch.export.export(net, call), extension=openvino_extensions())
        return
    given = (torch.export.export(net, call), {}) if exported else (net, {"example_input": call})
    found = run(openvino.convert_model(given[0], extension=openvino_extensions(), **given[1]), *call)
    expected = net(*call).detach().numpy()
    assert found.dtype == expected.dtype and np.abs(found - expected).max() < 8e-3 * np.abs(expected).max()


@pytest.mark.parametrize("road", [by_tracing, by_export])
@pytest.mark.parametrize(
    ("rank", "boundary", "masked"),
    [(1, "zeros", True), (2, "zeros", True), (2, "inside", False), (3, "zeros", True), (3, "inside", False)],
)
def test_aggregation(rank, boundary, masked, road, tmp_path):
    net, x, larger = aggregate(rank, boundary, masked)
    openvino.save_model(road(net, x, None), tmp_path / "net.xml", compress_to_fp16=False)
    model = openvino.Core().read_model(tmp_path / "net.xml")  # with no rules
    assert sum(node.get_type_name() == "GridSample" for node in model.get_ops()) == (rank < 3)
    for image in (x, larger):
        assert_close(run(model, image), net(image).detach(), "float32")


@pytest.mark.parametrize("rank", [2, 3])
def test_aggregation_in_half_precision(rank):
    net, x, larger = aggregate(rank)
    found = run(by_tracing(net.half(), x.half(), None), larger.half())
    expected = net(larger.half()).detach().numpy()
    assert found.dtype == expected.dtype and np.abs(found - expected).max() < 8e-3 * np.abs(expected).max()


def test_aggregation_from_an_onnx_file(tmp_path):
    net, x, larger = aggregate(2)
    model = by_onnx(net, x, tmp_path)
    for image in (x, larger):
        assert_close(run(model, image), net(image).detach(), "float32")
    net, x, _ = aggregate(3)
    torch.onnx.export(net, (x,), tmp_path / "volumes.onnx", dynamo=True, opset_version=20, verbose=False)
    with pytest.raises(Exception, match="GridSample"):  # of OpenVINO's own reader, for 2 axes
        openvino.convert_model(tmp_path / "volumes.onnx", extension=openvino_extensions())


class Both(nn.Module):
    """The layers of InternImage and of FlashInternImage, whose offsets are no longer 0."""

    def __init__(self):
        super().__init__()
        self.v3, self.v4 = DCNv3(16, group=2, center_feature_scale=True), DCNv4(16, group=2, remove_center=True)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, x):
        return self.v4(self.v3(x).flatten(1, 2), shape=(8, 10))


@pytest.mark.parametrize("road", ["the net", "a program", "an ONNX file"])
def test_internimages_layers(road, tmp_path):
    torch.manual_seed(0)
    net, x = Both().eval(), torch.rand(2, 8, 10, 16)
    given, how = net, {"example_input": x}
    if road == "a program":
        given, how = torch.export.export(net, (x,)), {}
    elif road == "an ONNX file":
        given, how = tmp_path / "net.onnx", {}
        torch.onnx.export(net, (x,), given, dynamo=True, verbose=False)
        session = pytest.importorskip("onnxruntime").InferenceSession(given, providers=["CPUExecutionProvider"])
        assert_close(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0], net(x).detach(), "float32")
    model = openvino.convert_model(given, extension=openvino_extensions(), **how)
    assert sum(node.get_type_name() == "GridSample" for node in model.get_ops()) == 2
    assert_close(run(model, x), net(x).detach(), "float32")


class Sum(nn.Module):
    def __init__(self, boundary):
        super().__init__()
        self.boundary = boundary

    def forward(self, x, offset):
        return deform_aggregate3d(x, offset, None, 2, padding=1, boundary=self.boundary)


@pytest.mark.parametrize("boundary", ["zeros", "inside"])
def test_aggregation_over_3_axes_far_outside_and_at_the_edge(boundary):
    """A corner of the map that is no number is not read by samples that lie outside and next to it."""
    torch.manual_seed(0)
    x, offset = torch.rand(2, 2, 3, 4, 5), torch.randint(-6, 7, (2, 24, 4, 5, 6)) / 2
    x[..., -1, -1, -1] = torch.nan
    offset[..., 0], offset[..., 1] = torch.inf, -3e38
    model = openvino.convert_model(Sum(boundary), example_input=(x, offset), extension=openvino_extensions())
    found, expected = torch.from_numpy(run(model, x, offset)), Sum(boundary)(x, offset)
    assert expected.isfinite().any() and not expected.isfinite().all() and (expected[..., 0] == 0).all()
    assert torch.equal(found.isfinite(), expected.isfinite())
    finite = expected.isfinite()
    assert_close(found[finite], expected[finite], "float32")


class Function(nn.Module):
    def __init__(self, **how):
        super().__init__()
        self.how = how

    def forward(self, x, offset, mask, weight):
        return deform_conv2d(x, offset, weight, padding=1, mask=mask, **self.how)


@pytest.mark.parametrize("exported", [False, True])
def test_the_function_with_every_tensor_an_input(exported):
    torch.manual_seed(0)
    inputs = torch.rand(2, 4, 8, 9), torch.randn(2, 36, 8, 9) * 3, torch.rand(2, 18, 8, 9), torch.rand(6, 2, 3, 3)
    for how in ({"groups": 2, "offset_groups": 2}, {}):
        function = Function(**how)
        program, keywords = (torch.export.export(function, inputs), {}) if exported else (function, {"example_input": inputs})
        if how:
            model = openvino.convert_model(program, extension=openvino_extensions(), **keywords)
            assert_close(run(model, *inputs), function(*inputs), "float32")
        else:
            text = HIDDEN if exported and HIDES_REASONS else "A call without `groups` or `offset_groups` cannot"
            with pytest.raises(Exception, match=text):
                openvino.convert_model(program, extension=openvino_extensions(), **keywords)


@pytest.mark.parametrize("given", ["", "b", "m", "bm"])
def test_onnx_nodes_with_nothing_but_defaults(given, tmp_path):
    torch.manual_seed(0)
    tensors = {
        "x": torch.rand(2, 4, 7, 6), "w": torch.rand(3, 4, 3, 3), "o": torch.randn(2, 18, 5, 4),
        "b": torch.rand(3), "m": torch.rand(2, 9, 5, 4),
    }  # fmt: skip
    bias, mask = (tensors[k] if k in given else None for k in "bm")
    expected = deform_conv2d(tensors["x"], tensors["o"], tensors["w"], bias, mask=mask)
    names = {"": ["x", "w", "o"], "b": ["x", "w", "o", "b"], "m": ["x", "w", "o", "", "m"], "bm": ["x", "w", "o", "b", "m"]}[
        given
    ]
    constants = [numpy_helper.from_array(tensors[k].numpy(), k) for k in "wb"]
    graph = helper.make_graph(
        [helper.make_node("DeformConv", names, ["y"])], "layer",
        [helper.make_tensor_value_info(k, TensorProto.FLOAT, tensors[k].shape) for k in "xom" if k in names],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, expected.shape)], constants,
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9), tmp_path / "net.onnx")
    model = openvino.convert_model(tmp_path / "net.onnx", extension=openvino_extensions())
    assert_close(run(model, *(tensors[k] for k in "xom" if k in names)), expected, "float32")


def test_offsets_far_outside_and_at_the_edge():
    torch.manual_seed(0)
    inputs = torch.rand(1, 2, 5, 6), torch.randint(-16, 17, (1, 18, 5, 6)) / 2, torch.rand(1, 9, 5, 6), torch.rand(3, 2, 3, 3)
    function = Function(groups=1, offset_groups=1)
    model = openvino.convert_model(function, example_input=inputs, extension=openvino_extensions())
    assert_close(run(model, *inputs), function(*inputs), "float32")


@pytest.mark.parametrize(
    ("layer", "x", "text"),
    [
        (
            DeformConv2d(4, 3, 3, boundary="inside"),
            torch.rand(1, 4, 6, 6),
            'boundary="inside" cannot be converted: OpenVINO\'s',
        ),
        (DeformConv3d(4, 3, 3), torch.rand(1, 4, 5, 5, 5), "A deformable convolution over 3 axes cannot be converted"),
    ],
    ids=["inside", "3-D"],
)
@pytest.mark.parametrize("exported", [False, True])
def test_what_openvino_cannot_do_is_refused(layer, x, text, exported):
    program, how = (torch.export.export(layer.eval(), (x,)), {}) if exported else (layer.eval(), {"example_input": x})
    with pytest.raises(Exception, match=HIDDEN if exported and HIDES_REASONS else text):
        openvino.convert_model(program, extension=openvino_extensions(), **how)


def test_the_operators_where_they_were_before_2025(monkeypatch):
    old_openvino.pretend(monkeypatch)
    net, x, larger = four_layers(1)
    assert_close(run(by_tracing(net, x, None), larger), net(larger).detach(), "float32")
    net, call, more, _ = attention()
    model = openvino.convert_model(net, example_input=call, extension=openvino_extensions())
    assert_close(run(model, *more), net(*more).detach(), "float32")


def test_without_the_rules_it_refuses():
    """What the rules are for; when this passes by itself they are not needed any more."""
    net, x, _ = four_layers(2)
    with pytest.raises(Exception, match="deformconv::deform_conv"):
        openvino.convert_model(net, example_input=x)


class Nothing:
    """A finder that finds no OpenVINO."""

    def find_spec(self, name, *_):
        if name == "openvino":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_openvino_is_missing(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "openvino"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Nothing(), *sys.meta_path])
    with pytest.raises(ModuleNotFoundError, match="openvino_extensions needs OpenVINO, which is not installed: pip install"):
        openvino_extensions()


def test_doctests():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = doctest.testmod(rules)
    assert result.failed == 0
    assert result.attempted > 5


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere OpenVINO leaves the signal stack alone")
def test_signals_have_a_stack_once_openvino_has_gone():
    """What tests/conftest.py sees to around every test, without which the next signal with a handler may end the process."""
    before = signal_stack.current().start
    with signal_stack.kept():
        first, second = openvino.Core(), openvino.Core()
        for core in (first, second):
            core.get_property("CPU", "FULL_DEVICE_NAME")  # loads the CPU plugin
        del core, first
        del second  # in this order OpenVINO puts the first one's stack back, which it has unmapped
    assert signal_stack.current().start == before
