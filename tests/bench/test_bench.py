"""The benchmark: its cases are valid calls, it refuses to time wrong results, and it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner

from deformconv.bench.cases import CASES, Case, make

pytest.importorskip("torchvision")
bench = pytest.importorskip("deformconv.bench.__main__")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cases(case: Case) -> None:
    spec, arrays = make(case._replace(size=(9, 8)))
    assert arrays["grad_output"].shape == spec.output_shape
    assert arrays["mask"].min() >= 0
    assert abs(arrays["offset"].std() - case.sigma) < 0.2
    again = make(case._replace(size=(9, 8)))[1]
    np.testing.assert_array_equal(arrays["weight"], again["weight"])


class Answering:
    """A process that saves what it is told to."""

    def __init__(self, **results: Any) -> None:
        self.saved = results

    def ask(self, do: str, file: str) -> None:
        assert do == "results"
        np.savez(file, **self.saved)


@pytest.mark.parametrize("wrong", [1.01, np.nan])
def test_wrong_results_are_not_timed(wrong: float) -> None:
    right = Answering(output=np.ones(3), weight=np.ones(3))
    bench.check({"deformconv": right, "torchvision": right})
    other = Answering(output=np.ones(3), weight=np.array([1, wrong, 1]))
    with pytest.raises(click.ClickException, match="the weight of deformconv and torchvision differ"):
        bench.check({"deformconv": other, "torchvision": right})


def test_it_runs(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    ran = CliRunner().invoke(bench.main, ["--case", "c128-28", "--blocks", "1", "--seconds", "0.01", "--json", str(file)])
    assert ran.exit_code == 0, ran.output
    assert "| 2x128x28x28 -> 128 | forward+backward |" in ran.stdout
    found = json.loads(file.read_text())
    assert [row["direction"] for row in found["rows"]] == ["forward", "forward+backward"]
    for row in found["rows"]:
        assert set(row["milliseconds"]) == {"deformconv", "torchvision", "dense"}
        for library, (low, high) in row["quartiles"].items():
            assert 0 < low <= row["milliseconds"][library] <= high
