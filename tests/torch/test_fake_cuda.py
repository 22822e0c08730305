"""Tensors that say they are on a GPU and have no memory: what a machine without one can know of a net for one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.torch.tensors import FUNCTIONS
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import deformconv
from deformconv import dispatch
from deformconv.ops import gpu
from deformconv.runtime import product, toolchain
from deformconv.torch import DeformConv2d, deform_conv2d
from deformconv.torch.conv.functional import DEFORM_CONV

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.fixture
def fake() -> Iterator[FakeTensorMode]:
    """The mode in which tensors are made without memory; CUDA is not started by any test here."""
    before = torch.cuda.is_initialized()
    with FakeTensorMode() as mode:
        yield mode
    assert torch.cuda.is_initialized() is before


def tensors(rank: int = 2, dtype: torch.dtype = torch.float32, offset: torch.dtype | None = None) -> dict[str, Any]:
    """A v2 call of 3**rank taps on cuda:0."""
    size, taps = (7, 6, 5)[:rank], 3**rank
    shapes = {"input": (2, 4, *size), "offset": (2, rank * taps, *size), "weight": (6, 4, *(3,) * rank), "bias": (6,)}
    shapes["mask"] = (2, taps, *size)
    own = {"offset": offset or dtype, "mask": offset or dtype}
    return {name: torch.empty(shape, dtype=own.get(name, dtype), device="cuda") for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_forward(fake: FakeTensorMode, rank: int, dtype: torch.dtype) -> None:
    y = FUNCTIONS[rank](**tensors(rank, dtype), padding=1)
    assert isinstance(y, FakeTensor)
    assert (y.shape, y.dtype, y.device) == ((2, 6, *(7, 6, 5)[:rank]), dtype, torch.device("cuda:0"))
    assert y.is_contiguous()


def test_channels_last_and_float32_offsets(fake: FakeTensorMode) -> None:
    given = tensors(dtype=torch.bfloat16, offset=torch.float32)
    given["input"] = given["input"].contiguous(memory_format=torch.channels_last)
    y = deform_conv2d(**given, padding=1)
    assert y.dtype is torch.bfloat16 and y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("wanted", [(True,) * 5, (False, True, False, False, True), (False, False, True, True, False)])
@pytest.mark.parametrize(("dtype", "offset"), [(torch.float32, torch.float32), (torch.float16, torch.float32)])
def test_backward(fake: FakeTensorMode, dtype: torch.dtype, offset: torch.dtype, wanted: tuple[bool, ...]) -> None:
    """By the registered operator: PyTorch's own backward pass asks for the device, which is not there."""
    given = tensors(dtype=dtype, offset=offset)
    given["weight"] = given["weight"].contiguous(memory_format=torch.channels_last)
    names = ("input", "offset", "weight", "mask")
    grad_output = torch.empty(2, 6, 7, 6, dtype=dtype, device="cuda")
    parameters = ([1, 1], [1, 1, 1, 1], [1, 1], None, None, "zeros", "gpu")
    found = torch.ops.deformconv.deform_conv_backward(grad_output, *(given[name] for name in names), *parameters, list(wanted))
    expected = [given[name] for name, flag in zip(DEFORM_CONV.operator.names, wanted, strict=True) if flag]
    assert len(found) == len(expected)
    for gradient, tensor in zip(found, expected, strict=True):
        assert (gradient.shape, gradient.dtype, gradient.device) == (tensor.shape, tensor.dtype, tensor.device)
        assert gradient.stride() == tensor.stride()


def test_export() -> None:
    with FakeTensorMode():
        net = torch.nn.Sequential(DeformConv2d(4, 6, 3, padding=1, device="cuda"), torch.nn.ReLU())
        x = torch.empty(2, 4, 7, 6, device="cuda")
    program = torch.export.export(net, (x,))
    (node,) = (node for node in program.graph.nodes if node.target is DEFORM_CONV.forward_op)
    assert node.meta["val"].device == torch.device("cuda:0") and node.meta["val"].shape == (2, 6, 7, 6)
    assert {parameter.device for parameter in program.parameters()} == {torch.device("cuda:0")}


class TestExplain:
    """Which backend would run a call there."""

    @pytest.fixture(autouse=True)
    def machine(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """It has all that the kernels need."""
        for name in ("without_triton", "without_compiler", "without_headers"):
            monkeypatch.setattr(toolchain, name, lambda: None)
        monkeypatch.setattr(toolchain, "is_interpreted", lambda: False)
        monkeypatch.setattr(gpu, "card", lambda device: None)
        dispatch._cached_first.cache_clear()
        yield
        dispatch._cached_first.cache_clear()

    def lines(self, backend: str | None = None) -> list[str]:
        given = tensors(dtype=torch.bfloat16, offset=torch.float32)
        return deformconv.explain(**given, padding=1, backend=backend).splitlines()

    def test_the_gpus_kernels_come_first(self, fake: FakeTensorMode) -> None:
        lines = self.lines()
        assert lines[0].endswith("bfloat16, torch on cuda:0")  # and not by way of float32
        assert [line for line in lines if not line.startswith(" ")][1:] == ["forward: gpu", "backward: gpu"]
        assert lines.count("  cpu: its kernels run on the CPU and the arrays are on cuda:0") == 2
        assert lines.count("  portable: can run it, but gpu comes first") == 2

    def test_products_of_float32_ask_no_card(self, fake: FakeTensorMode, monkeypatch: pytest.MonkeyPatch) -> None:
        """With 256 channels a card of compute capability 9.0 has products of ours: here is none, and CUDA is not started."""
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: pytest.fail("CUDA was started"))
        shapes = {"input": (2, 256, 56, 56), "offset": (2, 18, 56, 56), "weight": (256, 256, 3, 3)}
        given = {name: torch.zeros(shape, device="cuda") for name, shape in shapes.items()}
        monkeypatch.setattr(product, "_is_fast", product._is_fast.__wrapped__)
        lines = deformconv.explain(**given, padding=1).splitlines()
        assert "forward: gpu" in lines and "  gpu: a kernel samples, and PyTorch multiplies" in lines

    def test_what_is_missing_is_told_and_pytorchs_operations_run(
        self, fake: FakeTensorMode, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(toolchain, "without_compiler", lambda: "a compiler is missing: install one")
        monkeypatch.setattr(gpu, "card", lambda device: gpu.Card("A card", "sm_70", (7, 0), 1 << 30))
        lines = self.lines()
        expected = (
            "  gpu: a compiler is missing: install one; its kernels need a GPU of compute capability 7.5 or newer, and cuda:0, "
            "A card, has 7.0"
        )
        assert lines[1] == "forward: portable" and lines.count(expected) == 2
        assert self.lines("gpu")[1] == "forward: no backend can run it"

    def test_the_portable_form_by_name(self, fake: FakeTensorMode) -> None:
        lines = self.lines("portable")
        assert lines[1] == "forward: portable"
        assert '  gpu: can run it, but backend="portable" was asked for' in lines
