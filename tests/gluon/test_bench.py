"""The benchmark in Gluon: it measures what it says, and the documents quote what is in its file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from deformconv.bench import gluon as bench
from deformconv.bench.gluon_worker import KINDS, ROI_CASE, ROI_KINDS, ROI_WORDS
from deformconv.bench.peers import DIRECTIONS

ROOT = Path(__file__).parents[2]


def test_a_short_run():
    figures = bench.measure(rounds=1)
    assert set(figures["milliseconds"]) == set(KINDS) == set(figures["quartiles"])
    times = figures["milliseconds"]
    assert figures["v1 speedup"] == pytest.approx(times["mxnet v1"] / times["deformconv v1"], abs=0.1)
    assert figures["v2 to v1"] == pytest.approx(times["deformconv v2"] / times["deformconv v1"], abs=0.01)
    assert figures["machine"]["mxnet"] == "1.9.1"
    pooling = figures["pooling"]
    assert "512 boxes on 2x256x50x84, 7x7 bins of 2x2 samples: " in pooling["what"] and "group_size=1" in pooling["what"]
    for direction in DIRECTIONS:
        found = pooling[direction]
        assert set(found["milliseconds"]) == set(ROI_KINDS) == set(found["quartiles"])
        theirs, ours = (found["milliseconds"][kind] for kind in ROI_KINDS)
        assert found["speedup"] == pytest.approx(theirs / ours, abs=0.1) and found["speedup"] > 1
    json.dumps(figures)


def test_the_pooling_is_that_of_the_other_benchmark():
    """Of plain channels: MXNet's operator is position-sensitive by its group_size alone."""
    assert (ROI_CASE.boxes, ROI_CASE.channels, ROI_CASE.size, ROI_CASE.bins, ROI_CASE.sampling) == (512, 256, (50, 84), 7, 2)
    assert ROI_WORDS == {
        "spatial_scale": 1 / 16, "output_dim": 256, "group_size": 1, "pooled_size": 7, "part_size": 7, "sample_per_part": 2,
        "trans_std": 0.1,
    }  # fmt: skip


def test_a_wrong_result_is_not_timed():
    class Process:
        def __init__(self, factor):
            self.factor = factor

        def ask(self, what, file):
            np.savez(file, output=np.ones(3) * self.factor)

    bench._agree(Process(1.00001), Process(1), "v1")
    with pytest.raises(RuntimeError, match="v1 differs from MXNet's in output: error 1e-02, at most 1e-04 is rounding"):
        bench._agree(Process(1.01), Process(1), "v1")
    with pytest.raises(RuntimeError, match="error nan"):
        bench._agree(Process(np.nan), Process(1), "v1")


def quoted(folder, name):
    return (folder / name).read_text(encoding="utf-8").partition(bench.BEGIN)[2].partition(bench.END)[0]


def test_the_documents_quote_the_committed_figures():
    figures = json.loads((ROOT / bench.RESULTS).read_text())
    assert quoted(ROOT, bench.GUIDE) == bench.sentence(figures)
    assert quoted(ROOT, bench.EXPLAINED) == bench.pooling_sentence(figures)
    assert figures["v1 speedup"] >= 12 and figures["v2 to v1"] <= 1.4
    assert figures["pooling"]["forward+backward"]["speedup"] >= 20


def made_up():
    times = dict(zip(DIRECTIONS, ((800.0, 32.0), (1800.0, 72.0)), strict=True))
    pooling = {
        name: {"milliseconds": dict(zip(ROI_KINDS, both, strict=True)), "quartiles": {}, "speedup": 25.0}
        for name, both in times.items()
    }
    block = dict(zip(KINDS, (400.0, 20.0, 30.0), strict=True))
    return {
        "machine": {"processors": "2", "processor": "Some"}, "milliseconds": block, "v1 speedup": 20.0, "v2 to v1": 1.5,
        "pooling": pooling,
    }  # fmt: skip


def test_figures_are_written_into_a_repository(tmp_path):
    for name in (bench.GUIDE, bench.EXPLAINED, bench.RESULTS):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(ROOT / name, tmp_path / name)
    bench.write(made_up(), tmp_path)
    assert json.loads((tmp_path / bench.RESULTS).read_text()) == made_up()
    for name, word in ((bench.GUIDE, "20.0 times as fast"), (bench.EXPLAINED, "Forward 32 ms and 800, **25.0 times as fast**")):
        assert word in quoted(tmp_path, name)
        before, after = (ROOT / name).read_text(encoding="utf-8").split(bench.BEGIN + quoted(ROOT, name) + bench.END)
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert text.startswith(before) and text.endswith(after) and len(text) > len(before) + len(after)
    bench.write(made_up(), tmp_path)
    assert quoted(tmp_path, bench.GUIDE) == bench.sentence(made_up())
    (tmp_path / bench.GUIDE).write_text("no marks")
    with pytest.raises(ValueError, match=r"gluon\.md has no <!-- gluon:begin --> and <!-- gluon:end -->; expected a repo"):
        bench.write(made_up(), tmp_path)
