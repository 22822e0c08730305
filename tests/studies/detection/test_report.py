"""The report's statistics, by hand and by SciPy."""

import io
import json
import math

import numpy as np
import pytest

stats = pytest.importorskip("scipy.stats")
for needed in ("torch", "torchvision", "rich", "lightning_fabric", "mlxtend", "skimage"):
    pytest.importorskip(needed, reason="the experiment needs it")

from rich.console import Console  # noqa: E402

from deformconv.studies.detection import report  # noqa: E402
from deformconv.studies.detection.plan import FAST  # noqa: E402

SIZES = {"<16": 10.0, "16-32": 30.0, "32-64": 50.0, ">64": None}


def result(arm, seed, AP, variation="much", **others):
    return {
        "variation": variation, "seed": seed, "arm": arm, "steps": 600, "seconds": 150.0, "parameters": 2_300_000,
        "operations": 3e8, "AP": AP, "AP50": AP + 20, "AP75": AP + 5, "octaves": SIZES, "losses": {}, **others,
    }  # fmt: skip


APS = {"base": [40, 41, 42], "regular": [48, 50, 49], "seconds": [51, 52, 50], "v2": [52, 53, 54], "scratch": [37, 39, 35]}
RESULTS = [result(arm, seed, float(AP)) for arm, values in APS.items() for seed, AP in enumerate(values)]


def test_a_difference_is_paired_with_students_interval():
    found = report.difference({0: 52.0, 1: 53.0, 2: 54.0}, {0: 48.0, 1: 50.0, 2: 49.0})
    # Of 4, 3, 5: mean 4, deviation 1; t of 97.5 % and 2 degrees of freedom is 4.302653.
    assert found.mean == 4 and found.seeds == 3
    assert found.high - 4 == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6) == pytest.approx(4 - found.low)
    random = np.random.default_rng(0)
    ours, theirs = random.normal(size=(2, 7))
    low, high = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    found = report.difference(dict(enumerate(ours)), dict(enumerate(theirs)))
    assert (found.low, found.high) == pytest.approx((low, high))


def test_only_seeds_that_both_have_are_paired():
    found = report.difference({0: 52.0, 1: 53.0, 5: 0.0}, {1: 50.0, 0: 48.0, 7: 100.0})
    assert (found.mean, found.seeds) == (3.5, 2)
    one = report.difference({0: 52.0}, {0: 48.0})
    assert (one.mean, one.low, one.high, one.seeds) == (4.0, None, None, 1)
    assert report.difference({0: 1.0}, {1: 1.0}) is None


def test_a_summary_compares_each_arm_with_what_it_says():
    rows = {row["arm"]: row for row in report.summary(RESULTS)}
    assert list(rows) == ["base", "regular", "seconds", "v2", "scratch"]
    v2 = rows["v2"]
    assert v2["AP"] == 53 and (v2["lowest"], v2["highest"]) == (52, 54) and v2["deviation"] == 1
    assert v2["equal steps"]["mean"] == 4 and v2["equal seconds"]["mean"] == 2
    assert v2["milliseconds a step"] == 250
    assert rows["base"]["equal steps"] is rows["base"]["equal seconds"] is None
    assert rows["regular"]["equal steps"] is None and rows["regular"]["equal seconds"]["mean"] == -2
    assert rows["seconds"]["equal steps"]["mean"] == 2 and rows["seconds"]["equal seconds"] is None
    # From scratch is compared with the regular detector from scratch.
    assert rows["scratch"]["equal steps"]["mean"] == -4 and rows["scratch"]["equal seconds"] is None
    assert v2["octaves"] == SIZES


def test_a_sweep_has_a_row_for_each_variation():
    results = [*RESULTS, *(result(arm, 0, AP, "none") for arm, AP in (("base", 60.0), ("regular", 70.0), ("v2", 71.0)))]
    rows = report.sweep(results, ["none", "some", "much"])
    assert [(row["variation"], row["before"], row["regular"], row["v2"]) for row in rows] == [
        ("none", 60, 70, 71), ("much", 41, 49, 53)
    ]  # fmt: skip
    assert [row["difference"]["mean"] for row in rows] == [1, 4]


def test_what_is_written():
    found = report.everything(RESULTS, FAST, ["none", "some", "much"])
    assert json.loads(json.dumps(found, allow_nan=False))["arms"][3]["equal steps"]["seeds"] == 3
    text = report.tables(found)
    row = next(line for line in text.splitlines() if line.startswith("| v2: convolution, pooling "))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == [
        "v2: convolution, pooling", "53.0", "52.0 to 54.0", "73.0", "58.0", "+4.0 (+1.5 to +6.5)", "+2.0 (-2.3 to +6.3)",
        "2.30", "300", "250", "600",
    ]  # fmt: skip
    assert "Student's t interval of 95 % of the paired differences over 3 seeds" in text
    assert "what other seeds may give on these test scenes, and not what other scenes would" in text
    assert "The paper's detector (ResNet-50, images of 1000 pixels) has no feature pyramid" in report.page(found)
    assert "the one from scratch is compared with that row" in text and "Equal seconds: the regular detector was" in text
    some = report.tables(report.everything([one for one in RESULTS if one["arm"] in ("base", "regular", "v2")], FAST, ["much"]))
    assert "scratch" not in some and "Equal seconds:" not in some
    one = report.tables(report.everything(RESULTS[::3], FAST, ["much"]))
    assert "one seed" in one and "no difference of one seed is a finding" in one and "Student" not in one


def test_the_terminals_tables_fit_80_columns():
    found = report.everything(RESULTS, FAST, ["none", "some", "much"])
    stream = io.StringIO()
    report.print_report(Console(file=stream, width=80, highlight=False), found)
    text = stream.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text and "+4.0 (+1.5 to +6.5)" in text


def test_what_others_measured():
    text = report.published()
    for number in ("34.7", "38.0", "41.7", "37.4", "41.3", "41.4", "38.9", "38.7", "+7.0", "+4.0", "+1.3"):
        assert f" {number} " in text
