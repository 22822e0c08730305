"""ONNX export: standard nodes, the same numbers in ONNX Runtime, and clear words where that cannot be."""

from __future__ import annotations

import warnings
from importlib import metadata

import pytest
import torch
from tests.tolerances import assert_close
from tests.torch.nets import aggregate, any_size, attention, two_layers
from torch import nn

from deformconv.errors import BackendError
from deformconv.torch import DeformConv2d, deform_conv2d
from deformconv.torch.conv import export as module

onnx = pytest.importorskip("onnx")
# Older ones have no DeformConv, and there is no newer one for Python 3.10.
onnxruntime = pytest.importorskip("onnxruntime", minversion="1.25")
pytest.importorskip("onnxscript")

# What PyTorch's exporter and onnxscript warn of on their own account.
pytestmark = [
    pytest.mark.slow,  # compilers and exporters take seconds to begin
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def export(net, x, **how):
    return torch.onnx.export(net, (x,), dynamo=True, dynamic_shapes=any_size(x), verbose=False, **how).model_proto


def run(model, x):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


@pytest.mark.parametrize("opset", [None, 19, 22])
@pytest.mark.parametrize("rank", [1, 2])
def test_standard_nodes_that_onnx_runtime_runs(rank, opset):
    net, x, larger = two_layers(rank)
    model = export(net, x, **({} if opset is None else {"opset_version": opset}))
    onnx.checker.check_model(model, full_check=True)
    nodes = [node for node in model.graph.node if node.op_type == "DeformConv"]
    assert [node.domain for node in nodes] == ["", ""]
    if opset is not None:
        assert [entry.version for entry in model.opset_import if entry.domain == ""] == [opset]
    for image in (x, larger):
        assert_close(run(model, image), net(image).detach(), "float32")


def run_all(model, inputs):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    given = {one.name: x.numpy() for one, x in zip(session.get_inputs(), inputs, strict=True)}
    return torch.from_numpy(session.run(None, given)[0])


@pytest.mark.parametrize("opset", [None, 18])
def test_attention_is_standard_nodes(opset):
    net, call, more, dynamic = attention()
    how = {} if opset is None else {"opset_version": opset}
    model = torch.onnx.export(net, call, dynamo=True, dynamic_shapes=dynamic, verbose=False, **how).model_proto
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""}
    assert sum(node.op_type == "GridSample" for node in model.graph.node) == len(net.levels)
    for inputs in (call, more):
        assert_close(run_all(model, inputs), net(*inputs).detach(), "float32")


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_attention_in_half_precision(half):
    net, call, *_ = attention()
    net.to(half)
    call = tuple(tensor.to(half) for tensor in call)
    model = torch.onnx.export(net, call, dynamo=True, verbose=False).model_proto
    onnx.checker.check_model(model, full_check=True)
    if half is torch.float16:
        expected = net(*call)
        assert (run_all(model, call) - expected).abs().max() < 4e-3 * expected.abs().max()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_attention_in_the_older_exporter(tmp_path):
    net, call, *_ = attention()
    with pytest.raises(BackendError, match=r"dynamo=False\) cannot export .* opset_version=16 or newer"):
        torch.onnx.export(net, call, tmp_path / "net.onnx", dynamo=False)


@pytest.mark.parametrize(("rank", "boundary", "masked"), [(1, "inside", False), (2, "zeros", True), (3, "inside", True)])
def test_aggregation_is_standard_nodes(rank, boundary, masked):
    net, x, larger = aggregate(rank, boundary, masked)
    if rank == 2:
        model, images = export(net, x), (x, larger)
    else:  # of one size, which takes a fraction of the time
        model, images = torch.onnx.export(net, (x,), dynamo=True, opset_version=20, verbose=False).model_proto, (x,)
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""}
    assert sum(node.op_type == "GridSample" for node in model.graph.node) == 1
    for image in images:
        assert_close(run(model, image), net(image).detach(), "float32")


def test_aggregation_of_volumes_needs_a_newer_opset():
    net, x, _ = aggregate(3)
    with pytest.raises(Exception, match=r"for ONNX opset 19, which has no GridSample over 3 axes; expected .*opset_version=20"):
        torch.onnx.export(net, (x,), dynamo=True, opset_version=19, verbose=False)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision(half):
    net, x, larger = two_layers(2)
    net.to(half)
    model = export(net, x.to(half))
    onnx.checker.check_model(model, full_check=True)
    assert sum(node.op_type == "DeformConv" for node in model.graph.node) == 2
    if half is torch.float16:
        # Two layers of float32 each, rounded between them.
        assert (run(model, larger.half()) - net(larger.half())).abs().max() < 4e-3 * net(larger.half()).abs().max()


@pytest.mark.parametrize("opset", [18, 17])
def test_an_opset_without_the_operator(opset):
    net, x, _ = two_layers(2)
    text = rf"This export is for ONNX opset {opset}, which has no DeformConv; expected .*opset_version=19\) or newer"
    with pytest.raises(Exception, match=text) as raised:
        export(net, x, opset_version=opset)
    assert type(raised.value.__cause__).__name__ == "BackendError"


def test_the_other_boundary():
    net, x, _ = two_layers(2, boundary="inside")
    with pytest.raises(Exception, match=r'boundary="inside" cannot be exported: ONNX\'s DeformConv knows'):
        export(net, x)


def test_volumes():
    net, x, _ = two_layers(3)
    with pytest.warns(UserWarning, match="node over 3 axes.*ONNX Runtime runs DeformConv over 2 axes only"):
        model = export(net, x)
    onnx.checker.check_model(model, full_check=True)
    assert sum(node.op_type == "DeformConv" for node in model.graph.node) == 2


def test_an_input_without_a_batch():
    net, x, _ = two_layers(2)
    exported = torch.onnx.export(net, (x[0],), dynamo=True, verbose=False)
    assert_close(run(exported.model_proto, x[0]), net(x[0]).detach(), "float32")


@pytest.mark.parametrize(
    ("package", "version", "warns"),
    [
        ("onnxruntime", "1.24.4", True),
        ("onnxruntime-gpu", "1.9.0", True),
        ("onnxruntime", "1.25.0", False),
        ("onnxruntime", "2.0.0rc1", False),
        (None, None, False),
    ],
)
def test_an_older_onnx_runtime_is_told_of_once(package, version, warns, monkeypatch):
    def installed(name):
        if name != package:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(module.metadata, "version", installed)
    monkeypatch.setattr(module, "_warned_of_runtime", False)
    net, x, _ = two_layers(2)
    for again in (False, True):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            export(net, x)
        texts = [str(warning.message) for warning in caught if "DeformConv" in str(warning.message)]
        assert len(texts) == (warns and not again)
        if texts:
            assert texts == [
                f"This export has a DeformConv node, and the installed {package} is {version}; expected 1.25 or newer to run "
                "it: older ones answer NOT_IMPLEMENTED. The file itself is as good with any."
            ]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["layer", "function", "one image"])
def test_the_older_exporter(kind, tmp_path):
    x, offset, weight = torch.rand(1, 3, 8, 8), torch.zeros(1, 18, 6, 6), torch.rand(4, 3, 3, 3)
    net, arguments = DeformConv2d(3, 4, 3), (x,)
    if kind == "function":
        net, arguments = Function(weight), (x, offset)
    elif kind == "one image":
        arguments = (x[0],)
    with pytest.raises(BackendError) as raised:
        torch.onnx.export(net, arguments, tmp_path / "net.onnx", dynamo=False)
    assert str(raised.value) == (
        "torch.onnx.export(..., dynamo=False) cannot export deformconv's operators; expected dynamo=True, with "
        "opset_version=19 or newer."
    )


class Function(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, x, offset):
        return deform_conv2d(x, offset, self.weight)
