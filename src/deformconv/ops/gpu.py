"""What the backends of Triton's kernels answer alike, whatever the operator."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from deformconv.runtime import toolchain

__all__ = ["ADDED", "ADDED_ON", "DTYPES", "OLDEST", "Card", "adds", "card", "cards", "reasons_against", "words_of_adding"]

DTYPES = ("float16", "bfloat16", "float32", "float64")
OLDEST = (7, 5)  # the compute capability of NVIDIA's Turing
ADDED = 16  # channels of an offset group up to which atomics were measured to be faster than sorting, and on which capabilities
ADDED_ON = ((9, 0),)


class Card(NamedTuple):
    """A GPU."""

    name: str
    architecture: str  # "sm_90", "gfx942"
    capability: tuple[int, int] | None  # NVIDIA's compute capability
    memory: int  # bytes

    def __str__(self) -> str:
        return f"{self.name}, {self.architecture}"


def reasons_against(dtype: str, library: str, device: str) -> list[str]:
    """Why kernels cannot run a call on such arrays, as sentences; none if they can."""
    if library != "torch":
        return [f"it takes PyTorch's tensors, not {library}'s arrays"]
    reasons = []
    if dtype not in DTYPES:
        reasons.append(f"it computes in {', '.join(DTYPES[:-1])} and {DTYPES[-1]}, not {dtype}")
    if not (device.partition(":")[0] == "cuda" or (device == "cpu" and toolchain.is_interpreted())):
        # What this machine lacks for GPUs is no reason then.
        return [*reasons, f"its kernels run on GPUs of NVIDIA and AMD and the arrays are on {device}"]
    return [*reasons, *_reasons_of_machine(), *_reasons_of_card(device)]


def _reasons_of_machine() -> list[str]:
    found = [toolchain.without_triton()]
    if not toolchain.is_interpreted():
        found += [toolchain.without_compiler(), toolchain.without_headers()]
    return [reason for reason in found if reason is not None]


def _reasons_of_card(device: str) -> list[str]:
    found = None if toolchain.is_interpreted() else card(device)
    if found is None or found.capability is None or found.capability >= OLDEST:
        return []
    oldest, own = (".".join(map(str, capability)) for capability in (OLDEST, found.capability))
    return [f"its kernels need a GPU of compute capability {oldest} or newer, and {device}, {found.name}, has {own}"]


def adds(channels: int, device: str) -> bool:
    """Whether an input's gradient is added up by atomics, where an offset group has so many channels.

    The fewer there are, the more samples there are to sort for as many numbers. PyTorch's setting is read at each call.
    """
    import torch

    if channels > ADDED or torch.are_deterministic_algorithms_enabled():
        return False
    found = card(device)
    return found is not None and found.capability in ADDED_ON


def words_of_adding(added: bool) -> str:
    """What is to be said where `adds` is true, as the end of a sentence."""
    return "; the input's gradient is added up in another order each time, unless PyTorch is told to be deterministic" * added


@cache
def card(device: str) -> Card | None:
    """The GPU `cuda:N`; None where PyTorch finds none, as beside fake tensors, which may be of any device."""
    import torch

    kind, _, number = device.partition(":")
    index = int(number or 0)
    # Asked first, since whatever asks for properties starts CUDA.
    if kind != "cuda" or not torch.cuda.is_available() or index >= torch.cuda.device_count():
        return None
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        architecture, capability = properties.gcnArchName.partition(":")[0], None
    else:
        capability = properties.major, properties.minor
        architecture = f"sm_{properties.major}{properties.minor}"
    return Card(properties.name, architecture, capability, properties.total_memory)


def cards() -> dict[str, Card]:
    """Every GPU that PyTorch finds, by its device."""
    import torch

    devices = [f"cuda:{index}" for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)]
    return {device: found for device in devices if (found := card(device)) is not None}
