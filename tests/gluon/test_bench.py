"""The benchmark in Gluon: it measures what it says, and docs/gluon.md quotes what is in its file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from deformconv.bench import gluon as bench

ROOT = Path(__file__).parents[2]


def test_a_short_run():
    figures = bench.measure(rounds=1)
    assert set(figures["milliseconds"]) == set(bench.KINDS) == set(figures["quartiles"])
    times = figures["milliseconds"]
    assert figures["v1 speedup"] == pytest.approx(times["mxnet v1"] / times["deformconv v1"], abs=0.1)
    assert figures["v2 to v1"] == pytest.approx(times["deformconv v2"] / times["deformconv v1"], abs=0.01)
    assert figures["machine"]["mxnet"] == "1.9.1"
    json.dumps(figures)


def test_a_wrong_result_is_not_timed():
    class Process:
        def __init__(self, factor):
            self.factor = factor

        def ask(self, what, file):
            np.savez(file, output=np.ones(3) * self.factor)

    bench._agree({"mxnet v1": Process(1), "deformconv v1": Process(1.00001)})
    with pytest.raises(RuntimeError, match="v1 differs from MXNet's in output: error 1e-02, at most 1e-04 is rounding"):
        bench._agree({"mxnet v1": Process(1), "deformconv v1": Process(1.01)})
    with pytest.raises(RuntimeError, match="error nan"):
        bench._agree({"mxnet v1": Process(1), "deformconv v1": Process(np.nan)})


def test_the_guide_quotes_the_committed_figures():
    figures = json.loads((ROOT / "benchmarks" / "gluon.json").read_text())
    guide = (ROOT / "docs" / "gluon.md").read_text(encoding="utf-8")
    quoted = guide.partition("<!-- gluon:begin -->\n")[2].partition("\n<!-- gluon:end -->")[0]
    assert quoted == bench.sentence(figures)
    assert figures["v1 speedup"] >= 12 and figures["v2 to v1"] <= 1.4
