"""What keeps a call from the Triton kernels: the arrays, the machine, the card."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from deformconv.ops import gpu
from deformconv.ops.conv import gpu as conv
from deformconv.ops.conv.spec import Operand, conv_spec
from deformconv.runtime import toolchain

H100 = gpu.Card("NVIDIA H100 80GB HBM3", "sm_90", (9, 0), 80 << 30)


@pytest.fixture
def machine(monkeypatch):
    """A machine that has all that it takes, and no GPU but `cards`; set a name of `toolchain` to take something away."""
    cards: dict[str, gpu.Card] = {}
    for name in ("without_triton", "without_compiler", "without_headers"):
        monkeypatch.setattr(toolchain, name, lambda: None)
    monkeypatch.setattr(toolchain, "is_interpreted", lambda: False)
    monkeypatch.setattr(gpu, "card", cards.get)
    return SimpleNamespace(cards=cards, set=lambda name, value: monkeypatch.setattr(toolchain, name, lambda: value))


@pytest.mark.parametrize("dtype", gpu.DTYPES)
@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_nothing_is_against_pytorchs_tensors_on_a_gpu(machine, dtype, device):
    assert gpu.reasons_against(dtype, "torch", device) == []
    machine.cards["cuda:0"] = H100
    assert gpu.reasons_against(dtype, "torch", device) == []


def test_another_library(machine):
    machine.set("without_triton", "no Triton")
    assert gpu.reasons_against("float32", "numpy", "cpu") == ["it takes PyTorch's tensors, not numpy's arrays"]


@pytest.mark.parametrize("device", ["cpu", "mps:0", "xpu:0", "meta"])
def test_another_device(machine, device):
    """What the machine lacks for GPUs is not told to those who have none."""
    machine.set("without_triton", "no Triton")
    assert gpu.reasons_against("float32", "torch", device) == [
        f"its kernels run on GPUs of NVIDIA and AMD and the arrays are on {device}"
    ]


def test_another_dtype(machine):
    assert gpu.reasons_against("float8_e4m3fn", "torch", "cuda:0") == [
        "it computes in float16, bfloat16, float32 and float64, not float8_e4m3fn"
    ]


def test_everything_that_the_machine_lacks_is_told(machine):
    names = ("without_triton", "without_compiler", "without_headers")
    for name in names:
        machine.set(name, f"it is {name}")
    assert gpu.reasons_against("float32", "torch", "cuda:0") == [f"it is {name}" for name in names]
    for name in names[:2]:
        machine.set(name, None)
    assert gpu.reasons_against("float32", "torch", "cuda:0") == ["it is without_headers"]


@pytest.mark.parametrize(
    ("capability", "runs"), [((7, 0), False), ((6, 1), False), ((7, 5), True), ((10, 0), True), (None, True)]
)
def test_old_cards(machine, capability, runs):
    machine.cards["cuda:1"] = gpu.Card("A card", "one", capability, 1 << 30)
    own = capability and ".".join(map(str, capability))
    expected = f"its kernels need a GPU of compute capability 7.5 or newer, and cuda:1, A card, has {own}"
    assert gpu.reasons_against("float32", "torch", "cuda:1") == ([] if runs else [expected])
    assert gpu.reasons_against("float32", "torch", "cuda:0") == []


def test_the_interpreter_runs_on_the_cpu_and_needs_triton_alone(machine):
    machine.set("is_interpreted", True)
    machine.set("without_compiler", "no compiler")
    machine.set("without_headers", "no headers")
    machine.cards["cuda:0"] = gpu.Card("An old card", "sm_61", (6, 1), 1 << 30)
    assert gpu.reasons_against("float32", "torch", "cpu") == gpu.reasons_against("float32", "torch", "cuda:0") == []
    machine.set("without_triton", "no Triton")
    assert gpu.reasons_against("float32", "torch", "cpu") == ["no Triton"]
    assert "the arrays are on mps:0" in gpu.reasons_against("float32", "torch", "mps:0")[0]


class TestCards:
    """The card that PyTorch finds, and what is asked of it."""

    @pytest.fixture
    def cuda(self, monkeypatch):
        torch = pytest.importorskip("torch")
        found: list[SimpleNamespace] = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(found))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found[index])
        monkeypatch.setattr(torch.version, "hip", None)
        gpu.card.cache_clear()
        yield found
        gpu.card.cache_clear()

    def test_none(self, cuda):
        assert gpu.card("cuda:0") is None
        assert gpu.cards() == {}

    def test_nvidia(self, cuda):
        cuda.append(SimpleNamespace(name=H100.name, major=9, minor=0, total_memory=H100.memory))
        cuda.append(SimpleNamespace(name="NVIDIA RTX PRO 6000", major=12, minor=0, total_memory=96 << 30))
        assert gpu.card("cuda:0") == gpu.card("cuda") == H100
        assert str(H100) == "NVIDIA H100 80GB HBM3, sm_90"
        assert gpu.card("cuda:2") is gpu.card("cpu") is gpu.card("mps:0") is None
        assert list(gpu.cards()) == ["cuda:0", "cuda:1"]
        assert gpu.cards()["cuda:1"].architecture == "sm_120"

    def test_amd(self, cuda, monkeypatch):
        import torch

        monkeypatch.setattr(torch.version, "hip", "6.4")
        cuda.append(SimpleNamespace(name="AMD Instinct MI300X", gcnArchName="gfx942:sramecc+:xnack-", total_memory=192 << 30))
        assert gpu.card("cuda:0") == ("AMD Instinct MI300X", "gfx942", None, 192 << 30)

    def test_without_a_gpu_nothing_starts_cuda(self, monkeypatch):
        torch = pytest.importorskip("torch")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: pytest.fail("CUDA was started"))
        gpu.card.cache_clear()
        assert gpu.card("cuda:0") is None
        gpu.reasons_against("float32", "torch", "cuda:0")
        assert not torch.cuda.is_initialized()
        gpu.card.cache_clear()


@pytest.mark.parametrize(
    ("batch", "size", "stride", "reasons"),
    [
        (1, (46_339, 46_339), 46_339, []),
        (1, (46_340, 46_340), 46_340, ["a batch of 2147488281 pixels exceeds its 32-bit numbers"]),
        (33, (8_192, 8_192), 8_192, ["a batch of 2214592512 pixels exceeds its 32-bit numbers"]),
        (2, (40_000, 30_000), 1, ["a batch of 2400000000 output positions exceeds its 32-bit numbers",
                                  "a batch of 2400000000 pixels exceeds its 32-bit numbers"]),
    ],
)  # fmt: skip
def test_what_convolutions_count_in_32_bits(machine, batch, size, stride, reasons):
    positions = tuple((length - 1) // stride + 1 for length in size)
    shapes = (batch, 1, *size), (batch, 2, *positions), (1, 1, 1, 1)
    spec = conv_spec(*(Operand(shape, "float32") for shape in shapes), stride=stride)
    assert conv.reasons_against(spec, "torch", "cuda:0", False) == reasons
