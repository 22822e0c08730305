"""What the GPU kernels compile to, for cards that are not here: see tests/compiled.py.

Each build is of what a call asks for: block sizes, types and hints are the backend's own. That says nothing of time, and
nothing of races; but a spill, a load of single numbers or an address of 32 bits is seen here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.ops.conv.cases import Case, make

from deformconv.ops.conv import gpu
from deformconv.ops.conv.spec import GRADIENTS

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from tests.compiled import SHARED_MEMORY, Build, Launch, built, launches_for  # noqa: E402

pytestmark = pytest.mark.slow

DENSE = Case("dense", (16, 16), (3, 3), padding=1, batch=1, in_channels=256, out_channels=128, biased=False)
DEPTHWISE = DENSE.but(name="depthwise", out_channels=256, groups=256)
VOLUME = Case("volume", (4, 8, 8), (3, 3, 3), padding=1, batch=1, in_channels=64, out_channels=64, biased=False)

# (card, case, dtype). Those for sm_75 count elements in 64 bits, as for large tensors.
CALLS = [
    *((card, DENSE, "bfloat16") for card in ("sm_75", "sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")),
    ("sm_80", DENSE, "float16"),
    ("sm_80", DENSE, "float32"),
    ("sm_90", DENSE, "float32"),
    ("sm_75", DENSE, "float64"),
    ("sm_90", DEPTHWISE, "bfloat16"),
    ("gfx942", DEPTHWISE, "float32"),
    ("sm_80", VOLUME, "float32"),
    ("sm_90", VOLUME, "bfloat16"),
]
# Registers of a thread, of the 255 that there are on NVIDIA's cards, and bytes of shared memory. A multiprocessor has 65,536
# registers, so that 168 leave it three programs of 4 warps.
MOST = {
    "sample": (168, 8 << 10),
    "sample_backward": (255, 8 << 10),
    "convolve_depthwise": (168, 8 << 10),
    "collect": (255, 8 << 10),
    "sum_runs": (168, 8 << 10),
    "arrange": (64, 8 << 10),
    "transpose": (96, 33 << 10),
}
# How lines begin in which a product of 32 bits becomes a part of an address of 64, and why it is small.
SMALL_PRODUCTS = {
    "pixel = y_pixel * X + pixel": "a pixel of one image, of which there are less than 2**31",
    "position = ": "image * P is no more than the row's number",
    "return tl.max_contiguous(tl.multiple_of(group * size + own, SPAN), SPAN)": "a channel",
    "return tl.max_contiguous(tl.multiple_of(group * GROUP + (channel - group * CG), ": "within one row of columns",
    "row_of_tap = tl.multiple_of(own_row * (K * C) + tap * TAP, ": "tap * TAP is within one row of columns",
    "number += (pixel // X % Y + 1 - corner // 2 % 2) * (X + 1)": "a list of one image, hardly more than pixels",
}


def asked_for(card: str, case: Case, dtype: str, wide: bool = False, adds: bool = False) -> list[Launch]:
    """The launches of a call's forward and backward pass; `adds` is whether the input's gradient is added up by atomics."""
    call = make(case, "float32")
    exact = torch.float32 if dtype in ("float16", "bfloat16") else getattr(torch, dtype)
    tensors = []
    for name in ("grad_output", "input", "offset", "weight", "mask"):
        array = getattr(call, name)
        tensors.append(torch.from_numpy(array).to(exact if name in ("offset", "mask") else getattr(torch, dtype)))
    grad_output, input, offset, weight, mask = tensors
    spec = replace(call.spec, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch, launches_for(card) as asked:
        patch.setattr(gpu, "_adds", lambda spec, device: adds)
        if wide:
            patch.setattr(gpu, "_largest", lambda spec: 2**31)
            gpu._plan.cache_clear()
        gpu.forward(spec, input, offset, weight, None, mask)
        gpu.backward(spec, grad_output, input, offset, weight, mask, GRADIENTS)
    if wide:
        gpu._plan.cache_clear()
    kept = {"transpose": ("sm_75", "gfx942"), "arrange": ("sm_75", "gfx942"), "collect": ("sm_75", "sm_80", "sm_90", "gfx942")}
    kept["sum_runs"] = kept["arrange"]
    return [launch for launch in asked if card in kept.get(launch.name, (card,))]


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Build]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        launches = [launch for call in CALLS for launch in asked_for(*call, wide=call[0] == "sm_75")]
        # One after the other: of threads that compile at once, some get other code, since LLVM has options for a whole process.
        yield [built(launch) for launch in dict.fromkeys(launches)]


def test_nothing_spills(builds: list[Build]) -> None:
    spilling = [f"{build.launch}: {build.stack} bytes" for build in builds if build.stack]
    assert not spilling, "\n".join(spilling)


def test_registers_and_shared_memory(builds: list[Build]) -> None:
    wrong = []
    for build in builds:
        registers, shared = MOST[build.launch.name]
        registers *= 1 if build.launch.card.startswith("sm_") else 2  # a thread of AMD's has 512
        if build.registers > registers or build.shared > min(shared, SHARED_MEMORY[build.launch.card]):
            wrong.append(f"{build.launch}: {build.registers} registers, {build.shared} bytes of shared memory")
    assert not wrong, "\n".join(wrong)
    assert {build.launch.name for build in builds} == set(MOST)


def test_float32_is_never_rounded_to_tf32(builds: list[Build]) -> None:
    """Where a kernel of ours multiplies, tests/runtime/test_product.py looks at it; all other products are PyTorch's."""
    assert any(build.launch.signature.get("x_ptr") == "*fp32" for build in builds)
    assert [build.launch for build in builds if build.tensor_core] == []


def test_corners_are_loaded_16_bytes_at_a_time(builds: list[Build]) -> None:
    """A thread's channels of a corner in one instruction; beside them it loads offsets and masks, of 4 bytes or 8."""
    cards = set()
    for build in builds:
        if build.launch.name in ("sample", "sample_backward"):
            due, found = build.wide_loads_due("x_ptr"), build.loads
            single = 8 if build.launch.signature["offset_ptr"] == "*fp64" else 4
            if build.launch.card.startswith("sm_"):
                assert found[16] >= due > 0, f"{build.launch}: {found}, {due} of 16 bytes expected"
                assert set(found) <= {16, single}, f"{build.launch}: {found}"
            else:  # a tile has half as many channels for each thread of AMD's card, which has twice as many of them
                assert found[8] + found[16] >= 4, f"{build.launch}: {found}"
            cards.add(build.launch.card)
    assert cards == {card for card, *_ in CALLS}


def test_no_sum_is_made_by_atomics(builds: list[Build]) -> None:
    for build in builds:
        assert not build.float_atomics, build.launch


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_atomics_add_several_numbers_at_once(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they are asked for: an H100 adds 4 numbers of float32 in one instruction."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launches = asked_for("sm_90", DENSE.but(in_channels=64, offset_groups=8), dtype, adds=True)
    (build,) = [built(launch) for launch in launches if launch.name == "sample_backward"]
    assert not {"arrange", "collect"} & {launch.name for launch in launches}
    assert not build.stack
    assert set(build.float_atomics) == {"atom.global.gpu.relaxed.add.v4.f32"}
    assert build.registers <= MOST["sample"][0]


def test_addresses_of_large_tensors_are_multiplied_in_64_bits(builds: list[Build]) -> None:
    large = [build for build in builds if build.launch.card == "sm_75" and build.launch.name != "transpose"]
    assert {build.launch.name for build in large} == {"sample", "sample_backward", "arrange", "collect", "sum_runs"}
    assert all(str(build.launch.constant("INDEX")) == "int64" for build in large)
    found = defaultdict(set)
    for build in large:
        for line in build.narrow_products:
            if not line.startswith(tuple(SMALL_PRODUCTS)):
                found[line].add(build.launch.name)
    assert not found, "\n".join(f"{line}: {', '.join(names)}" for line, names in found.items())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_20_sizes_are_compiled_at_most_4_times(dtype: str) -> None:
    """A net sees images of many sizes, and a compilation takes a second."""
    keys: dict[str, set[Any]] = defaultdict(set)
    for number in range(20):
        size = (7 + 3 * number, 9 + 4 * number)
        case = DENSE.but(size=size, batch=1 + number % 3, in_channels=32, out_channels=32)
        for launch in asked_for("sm_90", case, dtype):
            keys[launch.name].add(launch)
    assert {"sample_backward", "collect"} <= set(keys)
    assert max(map(len, keys.values())) <= 4, {name: len(launches) for name, launches in keys.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_after_warmup_usual_calls_ask_for_nothing_new(dtype: str) -> None:
    with launches_for("sm_90") as warm:
        gpu.warmup([dtype], "cpu")
    known = set(warm)
    for channels, size in ((64, 56), (64, 50), (256, 28), (256, 25), (512, 7)):
        usual = DENSE.but(size=(size, size), batch=2, in_channels=channels, out_channels=channels)
        missing = [launch for launch in asked_for("sm_90", usual, dtype) if launch not in known]
        assert not missing, (channels, size, [launch.name for launch in missing])
