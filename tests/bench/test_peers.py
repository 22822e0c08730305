"""Other libraries agree with this one, each through the process in which it is measured: oracles of another making."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from deformconv.bench.cases import Case, named
from deformconv.bench.measure import Entry, Failure, Pace, Process, compare, differences, processes
from deformconv.bench.peers import DIRECTIONS, PEERS, RECORDED, Truth, missing

pytest.importorskip("torch")
pytestmark = pytest.mark.slow  # a process for each library

OTHERS = [name for name, peer in PEERS.items() if peer.deforms and name != "deformconv"]
# Two of them have left Python 3.10, and with it the extra `dev`.
INSTALLED = [name for name in OTHERS if sys.version_info >= (3, 11) or not missing(PEERS[name].packages)]


def random_cases() -> list[Case]:
    """Configurations that nobody chose: kernel, stride, padding, dilation, groups of both kinds."""
    random = np.random.default_rng(2)
    found = []
    for number in range(10):
        rank = 1 if number >= 8 else 2
        kernel, stride, padding, dilation = (
            tuple(random.integers(low, high, rank).tolist()) for low, high in ((1, 5), (1, 4), (0, 4), (1, 3))
        )
        groups, offset_groups = random.choice([1, 2, 3], 2).tolist()
        size = tuple(d * (k - 1) + 1 + int(random.integers(3, 12)) for k, d in zip(kernel, dilation, strict=True))
        batch, inputs, outputs = random.integers(1, 4, 3).tolist()
        layer = Case(f"random {number}", batch, 6 * inputs, 6 * outputs, size, kernel, stride, padding, dilation)
        found.append(layer._replace(groups=groups, offset_groups=offset_groups, masked=number % 3 != 0))
    return found


@pytest.fixture(scope="module")
def truth() -> Iterator[Process]:
    with processes([Truth.name], 1) as (process,):
        yield process


@pytest.fixture(scope="module", params=INSTALLED)
def other(request: pytest.FixtureRequest) -> Iterator[Process]:
    with processes([request.param], 2) as (process,):
        yield process


@pytest.fixture(scope="module")
def ours() -> Iterator[Process]:
    with processes(["deformconv"], 2) as (process,):
        yield process


def results(process: Process, case: Case, direction: str, folder: Path) -> dict[str, Any]:
    process.ask("prepare", case=case._asdict())
    process.ask("results", direction=direction, file=str(folder / "results.npz"))
    return dict(np.load(folder / "results.npz"))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", random_cases(), ids=lambda case: case.name)
def test_agreement(case: Case, direction: str, other: Process, truth: Process, ours: Process, tmp_path: Path):
    if PEERS[other.library].reason_against(case, direction) is not None:
        if direction == "forward+backward":
            assert not PEERS[other.library].trains
        else:
            assert other.library == "ncnn" and (case.groups > 1 or case.offset_groups > 1)
        return
    theirs = results(other, case, direction, tmp_path)
    exact = results(truth, case, direction, tmp_path)
    if direction == "forward+backward":
        assert set(theirs) == {"output", "input", "offset", "weight", "bias", *(["mask"] if case.masked else [])}
    else:
        assert set(theirs) == {"output"}
    assert max(differences(theirs, exact).values()) < 2e-5
    assert max(differences(results(ours, case, direction, tmp_path), exact).values()) < 5e-6


def test_what_they_cannot_run_they_say():
    volume, signal, plane = named("volume-3d"), named("signal-1d"), named("primes")
    for name in set(OTHERS) - {"prepacked"}:
        assert PEERS[name].reason_against(volume, "forward") == "has no 3-D"
        assert PEERS[name].reason_against(signal, "forward") is None and PEERS[name].embeds(signal)
        assert PEERS[name].reason_against(plane, "forward") is None and not PEERS[name].embeds(plane)
    for name in ("deformconv", "dense"):
        for case in (volume, signal, plane):
            assert PEERS[name].reason_against(case, "forward+backward") is None and not PEERS[name].embeds(case)
    for case in (volume, signal, plane):
        assert PEERS["prepacked"].reason_against(case, "forward") is None and not PEERS["prepacked"].embeds(case)
    for name in ("onnxruntime", "openvino", "ncnn", "prepacked"):
        assert PEERS[name].reason_against(plane, "forward+backward") == "has no gradients"
    for name, reason in (("resnext-c4", "has no groups"), ("depthwise", "has no groups"), ("edvr", "has no offset groups")):
        assert PEERS["ncnn"].reason_against(named(name), "forward") == reason
        assert PEERS["openvino"].reason_against(named(name), "forward") is None


@pytest.mark.parametrize("masked", [True, False])
def test_ncnn_computes_in_float32_with_every_number_in_its_place(masked: bool):
    """Kernel, stride, padding and dilation of two axes that differ, v1 and v2, and images that differ."""
    pytest.importorskip("ncnn")
    case = Case("odd", 2, 5, 7, (11, 9), (2, 3), (1, 2), (2, 1), (3, 1), masked=masked)
    theirs, exact = PEERS["ncnn"](1), Truth(1)
    for peer in (theirs, exact):
        peer.prepare(case)
    found = theirs.results("forward")
    assert not np.allclose(found["output"][0], found["output"][1])
    assert differences(found, exact.results("forward"))["output"] < 5e-6


def test_ncnn_says_what_it_could_not_do():
    pytest.importorskip("ncnn")
    peer: Any = PEERS["ncnn"](1)
    peer.prepare(Case("small", 1, 4, 6, (7, 6)))
    extractor = SimpleNamespace(input=lambda name, array: 0, extract=lambda name: (-100, None))
    peer.net = SimpleNamespace(create_extractor=lambda: extractor)
    with pytest.raises(RuntimeError, match="ncnn failed with -100"):
        peer.forward()
    described = peer._described
    peer._described = lambda case, weights: described(case, weights).replace("DeformableConv2D", "NoSuchLayer")
    with pytest.raises(RuntimeError, match="ncnn does not read the net's description"):
        peer.prepare(Case("small", 1, 4, 6, (7, 6)))


def test_openvino_runs_before_2025_too(monkeypatch: pytest.MonkeyPatch):
    """The extra `bench` takes 2024.4."""
    pytest.importorskip("openvino")
    from tests import old_openvino

    case = Case("small", 2, 4, 6, (7, 6), (3, 3), (1, 1), (1, 1), (1, 1))
    newest, oldest = PEERS["openvino"](1), PEERS["openvino"](1)
    newest.prepare(case)
    old_openvino.pretend(monkeypatch)
    oldest.prepare(case)
    assert np.array_equal(oldest.results("forward")["output"], newest.results("forward")["output"])


def test_three_axes(truth: Process, ours: Process, tmp_path: Path):
    case = Case("3-D", 2, 4, 6, (5, 4, 6), (2, 3, 2), (2, 1, 1), (1, 0, 2), (1, 1, 2), groups=2, offset_groups=2)
    found, exact = (results(process, case, "forward+backward", tmp_path) for process in (ours, truth))
    assert max(differences(found, exact).values()) < 5e-6


def test_zero_offsets_give_the_plain_convolution(truth: Process, tmp_path: Path):
    """The one that is compared for its time alone is the convolution of the same layer."""
    with processes(["dense"], 2) as (dense,):
        for name in ("primes", "signal-1d", "volume-3d"):
            case = named(name)._replace(sigma=0.0, masked=False, batch=1, in_channels=4, out_channels=3)
            found, exact = (results(process, case, "forward+backward", tmp_path) for process in (dense, truth))
            assert set(found) == {"output", "input", "weight", "bias"}
            assert max(differences(found, {key: exact[key] for key in found}).values()) < 2e-5


def test_a_gradient_may_be_recorded_and_not_computed(other: Process, truth: Process):
    case = named("primes")._replace(batch=1, size=(9, 9))
    if PEERS[other.library].trains:
        found = compare({"other": Entry(other, case)}, RECORDED, truth, Pace(1, 1e-3))
        assert found["other"]["milliseconds"] > 0 and found["other"]["error"] < 2e-5


def test_memory_and_failures_are_answers(ours: Process):
    case = named("primes")
    ours.ask("prepare", case=case._asdict())
    assert len(ours.ask("time", direction="forward+backward", calls=3)) == 3
    if sys.platform == "linux":
        assert 0 < ours.ask("peak", direction="forward+backward") < 2**28
    with pytest.raises(Failure, match="ShapeError: `weight` has shape"):
        ours.ask("prepare", case=case._replace(in_channels=38, groups=4)._asdict())
    assert ours.ask("prepare", case=case._asdict()) is None  # and it goes on


def test_a_process_that_ends_is_a_failure():
    with processes(["deformconv"], 1) as (process,):
        process.process.kill()
        with pytest.raises(Failure, match=r"its process ended with -?\d+"):
            process.ask("prepare", case=named("primes")._asdict())
