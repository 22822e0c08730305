"""`deformconv doctor`: what there is, what is used, and whether it computes."""

from __future__ import annotations

import os
import platform
import textwrap
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import numpy as np

import deformconv
from deformconv import dispatch
from deformconv.cli import trial
from deformconv.cli.progress import progress
from deformconv.ops.conv.operator import DEFORM_CONV
from deformconv.ops.conv.spec import ConvSpec

__all__ = ["run"]

PACKAGES = (
    "numpy", "numba", "llvmlite", "array-api-compat", "torch", "torchvision", "mxnet", "jax", "flax", "equinox", "keras",
    "onnx", "onnxruntime", "openvino", "ncnn", "matplotlib", "rich",
)  # fmt: skip
# The vector extensions that decide how fast kernels are.
EXTENSIONS = ("sse4.2", "avx", "avx2", "fma", "avx512f", "avx512bw", "avx512vl", "neon", "sve")

TESTED_KERNELS = 3  # those that a small call takes

Lines = Iterator[tuple[str, str]]  # what is looked at, and what was found


def run() -> int:
    """Print the report and return the exit code: 1 if a self-test or a section of the report failed."""
    click.secho(f"deformconv {deformconv.__version__}", bold=True, nl=False)
    click.echo(f"  {Path(deformconv.__file__).parent}")
    failures = [
        *_print("Versions", _versions),
        *_print("Processor", _processor),
        *_print("Kernel cache", _cache),
        *_print("Backends", _backends),
        *_print("GPUs", _gpus),
        *_print("Self-test: forward and backward against the reference", _self_test),
    ]
    if failures:
        click.secho(f"\nNot in order: {', '.join(failures)}.", fg="red", bold=True)
        return 1
    click.secho("\nAll in order.", fg="green", bold=True)
    return 0


def _print(title: str, section: Callable[[], Lines]) -> list[str]:
    """Print a section line by line, as it is found out; return the names of its failed lines."""
    click.secho(f"\n{title}", bold=True)
    failures = []
    try:
        for name, text in section():
            failed = text.startswith("FAILED")
            failures += [name] * failed
            _print_line(name, text, failed)
    except Exception as error:
        # A broken installation is what a doctor is for: the other sections are still worth reading.
        failures.append(title.partition(":")[0].lower())
        _print_line("", f"FAILED: {type(error).__name__}: {error}", True)
    return failures


def _print_line(name: str, text: str, failed: bool = False) -> None:
    # Paths are not broken, so that they can be copied.
    filled = textwrap.fill(
        text, 79, initial_indent=f"  {name:<18}", subsequent_indent=" " * 20, break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip
    click.secho(filled, fg="red" if failed else None)


def _versions() -> Lines:
    yield "python", f"{platform.python_version()} ({platform.python_implementation()})"
    yield "system", f"{platform.system()} {platform.release()}, {platform.machine()}"
    for package in PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            yield package, "not installed"


def _processor() -> Lines:
    from deformconv.runtime import processors
    from deformconv.runtime.host import processor_name
    from deformconv.runtime.openmp import team_for

    yield "name", processor_name()
    if find_spec("numba") is not None:
        from llvmlite import binding

        from deformconv.runtime import cache, matmul, simd

        features = simd.host_features()
        block = matmul.BLOCK
        yield "to LLVM", binding.get_host_cpu_name()
        yield "kernels for", cache.LEVEL or "this processor"
        yield (
            "extensions",
            " ".join(name for name in EXTENSIONS if name in features) or "none that kernels use",
        )
        yield "register block", f"{block.rows} rows x {block.vectors} vectors of {simd.VECTOR_BYTES} bytes"
    usable, present = processors.available_processors(), os.cpu_count()
    yield "processors", f"{usable} usable of {present} present (affinity and control-group quota)"
    yield "threads", f"{processors.get_num_threads()}{_thread_variables()}"
    yield "for NumPy", str(team_for("numpy"))
    if find_spec("torch") is not None:
        import deformconv.torch  # noqa: F401  # PyTorch lends its threads

        yield "for PyTorch", str(team_for("torch"))


def _thread_variables() -> str:
    names = ("DEFORMCONV_NUM_THREADS", "DEFORMCONV_THREADS", "OMP_NUM_THREADS")
    return "".join(f", {name}={value}" for name in names if (value := os.environ.get(name)))


def _cache() -> Lines:
    if find_spec("numba") is None:
        yield "folder", "none, since Numba is not installed"
        return
    from deformconv.runtime import cache

    folder, kernels = cache.cache_folder(), len(cache.cached_files())
    if folder is None:
        what = "what is missing is compiled anew by every process" if kernels else "every process compiles anew"
        yield "folder", f"none can be written, so {what}: set DEFORMCONV_CACHE_DIR to one that can"
    else:
        yield "folder", str(folder)
        yield "writable", "yes" if os.access(folder, os.W_OK) else "no"
    if folder is not None or kernels:
        yield "kernels found", str(kernels) if kernels else "none yet: `deformconv warmup` compiles them"
    for file in cache.damaged_files():
        yield "damaged", f"{file}: its kernel is compiled again when it is needed"
    found = cache.processors()
    own = cache.own_processor()
    name = cache.LEVEL or f"this processor, {_name_in(own)}"
    yield "warm for", f"{name}: {_kernels(found.pop(own))}" if found[own] else f"not for {name}"
    for processor, kernels in sorted(found.items()):
        yield "", f"{_name_in(processor)}: {_kernels(kernels)}{_use_of(_name_in(processor))}"


def _name_in(processor: str) -> str:
    return processor.rpartition(".")[0]


def _kernels(number: int) -> str:
    return f"{number} kernel{'s' * (number != 1)}"


def _use_of(name: str) -> str:
    """What this processor can do with kernels for another one, as the end of a sentence."""
    from deformconv.runtime import target

    if name not in target.levels():
        return ", which another processor compiled for itself"
    lacking = target.lacks(name)
    return f", but this processor lacks {', '.join(lacking)}" if lacking else f", loaded where DEFORMCONV_CPU={name}"


def _backends() -> Lines:
    spec, _ = trial.tiny_call()
    for library in ("numpy", "torch"):
        if find_spec(library) is None:
            yield library, "not installed"
            continue
        for backward in (False, True):
            verdicts = dispatch.verdicts(DEFORM_CONV, spec, library, "cpu", backward)
            runs = [verdict for verdict in verdicts if verdict.runs]
            yield f"{library} {'backward' if backward else 'forward'}", runs[0].backend if runs else "no backend can run it"
            for verdict in sorted(verdicts, key=lambda verdict: not verdict.runs):
                if verdict.sentences:
                    yield "", str(verdict)


def _gpus() -> Lines:
    from deformconv.runtime import toolchain

    if find_spec("torch") is None:
        yield "devices", "none is used, since PyTorch is not installed"
        return
    from deformconv.ops import gpu

    with warnings.catch_warnings(record=True) as warned:  # of an old driver, as an example
        warnings.simplefilter("always")
        cards = gpu.cards()
    if not cards:
        why = "".join(f": {warning.message}" for warning in warned)
        yield "devices", f"none that PyTorch finds, which is built for {_what_pytorch_is_for()}{why}"
        return
    for device, card in cards.items():
        yield device, f"{card}, {card.memory / 2**30:.0f} GiB"
    yield "triton", toolchain.without_triton() or f"{toolchain.triton_version()}, keeps kernels in {toolchain.kernel_folder()}"
    yield "C compiler", toolchain.without_compiler() or str(toolchain.compiler())
    yield "Python.h", toolchain.without_headers() or str(toolchain.headers())
    if toolchain.is_interpreted():
        yield "TRITON_INTERPRET", "is set: kernels run as Python on the CPU, slowly"
    for device in cards:
        yield from _launch(device)


def _what_pytorch_is_for() -> str:
    import torch

    kinds = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}
    return next((f"{kind} {version}" for kind, version in kinds.items() if version), "CPUs alone")


def _launch(device: str) -> Lines:
    """Our kernels on a GPU, forward and backward, beside the reference."""
    with _exact_products():  # TF32, which an environment may ask for, has no error of float32
        for dtype in ("float32", "bfloat16"):
            reasons = dispatch.load(DEFORM_CONV, "gpu").reasons_against(trial.tiny_call()[0], "torch", device, True)
            if reasons:
                yield f"{device} {dtype}", f"PyTorch's operations, since {'; '.join(reasons)}"
                continue
            try:
                yield f"{device} {dtype}", trial.verdict(*trial.gpu_values(device, dtype), dtype)
            except Exception as error:  # what a driver, a compiler or a kernel says
                yield f"{device} {dtype}", f"FAILED: {type(error).__name__}: {error}"


@contextmanager
def _exact_products() -> Iterator[None]:
    """PyTorch's products of float32 on a GPU are of float32, whichever of its settings said otherwise."""
    import torch

    matmul = torch.backends.cuda.matmul
    # After the newer setting was used, PyTorch raises where the older one is read.
    name, exact = ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", False)
    before = getattr(matmul, name)
    setattr(matmul, name, exact)
    try:
        yield
    finally:
        setattr(matmul, name, before)


def _self_test() -> Lines:
    spec, arrays = trial.tiny_call()
    grad_output = np.random.default_rng(1).normal(size=spec.output_shape).astype(np.float32)
    expected = trial.values("reference", arrays, grad_output)
    _compile(spec, arrays, grad_output)
    for backend in [line.name for line in DEFORM_CONV.backends if line.name != "reference"]:
        for backward in (False, True):
            direction = "backward" if backward else "forward"
            if dispatch.load(DEFORM_CONV, backend).reasons_against(spec, "numpy", "cpu", backward):
                continue
            found = trial.values(backend, arrays, grad_output, backward)
            yield f"{backend} {direction}", trial.verdict(found, expected)
    if find_spec("torch") is not None:
        import torch

        tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
        yield "torch, both", trial.verdict(trial.torch_values(tensors, torch.from_numpy(grad_output)), expected)


def _compile(spec: ConvSpec, arrays: dict[str, Any], grad_output: Any) -> None:
    """Have the kernels compiled of which the lines that follow are said, where they can be."""
    if not dispatch.load(DEFORM_CONV, "cpu").reasons_against(spec, "numpy", "cpu", True):
        with progress(TESTED_KERNELS):
            trial.values("cpu", arrays, grad_output)
