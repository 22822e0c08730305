"""Whole nets: the same weights in every library, right results, and what the report makes of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.bench import made_up

from deformconv.bench import reports
from deformconv.bench.measure import Pace, differences, peer_of
from deformconv.bench.nets import NET_PEERS, NETS, QUICK_NETS, STAGES, Net, TruthNet, net_of
from deformconv.bench.peers import DIRECTIONS
from deformconv.bench.reports import REPORTS, Plan, net_means

torch = pytest.importorskip("torch")
pytest.importorskip("torchvision")

BLOCK, RESNET = made_up.BLOCK, made_up.RESNET


def layers(peer: str, net: Net) -> Any:
    return NET_PEERS[peer](1).make(net, torch.float32).net


def test_names_are_known_and_differ():
    names = [net.name for net in NETS]
    assert len(set(names)) == len(names)
    assert set(QUICK_NETS) <= set(names)
    assert all(net_of(net._asdict()) == net for net in NETS)
    assert all(max(net.checked.size) <= 128 for net in NETS)


@pytest.mark.parametrize("depth", STAGES)
def test_a_resnet_has_deformable_layers_where_it_says(depth: int):
    net = layers("deformconv-net", RESNET._replace(depth=depth))
    found = [name for name, module in net.named_modules() if type(module).__name__ == "DeformConv2d"]
    stages, number = STAGES[depth]
    assert len(found) == number
    assert {name.partition(".")[0] for name in found} == set(stages)


@pytest.mark.parametrize("net", [BLOCK, RESNET], ids=["block", "resnet"])
def test_weights_are_the_same_in_every_library(net: Net):
    ours = layers("deformconv-net", net).state_dict()
    for peer in ("torchvision-net", "kornia-net", "truth-net"):
        if peer == "kornia-net":
            pytest.importorskip("kornia")
        theirs = layers(peer, net).state_dict()
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    plain = layers("dense-net", net).state_dict()
    assert plain.keys() == {name for name in ours if "offset_conv" not in name}
    assert all(torch.equal(plain[name], ours[name]) for name in plain)


@pytest.mark.slow
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("net", [BLOCK, RESNET], ids=["block", "resnet"])
def test_results_are_those_of_array_operations(net: Net, direction: str):
    found = []
    for peer in (TruthNet.name, "deformconv-net", "torchvision-net"):
        one = NET_PEERS[peer](2)
        one.prepare(net)
        found.append(one.results(direction))
    truth, *others = found
    if direction != "forward":
        assert any("offset_conv" in name for name in truth)
        assert all(np.abs(truth[name]).max() > 0 for name in truth if name.endswith("offset_conv.weight"))
    for other in others:
        assert max(differences(other, truth).values()) < net.tolerance / 100


def test_a_wrong_layer_is_seen():
    """Offsets in another order, say."""

    class Wrong(NET_PEERS["torchvision-net"]):
        def layer(self, conv: Any) -> Any:
            layer = super().layer(conv)
            layer.offset_conv.register_forward_hook(lambda module, given, found: found.flip(1))
            return layer

    truth, wrong = NET_PEERS["truth-net"](1), Wrong(1)
    for peer in (truth, wrong):
        peer.prepare(BLOCK)
    assert differences(wrong.results("forward"), truth.results("forward"))["output"] > 100 * BLOCK.tolerance


def test_a_step_of_training_leaves_the_net_as_it_was():
    peer = NET_PEERS["deformconv-net"](1)
    peer.prepare(BLOCK)
    with peer.context("forward+backward"):
        before = {name: p.detach().clone() for name, p in peer.made.net.named_parameters()}
        for _ in range(3):
            peer.call_of("forward+backward")()
        assert all(torch.allclose(p, before[name]) for name, p in peer.made.net.named_parameters())
        assert all(p.grad is not None for p in peer.made.net.parameters())
        assert peer.made.x.grad is not None


def test_libraries_are_found_by_name():
    assert peer_of("torchvision").title == peer_of("torchvision-net").title == "torchvision"
    with pytest.raises(KeyError):
        peer_of("nobody")


@pytest.mark.slow
def test_measured():
    progress = made_up.Counting()
    plan = Plan([], ["deformconv", "torchvision", "dense"], DIRECTIONS, 2, Pace(1, 1e-3), nets=[BLOCK])
    rows = REPORTS["net"].measure(plan, progress)
    assert len(progress.steps) == progress.expected == 4
    assert [(row["machine"], row["direction"]) for row in rows] == [
        ("idle", "forward"), ("idle", "forward+backward"), ("busy", "forward"), ("busy", "forward+backward"),
    ]  # fmt: skip
    for row in rows:
        assert list(row["results"]) == ["deformconv", "torchvision", "dense"][:: 1 if row["machine"] == "idle" else 2]
        assert all(result["milliseconds"] > 0 for result in row["results"].values())
        assert row["results"]["deformconv"]["error"] < 1e-8
    assert "| tiny" in REPORTS["net"].write(rows)


def test_means():
    idle, busy = net_means(made_up.net_rows())
    assert (idle.direction, idle.machine, idle.nets) == ("forward", "idle", 2)
    assert idle.mean == pytest.approx(4.0)
    assert idle.most == (8.0, "small")
    assert (busy.machine, busy.mean) == ("busy", 0.25)
    missing = made_up.net_rows()[0]
    missing["results"]["dense"] = {"reason": "failed: it cannot"}
    assert net_means([missing]) == []


def test_written():
    text = REPORTS["net"].write(made_up.net_rows())
    first = next(line for line in text.splitlines() if line.startswith("| tiny"))
    assert [cell.strip() for cell in first.split("|")[5:-1]] == ["4.00", "64.0", "2.00", "2.00", "16.0"]
    assert "Beside a process that keeps one processor busy" in text
    assert "ResNet-18, 4 deformable layers" in text
    last = text.splitlines()[-1]
    assert [cell.strip() for cell in last.split("|")[1:-1]] == ["forward", "busy", "0.250", "0.250 (tiny)", "1"]


def test_the_busy_process_ends():
    with reports._busy():
        pass
    with pytest.raises(RuntimeError), reports._busy():
        raise RuntimeError("a failure meanwhile")
