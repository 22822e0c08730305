"""The demo's training: equal budgets, the same data for all, reproducible."""

import numpy as np
import pytest

from deformconv.studies import digits

torch = pytest.importorskip("torch")
training = pytest.importorskip("deformconv.studies.training")
KINDS, DigitNet, Schedule = training.KINDS, training.DigitNet, training.Schedule
TINY = Schedule(steps=3, evaluations=2, batch=8)


def noise(count: int = 24) -> digits.Digits:
    random = np.random.default_rng(0)
    return digits.Digits(random.random((count, 28, 28), np.float32), np.arange(count) % 10)


def test_the_nets_have_equal_budgets():
    nets = [DigitNet(kind) for kind in KINDS]
    parameters = [sum(parameter.numel() for parameter in net.parameters()) for net in nets]
    assert max(parameters) / min(parameters) < 1.013
    work = [training.multiply_adds(net) for net in nets]
    assert max(work) / min(work) < 1.013


def test_only_the_middle_layers_differ_in_kind():
    kinds = {
        kind: [layer.modulated for layer in DigitNet(kind).modules() if isinstance(layer, training.DeformConv2d)]
        for kind in KINDS
    }
    assert kinds == {"plain": [], "v1": [False, False], "v2": [True, True]}


def test_multiply_adds_count_what_runs():
    """The convolutions, counted while they run, and the samples of a deformable layer, by hand."""
    for kind, samples in (("plain", 0), ("v1", 4), ("v2", 5)):
        counted = []

        def count(module, _, output, counted=counted):
            counted.append(module.weight.numel() * output[0, 0].numel())

        net = DigitNet(kind)
        for module in net.modules():
            if getattr(module, "weight", torch.empty(0)).ndim == 4:
                module.register_forward_hook(count)
        net(torch.zeros(2, 1, 40, 40))
        interpolation = samples * 9 * (16 * 20 * 20 + 32 * 10 * 10)
        assert training.multiply_adds(net) == sum(counted) + interpolation


def test_training_is_reproducible_and_its_seed_matters():
    canvases = digits.scatter(noise(12), np.random.default_rng(1))
    *_, runs = training.train(noise(), canvases, TINY, 5)
    *_, again = training.train(noise(), canvases, TINY, 5)
    *_, other = training.train(noise(), canvases, TINY, 6)
    assert [run.kind for run in runs] == list(KINDS)
    # PyTorch's products promise no bits, not even for the same call twice.
    for run, same, another in zip(runs, again, other, strict=True):
        assert run.losses == pytest.approx(same.losses, rel=1e-3)
        assert run.losses != pytest.approx(another.losses, rel=1e-2)
    for run in runs:
        assert len(run.losses) == len(run.seconds) == 3
        assert sorted(run.accuracies) == [2, 3] and run.accuracy == run.accuracies[3]


def test_all_nets_see_every_scan_once_an_epoch_at_new_placements(monkeypatch):
    seen = []
    monkeypatch.setattr(digits, "scatter", lambda batch, random: seen.append(batch.images[:, 0, 0]) or batch)
    scans = noise(16)
    list(training.batches(scans, Schedule(steps=4, evaluations=1, batch=8), seed=0))
    for epoch in (seen[:2], seen[2:]):
        assert sorted(np.concatenate(epoch)) == sorted(scans.images[:, 0, 0])
    assert not (np.concatenate(seen[:2]) == np.concatenate(seen[2:])).all()


def test_accuracy_is_the_share_of_right_answers():
    class Constant(DigitNet):
        def forward(self, images):
            return torch.eye(10)[torch.full((len(images),), 3)]

    run = training.Run("plain", 0, Constant("plain"))
    assert training.accuracy(run.net, noise(20)) == 0.1
    assert training.scores(run.net, np.zeros((501, 40, 40), np.float32)).shape == (501, 10)


def test_evaluations_are_spread_evenly_and_the_last_one_ends():
    assert Schedule(steps=250, evaluations=5).evaluation_steps == {50, 100, 150, 200, 250}
    assert Schedule(steps=7, evaluations=2).evaluation_steps == {4, 7}
