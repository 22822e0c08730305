"""The demo's training: one trained net, copies of it that differ in kind alone, the same data for all, reproducible."""

import numpy as np
import pytest

from deformconv.studies import digits

torch = pytest.importorskip("torch")
training = pytest.importorskip("deformconv.studies.training")
KINDS, LONGER, DigitNet, Schedule = training.KINDS, training.LONGER, training.DigitNet, training.Schedule
PLAN = training.Training(first=Schedule(steps=4, evaluations=1, batch=8), then=Schedule(steps=3, evaluations=2, batch=8))


def noise(count: int = 24) -> digits.Digits:
    random = np.random.default_rng(0)
    return digits.Digits(random.random((count, 28, 28), np.float32), np.arange(count) % 10)


def deformable(net):
    return [layer for layer in net.modules() if isinstance(layer, training.DeformConv2d)]


def test_copies_differ_in_kind_and_compute_what_the_trained_net_computes():
    trained = DigitNet()
    canvases = digits.scatter(noise(5), np.random.default_rng(1)).images
    expected = training.scores(trained, canvases)
    copies = {kind: training.of_kind(kind, trained) for kind in KINDS}
    found = {kind: [layer.modulated for layer in deformable(net)] for kind, net in copies.items()}
    assert found == {"plain": [], "longer": [], "v1": [False, False], "v2": [True, True]}
    for kind, net in copies.items():
        assert net.kind == kind
        assert torch.allclose(training.scores(net, canvases), expected, atol=1e-5)
        own = {parameter.data_ptr() for parameter in net.parameters()}
        assert own.isdisjoint(parameter.data_ptr() for parameter in trained.parameters())
    assert deformable(trained) == []


def test_longer_costs_no_less_than_the_deformable_nets():
    work = {kind: training.multiply_adds(training.of_kind(kind, DigitNet())) for kind in KINDS}
    assert work["plain"] == work["longer"] < work["v1"] < work["v2"] <= LONGER * work["longer"]


def test_multiply_adds_count_what_runs():
    """The convolutions, counted while they run, and the samples of a deformable layer, by hand."""
    for kind, samples in (("plain", 0), ("v1", 4), ("v2", 5)):
        counted = []

        def count(module, _, output, counted=counted):
            counted.append(module.weight.numel() * output[0, 0].numel())

        net = training.of_kind(kind, DigitNet())
        for module in net.modules():
            if getattr(module, "weight", torch.empty(0)).ndim == 4:
                module.register_forward_hook(count)
        net(torch.zeros(2, 1, 40, 40))
        interpolation = samples * 9 * (8 * 10 * 10 + 16 * 10 * 10)
        assert training.multiply_adds(net) == sum(counted) + interpolation


def test_training_is_reproducible_and_its_seed_matters():
    canvases = digits.scatter(noise(12), np.random.default_rng(1))
    *_, runs = training.train(noise(), canvases, PLAN, 5)
    *_, again = training.train(noise(), canvases, PLAN, 5)
    *_, other = training.train(noise(), canvases, PLAN, 6)
    assert [run.kind for run in runs] == list(KINDS)
    # PyTorch's products promise no bits, not even for the same call twice.
    for run, same, another in zip(runs, again, other, strict=True):
        assert run.losses == pytest.approx(same.losses, rel=1e-3)
        assert run.losses != pytest.approx(another.losses, rel=1e-2)
    for run in runs:
        steps = 3 * LONGER if run.kind == "longer" else 3
        assert len(run.losses) == len(run.seconds) == steps
        assert sorted(run.accuracies) == sorted({0} | Schedule(steps=steps, evaluations=2).evaluation_steps)
        assert run.accuracy == run.accuracies[steps]


def test_first_the_plain_net_is_trained_and_then_its_copies_on_other_batches(monkeypatch):
    canvases = digits.scatter(noise(12), np.random.default_rng(1))
    seen, kinds, forward = [], [], DigitNet.forward

    def spied(net, images):
        if net.training:
            seen.append((net.kind, images.clone()))
        return forward(net, images)

    monkeypatch.setattr(DigitNet, "forward", spied)
    for runs in training.train(noise(), canvases, PLAN, 0):
        kinds.append([run.kind for run in runs])
        assert {run.accuracies.get(0) for run in runs} == {runs[0].accuracies.get(0)}
    assert kinds == 4 * [["plain"]] + 3 * LONGER * [list(KINDS)]
    assert [kind for kind, _ in seen] == 4 * ["plain"] + 3 * list(KINDS) + 3 * (LONGER - 1) * ["longer"]
    for step in range(3):
        batches = [images for _, images in seen[4 + step * len(KINDS) :][: len(KINDS)]]
        assert all(torch.equal(batch, batches[0]) for batch in batches)
        assert not torch.equal(batches[0], seen[step][1])
    # The first losses are those of one and the same net.
    assert [run.losses[0] for run in runs] == pytest.approx(len(KINDS) * [runs[0].losses[0]], rel=1e-4)


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

    run = training.Run("plain", 0, Constant())
    assert training.accuracy(run.net, noise(20)) == 0.1
    assert training.scores(run.net, np.zeros((501, 40, 40), np.float32)).shape == (501, 10)


def test_evaluations_are_spread_evenly_and_the_last_one_ends():
    assert Schedule(steps=250, evaluations=5).evaluation_steps == {50, 100, 150, 200, 250}
    assert Schedule(steps=7, evaluations=2).evaluation_steps == {4, 7}
