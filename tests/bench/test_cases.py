"""The named cases are valid calls, the same in every process, and every kind of them is computed right."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from tests.tolerances import assert_close

import deformconv
from deformconv.bench.cases import CASES, QUICK, Case, case_of, make, named

BY_NAME = {case.name: case for case in CASES}


def shrunk(case: Case) -> Case:
    """A case of the same kind, small enough for the reference: fewer pixels, images and channels, as many tails."""
    small = case._replace(batch=min(case.batch, 3), size=tuple(min(length, 13 - 2 * i) for i, length in enumerate(case.size)))
    channels = min(case.in_channels, 48)
    if case.groups == case.in_channels:
        return small._replace(in_channels=channels, out_channels=channels, groups=channels)
    if case.groups > 1:
        return small._replace(in_channels=64, out_channels=64, groups=4)
    return small._replace(in_channels=channels, out_channels=min(case.out_channels, 56))


def test_every_case_has_a_name_of_its_own():
    assert len(BY_NAME) == len(CASES) == 20
    assert set(QUICK) <= set(BY_NAME)
    assert named("edvr") is BY_NAME["edvr"]


@pytest.mark.parametrize(
    ("name", "shape", "details", "output"),
    [
        ("c64-56", "2x64x56x56 -> 64", "", (2, 64, 56, 56)),
        ("c256-100", "2x256x100x100 -> 256", "", (2, 256, 100, 100)),
        ("resnet-c3-v1", "1x128x100x168 -> 128", "v1", (1, 128, 100, 168)),
        ("resnet-c5-v2", "1x512x25x42 -> 512", "", (1, 512, 25, 42)),
        ("resnext-c4", "1x512x50x84 -> 512", "32 groups", (1, 512, 50, 84)),
        ("edvr", "1x64x180x320 -> 64", "8 offset groups", (1, 64, 180, 320)),
        ("birefnet-aspp", "1x64x64x64 -> 256", "kernel 7x7", (1, 256, 64, 64)),
        ("dbnet", "1x128x92x160 -> 128", "stride 2x2", (1, 128, 46, 80)),
        ("signal-1d", "4x64x4096 -> 64", "kernel 9", (4, 64, 4096)),
        ("volume-3d", "1x32x16x28x28 -> 32", "kernel 3x3x3", (1, 32, 16, 28, 28)),
        ("depthwise", "2x256x56x56 -> 256", "depthwise", (2, 256, 56, 56)),
        ("batch-8", "8x128x28x28 -> 128", "", (8, 128, 28, 28)),
        ("primes", "3x37x41x29 -> 53", "kernel 5x3, stride 2x1", (3, 53, 21, 29)),
    ],
)
def test_what_the_names_stand_for(name: str, shape: str, details: str, output: tuple[int, ...]):
    case = named(name)
    assert (case.shape, case.details) == (shape, details)
    windows = zip(case.size, case.kernel, case.stride, case.padding, case.dilation, strict=True)
    assert tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in windows) == output[2:]
    assert (case.batch, case.out_channels) == output[:2]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_arrays(case: Case):
    small = shrunk(case)
    spec, arrays = make(small)
    assert arrays["grad_output"].shape == spec.output_shape
    assert (arrays["mask"] is not None) == case.masked == spec.masked
    assert abs(arrays["offset"].std() - case.sigma) < 0.2
    fractions = arrays["offset"] - np.floor(arrays["offset"])
    assert fractions.min() > 0.005 and fractions.max() < 0.995
    again = make(small)[1]
    assert all(np.array_equal(arrays[name], again[name]) for name in arrays if arrays[name] is not None)
    assert {array.dtype for array in arrays.values() if array is not None} == {np.dtype("float32")}


def test_offsets_may_be_zero():
    arrays = make(shrunk(named("primes"))._replace(sigma=0.0))[1]
    assert not arrays["offset"].any()


def test_a_case_survives_json():
    for case in CASES:
        assert case_of(json.loads(json.dumps(case._asdict()))) == case


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_kind_of_case_is_computed_right(case: Case):
    spec, arrays = make(shrunk(case))
    grad_output = arrays.pop("grad_output")
    window: dict[str, Any] = {"stride": spec.stride, "padding": spec.padding, "dilation": spec.dilation}
    window |= {"groups": spec.groups, "offset_groups": spec.offset_groups}
    exact = {name: None if array is None else array.astype("float64") for name, array in arrays.items()}
    expected = deformconv.deform_conv(**exact, **window, backend="reference")
    assert_close(deformconv.deform_conv(**arrays, **window, backend="cpu"), expected, "float32", "output")
    wanted = deformconv.deform_conv_backward(grad_output.astype("float64"), **exact, **window, backend="reference")
    found = deformconv.deform_conv_backward(grad_output, **arrays, **window, backend="cpu")
    for name, right in wanted._asdict().items():
        if right is not None:
            assert_close(getattr(found, name), right, "float32", name)
