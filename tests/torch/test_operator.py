"""The registered operators: what opcheck asks of them, and what compilers, exporters and tracers make of them."""

from __future__ import annotations

import copy
import io
import math
import shutil

import pytest
import torch
from tests.ops.conv.cases import CASES, Case
from tests.tolerances import assert_close
from tests.torch.tensors import FUNCTIONS, call_of
from torch._dynamo.exc import TorchRuntimeError, Unsupported
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from deformconv import ShapeError
from deformconv.ops.conv.spec import GRADIENTS
from deformconv.torch import DeformConv1d, DeformConv2d, DeformConv3d, deform_conv2d
from deformconv.torch.conv.functional import DEFORM_CONV

pytestmark = [
    pytest.mark.slow,  # compilers and exporters take seconds to begin
    # PyTorch's own scripts, used by its forward-mode rules.
    pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
    # opcheck looks at the .grad of what is no leaf.
    pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning"),
]

SMALL = {
    1: Case("1-D", (5,), (3,), in_channels=2, out_channels=2, padding=1, offset_groups=2),
    2: Case("2-D", (4, 3), (2, 1), in_channels=2, out_channels=2, stride=(2, 1), padding=1, groups=2),
    3: Case("3-D", (2, 3, 2), (1, 2, 2), batch=1, in_channels=2, out_channels=1),
}


@pytest.fixture(autouse=True)
def forget_what_was_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def arguments_of(case, requires_grad, dtype="float64"):
    """The registered operator's arguments, and a gradient of its output."""
    _, arrays, _, grad_output = call_of(case, dtype, requires_grad=requires_grad)
    rank = len(case.size)
    stride = case.stride if isinstance(case.stride, tuple) else (case.stride,) * rank
    parameters = [list(stride), [case.padding] * 2 * rank, [case.dilation] * rank]
    parameters += [case.groups, case.offset_groups, case.boundary, None]
    return [arrays[name] for name in (*GRADIENTS,)], parameters, grad_output


@pytest.mark.parametrize("version", ["v1-inside", "v2-zeros"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_opcheck(rank, version):
    masked, boundary = version.startswith("v2"), version[3:]
    case = SMALL[rank].but(masked=masked, boundary=boundary)
    operands, parameters, grad_output = arguments_of(case, requires_grad=True)
    opcheck(DEFORM_CONV.forward_op, (*operands, *parameters))
    del operands[3]
    opcheck(DEFORM_CONV.backward_op, (grad_output, *operands, *parameters, [True] * 4 + [masked]))
    plain = [t if t is None else t.detach() for t in operands]
    opcheck(DEFORM_CONV.backward_op, (grad_output, *plain, *parameters, [True] + [False] * 4))


@pytest.mark.parametrize("form", ["channels last", "bfloat16 beside float32", "portable", "strided"])
def test_opcheck_of_other_tensors(form):
    (x, offset, weight, bias, mask), parameters, g = arguments_of(SMALL[2], requires_grad=False)
    if form == "channels last":
        x, offset, g, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, offset, g, weight))
    elif form == "bfloat16 beside float32":
        offset, mask = offset.float(), mask.float()
        x, weight, bias, g = (t.bfloat16() for t in (x, weight, bias, g))
    elif form == "portable":
        parameters[-1] = "portable"
    else:
        x, g = x.transpose(2, 3).contiguous().transpose(2, 3), g[:, :1].expand(g.shape)
    opcheck(DEFORM_CONV.forward_op, (x, offset, weight, bias, mask, *parameters))
    opcheck(DEFORM_CONV.backward_op, (g, x, offset, weight, mask, *parameters, [True] * 5))


def nets():
    """Nets of our layers for 1, 2 and 3 axes, an input and a larger one."""
    torch.manual_seed(0)
    for layer, size, larger in (
        (DeformConv1d, (9,), (14,)),
        (DeformConv2d, (8, 7), (11, 13)),
        (DeformConv3d, (4, 5, 6), (5, 6, 8)),
    ):
        net = torch.nn.Sequential(layer(3, 4, 3, padding=1), torch.nn.ReLU(), layer(4, 2, 2, stride=2, modulated=False))
        for part in net[::2]:
            torch.nn.init.normal_(part.offset_conv.weight, std=0.3)
        yield net.double(), torch.rand(2, 3, *size).double(), torch.rand(5, 3, *larger).double()


NETS = list(nets())


class Unpredicted(torch.nn.Module):
    """A layer whose offsets and mask are channels of its input, so that no product in it is PyTorch's."""

    def __init__(self, rank):
        super().__init__()
        kernel = {1: (3,), 2: (3, 3), 3: (1, 1, 3)}[rank]
        self.function, self.padding = FUNCTIONS[rank], tuple(k // 2 for k in kernel)
        self.offsets = rank * math.prod(kernel)
        self.channels = self.offsets + math.prod(kernel)
        self.weight = torch.nn.Parameter(0.2 * torch.randn(self.channels, self.channels, *kernel))
        self.bias = torch.nn.Parameter(torch.randn(self.channels))

    def forward(self, input):
        offset, mask = input[:, : self.offsets], input[:, self.offsets :]
        return self.function(input, offset, self.weight, self.bias, padding=self.padding, mask=mask)


def unpredicted_nets():
    """As `nets`, of layers that are ours alone: their bits are the same through every door."""
    torch.manual_seed(0)
    for rank, (_, x, larger) in enumerate(NETS, 1):
        net = torch.nn.Sequential(Unpredicted(rank), torch.nn.ReLU(), Unpredicted(rank)).double()
        yield net, *(torch.rand(t.shape[0], net[0].channels, *t.shape[2:]).double() for t in (x, larger))


RANKS = ["1-D", "2-D", "3-D"]
UNPREDICTED = list(unpredicted_nets())
of_nets = pytest.mark.parametrize(
    ("net", "x", "larger"), NETS + UNPREDICTED, ids=[*RANKS, *(f"{rank}, unpredicted" for rank in RANKS)]
)


def assert_agree(net, found, expected):
    """Bit for bit where all products are ours; a predictor's convolution is PyTorch's, which promises no bits."""
    for ours, wanted in zip(found, expected, strict=True):
        assert_close(ours.detach(), wanted.detach(), "float64")
        if isinstance(net[0], Unpredicted):
            assert torch.equal(ours, wanted)


def gradients(net, x):
    x = x.clone().requires_grad_()
    y = net(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *net.parameters()])]


@pytest.mark.parametrize("dynamic", [False, True])
@of_nets
def test_compiled_and_eager_agree(net, x, larger, dynamic):
    compiled = torch.compile(copy.deepcopy(net), backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for image in (x, larger):
        assert_agree(net, gradients(compiled, image), gradients(net, image))
        with torch.no_grad():
            assert_agree(net, [compiled(image)], [net(image)])


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler here")
def test_inductor(tmp_path, monkeypatch):
    """The default compiler, which writes C++ around our operators."""
    # It keeps what it compiled, and takes it for other vector instructions as well, with wrong results.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    net, x, _ = NETS[1]
    compiled = torch.compile(copy.deepcopy(net), fullgraph=True)
    for found, expected in zip(gradients(compiled, x), gradients(net, x), strict=True):
        assert_close(found, expected, "float64")


def test_a_new_batch_size_is_not_compiled_again():
    net, _, _ = NETS[1]
    for dynamic, counts in ((None, [1, 2, 2, 2]), (True, [1, 1, 1, 1])):
        torch._dynamo.reset()
        counter, found = CompileCounterWithBackend("aot_eager"), []
        compiled = torch.compile(copy.deepcopy(net), backend=counter, fullgraph=True, dynamic=dynamic)
        for batch in (5, 6, 9, 4):
            compiled(torch.rand(batch, 3, 8, 7).double()).sum().backward()
            found.append(counter.frame_count)
        assert found == counts


@pytest.mark.parametrize("padding", [1, (1, 1), "same", ((1, 1), (1, 1))], ids=str)
def test_compile_of_the_function(padding):
    x, offset, weight = torch.rand(2, 3, 6, 5), torch.randn(2, 18, 6, 5), torch.rand(4, 3, 3, 3)
    compiled = torch.compile(deform_conv2d, backend="aot_eager", fullgraph=True)
    expected = deform_conv2d(x, offset, weight, padding=padding)
    assert torch.equal(compiled(x, offset, weight, padding=padding), expected)
    assert torch.equal(compiled(x[0], offset[0], weight, padding=padding), expected[0])


def test_compile_with_a_changing_parameter():
    x, weight = torch.rand(2, 3, 6, 5), torch.rand(4, 3, 3, 3)
    compiled = torch.compile(deform_conv2d, backend="aot_eager", fullgraph=True, dynamic=True)
    for padding in (1, 2, 3):
        offset = torch.randn(2, 18, 4 + 2 * padding, 3 + 2 * padding)
        assert torch.equal(compiled(x, offset, weight, padding=padding), deform_conv2d(x, offset, weight, padding=padding))


class TestErrors:
    """PyTorch wraps errors of compiled code; our sentence is in them."""

    def test_of_shapes(self):
        x, offset, weight = torch.rand(1, 3, 8, 8), torch.zeros(1, 27, 8, 8), torch.rand(4, 3, 3, 3)
        with pytest.raises(TorchRuntimeError, match=r"for v2 pass the last 9 as `mask`"):
            torch.compile(deform_conv2d, backend="eager", fullgraph=True)(x, offset, weight, padding=1)

    def test_of_dtypes(self):
        x, offset, weight = torch.rand(1, 3, 8, 8), torch.zeros(1, 18, 8, 8).double(), torch.rand(4, 3, 3, 3)
        with pytest.raises(TorchRuntimeError, match="`offset` is float64 and `input` is float32"):
            torch.compile(deform_conv2d, backend="eager", fullgraph=True)(x, offset, weight, padding=1)

    def test_of_ranks_and_parameters(self):
        x, offset, weight = torch.rand(1, 3, 8, 8), torch.zeros(1, 18, 8, 8), torch.rand(4, 3, 3, 3)
        for arguments, padding, text in (
            ((x, offset, weight[0]), 1, "`weight` has 3 axes"),
            ((x, offset, weight), -1, "`padding` is -1"),
        ):
            torch._dynamo.reset()
            with pytest.raises((TorchRuntimeError, Unsupported)):
                torch.compile(deform_conv2d, backend="eager", fullgraph=True)(*arguments, padding=padding)
            with pytest.raises(ShapeError, match=text):  # a graph may break: PyTorch runs the rest eagerly
                torch.compile(deform_conv2d, backend="eager")(*arguments, padding=padding)

    @pytest.mark.parametrize("dynamic", [None, True])
    def test_of_a_layers_input(self, dynamic):
        layer = DeformConv2d(3, 4, 3, padding=1)
        for x, text in (
            (torch.rand(1, 5, 8, 8), r"`input` has 5 channels, shape \(1, 5, 8, 8\); this layer has in_channels=3\."),
            (torch.rand(5, 8, 8), r"`input` has 5 channels, .*in_channels=3\..*one image without a batch axis"),
            (torch.rand(1, 3, 0, 8), "`weight` has a kernel of size 3x3; along height it spans"),
        ):
            torch._dynamo.reset()
            # With sizes that are symbols a compiler cannot put our sentence together, and says so.
            with pytest.raises((TorchRuntimeError, Unsupported), match=None if dynamic else f"(?s){text}"):
                torch.compile(layer, backend="eager", fullgraph=True, dynamic=dynamic)(x)
            with pytest.raises(ShapeError, match=text):
                torch.compile(layer, backend="eager", dynamic=dynamic)(x)


@pytest.mark.parametrize("strict", [False, True])
@of_nets
def test_export_with_any_batch_and_size(net, x, larger, strict):
    sizes = {axis: Dim.AUTO for axis in range(x.ndim) if axis != 1}
    exported = torch.export.export(net, (x,), dynamic_shapes={"input": sizes}, strict=strict)
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for image in (x, larger):
        assert_agree(net, [loaded(image)], [net(image)])


@pytest.mark.parametrize(("net", "x"), [NETS[1][:2], UNPREDICTED[1][:2]], ids=["predicted", "unpredicted"])
def test_export_to_training_and_decomposed(net, x):
    exported = torch.export.export(net, (x,))
    assert_agree(net, gradients(exported.module(), x), gradients(net, x))
    assert_agree(net, [exported.run_decompositions().module()(x)], [net(x)])
    operators = [node.target for node in exported.graph.nodes if node.target is DEFORM_CONV.forward_op]
    assert len(operators) == 2


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
@of_nets
def test_jit_trace_keeps_sizes_free(net, x, larger):
    traced = torch.jit.trace(net, (x,))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    kinds = [node.kind() for node in loaded.inlined_graph.nodes()]
    assert kinds.count("deformconv::deform_conv") == 2
    for image in (x, larger):
        found, expected = gradients(loaded, image), gradients(net, image)
        assert_agree(net, found[:1], expected[:1])
        for ours, wanted in zip(found, expected, strict=True):  # sums of gradients go in another order
            assert_close(ours, wanted, "float64")


@of_nets
def test_make_fx_records_forward_and_backward(net, x, larger):
    def step(x):
        return gradients(net, x)

    traced = make_fx(step)(x)
    targets = [node.target for node in traced.graph.nodes]
    assert targets.count(DEFORM_CONV.forward_op) == targets.count(DEFORM_CONV.backward_op) == 2
    assert_agree(net, traced(x), step(x))


def test_compiled_autograd():
    """Backward passes of eager graphs, compiled."""
    function, arrays, keywords, grad_output = call_of(requires_grad=True)
    tensors = list(arrays.values())
    expected = torch.autograd.grad(function(**arrays, **keywords), tensors, grad_output)
    y = function(**arrays, **keywords)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        y.backward(grad_output)
    assert all(torch.equal(t.grad, wanted) for t, wanted in zip(tensors, expected, strict=True))


@pytest.mark.parametrize(("net", "x"), [NETS[1][:2], UNPREDICTED[1][:2]], ids=["predicted", "unpredicted"])
def test_compile_with_checkpointing(net, x):
    compiled = torch.compile(lambda x: checkpoint(net, x, use_reentrant=False), backend="aot_eager", fullgraph=True)
    x = x.clone().requires_grad_()
    found = torch.autograd.grad(compiled(x).square().sum(), x)[0]
    assert_agree(net, [found], [torch.autograd.grad(net(x).square().sum(), x)[0]])


def test_make_fx_with_symbols():
    def function(x, offset, weight):
        return deform_conv2d(x, offset, weight, padding=1)

    weight = torch.rand(4, 3, 3, 3)
    traced = make_fx(function, tracing_mode="symbolic")(torch.rand(2, 3, 6, 5), torch.randn(2, 18, 6, 5), weight)
    x, offset = torch.rand(3, 3, 8, 9), torch.randn(3, 18, 8, 9)
    assert torch.equal(traced(x, offset, weight), function(x, offset, weight))


@pytest.mark.parametrize("case", [case for case in CASES if case.batch], ids=lambda case: case.name)
def test_fake_tensors_have_the_real_ones_shapes(case):
    function, arrays, keywords, _ = call_of(case, requires_grad=True)
    real = function(**arrays, **keywords)
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = {name: None if t is None else mode.from_tensor(t) for name, t in arrays.items()}
        fake = function(**fakes, **keywords)
        leaves = [t for t in fakes.values() if t is not None]
        found = torch.autograd.grad(fake.sum(), leaves)
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)
    assert [g.shape for g in found] == [t.shape for t in leaves]


def test_operations_are_counted_as_a_convolutions():
    x, weight = torch.rand(2, 4, 6, 6, requires_grad=True), torch.rand(8, 4, 3, 3, requires_grad=True)
    offset, totals = torch.zeros(2, 18, 6, 6), []
    for call in (lambda: deform_conv2d(x, offset, weight, padding=1), lambda: torch.conv2d(x, weight, padding=1)):
        with FlopCounterMode(display=False) as counter:
            call().sum().backward()
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] > 0


def test_the_registered_operator_has_derivatives_of_every_order():
    operands, parameters, _ = arguments_of(SMALL[2].but(padding=0), requires_grad=True)

    def call(*operands):
        return torch.ops.deformconv.deform_conv(*operands, *parameters)

    assert torch.autograd.gradcheck(call, operands)
    assert torch.autograd.gradgradcheck(call, operands)
    with pytest.raises(ShapeError, match="`bias` has shape"):
        torch.ops.deformconv.deform_conv(*operands[:3], operands[3][:1], operands[4], *parameters)
