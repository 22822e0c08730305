"""What the commands say and do of GPUs, where there need be none: cards are made up, and kernels are stand-ins on the CPU."""

from __future__ import annotations

import warnings

import pytest

from deformconv.cli import warmup
from deformconv.cli.main import main
from deformconv.ops import gpu as on_gpu
from deformconv.runtime import product, toolchain

torch = pytest.importorskip("torch")

from deformconv import dispatch  # noqa: E402
from deformconv.ops.aggregate import gpu as aggregate_gpu  # noqa: E402
from deformconv.ops.attention import gpu as attention_gpu  # noqa: E402
from deformconv.ops.conv import gpu, portable  # noqa: E402
from deformconv.ops.roi_pool import gpu as roi_gpu  # noqa: E402
from deformconv.torch import calls, native  # noqa: E402
from deformconv.torch.conv.functional import DEFORM_CONV  # noqa: E402

H100 = on_gpu.Card("NVIDIA H100", "sm_90", (9, 0), 80 << 30)
V100 = on_gpu.Card("Tesla V100", "sm_70", (7, 0), 16 << 30)


@pytest.fixture
def cards(monkeypatch, tmp_path):
    """The GPUs of a machine that lacks nothing else."""
    found: dict[str, on_gpu.Card] = {}
    for name in ("without_triton", "without_compiler", "without_headers"):
        monkeypatch.setattr(toolchain, name, lambda: None)
    monkeypatch.setattr(toolchain, "triton_version", lambda: "3.8.0")
    monkeypatch.setattr(toolchain, "compiler", lambda: "/usr/bin/gcc")
    monkeypatch.setattr(toolchain, "headers", lambda: "/usr/include/python3.12")
    monkeypatch.setattr(toolchain, "is_interpreted", lambda: False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(on_gpu, "cards", lambda: found)
    monkeypatch.setattr(on_gpu, "card", found.get)
    return found


class TestWarmup:
    @pytest.fixture
    def compiled(self, monkeypatch):
        """What is asked of the kernels."""
        asked = []
        monkeypatch.setattr(gpu, "warmup", lambda dtypes, device: asked.append((device, tuple(dtypes))))
        for what, module in (("boxes", roi_gpu), ("attention", attention_gpu), ("an aggregate", aggregate_gpu)):
            monkeypatch.setattr(
                module, "warmup", lambda dtypes, device, what=what: asked.append((f"{what} on {device}", tuple(dtypes)))
            )
        return asked

    def test_each_kind_of_card_once(self, cards, compiled, capsys, tmp_path):
        cards.update({"cuda:0": H100, "cuda:1": H100, "cuda:2": V100, "cuda:3": H100._replace(architecture="sm_120")})
        assert main(["warmup", "--gpu"]) == 0
        assert compiled == [(device, ("float16", "bfloat16", "float32")) for device in ("cuda:0", "cuda:3")]
        out, err = capsys.readouterr()
        first, second, last = out.splitlines()
        assert first == "cuda:0, NVIDIA H100, sm_90: float16, bfloat16, float32 ..." and second.startswith("cuda:3, ")
        assert last == f"Ready in 0 s: the kernels are in {tmp_path}"
        assert err == (
            "Nothing is compiled for cuda:2: its kernels need a GPU of compute capability 7.5 or newer, and cuda:2, Tesla "
            "V100, has 7.0\n"
        )

    @pytest.mark.parametrize(
        ("dtype", "expected"),
        [("float64", ("float64",)), ("bfloat16", ("bfloat16",)), ("all", ("float16", "bfloat16", "float32", "float64"))],
    )
    def test_the_dtypes(self, cards, compiled, dtype, expected):
        cards["cuda:0"] = H100
        assert main(["warmup", "--gpu", "--dtype", dtype]) == 0
        assert compiled == [("cuda:0", expected)]

    @pytest.mark.parametrize(
        ("option", "what"), [("--rois", "boxes"), ("--attention", "attention"), ("--aggregate", "an aggregate")]
    )
    def test_other_operators(self, cards, compiled, option, what):
        cards["cuda:0"] = H100
        assert main(["warmup", "--gpu", option, "--dtype", "float32"]) == 0
        assert compiled == [("cuda:0", ("float32",)), (f"{what} on cuda:0", ("float32",))]

    def test_what_is_missing_ends_with_1(self, cards, compiled, capsys, monkeypatch):
        cards["cuda:0"] = H100
        monkeypatch.setattr(toolchain, "without_compiler", lambda: "install a compiler")
        assert main(["warmup", "--gpu"]) == 1
        assert capsys.readouterr() == ("", "Nothing is compiled for cuda:0: install a compiler\n")
        assert compiled == []

    def test_no_gpu(self, cards, capsys):
        assert main(["warmup", "--gpu"]) == 1
        assert capsys.readouterr().err == "Error: there is no GPU to compile for: PyTorch finds none, see `deformconv doctor`\n"

    def test_no_pytorch(self, capsys, monkeypatch):
        monkeypatch.setattr(warmup, "find_spec", lambda name: None)
        assert main(["warmup", "--gpu"]) == 1
        expected = "Error: there is no GPU to compile for, since PyTorch, which finds them, is not installed\n"
        assert capsys.readouterr().err == expected

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--gpu", "--rank", "2", "--cpu", "native"], "--rank, --cpu: of the CPU's kernels alone, not of --gpu"),
            (["--gpu", "--cpu", "native"], "--cpu: of the CPU's kernels alone, not of --gpu"),
        ],
    )
    def test_what_does_not_go_together(self, arguments, message, capsys):
        assert main(["warmup", *arguments]) == 2
        assert message in capsys.readouterr().err


def section(capsys):
    """The lines about GPUs, each with one blank between words, and how the report ends."""
    text = capsys.readouterr().out
    assert max(len(line) for line in text.splitlines() if "/" not in line) <= 80
    lines = text.partition("\nGPUs\n")[2].partition("\n\n")[0]
    return " ".join(lines.split()), text.rstrip().splitlines()[-1]


class TestDoctor:
    @pytest.fixture
    def kernels(self, cards, monkeypatch):
        """A card that is the CPU, and stand-ins for our GPU kernels, which compute rightly."""

        def clear():
            dispatch._cached_first.cache_clear()
            calls._plan.cache_clear()

        def backward(spec, grad_output, *operands, wanted):
            return native.backward(DEFORM_CONV.operator, spec, grad_output, operands, wanted, portable.forward)

        cards["cpu"] = H100
        monkeypatch.setattr(
            gpu, "reasons_against", lambda spec, library, device, backward: [] if library == "torch" else ["no"]
        )
        monkeypatch.setattr(gpu, "forward", portable.forward)
        monkeypatch.setattr(gpu, "backward", backward)
        clear()
        yield
        clear()

    @pytest.mark.parametrize(
        ("cuda", "hip", "built_for"), [("13.0", None, "CUDA 13.0"), (None, "6.4", "ROCm 6.4"), (None, None, "CPUs alone")]
    )
    def test_a_machine_without_one(self, cards, capsys, monkeypatch, cuda, hip, built_for):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.version, "hip", hip)
        assert main(["doctor"]) == 0
        assert section(capsys) == (f"devices none that PyTorch finds, which is built for {built_for}", "All in order.")

    def test_what_pytorch_warns_of(self, capsys, monkeypatch):
        def cards():
            warnings.warn("CUDA initialization: the driver is too old", stacklevel=1)
            return {}

        monkeypatch.setattr(on_gpu, "cards", cards)
        assert main(["doctor"]) == 0
        assert section(capsys)[0].endswith(": CUDA initialization: the driver is too old")

    def test_kernels_that_compute_rightly(self, kernels, capsys, monkeypatch, tmp_path):
        monkeypatch.setattr(toolchain, "is_interpreted", lambda: True)
        assert main(["doctor"]) == 0
        text, end = section(capsys)
        assert f"cpu NVIDIA H100, sm_90, 80 GiB triton 3.8.0, keeps kernels in {tmp_path} C compiler /usr/bin/gcc" in text
        assert "Python.h /usr/include/python3.12 TRITON_INTERPRET is set: kernels run as Python on the CPU, slowly" in text
        assert "cpu float32 ok, error" in text and "cpu bfloat16 ok, error" in text and "FAILED" not in text
        assert end == "All in order."

    def test_a_wrong_result_ends_with_1(self, kernels, capsys, monkeypatch):
        right = portable.forward
        monkeypatch.setattr(gpu, "forward", lambda spec, *operands: right(spec, *operands) * 1.001)
        assert main(["doctor"]) == 1
        text, end = section(capsys)
        assert "cpu float32 FAILED: error 1.0e-03 in output; 1e-05 is the most that rounding explains" in text
        assert "cpu bfloat16 ok" in text and end == "Not in order: cpu float32."

    def test_a_launch_that_fails_does_not_hide_the_next(self, kernels, capsys, monkeypatch):
        right = portable.forward

        def forward(spec, *operands):
            if spec.dtype == "float32":
                raise RuntimeError("no kernel image is available")
            return right(spec, *operands)

        monkeypatch.setattr(gpu, "forward", forward)
        assert main(["doctor"]) == 1
        text, _ = section(capsys)
        assert "cpu float32 FAILED: RuntimeError: no kernel image is available cpu bfloat16 ok" in text

    def test_a_card_that_runs_pytorchs_operations_is_in_order(self, cards, capsys, monkeypatch):
        cards["cuda:0"] = V100
        monkeypatch.setattr(toolchain, "without_triton", lambda: "Triton is not installed: pip install it")
        assert main(["doctor"]) == 0
        text, end = section(capsys)
        assert "triton Triton is not installed: pip install it" in text
        reasons = (
            "Triton is not installed: pip install it; its kernels need a GPU of compute capability 7.5 or newer, and cuda:0,"
        )
        assert f"cuda:0 float32 PyTorch's operations, since {reasons} Tesla V100, has 7.0" in text
        assert end == "All in order."

    def test_tf32_is_off_while_float32_is_tried(self, kernels, monkeypatch):
        seen = []
        right = portable.forward

        def forward(spec, *operands):
            seen.append(product._allows_tf32())
            return right(spec, *operands)

        monkeypatch.setattr(gpu, "forward", forward)
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            assert main(["doctor"]) == 0
            assert seen and not any(seen)
            assert product._allows_tf32() and torch.get_float32_matmul_precision() == "high"
        finally:
            torch.set_float32_matmul_precision(before)

    def test_after_the_newer_setting_was_used(self, kernels):
        """PyTorch raises then where the older one is read."""
        matmul = torch.backends.cuda.matmul
        if not hasattr(matmul, "fp32_precision"):
            pytest.skip("PyTorch 2.9 brought it")
        before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
        try:
            assert main(["doctor"]) == 0
            assert matmul.fp32_precision == "tf32"
        finally:
            matmul.fp32_precision = before
