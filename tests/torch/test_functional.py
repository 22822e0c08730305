"""deform_conv1d, 2d and 3d: what they compute, on which tensors, and what they say when they cannot."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
import torchvision
from tests.frontends.suite import OperatorSuite
from tests.ops.conv.cases import ARGUMENTS, CASES, make
from tests.tolerances import assert_close
from tests.torch.tensors import FUNCTIONS, PLAIN, call_of
from tests.torch.tensors import tensors as tensors_of

import deformconv
from deformconv import BackendError, ShapeError
from deformconv.ops.conv import cpu, cpu_small
from deformconv.ops.window import paddings, same_padding
from deformconv.torch import deform_conv1d, deform_conv2d, deform_conv3d
from deformconv.torch.conv import functional

LAYOUTS = {
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t,
    "every other element": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "negative bit": lambda t: torch.complex(t, -t).conj().imag,
    "a parameter": torch.nn.Parameter,
    "not aligned": lambda t: torch.frombuffer(bytearray(b"1" + t.numpy().tobytes()), dtype=t.dtype, offset=1).view(t.shape),
    "an offset in storage": lambda t: torch.cat([t.flatten()[:3], t.flatten()])[3:].view(t.shape),
}
MISTAKES = {
    "list": (torch.Tensor.tolist, "`{name}` is a list; expected a PyTorch tensor, as .* are. Pass `torch.as_tensor"),
    "NumPy array": (torch.Tensor.numpy, "`{name}` is a numpy.ndarray; expected .* are. Pass `torch.from_numpy"),
    "sparse": (lambda t: t.to_sparse(), r"`{name}` has the layout torch.sparse_coo; .*`{name}.to_dense\(\)`"),
    "integers": (lambda t: t.int(), "`{name}` is int32; expected floating point"),
    "complex": (lambda t: t + 0j, "`{name}` is complex128; expected floating point"),
    "another dtype": (lambda t: t.float(), "is float32.*is float64|is float64.*is float32"),
}


class TestOperator(OperatorSuite):
    module = functional
    kind = torch.Tensor
    expected = "a PyTorch tensor, as "
    backends = ("cpu", "portable")
    layouts = LAYOUTS
    mistakes = MISTAKES

    def array(self, array):
        return torch.from_numpy(array.copy())

    def numpy(self, array):
        return array.detach().resolve_neg().numpy()

    def function(self, rank):
        return FUNCTIONS[rank]

    def backward(self, rank, arrays, grad_output, **parameters):
        leaves = {name: None if t is None else t.detach().requires_grad_() for name, t in arrays.items()}
        self.forward(rank, leaves, **parameters).backward(grad_output.detach())
        return {name: None if t is None else t.grad for name, t in leaves.items()}

    def convolution(self, call):
        spec, tensors = call.spec, tensors_of(call)
        window = spec.stride, [before for before, _ in spec.padding], spec.dilation, spec.groups
        convolution = (F.conv1d, F.conv2d, F.conv3d)[spec.rank - 1]
        return convolution(tensors["input"], tensors["weight"], tensors["bias"], *window).numpy()


def test_torchvisions_signature_comes_first():
    theirs = list(inspect.signature(torchvision.ops.deform_conv2d).parameters.values())
    for function in FUNCTIONS.values():
        ours = list(inspect.signature(function).parameters.values())
        assert [(p.name, p.default) for p in ours[: len(theirs) - 1]] == [
            (p.name, p.default if p.name not in ("stride", "padding", "dilation") else p.default[0]) for p in theirs[:-1]
        ]
        assert ours[len(theirs) - 1].name == theirs[-1].name == "mask"
        rest = [(p.name, p.default, p.kind) for p in ours[len(theirs) :]]
        assert rest == [
            (name, default, inspect.Parameter.KEYWORD_ONLY)
            for name, default in [
                ("groups", None),
                ("offset_groups", None),
                ("boundary", "zeros"),
                ("backend", None),
            ]
        ] + [("unknown", inspect.Parameter.empty, inspect.Parameter.VAR_KEYWORD)]  # for the error that names another word


def torchvisions(case, arrays):
    """torchvision's result; what its padding cannot say is padded onto the input, which is the same."""
    pairs = paddings(case.padding, 2)
    if isinstance(pairs, str):
        pairs = same_padding(case.kernel, (1, 1), case.dilation)
    x = F.pad(arrays["input"], [amount for pair in reversed(pairs) for amount in pair])
    return torchvision.ops.deform_conv2d(
        x, arrays["offset"], arrays["weight"], arrays["bias"], case.stride, 0, case.dilation, arrays["mask"]
    )


PARITY = [case for case in CASES if len(case.size) == 2 and case.boundary == "zeros" and case.batch]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("case", PARITY, ids=lambda case: case.name)
def test_parity_with_torchvision(case, dtype):
    """Forward and backward, against torchvision in float64."""
    _, theirs, _, theirs_grad = call_of(case, dtype, requires_grad=True)
    theirs = {k: None if v is None else v.detach().double().requires_grad_() for k, v in theirs.items()}
    expected = torchvisions(case, theirs)
    expected.backward(theirs_grad.double())

    function, ours, keywords, grad_output = call_of(case, dtype, requires_grad=True)
    y = function(**ours, **keywords)
    assert y.dtype == getattr(torch, dtype)
    y.backward(grad_output)
    assert_close(y.detach(), expected.detach(), dtype)
    for name in ARGUMENTS:
        if ours[name] is not None:
            assert_close(ours[name].grad, theirs[name].grad, dtype, name)


@pytest.mark.parametrize("case", [case for case in CASES if case.batch == 2], ids=lambda case: case.name)
def test_portable_agrees(case):
    function, arrays, keywords, grad_output = call_of(case, requires_grad=True)
    results = []
    for backend in ("cpu", "portable"):
        y = function(**arrays, **keywords, backend=backend)
        given = [t for t in arrays.values() if t is not None]
        results.append([y.detach(), *torch.autograd.grad(y, given, grad_output)])
    for found, expected in zip(*results, strict=True):
        assert_close(found, expected, "float64")


def test_another_device_runs_the_portable_form():
    function, arrays, keywords, _ = call_of()
    elsewhere = {name: t.to("meta") for name, t in arrays.items()}
    y = function(**elsewhere, **keywords)
    assert y.shape == function(**arrays, **keywords).shape
    assert y.is_meta
    assert deformconv.explain(**elsewhere, **keywords).splitlines()[1] == "forward: portable"
    with pytest.raises(BackendError, match="the arrays are on meta"):
        function(**elsewhere, **keywords, backend="cpu")
    with pytest.raises(ValueError, match="`mask` is on meta and `input` is on cpu; expected one device"):
        function(**arrays | {"mask": elsewhere["mask"]}, **keywords)


def test_backends_by_name():
    function, arrays, keywords, _ = call_of(requires_grad=True)
    assert "DeformConvFunction" in type(function(**arrays, **keywords).grad_fn).__name__
    assert "DeformConvFunction" in type(function(**arrays, **keywords, backend="cpu").grad_fn).__name__
    assert "DeformConvFunction" in type(function(**arrays, **keywords, backend="portable").grad_fn).__name__
    with pytest.raises(BackendError, match="reference: it takes NumPy arrays"):
        function(**arrays, **keywords, backend="reference")


def test_the_kernel_reads_the_tensors_memory(monkeypatch, nothing_is_small):
    function, arrays, keywords, _ = call_of()
    seen, real = [], cpu.forward

    def spy(spec, *operands, library):
        seen.extend(operands)
        return real(spec, *operands, library=library)

    monkeypatch.setattr(cpu, "forward", spy)
    function(**arrays, **keywords)
    assert [array.ctypes.data for array in seen] == [arrays[name].data_ptr() for name in ARGUMENTS]


@pytest.fixture
def by_address(monkeypatch):
    """The addresses that small calls were made with, the output's first."""
    seen, real = [], cpu_small.forward

    def spy(*arguments):
        seen.append(arguments[-1])
        real(*arguments)

    monkeypatch.setattr(cpu_small, "forward", spy)
    return seen


@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_small_call_takes_addresses_alone(by_address, requires_grad):
    function, arrays, keywords, _ = call_of(requires_grad=requires_grad)
    y = function(**arrays, **keywords)
    assert by_address == [(y.data_ptr(), *(arrays[name].data_ptr() for name in ARGUMENTS))]
    call = make(PLAIN, "float64")
    assert (y.detach().numpy() == cpu.forward(call.spec, *call.arrays)).all()


@pytest.mark.parametrize("name", ["every other element", "negative bit", "not aligned"])
def test_memory_that_an_address_does_not_describe(by_address, name):
    function, arrays, keywords, _ = call_of()
    expected = function(**arrays, **keywords)
    for argument in ARGUMENTS:
        assert torch.equal(function(**arrays | {argument: LAYOUTS[name](arrays[argument])}, **keywords), expected)
    assert len(by_address) == 1


def test_zeros_without_memory(by_address):
    """As PyTorch's forward-mode derivatives make them: they have the address 0."""
    function, arrays, keywords, _ = call_of()
    for argument in ARGUMENTS:
        zeros = torch.zeros_like(arrays[argument])
        without = torch._efficientzerotensor(zeros.shape, dtype=zeros.dtype)
        expected = function(**arrays | {argument: zeros}, **keywords)
        assert torch.equal(function(**arrays | {argument: without}, **keywords), expected)
    assert len(by_address) == len(ARGUMENTS)


def test_expanded_tensors():
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64).expand(2, 3, 5, 5)
    offset = torch.zeros(1, dtype=torch.float64).expand(2, 2, 5, 5)
    weight = torch.ones(4, 3, 1, 1, dtype=torch.float64)
    assert torch.equal(deform_conv2d(x, offset, weight), torch.full((2, 4, 5, 5), 3.0, dtype=torch.float64))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_no_graph_is_made(context, monkeypatch):
    function, arrays, keywords, _ = call_of(requires_grad=True)
    expected = function(**arrays, **keywords)

    def refuse(*arguments):
        raise AssertionError("Function.apply costs time and is not needed")

    monkeypatch.setattr(functional.DEFORM_CONV.function, "apply", refuse)
    with context():
        y = function(**arrays, **keywords)
    assert not y.requires_grad
    assert torch.equal(y, expected)
    plain = {name: t.detach() for name, t in arrays.items()}
    assert torch.equal(function(**plain, **keywords), expected)


def test_tensors_made_under_inference_mode():
    with torch.inference_mode():
        function, arrays, keywords, _ = call_of()
        inside = function(**arrays, **keywords)
    assert torch.equal(function(**arrays, **keywords), inside)


class Images(torch.utils.data.Dataset):
    """A dataset that deforms its images."""

    def __init__(self, count: int) -> None:
        self.images = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        offset = torch.full((1, 18, 16, 16), index / 4)
        return deform_conv2d(self.images[index : index + 1], offset, torch.ones(2, 3, 3, 3), padding=1)[0]


# From Python 3.12 on a fork beside threads, such as torch's own, warns.
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.skipif("fork" not in torch.multiprocessing.get_all_start_methods(), reason="no fork here")
def test_in_the_workers_of_a_data_loader():
    dataset = Images(6)
    expected = [dataset[index] for index in range(6)]
    # A large call before the fork, so that worker threads exist.
    deform_conv2d(torch.ones(2, 64, 56, 56), torch.zeros(2, 18, 56, 56), torch.ones(64, 64, 3, 3), padding=1)
    loader = torch.utils.data.DataLoader(dataset, batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=120)
    for found, wanted in zip(torch.cat(list(loader)), expected, strict=True):
        assert torch.equal(found, wanted)


class TestErrors:
    """A sentence for each mistake; the checks' own texts are tested with the operator."""

    def test_wrong_rank_names_the_other_function(self):
        _, arrays, keywords, _ = call_of()
        for other, name in ((deform_conv1d, "deform_conv1d"), (deform_conv3d, "deform_conv3d")):
            with pytest.raises(ShapeError, match=rf"`input` has 4 axes.*{name} takes.*for deform_conv2d"):
                other(**arrays, **keywords)

    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
    def test_nested_tensors(self):
        _, arrays, keywords, _ = call_of()
        x = torch.nested.nested_tensor(list(arrays["input"]))
        with pytest.raises(TypeError, match=r"`input` is a nested tensor; expected a dense one: `input.to_padded_tensor"):
            deform_conv2d(**arrays | {"input": x}, **keywords)

    def test_an_error_is_raised_once(self):
        """Not while another one, of a check that comes first for speed, is handled."""
        function, arrays, keywords, _ = call_of()
        with pytest.raises(TypeError) as raised:
            function(**arrays | {"offset": arrays["offset"].float()}, **keywords)
        assert raised.value.__context__ is None or raised.value.__suppress_context__

    def test_arrays_only(self):
        function, arrays, keywords, _ = call_of()
        arrays = {name: t.numpy() for name, t in arrays.items()}
        with pytest.raises(TypeError, match=r"`input` is a numpy.ndarray; expected a PyTorch tensor. Pass"):
            function(**arrays, **keywords)


@pytest.mark.parametrize("kind", [AttributeError, TypeError, RuntimeError])
def test_a_fault_of_our_own_plan_is_raised_and_not_taken_for_a_call_that_must_be_looked_at(kind, monkeypatch):
    planned = []

    def broken(*arguments, **keywords):
        planned.append(1)
        raise kind("a fault of the plan")

    function, arrays, keywords, _ = call_of()
    functional.calls._plan.cache_clear()
    monkeypatch.setattr(functional.run, "plan_of", broken)
    with pytest.raises(kind, match="a fault of the plan"):
        function(**arrays, **keywords)
    assert planned == [1]


@pytest.mark.parametrize("padding", [(1.0, 1), (True, 1), ((1, 1), (1, 1.0)), ((1, 1), (True, 1)), 1.0, True])
def test_what_a_cache_takes_for_an_integer_is_refused_after_one(padding):
    x, offset, weight = torch.rand(1, 2, 5, 5), torch.zeros(1, 18, 5, 5), torch.rand(3, 2, 3, 3)
    for plain in (1, (1, 1), ((1, 1), (1, 1))):
        assert deform_conv2d(x, offset, weight, padding=plain).shape == (1, 3, 5, 5)
    with pytest.raises(TypeError, match=r"`padding` is .*; expected integers"):
        deform_conv2d(x, offset, weight, padding=padding)
