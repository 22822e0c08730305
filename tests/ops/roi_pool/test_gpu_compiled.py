"""What the GPU kernels compile to, for cards that are not here: see tests/compiled.py."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from tests.ops.roi_pool.cases import Case, make
from tests.ops.roi_pool.suite import WANTED

from deformconv.ops.roi_pool import gpu

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from tests.compiled import Build, Launch, built, launches_for, narrow_in, too_large  # noqa: E402

pytestmark = pytest.mark.slow

BOX_HEAD = Case("box head", channels=256, size=(14, 17), boxes=64, output_size=(7, 7), convention="unaligned")
GROUPS = BOX_HEAD.but(
    name="groups", channels=9 * 64, output_size=(3, 3), position_sensitive=True, classes=2, convention="rounded"
)
# (card, case, dtype). Those for sm_75 count elements in 64 bits, as for large tensors.
CALLS = [
    ("sm_75", GROUPS, "float32"),
    ("sm_90", BOX_HEAD, "bfloat16"),
    ("sm_90", BOX_HEAD, "float64"),
    ("gfx942", BOX_HEAD, "float32"),
]
# Registers of a thread and bytes of shared memory. What both operators share is tested beside the convolution.
MOST = {"pool": (128, 8 << 10), "pool_backward": (255, 8 << 10)}
# How lines begin in which a product of 32 bits becomes a part of an address of 64, and why it is small.
SMALL_PRODUCTS = {
    "pixel = y_pixel * X + pixel": "a pixel of one image, of which there are less than 2**31",
    "return bin_y * SIZES[2]": "a group of channels",
    "first = _group_of(": "a channel",
    "begin = image.to(INDEX) * pixels * C + part_of_input * CO": "a channel",
    "return tl.max_contiguous(tl.multiple_of(group * size + own, SPAN), SPAN)": "a channel",
    "number += (y_low + 1) * (X + 1)": "a list of one image, of which there are hardly more than pixels",
}


def asked_for(card: str, case: Case, dtype: str, wide: bool = False) -> list[Launch]:
    """The launches of a call's forward and backward pass that are RoI pooling's own."""
    call = make(case, "float32")
    exact = torch.float64 if dtype == "float64" else torch.float32
    x, grad_output = (torch.from_numpy(array).to(getattr(torch, dtype)) for array in (call.input, call.grad_output))
    others = [torch.from_numpy(array).to(exact) for array in call.arrays[1:]]
    spec = replace(call.spec, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch, launches_for(card) as asked:
        if wide:
            patch.setattr(gpu, "_largest", lambda spec: 2**31)
            gpu._plan.cache_clear()
        gpu.forward(spec, x, *others)
        gpu.backward(spec, grad_output, x, *others, wanted=WANTED)
    if wide:
        gpu._plan.cache_clear()
    return [launch for launch in asked if launch.name in MOST]


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Build]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        launches = [launch for call in CALLS for launch in asked_for(*call, wide=call[0] == "sm_75")]
        yield [built(launch) for launch in dict.fromkeys(launches)]


def test_nothing_spills_and_programs_are_small(builds: list[Build]) -> None:
    wrong = too_large(builds, MOST)
    assert not wrong, "\n".join(wrong)
    assert [build.launch.name for build in builds] == ["pool", "pool_backward"] * len(CALLS)


def test_corners_are_loaded_16_bytes_at_a_time(builds: list[Build]) -> None:
    for build in builds:
        due, found = build.wide_loads_due("x_ptr"), build.loads
        assert due > 0
        assert found[16] >= due, f"{build.launch}: {found}, {due} of 16 bytes expected"


def test_no_sum_is_made_by_atomics(builds: list[Build]) -> None:
    assert not [build.launch for build in builds if build.float_atomics]


def test_addresses_of_large_tensors_are_multiplied_in_64_bits(builds: list[Build]) -> None:
    assert not narrow_in([build for build in builds if build.launch.card == "sm_75"], SMALL_PRODUCTS)


def test_20_sizes_and_scales_are_compiled_at_most_3_times() -> None:
    """A net has several maps and sees images of many sizes, with more boxes or fewer, and a compilation takes a second."""
    keys: dict[str, set[Any]] = defaultdict(set)
    for number in range(20):
        size, boxes = (7 + 3 * number, 9 + 4 * number), 1 + 7 * number
        case = BOX_HEAD.but(size=size, batch=1 + number % 3, channels=32, boxes=boxes, scale=2.0**-number, gamma=0.01 * number)
        for launch in asked_for("sm_90", case, "bfloat16"):
            keys[launch.name].add(launch)
    assert set(keys) == set(MOST)
    assert max(map(len, keys.values())) <= 3, {name: len(launches) for name, launches in keys.items()}
