"""The table of aims: each figure from its own report, and whether it reaches what is asked."""

from __future__ import annotations

import pytest
from tests.bench import made_up

from deformconv.bench import aims
from deformconv.bench.cases import Case, named
from deformconv.bench.half import HALF_CASES
from deformconv.bench.peers import DIRECTIONS, RECORDED

FORWARD, TRAINING = DIRECTIONS


def lines(found: dict) -> dict[str, list[str]]:
    """The aims that the document has a figure for; all others have a dash."""
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in aims.table(found).splitlines()[2:]]
    assert [line[0] for line in cells] == [aim.what for aim in aims.AIMS]
    assert all((line[2] == "-") == (line[3] == "-") for line in cells)
    return {line[0]: line[1:] for line in cells if line[2] != "-"}


def test_speed_is_compared_with_the_plain_convolution_and_the_faster_peer():
    rows = [
        made_up.row(named("c64-56"), TRAINING, deformconv=2.0, dense=1.0),
        made_up.row(named("edvr"), TRAINING, deformconv=4.0, dense=2.0),
        made_up.row(named("depthwise"), TRAINING, deformconv=90.0, dense=1.0),
        made_up.row(named("c512-14"), FORWARD, deformconv=4.0, dense=4.0, onnxruntime=3.0, openvino=8.0, prepacked=2.0),
        made_up.row(named("edvr"), FORWARD, deformconv=4.0, dense=1.0, onnxruntime=16.0),
    ]
    found = lines(made_up.document() | {"speed": made_up.section(rows)})
    assert found["training / plain convolution, 2-D, groups = 1, geometric mean"] == ["at most 1.1", "2.00", "no"]
    assert found["training / plain convolution, 2-D, groups = 1, the most but for edvr"] == ["at most 1.5", "2.00", "no"]
    assert found["training / plain convolution, edvr"] == ["at most 2.2", "2.00", "yes"]
    assert found["forward / plain convolution, C >= 128, groups = 1, geometric mean"] == ["at most 1.1", "1.00", "yes"]
    assert found["forward / plain convolution, edvr"] == ["at most 2.2", "4.00", "no"]
    assert found["the faster of ONNX Runtime and OpenVINO / ours, forward, the least"] == ["at least 1", "0.750", "no"]
    assert found["the same, with our weight packed beforehand"] == ["at least 1", "1.50", "yes"]
    assert len(found) == 7


@pytest.mark.parametrize("pairs", [False, True])
def test_half_precision_must_not_cost_more_and_pairs_must_gain(pairs):
    narrow, wide = HALF_CASES[0], named("c256-56")
    rows = [
        made_up.row(narrow, **{"deformconv-float32": 2.0, "deformconv-bfloat16": 2.0, "deformconv-float16": 3.0}),
        made_up.row(
            wide,
            **{"deformconv-float32": 8.0, "deformconv-bfloat16": 4.0, "deformconv-float16": 8.0, "dense-bfloat16": 2.0},
        ),
    ]
    rows = [row | {"pairs": pairs} for row in rows]
    found = lines(made_up.document() | {"speed": made_up.section([]), "half": made_up.section(rows)})
    assert found.pop("half precision / float32, the most") == ["at most 1", "1.50", "no"]
    gains = found.pop("float32 / bfloat16 where the processor multiplies it, C >= 128, the least", None)
    assert gains == (["at least 1.6", "2.00", "yes"] if pairs else None)
    over_plain = found.pop("bfloat16 / plain convolution in bfloat16, likewise, the most", None)
    assert over_plain == (["at most 1.3", "2.00", "no"] if pairs else None)
    assert not found


def test_memory_and_small_calls():
    bytes_of = {"deformconv": {"bytes": 1}, "torchvision": {"bytes": 5}}
    memory = [{"layer": named("c256-100")._asdict(), "direction": TRAINING, "results": bytes_of}]
    tiny = Case("1x8x8x8", 1, 8, 8, (8, 8))
    small = [made_up.row(tiny, FORWARD, deformconv=0.02), made_up.row(tiny, RECORDED, deformconv=0.05)]
    document = made_up.document() | {"speed": made_up.section([])}
    found = lines(document | {"memory": made_up.section(memory), "small": made_up.section(small)})
    assert found == {
        "memory of training / torchvision's, c256-100": ["at most 0.25", "0.200", "yes"],
        "1x8x8x8, forward, microseconds": ["at most 30", "20.0", "yes"],
        "1x8x8x8, forward with a gradient recorded, microseconds": ["at most 38", "50.0", "no"],
    }
