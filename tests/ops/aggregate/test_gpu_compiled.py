"""What the GPU kernels compile to, for cards that are not here: see tests/compiled.py."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from tests.ops.aggregate.cases import Case, make

from deformconv.ops.aggregate import gpu
from deformconv.ops.aggregate.spec import GRADIENTS

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from tests.compiled import Build, Launch, built, launches_for, narrow_in, too_large  # noqa: E402

pytestmark = pytest.mark.slow

INTERN = Case("InternImage", (16, 16), (3, 3), padding=1, batch=1, channels=64, offset_groups=4)
VOLUME = Case("volume", (4, 8, 8), (3, 3, 3), padding=1, batch=1, channels=64, offset_groups=2)
# (card, case, dtype, whether all lies channels last). Those for sm_75 count elements in 64 bits, as for large tensors.
CALLS = [
    ("sm_75", INTERN, "float32", True),
    ("sm_90", INTERN, "bfloat16", True),
    ("sm_90", INTERN, "float32", False),
    ("gfx942", VOLUME, "float32", True),
]
# Registers of a thread and bytes of shared memory.
MOST = {"aggregate": (96, 1 << 10), "aggregate_backward": (128, 1 << 10)}
# How lines begin in which a product of 32 bits becomes a part of an address of 64, and why it is small.
SMALL_PRODUCTS = {
    "pixel = y_pixel * X + pixel": "a pixel of one image, of which there are less than 2**31",
    "position = ": "image * P is no more than the row's number",
    "return tl.max_contiguous(tl.multiple_of(group * size + own, SPAN), SPAN)": "a channel",
}


def asked_for(card: str, case: Case, dtype: str, last: bool, wide: bool = False) -> list[Launch]:
    """The launches of a call's forward and backward pass that are aggregation's own."""
    call = make(case, "float32")
    exact = torch.float64 if dtype == "float64" else torch.float32
    form = (torch.channels_last, torch.channels_last_3d)[call.spec.rank - 2] if last else torch.contiguous_format
    x, offset, mask, grad_output = (
        torch.from_numpy(array).to(to).contiguous(memory_format=form)
        for array, to in zip(
            (*call.arrays, call.grad_output), (getattr(torch, dtype), exact, exact, getattr(torch, dtype)), strict=True
        )
    )
    spec = replace(call.spec, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch, launches_for(card) as asked:
        if wide:
            patch.setattr(gpu, "_largest", lambda spec: 2**31)
            gpu._plan.cache_clear()
        gpu.forward(spec, x, offset, mask)
        gpu.backward(spec, grad_output, x, offset, mask, GRADIENTS)
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
    assert [build.launch.name for build in builds] == list(MOST) * len(CALLS)


def test_corners_are_loaded_16_bytes_at_a_time(builds: list[Build]) -> None:
    for build in builds:
        due, found = build.wide_loads_due("x_ptr"), build.loads
        assert found[16] >= due > 0, f"{build.launch}: {found}, {due} of 16 bytes expected"


def test_no_sum_is_made_by_atomics(builds: list[Build]) -> None:
    assert not [build.launch for build in builds if build.float_atomics]


def test_addresses_of_large_tensors_are_multiplied_in_64_bits(builds: list[Build]) -> None:
    assert not narrow_in([build for build in builds if build.launch.card == "sm_75"], SMALL_PRODUCTS)


def test_20_sizes_are_compiled_at_most_twice() -> None:
    """A net sees images of many sizes, and a compilation takes a second."""
    keys: dict[str, set[Any]] = defaultdict(set)
    for number in range(20):
        case = INTERN.but(size=(7 + number, 9 + 2 * number), batch=1 + number % 3, channels=16, offset_groups=1)
        for launch in asked_for("sm_90", case, "bfloat16", last=True):
            keys[launch.name].add(launch)
    assert set(keys) == set(MOST)
    assert max(map(len, keys.values())) <= 2, {name: len(launches) for name, launches in keys.items()}
