"""Which backend runs a call, and what is said of the others."""

from __future__ import annotations

import inspect
import types

import numpy as np
import pytest

import deformconv
from deformconv import BackendError, dispatch
from deformconv.ops.conv.operator import DEFORM_CONV
from deformconv.ops.conv.spec import Operand, conv_spec

SPEC = conv_spec(
    *(Operand(shape, "float32", "cpu") for shape in [(2, 4, 8, 8), (2, 18, 8, 8), (6, 4, 3, 3), (6,)]),
    Operand((2, 9, 8, 8), "float32", "cpu"),
    padding=1,
)


@pytest.fixture
def backends(monkeypatch):
    """Stand-ins for the registered backends: set `reasons[name]`, read `asked`."""
    reasons: dict[str, list[str]] = {"cpu": [], "gpu": ["too far"], "portable": [], "reference": []}
    asked: list[str] = []

    def load(operator, name):
        def reasons_against(*call):
            asked.append(name)
            return reasons[name]

        module = types.ModuleType(name)
        module.reasons_against = reasons_against
        module.how = lambda spec, library, device, backward: []
        module.computes_in = lambda dtype, library: dtype
        return module

    monkeypatch.setattr(dispatch, "load", load)
    dispatch._cached_first.cache_clear()
    yield types.SimpleNamespace(reasons=reasons, asked=asked)
    dispatch._cached_first.cache_clear()


def chosen(requested=None):
    return dispatch.choose(DEFORM_CONV, SPEC, "numpy", "cpu", False, requested).__name__


def test_the_first_that_can_run_runs(backends):
    assert chosen() == "cpu"
    assert backends.asked == ["cpu"]


def test_one_that_cannot_is_passed_over(backends):
    backends.reasons["cpu"] = ["too warm"]
    assert chosen() == "portable"


def test_what_runs_by_name_only_is_never_taken_unasked(backends):
    backends.reasons.update(cpu=["too warm"], portable=["too cold"])
    with pytest.raises(BackendError):
        chosen()
    assert chosen("reference") == "reference"


def test_a_named_backend_is_honoured(backends):
    assert chosen("portable") == "portable"
    assert backends.asked == ["portable"]


def test_the_error_prints_shapes_dtype_and_every_reason(backends):
    backends.reasons.update(cpu=["too warm.", "too wet"], portable=["too cold"])
    with pytest.raises(BackendError) as caught:
        chosen()
    assert str(caught.value) == (
        "No backend can run this call: input (2, 4, 8, 8), offset (2, 18, 8, 8), weight (6, 4, 3, 3), "
        "mask (2, 9, 8, 8); float32, numpy on cpu, forward.\n"
        "  cpu: too warm; too wet\n"
        "  gpu: too far\n"
        "  portable: too cold\n"
        '  reference: can run it, but only when asked for by backend="reference"'
    )


def test_the_error_of_a_named_backend(backends):
    backends.reasons["cpu"] = ["too warm"]
    with pytest.raises(BackendError) as caught:
        chosen("cpu")
    text = str(caught.value)
    assert text.startswith('backend="cpu" cannot run this call: input (2, 4, 8, 8)')
    assert "\n  cpu: too warm\n" in text
    assert '  portable: can run it, but backend="cpu" was asked for' in text


def test_an_unknown_name(backends):
    expected = '`backend` is \'cuda\'; expected "cpu", "gpu", "portable", "reference", or None for the first that can'
    with pytest.raises(ValueError, match=expected):
        chosen("cuda")
    with pytest.raises(ValueError, match=expected):
        dispatch.explain(DEFORM_CONV, SPEC, "numpy", "cpu", "cuda")


@pytest.mark.parametrize("name", [["cpu"], 0, np.array(["cpu", "portable"])], ids=repr)
def test_a_name_that_is_no_text(name):
    for call in (
        lambda: dispatch.choose(DEFORM_CONV, SPEC, "numpy", "cpu", False, name),
        lambda: dispatch.explain(DEFORM_CONV, SPEC, "numpy", "cpu", name),
    ):
        with pytest.raises(ValueError) as caught:
            call()
        assert str(caught.value).startswith(f'`backend` is {name!r}; expected "cpu", ')


def test_a_choice_is_made_once(backends):
    for _ in range(5):
        chosen()
    assert backends.asked == ["cpu"]


def test_explain(backends):
    backends.reasons["cpu"] = ["too warm"]
    assert dispatch.explain(DEFORM_CONV, SPEC, "torch", "cuda:0").splitlines() == [
        "input (2, 4, 8, 8), offset (2, 18, 8, 8), weight (6, 4, 3, 3), mask (2, 9, 8, 8); float32, torch on cuda:0",
        "forward: portable",
        "  cpu: too warm",
        "  gpu: too far",
        '  reference: can run it, but only when asked for by backend="reference"',
        "backward: portable",
        "  cpu: too warm",
        "  gpu: too far",
        '  reference: can run it, but only when asked for by backend="reference"',
    ]


def test_explain_does_not_raise_where_nothing_can_run(backends):
    backends.reasons["cpu"] = ["too warm"]
    lines = dispatch.explain(DEFORM_CONV, SPEC, "numpy", "cpu", "cpu").splitlines()
    assert lines[1:4] == ["forward: no backend can run it", "  cpu: too warm", "  gpu: too far"]


def test_the_real_backends():
    assert dispatch.choose(DEFORM_CONV, SPEC, "numpy", "cpu", True).__name__ == "deformconv.ops.conv.cpu"
    for name in ("cpu", "portable", "reference"):
        assert dispatch.choose(DEFORM_CONV, SPEC, "numpy", "cpu", False, name).__name__ == f"deformconv.ops.conv.{name}"
    with pytest.raises(BackendError, match="portable: NumPy has no automatic derivative"):
        dispatch.choose(DEFORM_CONV, SPEC, "numpy", "cpu", True, "portable")
    with pytest.raises(BackendError, match="gpu: it takes PyTorch's tensors, not numpy's arrays"):
        dispatch.choose(DEFORM_CONV, SPEC, "numpy", "cpu", False, "gpu")


def test_how_a_backend_computes_may_depend_on_the_device(backends, monkeypatch):
    load = dispatch.load

    def load_another(operator, name):
        module = load(operator, name)
        module.how = lambda spec, library, device, backward: [f"it computes {spec.dtype} of {library} on {device}"]
        return module

    backends.reasons.update(cpu=["too warm"], gpu=[])
    monkeypatch.setattr(dispatch, "load", load_another)
    lines = dispatch.explain(DEFORM_CONV, SPEC, "torch", "cuda:1").splitlines()
    assert lines[1:4] == ["forward: gpu", "  gpu: it computes float32 of torch on cuda:1", "  cpu: too warm"]


def test_a_fault_of_a_backend_is_raised_and_not_hidden(monkeypatch):
    from deformconv.ops.conv import cpu

    def broken(*arguments, **keywords):
        raise NotImplementedError("a fault of the kernel")

    monkeypatch.setattr(cpu, "forward", broken)
    with pytest.raises(NotImplementedError, match="a fault of the kernel"):
        deformconv.deform_conv(np.ones((1, 1, 2, 2)), np.zeros((1, 2, 2, 2)), np.ones((1, 1, 1, 1)))


def test_is_short_and_catches_nothing():
    source = inspect.getsource(dispatch)
    assert len(source.splitlines()) < 150
    assert "except" not in source.replace("exception", "")


def test_verdicts_are_data(backends):
    backends.reasons["cpu"] = ["too warm.", "too wet"]
    assert dispatch.verdicts(DEFORM_CONV, SPEC, "torch", "cuda:0", backward=True) == [
        ("cpu", False, ("too warm", "too wet")),
        ("gpu", False, ("too far",)),
        ("portable", True, ()),
        ("reference", False, ('can run it, but only when asked for by backend="reference"',)),
    ]
