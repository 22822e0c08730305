"""OpenVINO's operator, another text of the convention "rounded" with position-sensitive channels; it has no gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.ops.roi_pool.cases import Array, Call, Case, make
from tests.ops.roi_pool.suite import reference_output

from deformconv.accuracy import error
from deformconv.ops.roi_pool import cpu, portable

openvino = pytest.importorskip("openvino")

BASE = Case(
    "openvino", channels=18, size=(11, 14), boxes=12, output_size=(3, 3), convention="rounded", position_sensitive=True,
    masked=False,
)  # fmt: skip
CASES = [
    BASE,
    BASE.but(name="no offsets", deformed=False),
    BASE.but(name="one bin and sample", output_size=(1, 1), channels=5, sampling=1),
    BASE.but(name="four samples", sampling=4, scale=1 / 16),
    BASE.but(name="classes", channels=36, classes=2),
    BASE.but(name="one part", part_size=(1, 1)),
    BASE.but(name="fewer parts than bins", part_size=(2, 2), gamma=0.5),
    BASE.but(name="classes and parts", channels=4 * 49, output_size=(7, 7), part_size=(3, 3), classes=4, sampling=3),
    BASE.but(name="large offsets", spread=20.0),
]


def theirs(case: Case, call: Call) -> Array:
    """The operator's output, computed by OpenVINO's CPU plugin in float32."""
    ops: Any = openvino.opset8
    given = [array for array in (call.input, call.boxes, call.offset) if array is not None]
    parameters = [ops.parameter(array.shape, np.float32) for array in given]
    bins, parts = case.output_size[0], (case.part_size or case.output_size)[0]
    node = ops.deformable_psroi_pooling(
        *parameters[:2], call.spec.out_channels, case.scale, bins, "bilinear_deformable", case.sampling, case.sampling,
        case.gamma, parts, *parameters[2:],
    )  # fmt: skip
    model = openvino.Model([node], parameters)
    compiled = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found: Array = compiled(given)[0]
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_computes_what_openvino_does(case: Case) -> None:
    call = make(case, "float32")
    expected = theirs(case, call)
    assert expected.shape == call.spec.output_shape and expected.any()
    for found in (reference_output(call), cpu.forward(call.spec, *call.arrays), portable.forward(call.spec, *call.arrays)):
        assert error(found, expected) <= 1e-5
