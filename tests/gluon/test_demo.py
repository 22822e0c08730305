"""`deformconv demo-gluon` and what it is made of."""

from __future__ import annotations

import io
import re

import mxnet as mx
import numpy as np
import pytest
from rich.console import Console

from deformconv.cli.main import main
from deformconv.studies import digits, gluon_demo
from deformconv.studies.schedule import Schedule

TINY = Schedule(steps=3, evaluations=2, batch=8)


def noise(count=24):
    random = np.random.default_rng(0)
    return digits.Digits(random.random((count, 28, 28), np.float32), np.arange(count) % 10)


def console():
    return Console(file=io.StringIO(), width=120, highlight=False)


def test_the_fast_demo_prints_accuracies(capsys):
    assert main(["demo-gluon", "--fast", "--seed", "1"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("ok ") == 2 and "FAILED" not in printed
    for kind in ("v1", "v2"):
        assert len(re.findall(rf"^  {kind} +\d+ +\d+\.\d{{3}}  \d+\.\d%$", printed, re.M)) == 2
        assert re.search(rf"^  {kind}: accuracy \d+\.\d% on digits it never saw, \d+ ms a step$", printed, re.M)


@pytest.mark.parametrize("kind", gluon_demo.BLOCKS)
def test_it_learns(kind):
    """Eight digits of two classes, placed anew in every step."""
    scans = digits.load()
    chosen = np.flatnonzero(np.isin(scans.labels, (0, 1)))
    few = scans.take(np.concatenate([chosen[:40], chosen[-40:]]))
    losses = [loss for _, loss in gluon_demo.train(kind, few, Schedule(steps=60, evaluations=1), seed=0)]
    assert np.mean(losses[-10:]) < 0.3 < losses[0]


def test_training_is_reproducible_and_its_seed_matters():
    runs = [[loss for _, loss in gluon_demo.train("v2", noise(), TINY, seed)] for seed in (5, 5, 6)]
    assert len(runs[0]) == 3
    # MXNet's products promise no bits, not even for the same call twice.
    assert runs[0] == pytest.approx(runs[1], rel=1e-3)
    assert runs[0] != pytest.approx(runs[2], rel=1e-2)


def test_the_nets_are_those_of_the_pytorch_demo():
    net = gluon_demo.digit_net("v2")
    net.initialize()
    net(mx.nd.zeros((1, 1, 40, 40)))
    shapes = [p.shape for name, p in net.collect_params().items() if name.endswith("weight")]
    assert shapes == [(8, 1, 3, 3), (16, 8, 3, 3), (27, 8, 3, 3), (16, 16, 3, 3), (27, 16, 3, 3), (10, 16)]


def test_accuracy_is_the_share_of_right_answers():
    class Constant:
        def __call__(self, images):
            return mx.nd.one_hot(mx.nd.full(len(images), 3), 10)

    canvases = digits.Digits(np.zeros((501, 40, 40), np.float32), np.arange(501) % 10)
    assert gluon_demo.accuracy(Constant(), canvases) == pytest.approx(50 / 501)


def test_a_block_that_differs_fails(monkeypatch):
    class Wrong(gluon_demo.DeformableConvolution):
        def hybrid_forward(self, F, x, **parameters):
            return 1.001 * super().hybrid_forward(F, x, **parameters)

    monkeypatch.setitem(gluon_demo.BLOCKS, "v1", (Wrong, gluon_demo.BLOCKS["v1"][1]))
    shown = console()
    assert not gluon_demo.check_block(shown, "v1", seed=0)
    assert "FAILED" in shown.file.getvalue()
    assert gluon_demo.check_block(shown, "v2", seed=0)


def test_the_learning_rate_rises_and_falls():
    rates = [gluon_demo._one_cycle(part / 100) for part in range(100)]
    assert rates[0] == pytest.approx(0.04) and max(rates) == 1 and rates.index(1) == 30 and rates[-1] < 0.01
