"""Only right results are timed, and blocks alternate."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.bench.made_up import RIGHT, Fake

from deformconv.bench.cases import TOLERANCE, named
from deformconv.bench.measure import Entry, Failure, Pace, compare, differences

CASE = named("primes")
PACE = Pace(blocks=3, seconds=1e-2)


def compared(*fakes: Fake, direction: str = "forward+backward", pace: Pace = PACE) -> dict[str, dict[str, Any]]:
    return compare({fake.library: Entry(fake, CASE) for fake in fakes}, direction, Fake("truth", RIGHT), pace)


@pytest.mark.parametrize(("wrong", "text"), [(4.01, "2.5e-03"), (np.nan, "inf"), (-np.inf, "inf")])
def test_a_wrong_result_has_no_time(wrong: float, text: str):
    liar = Fake("kornia", RIGHT | {"weight": np.array([1.0, 2.0, wrong])})
    found = compared(Fake("deformconv", RIGHT), liar)
    assert found["kornia"] == {"reason": f"differs by {text} in weight"}
    assert liar.log == []
    assert found["deformconv"]["milliseconds"] == pytest.approx(1.0)
    assert found["deformconv"]["error"] == 0


def test_our_own_wrong_result_has_no_time_either():
    found = compared(Fake("deformconv", RIGHT | {"output": np.zeros(3)}), Fake("torchvision", RIGHT))
    assert found["deformconv"] == {"reason": "differs by 1.0e+00 in output"}
    assert "milliseconds" in found["torchvision"]


def test_a_missing_or_misshapen_gradient_is_wrong():
    assert differences({"output": np.ones(3)}, RIGHT) == {"output": 0.0, "weight": np.inf}
    assert differences(RIGHT | {"output": np.ones(4)}, RIGHT)["output"] == np.inf


def test_a_plain_convolution_is_timed_though_it_computes_another_thing():
    found = compared(Fake("dense", {"output": np.full(3, 9.0)}))
    assert found["dense"]["milliseconds"] == pytest.approx(1.0) and "error" not in found["dense"]


@pytest.mark.parametrize("when", ["prepare", "results", "time"])
def test_a_failing_library_has_no_time_and_the_others_have(when: str):
    broken = Fake("torchvision", RIGHT)
    broken.fails = when
    found = compared(Fake("deformconv", RIGHT), broken)
    assert found["torchvision"] == {"reason": "failed: SomeError: it cannot"}
    assert found["deformconv"]["blocks"] == 3


def test_without_the_truth_nothing_is_timed():
    ours, truth = Fake("deformconv", RIGHT), Fake("truth", RIGHT)
    truth.fails = "results"
    with pytest.raises(Failure, match="what primes should be could not be computed: SomeError: it cannot"):
        compare({"deformconv": Entry(ours, CASE)}, "forward", truth, PACE)
    assert ours.log == []


def test_what_a_library_cannot_run_it_is_not_asked():
    runtime = Fake("openvino", RIGHT)
    assert compared(runtime) == {"openvino": {"reason": "has no gradients"}}
    assert runtime.log == []


def test_blocks_alternate_and_are_about_as_long_as_asked():
    log: list[str] = []
    found = compared(Fake("deformconv", RIGHT, 1e-3, log), Fake("torchvision", RIGHT, 5e-3, log))
    assert found["deformconv"]["calls"] == 30 and found["torchvision"]["calls"] == 6
    warm = ["deformconv"] * 4 + ["torchvision"] * 4
    assert log[:8] == warm
    block = ["deformconv"] * (1 + 10) + ["torchvision"] * (1 + 2)
    assert log[8:] == 3 * block


def test_long_calls_are_not_repeated_without_need():
    slow = Fake("torchvision", RIGHT, 2.0)
    found = compared(slow, pace=Pace(9, 0.5))
    assert found["torchvision"]["blocks"] == found["torchvision"]["calls"] == 4
    assert len(slow.log) == 1 + 4


def test_a_block_of_one_call_begins_with_another():
    call = Fake("deformconv", RIGHT, 0.4)
    found = compared(call, pace=Pace(9, 0.5))
    assert found["deformconv"]["blocks"] == found["deformconv"]["calls"] == 4
    assert len(call.log) == 1 + 3 + 4 * 2


def test_a_block_of_several_long_calls_begins_with_another():
    call = Fake("deformconv", RIGHT, 2.0)
    assert compared(call, pace=Pace(3, 6.0))["deformconv"]["calls"] == 3 * 3
    assert len(call.log) == 1 + 3 + 3 * (1 + 3)


def test_medians_and_quartiles_are_of_blocks():
    class Drifting(Fake):
        def ask(self, do: str, **request: Any) -> Any:
            answer = super().ask(do, **request)
            if do == "time":
                self.seconds += 1e-3
                return [*answer[:-1], 99.0] if len(answer) > 2 else answer  # one call of a block is disturbed
            return answer

    found = compared(Drifting("deformconv", RIGHT, 1e-3), pace=Pace(5, 1e-2))["deformconv"]
    low, high = found["quartiles"]
    assert low < found["milliseconds"] < high < 99


def test_wide_images_are_given_what_rounding_takes():
    assert named("primes").tolerance == TOLERANCE
    assert named("signal-1d").tolerance == 4096 / 2**23
