"""What the GPU kernels compile to, for cards that are not here: see tests/compiled.py."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from tests.ops.attention.cases import ARGUMENTS, Case, make
from tests.ops.attention.gpu_suite import DETR

from deformconv.ops.attention import gpu

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from tests.compiled import Build, Launch, built, launches_for, narrow_in, too_large  # noqa: E402

pytestmark = pytest.mark.slow

# (card, dtype). Those for sm_75 count elements in 64 bits, as for large tensors.
CALLS = [("sm_75", "float32"), ("sm_90", "bfloat16"), ("sm_90", "float64"), ("gfx942", "float32")]
# Registers of a thread and bytes of shared memory: of 64 registers each, a multiprocessor has room for 32 warps.
MOST = {"attend": (80, 1 << 10), "attend_backward": (96, 1 << 10), "collect_levels": (96, 1 << 10)}
# How lines begin in which a product of 32 bits becomes a part of an address of 64, and why it is small.
SMALL_PRODUCTS = {
    "pixel = y_pixel * X + pixel": "a pixel of one level, of which there are less than 2**31",
    "return tl.max_contiguous(tl.multiple_of(group * size + own, SPAN), SPAN)": "a channel",
    "return tl.max_contiguous(tl.multiple_of(group * GROUP + (channel - group * CG), ": "within one row of a gradient",
    "value_ptr, begin, y_low, x_low, y, x, counts, height, width, H * D": "the channels of a pixel",
    "of = tl.multiple_of(row.to(INDEX) * (H * D), SPAN)": "the channels of a query",
    "to = tl.multiple_of(row.to(INDEX) * (H * D), SPAN)": "the channels of a query",
    "sample = (row.to(INDEX) * H + head) * (levels * points)": "the samples of a query in a head",
    "at = sample + level * points + point": "the same",
    "at = (row.to(INDEX) * H + head) * (levels * points)": "the same",
    "samples = tl.cast(rows, INDEX) * heads * (levels * points)": "the same",
    "key_ptr, share_ptr, of_sample * Q + (row - image * Q)": "image * Q is no more than the row's number",
    "tokens += ": "pixels of one image",
    "lists += ": "lists of one image, of which there are hardly more than pixels",
    "tokens, lists = ": "the same",
    "x = token - first_token - y * X": "a pixel of one level",
    "number = ": "a list of one image",
}


def asked_for(card: str, case: Case, dtype: str, wide: bool = False) -> list[Launch]:
    """The launches of a call's forward and backward pass that are attention's own."""
    call = make(case, "float32")
    exact = torch.float64 if dtype == "float64" else torch.float32
    value, grad_output = (torch.from_numpy(array).to(getattr(torch, dtype)) for array in (call.value, call.grad_output))
    others = [torch.from_numpy(array).to(exact) for array in call.arrays[1:]]
    spec = replace(call.spec, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch, launches_for(card) as asked:
        if wide:
            patch.setattr(gpu, "_largest", lambda spec: 2**31)
            gpu._plan.cache_clear()
        gpu.forward(spec, value, *others)
        gpu.backward(spec, grad_output, value, *others, wanted=ARGUMENTS)
    if wide:
        gpu._plan.cache_clear()
    return [launch for launch in asked if launch.name in MOST and (launch.name != "collect_levels" or exact != torch.float64)]


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Build]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        launches = [launch for card, dtype in CALLS for launch in asked_for(card, DETR, dtype, wide=card == "sm_75")]
        yield [built(launch) for launch in dict.fromkeys(launches)]


def test_nothing_spills_and_programs_are_small(builds: list[Build]) -> None:
    wrong = too_large(builds, MOST)
    assert not wrong, "\n".join(wrong)
    assert {build.launch.name for build in builds} == set(MOST) and len(builds) == 3 * len(CALLS) - 1


def test_corners_are_loaded_16_bytes_at_a_time(builds: list[Build]) -> None:
    for build in builds:
        if build.launch.name != "collect_levels":
            due, found = build.wide_loads_due("value_ptr"), build.loads
            assert found[16] >= due > 0, f"{build.launch}: {found}, {due} of 16 bytes expected"


def test_no_sum_is_made_by_atomics(builds: list[Build]) -> None:
    assert not [build.launch for build in builds if build.float_atomics]


def test_what_places_a_sample_is_rounded_apart(builds: list[Build]) -> None:
    """Products and sums that the kernels do not make one stay two, or what a product lost would be wrong."""
    for build in builds:
        if build.launch.name.startswith("attend"):
            assert build.launch.options["enable_fp_fusion"] is False
            assert ("mul.rn.f" in build.texts["ptx"]) if "ptx" in build.texts else True


def test_addresses_of_large_tensors_are_multiplied_in_64_bits(builds: list[Build]) -> None:
    assert not narrow_in([build for build in builds if build.launch.card == "sm_75"], SMALL_PRODUCTS)


def test_20_sizes_are_compiled_at_most_twice() -> None:
    """A net sees images of many sizes, and a decoder has fewer queries than an encoder; a compilation takes a second."""
    keys: dict[str, set[Any]] = defaultdict(set)
    for number in range(20):
        levels = tuple(((7 + 3 * number) >> level, (9 + 4 * number) >> level) for level in range(1 + number % 3))
        case = DETR.but(levels=levels, batch=1 + number % 3, queries=3 + 5 * number, points=1 + number % 5, heads=2)
        for launch in asked_for("sm_90", case, "bfloat16"):
            keys[launch.name].add(launch)
    assert set(keys) == set(MOST)
    assert max(map(len, keys.values())) <= 2, {name: len(launches) for name, launches in keys.items()}
