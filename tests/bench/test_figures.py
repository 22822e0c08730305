"""Ratios, geometric means and tables, on made-up numbers."""

from __future__ import annotations

import pytest
from tests.bench import made_up

from deformconv.bench import figures
from deformconv.bench.cases import CASES, named
from deformconv.bench.figures import GOALS, INFERENCE, OURS
from deformconv.bench.peers import DIRECTIONS

PRIMES, WIDE, GROUPED = named("primes"), named("c128-28"), named("resnext-c4")


def mean(rows, number):
    """The mean of one of the goals, by its place in GOALS."""
    return next((found for found in figures.goals(rows) if found.goal is GOALS[number]), None)


def test_the_fastest_of_several_and_ratios():
    row = made_up.row(PRIMES, deformconv=4.0, onnxruntime=6.0, openvino=5.0, dense=2.0)
    row["results"]["torchvision"] = {"reason": "differs by 1.0e-01 in output"}
    assert figures.milliseconds(row, *INFERENCE) == 5.0
    assert figures.milliseconds(row, "torchvision") is figures.milliseconds(row, "kornia") is None
    assert figures.ratio(row, INFERENCE, OURS) == 1.25
    assert figures.ratio(row, OURS, ("dense",)) == 2.0
    assert figures.ratio(row, ("torchvision",), OURS) is None


def test_one_of_the_runtimes_is_enough():
    row = made_up.row(PRIMES, deformconv=4.0, onnxruntime=6.0)
    assert figures.ratio(row, INFERENCE, OURS) == 1.5


def test_inference_is_compared_with_the_faster_of_the_two_in_each_case():
    rows = [
        made_up.row(PRIMES, deformconv=1.0, onnxruntime=2.0, openvino=9.0),
        made_up.row(WIDE, deformconv=1.0, onnxruntime=9.0, openvino=4.5),
    ]
    found = mean(rows, 0)
    assert found.mean == pytest.approx(3.0)  # the square root of 2 x 4.5
    assert found.least == (2.0, "primes") and found.most == (4.5, "c128-28") and found.cases == 2


def test_training_is_compared_with_torchvision_case_by_case():
    rows = [
        made_up.row(PRIMES, "forward+backward", deformconv=1.0, torchvision=8.0),
        made_up.row(WIDE, "forward+backward", deformconv=2.0, torchvision=64.0),
        made_up.row(WIDE, "forward", deformconv=1.0, torchvision=1000.0),
    ]
    found = mean(rows, 3)
    assert found.mean == pytest.approx(16.0) and found.least == (8.0, "primes") and found.cases == 2


def test_which_cases_the_plain_convolution_is_compared_in():
    rows = [made_up.row(case, direction, deformconv=1.0, dense=1.0) for case in CASES for direction in DIRECTIONS]
    forward = {case.name for case in CASES if case.in_channels >= 128 and case.groups == 1}
    training = {case.name for case in CASES if len(case.size) == 2 and case.groups == 1}
    assert mean(rows, 2).cases == len(forward) == 12
    assert mean(rows, 4).cases == len(training) == 16
    for name in ("c64-56", "primes", "edvr"):
        assert name not in forward and name in training
    for name in ("resnext-c4", "depthwise", "volume-3d", "signal-1d"):
        assert name not in forward | training


def test_a_goal_without_a_case_is_left_out():
    assert figures.goals([made_up.row(GROUPED, deformconv=1.0, dense=1.0)]) == []
    assert figures.summary([made_up.row(GROUPED, deformconv=1.0, dense=1.0)]) == ""


def test_all_means_of_all_cases():
    means = [found.mean for found in figures.goals(made_up.rows())]
    assert means == pytest.approx([2.0, 16.0, 2.0, 32.0, 0.5])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"), (0.0421, "0.042"), (0.9994, "0.999"), (0.9996, "1.00"), (9.994, "9.99"), (9.996, "10.0"), (99.96, "100"),
        (1234.5, "1234"),
    ],
)  # fmt: skip
def test_three_digits(value, text):
    assert figures.digits(value) == text


def test_tables_are_aligned():
    table = figures.markdown(["what", "ms"], [["a", "1.00"], ["longer", "12.0"]])
    assert table == "| what   |   ms |\n| ------ | ---: |\n| a      | 1.00 |\n| longer | 12.0 |"


def test_the_table_of_one_direction():
    table = figures.speed_table(made_up.rows(), "forward")
    lines = table.splitlines()
    assert len(lines) == 2 + len(CASES) and len({len(line) for line in lines}) == 1
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == [
        "case", "layer", "deformconv", "ONNX Runtime", "OpenVINO", "ncnn (weights packed at load)", "torchvision", "kornia",
        "plain convolution", "inference's best / ours", "ncnn / ours", "torchvision / ours", "ours / plain",
    ]  # fmt: skip
    found = {line[0]: line[1:] for line in cells[2:]}
    assert found["c64-56"] == [
        "2x64x56x56 -> 64", "4.00", "16.0", "8.00", "32.0", "64.0", "128", "2.00", "2.00", "8.00", "16.0", "2.00",
    ]  # fmt: skip
    assert found["volume-3d"][1:] == ["68.0", "-", "-", "-", "-", "-", "34.0", "-", "-", "-", "2.00"]
    assert found["edvr"][4] == "-" and found["edvr"][9] == "-"
    assert found["signal-1d"][2] == "256*" and found["signal-1d"][1] == "64.0"


def test_training_has_no_columns_for_runtimes():
    head = figures.speed_table(made_up.rows(), "forward+backward").splitlines()[0]
    assert "torchvision" in head and "best" not in head
    assert not any(name in head for name in ("ONNX", "OpenVINO", "ncnn"))


def test_what_is_wrong_or_failed_is_said_in_place_of_a_time():
    row = made_up.row(PRIMES, deformconv=1.0, openvino=3.0)
    row["results"]["torchvision"] = {"reason": "differs by 3.0e-02 in offset"}
    row["results"]["onnxruntime"] = {"reason": "failed: Fail: no such operator"}
    line = figures.speed_table([row], "forward").splitlines()[2]
    assert [cell.strip() for cell in line.split("|")][3:7] == ["1.00", "failed", "3.00", "differs"]
    assert figures.notes([row]) == [
        "torchvision differs by 3.0e-02 in offset, forward (primes)",
        "ONNX Runtime failed: Fail: no such operator, forward (primes)",
    ]


def test_notes_name_the_cases_once():
    notes = figures.notes(made_up.rows())
    assert "* as 2-D of height 1, with every dy 0 (signal-1d)" in notes
    assert "torchvision has no 3-D (volume-3d)" in notes and len(notes) == 1 + 5 + 2 + 1
    assert "ncnn (weights packed at load) has no groups (resnext-c4, depthwise)" in notes
    assert "ncnn (weights packed at load) has no offset groups (edvr)" in notes
    assert not any("gradients" in note for note in notes)


def test_what_times_must_not_be_read_without():
    row = made_up.row(PRIMES, deformconv=1.0, ncnn=3.0)
    (remark,) = figures.notes([row, row])
    assert remark.startswith("ncnn (weights packed at load) computes the images of a batch one after the other")
    row["results"]["ncnn"] = {"reason": "failed: RuntimeError: no luck"}
    assert figures.notes([row]) == ["ncnn (weights packed at load) failed: RuntimeError: no luck, forward (primes)"]


def test_weights_packed_beforehand_do_not_count_as_inference_s_best():
    row = made_up.row(PRIMES, deformconv=1.0, openvino=3.0, ncnn=0.5)
    assert mean([row], 0).most == (3.0, "primes")
    line = figures.speed_table([row], "forward").splitlines()[2]
    assert [cell.strip() for cell in line.split("|")][3:-1] == ["1.00", "3.00", "0.500", "3.00", "0.500"]


def test_the_summary_names_extremes():
    rows = [
        made_up.row(PRIMES, "forward+backward", deformconv=1.0, torchvision=8.0),
        made_up.row(WIDE, "forward+backward", deformconv=2.0, torchvision=64.0),
    ]
    line = figures.summary(rows).splitlines()[2]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == ["forward+backward", "faster than torchvision", "16.0", "8.00 (primes)", "32.0 (c128-28)", "2"]
