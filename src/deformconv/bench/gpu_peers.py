"""What the benchmark on a GPU measures: cases, dtypes, and the libraries that have a kernel for one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from deformconv.bench.cases import TOLERANCE, Case, make, named
from deformconv.bench.peers import Deformconv, Dense, TorchPeer, Torchvision, Truth, missing

__all__ = [
    "BLOCKS", "DTYPES", "GPU_CASES", "GPU_PEERS", "MAIN", "TINY", "Dtype", "Given", "allow_tf32", "copies", "given",
    "reason_against", "step", "truth",
]  # fmt: skip

Given = dict[str, Any]  # tensors by name; None stands for a mask that is not there

TINY = Case("tiny", 1, 16, 16, (9, 11))  # for a smoke run, and for no figure
MAIN = ("c256-56", "c256-100")
GPU_CASES = (
    *map(named, MAIN),
    named("c64-56"),
    named("c512-14"),
    named("c256-56")._replace(name="b16-c256-56", batch=16),
    named("edvr"),
    named("resnext-c4"),
    named("depthwise"),
)


class Dtype(NamedTuple):
    """A label of the tables: the dtype of input, weight, bias and output, and whether products may round to TF32.

    `limit` is the error above which a result is wrong and has no time: halves are judged by their errors, which stand
    beside the times, and not by it.
    """

    name: str
    tf32: bool
    limit: float


DTYPES = {
    "bf16": Dtype("bfloat16", False, 0.1),
    "fp32": Dtype("float32", False, TOLERANCE),
    "tf32": Dtype("float32", True, 1e-2),
    "fp16": Dtype("float16", False, 0.1),
}


class _OnDevice(TorchPeer):
    """A library on a GPU, where the host's threads compute nothing."""

    def __init__(self, threads: int = 1) -> None:
        self.torch = torch


class Ours(_OnDevice, Deformconv):
    backend = "gpu"


class Portable(_OnDevice, Deformconv):
    name = title = "portable"
    backend = "portable"


class Right(_OnDevice, Truth):
    """What the results are compared with, for the whole batch at once."""


class Plain(_OnDevice, Dense):
    """The plain convolution of the same shape, on tensors that lie as those of the others do."""


class PlainChannelsLast(_OnDevice, Dense):
    """The plain convolution on tensors that lie with channels last already, which is how tensor cores read them."""

    name, title = "dense-channels-last", "plain, channels last"


class Theirs(_OnDevice, Torchvision):
    """torchvision's CUDA kernels, on numbers of one dtype."""


# deformops would search 24 configurations forward and 16 backward for each dtype and size, and to compile one takes a quarter
# of a minute. It gets one of them.
BLOCKS = {
    "_conv_forward_kernel": {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32},
    "_conv_backward_kernel": {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32},
}


class Deformops(_OnDevice):
    name = title = "deformops"
    packages = ("torch", "deformops", "triton")

    def operator(self, case: Case) -> Callable[..., Any]:
        import triton
        from deformops.backends.triton._kernels import conv_deform2d as kernels
        from deformops.integrations.torchvision import deform_conv2d
        from deformops.registry import Backend

        for name, blocks in BLOCKS.items():
            getattr(kernels, name).configs = [triton.Config(blocks, num_warps=4, num_stages=2)]

        def call(input: Any, offset: Any, weight: Any, bias: Any, mask: Any) -> Any:
            where = (case.stride, case.padding, case.dilation)
            return deform_conv2d(input, offset, weight, bias, *where, mask, backend=Backend.TRITON)

        return call


GPU_PEERS: dict[str, type[TorchPeer]] = {
    peer.name: peer for peer in (Ours, Plain, PlainChannelsLast, Theirs, Portable, Deformops)
}
LACKING = {("torchvision", "bf16"): "has no bfloat16", ("deformops", "tf32"): "has no TF32"}


def reason_against(library: str, dtype: str) -> str | None:
    """Why a library cannot be measured in a dtype, if it cannot."""
    absent = missing(GPU_PEERS[library].packages)
    return f"not installed here: {', '.join(absent)}" if absent else LACKING.get((library, dtype))


@lru_cache(maxsize=1)
def _arrays(case: Case) -> Mapping[str, Any]:
    return make(case)[1]


def given(case: Case, dtype: str, device: str, channels_last: bool = False) -> Given:
    """A case's tensors on a device: offsets and masks in float32 beside numbers of any dtype.

    In float16 they are rounded to it, since torchvision takes them in the input's dtype: so all libraries get the same numbers.
    """
    tensors: Given = {name: None if a is None else torch.from_numpy(a).to(device) for name, a in _arrays(case).items()}
    to = getattr(torch, DTYPES[dtype].name)
    for name in ("input", "weight", "bias", "grad_output"):
        tensors[name] = tensors[name].to(to)
    if to == torch.float16:
        for name in ("offset", "mask"):
            tensors[name] = None if tensors[name] is None else tensors[name].to(to).float()
    if channels_last:
        for name in ("input", "grad_output"):
            tensors[name] = tensors[name].contiguous(memory_format=torch.channels_last)
    return tensors


def copies(library: str, tensors: Given, count: int) -> list[Given]:
    """Copies of a case's tensors to be used in turn, in the form in which a library takes them, ready for gradients."""
    tensors = dict(tensors)
    if library == "torchvision":  # wants one dtype
        for name in ("offset", "mask"):
            tensors[name] = None if tensors[name] is None else tensors[name].to(tensors["input"].dtype)
    if library == PlainChannelsLast.name:
        for name in ("input", "weight", "grad_output"):
            tensors[name] = tensors[name].contiguous(memory_format=torch.channels_last)
    return [
        {name: None if t is None else t.clone().requires_grad_(name != "grad_output") for name, t in tensors.items()}
        for _ in range(count)
    ]


def step(operate: Callable[..., Any], tensors: Given, direction: str) -> Given:
    """The output, and after a backward call the gradients by name."""
    arguments = {name: tensor for name, tensor in tensors.items() if name != "grad_output"}
    if direction == "forward":
        with torch.no_grad():
            return {"output": operate(**arguments)}
    leaves = {name: tensor for name, tensor in arguments.items() if tensor is not None}
    output = operate(**arguments)
    gradients = torch.autograd.grad(output, list(leaves.values()), tensors["grad_output"], allow_unused=True)
    found = {name: gradient for name, gradient in zip(leaves, gradients, strict=True) if gradient is not None}
    return {"output": output.detach(), **found}


def truth(case: Case, tensors: Given, direction: str) -> Given:
    """What is right for these numbers: array operations in float64, which share nothing with the kernels."""
    wide = {name: None if t is None else t.detach().double() for name, t in tensors.items()}
    (ready,) = copies("truth", wide, 1)
    return step(Right().operator(case), ready, direction)


def allow_tf32(allowed: bool) -> None:
    """Whether float32 products may round to TF32, in PyTorch's own operations and in whatever reads its settings.

    The older names: they set the newer ones too, while the older cannot be read once the newer were set.
    """
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed
