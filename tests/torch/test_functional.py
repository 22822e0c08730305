"""deform_conv1d, 2d and 3d: what they compute, on which tensors, and what they say when they cannot."""

from __future__ import annotations

import doctest
import inspect
import threading

import pytest
import torch
import torch.nn.functional as F
import torchvision
from tests.ops.conv.cases import CASES
from tests.tolerances import TOLERANCE, assert_close
from tests.torch.tensors import FUNCTIONS, call_of

import deformconv
from deformconv import BackendError, ShapeError
from deformconv.ops.window import paddings, same_padding
from deformconv.torch import deform_conv1d, deform_conv2d, deform_conv3d, functional

ARRAYS = ("input", "offset", "weight", "bias", "mask")


@pytest.mark.slow
def test_doctests():
    result = doctest.testmod(functional)
    assert result.failed == 0
    assert result.attempted > 10


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
        ]


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
    for name in ARRAYS:
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
    with pytest.raises(ValueError, match="`backend` is 'fast'"):
        function(**arrays, **keywords, backend="fast")


def test_the_kernel_reads_the_tensors_memory(monkeypatch):
    from deformconv.ops.conv import cpu

    function, arrays, keywords, _ = call_of()
    seen, real = [], cpu.deform_conv

    def spy(spec, *operands, library):
        seen.extend(operands)
        return real(spec, *operands, library=library)

    monkeypatch.setattr(cpu, "deform_conv", spy)
    function(**arrays, **keywords)
    assert [array.ctypes.data for array in seen] == [arrays[name].data_ptr() for name in ARRAYS]


MEMORY = {
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t,
    "every other element": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "negative bit": lambda t: torch.complex(t, -t).conj().imag,
    "a parameter": torch.nn.Parameter,
    "an offset in storage": lambda t: torch.cat([t.flatten()[:3], t.flatten()])[3:].view(t.shape),
}


@pytest.mark.parametrize("form", MEMORY)
def test_any_memory_gives_the_same_result(form):
    function, arrays, keywords, grad_output = call_of(requires_grad=True)
    expected = function(**arrays, **keywords)
    expected.backward(grad_output)
    for name in ARRAYS:
        _, odd, _, _ = call_of()
        odd[name] = MEMORY[form](odd[name]).detach().requires_grad_()
        y = function(**odd, **keywords)
        y.backward(MEMORY[form](grad_output).detach())
        assert torch.equal(y, expected)
        assert_close(odd[name].grad, arrays[name].grad, "float64", name)


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

    monkeypatch.setattr(functional.autograd.DeformConvFunction, "apply", refuse)
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


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_zero_offsets_give_the_plain_convolution(rank):
    torch.manual_seed(0)
    convolution = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    x = torch.randn(2, 4, *(6, 5, 7)[:rank], dtype=torch.float64)
    weight, bias = torch.randn(6, 2, *(3, 2, 3)[:rank], dtype=torch.float64), torch.randn(6).double()
    expected = convolution(x, weight, bias, padding=1, stride=2, groups=2)
    taps = weight[0, 0].numel()
    offset = torch.zeros(2, rank * taps, *expected.shape[2:], dtype=torch.float64)
    y = FUNCTIONS[rank](x, offset, weight, bias, padding=1, stride=2, groups=2)
    assert_close(y, expected, "float64")


@pytest.mark.slow
def test_eight_threads_at_once_give_what_one_gives():
    cases = [case for case in CASES if case.batch == 2][:8]

    def both(case):
        function, arrays, keywords, grad_output = call_of(case, "float32", requires_grad=True)
        y = function(**arrays, **keywords)
        y.backward(grad_output)
        return [y.detach(), *(t.grad for t in arrays.values() if t is not None)]

    expected = [both(case) for case in cases]
    found: dict[int, list] = {}
    barrier = threading.Barrier(8)

    def work(number):
        barrier.wait()
        for _ in range(5):
            found[number] = both(cases[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(8):
        for ours, serial in zip(found[number], expected[number], strict=True):
            assert torch.equal(ours, serial)


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

    def test_packed_offsets_are_told_from_masks(self):
        x, weight = torch.rand(1, 3, 8, 8), torch.rand(4, 3, 3, 3)
        with pytest.raises(ShapeError, match=r"27 = 18 offsets \+ 9 masks: for v2 pass the last 9 as `mask`"):
            deform_conv2d(x, torch.zeros(1, 27, 8, 8), weight, padding=1)

    @pytest.mark.parametrize("name", ARRAYS)
    @pytest.mark.parametrize(
        ("spoil", "text"),
        [
            (torch.Tensor.tolist, "`{}` is a list; expected a PyTorch tensor, as .* are. Pass `torch.as_tensor"),
            (torch.Tensor.numpy, "`{}` is a numpy.ndarray; expected .* are. Pass `torch.from_numpy"),
            (lambda t: t.to_sparse(), r"`{}` has the layout torch.sparse_coo; .*`{}.to_dense\(\)`"),
            (lambda t: t.int(), "`{}` is int32; expected floating point"),
            (lambda t: t + 0j, "`{}` is complex128; expected floating point"),
            (lambda t: t.float(), "is float32.*is float64|is float64.*is float32"),
        ],
    )
    def test_what_is_no_dense_tensor_of_the_dtype(self, name, spoil, text):
        function, arrays, keywords, _ = call_of()
        arrays[name] = spoil(arrays[name])
        with pytest.raises(TypeError, match=text.replace("{}", name)):
            function(**arrays, **keywords)

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

    @pytest.mark.parametrize("name", ["input", "offset", "weight"])
    def test_none(self, name):
        function, arrays, keywords, _ = call_of()
        with pytest.raises(TypeError, match=f"`{name}` is None; expected a PyTorch tensor, as "):
            function(**arrays | {name: None}, **keywords)

    def test_arrays_only(self):
        function, arrays, keywords, _ = call_of()
        arrays = {name: t.numpy() for name, t in arrays.items()}
        with pytest.raises(TypeError, match=r"`input` is a numpy.ndarray; expected a PyTorch tensor. Pass"):
            function(**arrays, **keywords)


def test_nan_and_infinity_in_offsets():
    """One output position is touched, forward and backward, and the process survives."""
    for bad in (float("nan"), float("inf"), 1e30):
        x = torch.rand(1, 2, 6, 6, dtype=torch.float64, requires_grad=True)
        offset = torch.zeros(1, 18, 6, 6, dtype=torch.float64)
        offset[0, :2, 2, 3] = bad
        offset.requires_grad_()
        weight = torch.rand(3, 2, 3, 3, dtype=torch.float64, requires_grad=True)
        y = deform_conv2d(x, offset, weight, padding=1)
        touched = torch.zeros(6, 6, dtype=torch.bool)
        touched[2, 3] = bad != bad
        assert torch.equal(y[0].isnan(), touched.expand(3, 6, 6))
        y.sum().backward()
        assert x.grad.isfinite().all()
        assert torch.equal(offset.grad[0, 0].isnan(), touched)
        assert not offset.grad[0, 2:].isnan().any()


def test_keywords_reach_the_operator():
    """Groups are verified, not inferred, when they are given."""
    function, arrays, keyword, _ = call_of()
    with pytest.raises(ShapeError, match="groups=2"):
        function(**arrays, **keyword | {"groups": 2})
    with pytest.raises(ShapeError, match="offset_groups=2"):
        function(**arrays, **keyword | {"offset_groups": 2})
    inside = function(**arrays, **keyword | {"boundary": "inside"})
    assert (inside - function(**arrays, **keyword)).abs().max() > TOLERANCE["float64"]
