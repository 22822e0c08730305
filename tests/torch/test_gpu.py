"""The GPU kernels from PyTorch, in Triton's interpreter: memory formats, half precision, odd offsets, registration.

The interpreter runs the programs one after the other, and knows neither registers nor tensor cores. Where it computes something
else than a GPU, the test that touches it says so.
"""

from __future__ import annotations

import pytest
import torch
from tests.ops.conv.cases import Case, make
from tests.ops.conv.suite import in_float64, reference_backward
from tests.tolerances import TOLERANCE, assert_close, error
from tests.torch.hostile import OFFSETS, spoiled
from tests.torch.tensors import FUNCTIONS, PLAIN, call_of, keywords, tensors
from tests.torch.test_layouts import FORMS, FORMS_OF_MEMORY, LAST
from tests.torch.test_operator import arguments_of
from torch import nn
from torch.library import opcheck

import deformconv
from deformconv.ops.conv import reference
from deformconv.ops.conv.spec import GRADIENTS
from deformconv.torch import deform_conv2d
from deformconv.torch.conv.functional import DEFORM_CONV

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, of the NaN that the interpreter computes with
    # opcheck looks at the .grad of what is no leaf.
    pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning"),
    # PyTorch's own scripts, used by its forward-mode rules.
    pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
]

TINY = {
    1: Case("1-D", (5,), (3,), in_channels=2, out_channels=2, padding=1, offset_groups=2),
    2: Case("2-D", (4, 3), (2, 1), in_channels=2, out_channels=2, stride=(2, 1), padding=1, groups=2),
    3: Case("3-D", (2, 3, 2), (1, 2, 2), batch=1, in_channels=2, out_channels=1),
}
by_rank = pytest.mark.parametrize("rank", [1, 2, 3])
HALF = [torch.float16, torch.bfloat16]
halves = pytest.mark.parametrize("half", HALF, ids=str)


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def results(function, arrays, keywords, grad_output, backend="gpu"):
    """The output, and the gradients of what was given."""
    given = {name: None if t is None else t.detach().requires_grad_() for name, t in arrays.items()}
    y = function(**given, **keywords, backend=backend)
    return [y.detach(), *torch.autograd.grad(y, [t for t in given.values() if t is not None], grad_output)]


@pytest.fixture(autouse=True)
def forget_what_was_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class TestRegistered:
    def test_opcheck(self):
        """Of one rank, since it calls the kernels some forty times."""
        operands, parameters, grad_output = arguments_of(TINY[2], requires_grad=True)
        parameters[-1] = "gpu"
        opcheck(DEFORM_CONV.forward_op, (*operands, *parameters))
        del operands[3]
        opcheck(DEFORM_CONV.backward_op, (grad_output, *operands, *parameters, [True] * 5))

    @pytest.mark.parametrize("form", ["channels last", "bfloat16 beside float32", "strided"])
    def test_opcheck_of_other_tensors(self, form):
        (x, offset, weight, bias, mask), parameters, g = arguments_of(TINY[2], requires_grad=False)
        parameters[-1] = "gpu"
        if form == "channels last":
            x, offset, g, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, offset, g, weight))
        elif form == "bfloat16 beside float32":
            offset, mask = offset.float(), mask.float()
            x, weight, bias, g = (t.bfloat16() for t in (x, weight, bias, g))
        else:
            x, g = x.transpose(2, 3).contiguous().transpose(2, 3), g[:, :1].expand(g.shape)
        opcheck(DEFORM_CONV.forward_op, (x, offset, weight, bias, mask, *parameters))
        opcheck(DEFORM_CONV.backward_op, (g, x, offset, weight, mask, *parameters, [True] * 5))

    def test_compiled(self):
        function, arrays, keywords, grad_output = call_of(FORMS[2])
        expected = results(function, arrays, keywords, grad_output)
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        assert all(map(torch.equal, results(compiled, arrays, keywords, grad_output), expected))

    def test_exported(self):
        class Net(nn.Module):
            def forward(self, x, offset, weight):
                return deform_conv2d(x, offset, weight, padding=1, backend="gpu")

        arguments = torch.rand(2, 3, 6, 5), torch.randn(2, 18, 6, 5), torch.rand(4, 3, 3, 3)
        exported = torch.export.export(Net(), arguments)
        assert DEFORM_CONV.forward_op in [node.target for node in exported.graph.nodes]
        assert torch.equal(exported.module()(*arguments), Net()(*arguments))


class TestDerivatives:
    @pytest.mark.parametrize("boundary", ["zeros", "inside"])
    @by_rank
    def test_gradcheck(self, rank, boundary):
        """Along one random direction: each number apart would take hundreds of calls."""
        case = TINY[rank].but(boundary=boundary)
        function, arrays, keywords, _ = call_of(case, away_from_kinks=True, requires_grad=True)

        def call(*given):
            return function(**dict(zip(arrays, given, strict=True)), **keywords, backend="gpu")

        assert torch.autograd.gradcheck(call, list(arrays.values()), fast_mode=True)

    def test_second_derivatives(self):
        """Of PyTorch's own operations, whichever backend computed the first ones."""
        function, arrays, keywords, _ = call_of(TINY[2], away_from_kinks=True, requires_grad=True)
        given = list(arrays.values())

        def second(backend):
            y = function(**arrays, **keywords, backend=backend)
            first = torch.autograd.grad(y.square().sum(), given, create_graph=True)
            return [y, *first, *torch.autograd.grad(sum(g.square().sum() for g in first), given)]

        for found, expected in zip(second("gpu"), second("portable"), strict=True):
            assert_close(found.detach(), expected.detach(), "float64")

    def test_vmap_is_a_loop(self):
        function, arrays, keywords, _ = call_of(TINY[2])
        stacked = [torch.stack([t, 0.5 * t]) for t in arrays.values()]

        def call(*given, backend="gpu"):
            return function(**dict(zip(arrays, given, strict=True)), **keywords, backend=backend)

        mapped = torch.func.vmap(call)(*stacked)
        for number, one in enumerate(mapped):
            assert_close(one, call(*(t[number] for t in stacked), backend="portable"), "float64")

    def test_only_what_requires_a_gradient_gets_one(self):
        function, arrays, keywords, grad_output = call_of(FORMS[2])
        for name in GRADIENTS:
            leaf = arrays[name].detach().requires_grad_()
            y = function(**arrays | {name: leaf}, **keywords, backend="gpu")
            found = torch.autograd.grad(y, leaf, grad_output)[0]
            expected = results(function, arrays, keywords, grad_output, "portable")[1 + list(arrays).index(name)]
            assert_close(found, expected, "float64", name)


class TestLayouts:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("rank", [2, 3])
    def test_channels_last_in_channels_last_out(self, rank, dtype):
        form = LAST[rank]
        function, arrays, keywords, grad_output = call_of(FORMS[rank])
        plain = {name: t.to(dtype) for name, t in arrays.items()}
        last = {n: t.contiguous(memory_format=form) if t.ndim > 1 else t for n, t in plain.items()}
        grad_output = grad_output.to(dtype)
        expected = results(function, plain, keywords, grad_output)
        found = results(function, last, keywords, grad_output.contiguous(memory_format=form))
        formats = dict(zip(("output", *arrays), found, strict=True))
        for name, ours, wanted in zip(formats, found, expected, strict=True):
            assert_close(ours.double(), wanted.double(), name_of(dtype), name)
            assert wanted.is_contiguous(), name
            if name in ("output", "input", "weight"):
                assert ours.is_contiguous(memory_format=form), name

    @pytest.mark.parametrize("form", FORMS_OF_MEMORY)
    def test_strides_do_not_matter(self, form):
        function, arrays, keywords, grad_output = call_of(FORMS[2])
        odd = {name: FORMS_OF_MEMORY[form](t) for name, t in (arrays | {"grad_output": grad_output}).items()}
        plain = {name: t.clone(memory_format=torch.contiguous_format) for name, t in odd.items()}
        found, expected = (
            results(function, {name: t[name] for name in arrays}, keywords, t["grad_output"]) for t in (odd, plain)
        )
        for name, ours, wanted in zip(("output", *arrays), found, expected, strict=True):
            assert_close(ours, wanted, "float64", name)

    def test_a_layer_without_a_batch(self):
        function, arrays, keywords, grad_output = call_of(FORMS[2].but(batch=1))
        expected = results(function, arrays, keywords, grad_output)
        one = {name: t[0] if name in ("input", "offset", "mask") else t for name, t in arrays.items()}
        for name, ours, wanted in zip(
            ("output", *one), results(function, one, keywords, grad_output[0]), expected, strict=True
        ):
            assert torch.equal(ours, wanted[0] if name in ("output", "input", "offset", "mask") else wanted), name

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
    @by_rank
    def test_a_batch_of_no_images(self, rank, dtype):
        function, arrays, keywords, grad_output = call_of(TINY[rank].but(batch=0))
        arrays = {name: t.to(dtype) for name, t in arrays.items()}
        y, *gradients = results(function, arrays, keywords, grad_output.to(dtype))
        assert y.shape == grad_output.shape and y.dtype == dtype
        for gradient, tensor in zip(gradients, arrays.values(), strict=True):
            assert gradient.shape == tensor.shape and gradient.dtype == dtype
            assert not gradient.any()


class TestPrecision:
    """Triton's own interpreter is wrong in bfloat16 (see tests/interpreted.py). That tensor cores multiply is seen in compiled
    code alone, and that they are right on a GPU.
    """

    @halves
    @pytest.mark.parametrize("mixed", [False, True], ids=["half", "mixed"])
    def test_half_precision_is_near_float64(self, half, mixed):
        function, arrays, keywords, grad_output = call_of(PLAIN, "float32")
        coarse = {n: t.to(half) if not mixed or n in ("input", "weight", "bias") else t for n, t in arrays.items()}
        found = results(function, coarse, keywords, grad_output.to(half))
        exact = {n: t.double() for n, t in coarse.items()}
        expected = results(function, exact, keywords, grad_output.to(half).double(), "portable")
        for name, ours, wanted in zip(("output", *coarse), found, expected, strict=True):
            assert ours.dtype == (half if name == "output" else coarse[name].dtype), name
            most = TOLERANCE[name_of(half)] * (1 if name == "output" else 2)
            assert error(ours.double(), wanted) <= most, name

    @halves
    def test_the_gain_of_float32_offsets(self, half):
        """bfloat16 knows an offset of 20 to 0.125 pixels, and puts 20.06 at 20: on a slope that is seen."""
        x = torch.arange(32.0).expand(1, 1, 8, 32)[..., :24]
        weight, offset = torch.ones(1, 1, 1, 1), torch.zeros(1, 2, 8, 24)
        offset[:, 1] = -16.06
        exact = deform_conv2d(x, offset, weight, backend="portable")[..., 18:]
        fine = deform_conv2d(x.to(half), offset, weight.to(half), backend="gpu")[..., 18:]
        assert (fine - exact).abs().max() <= exact.max() * torch.finfo(half).eps / 2

    @halves
    def test_autocast(self, half):
        function, arrays, keywords, grad_output = call_of(PLAIN, "float32", requires_grad=True)
        with torch.autocast("cpu", dtype=half):
            y = function(**arrays, **keywords, backend="gpu")
        assert y.dtype == half
        coarse = ("input", "weight", "bias")
        cast = {name: t.detach().to(half) if name in coarse else t.detach() for name, t in arrays.items()}
        assert torch.equal(y, function(**cast, **keywords, backend="gpu"))
        y.backward(grad_output.to(half))
        assert all(t.grad.dtype == torch.float32 for t in arrays.values())

    def test_explain_says_what_it_computes_in(self):
        _, arrays, keywords, _ = call_of(PLAIN, "float32")
        for half in HALF:
            coarse = {n: t.to(half) if n in ("input", "weight", "bias") else t for n, t in arrays.items()}
            lines = deformconv.explain(**coarse, **keywords, backend="gpu").splitlines()
            assert f"{name_of(half)}, torch on cpu" in lines[0]
            assert lines[1] == "forward: gpu"


class TestOddOffsets:
    """A float that is no int32 becomes another number on each kind of machine: the kernels must not make an integer of it, and
    the interpreter refuses to.
    """

    @pytest.mark.parametrize("kind", OFFSETS)
    @pytest.mark.parametrize("boundary", ["zeros", "inside"])
    def test_against_the_definition(self, kind, boundary):
        case = Case("2-D", (6, 5), (2, 3), padding=1, groups=2, offset_groups=2, boundary=boundary)
        dtype = "float32" if boundary == "zeros" else "float64"
        call = make(case, dtype)
        call = call.but(offset=spoiled(call.offset, OFFSETS[kind]))
        found = results(FUNCTIONS[2], tensors(call), keywords(case), torch.from_numpy(call.grad_output))
        expected = [in_float64(call, reference.forward), *in_float64(call, reference_backward)]
        for name, ours, wanted in zip(("output", *GRADIENTS), found, expected, strict=True):
            assert_close(ours, wanted, dtype, name)

    @halves
    def test_beside_half_precision(self, half):
        """In float32, where a number is that half precision has not: 1e30 and 2**31 are no infinity."""
        function, arrays, keywords, grad_output = call_of(PLAIN, "float32")
        coarse = {n: t.to(half) if n in ("input", "weight", "bias") else t for n, t in arrays.items()}
        without = {name: t.clone() for name, t in coarse.items()}
        far = {(0, 1, 2): 1e30, (1, 4, 3): -(2.0**31), (0, 16, 5): float("inf"), (1, 0, 0): 3e38}
        for (n, channel, row), value in far.items():
            coarse["offset"][n, channel, row, 2] = value
            without["mask"][n, channel // 2, row, 2] = 0
        found, expected = (results(function, given, keywords, grad_output.to(half)) for given in (coarse, without))
        for n, channel, row in far:  # a far sample's value is 0, and so is its mask's gradient
            expected[-1][n, channel // 2, row, 2] = 0
        for name, ours, wanted in zip(("output", *coarse), found, expected, strict=True):
            assert_close(ours.double(), wanted.double(), name_of(half), name)
