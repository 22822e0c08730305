"""Deformable RoI pooling on MXNet's arrays and symbols, beside MXNet's own operator, which nobody here wrote."""

from __future__ import annotations

import doctest
import re
from typing import Any

import mxnet as mx
import pytest
from tests.ops.roi_pool.cases import CASES, Call, Case, make, parameters
from tests.ops.roi_pool.suite import expected_gradients, expected_output
from tests.tolerances import assert_close

import deformconv.gluon.roi_pool
from deformconv.errors import ShapeError
from deformconv.gluon import contrib, deform_roi_pool

ROUNDED = Case(
    "MXNet", channels=36, output_size=(3, 3), boxes=12, size=(10, 14), convention="rounded", gamma=0.125, masked=False
)
VARIANTS = [
    ROUNDED.but(name="position-sensitive", position_sensitive=True),
    ROUNDED.but(name="plain channels", channels=4),
    ROUNDED.but(name="classes", position_sensitive=True, classes=2),
    ROUNDED.but(name="parts", channels=4, output_size=(4, 4), part_size=(2, 2), sampling=4),
    ROUNDED.but(name="no offsets", channels=4, deformed=False, sampling=1),
    ROUNDED.but(name="far offsets", channels=4, spread=30.0, sampling=3),
    ROUNDED.but(name="seven bins", channels=98, output_size=(7, 7), position_sensitive=True, size=(20, 24)),
]


NO_MASK = "MXNet's operator takes no mask: multiply its output by it, or pass it to `deformconv.gluon.deform_roi_pool`."


def arrays(call: Call) -> list[Any]:
    return [None if array is None else mx.nd.array(array, dtype=array.dtype) for array in call.arrays]


def mxnet_words(case: Case) -> dict[str, Any]:
    groups = case.output_size[0] if case.position_sensitive else 1
    return {
        "spatial_scale": case.scale, "output_dim": case.channels // groups**2, "group_size": groups,
        "pooled_size": case.output_size[0], "part_size": case.part_size[0] if case.part_size else 0,
        "sample_per_part": case.sampling, "trans_std": case.gamma, "no_trans": not case.deformed,
    }  # fmt: skip


def result(function: Any, given: list[Any], grad_output: Any, **others: Any) -> list[Any]:
    for array in given:
        array.attach_grad()
    with mx.autograd.record():
        output = function(*given, **others)
    output.backward(mx.nd.array(grad_output, dtype=grad_output.dtype))
    return [output.asnumpy(), *(array.grad.asnumpy() for array in given)]


@pytest.mark.parametrize("case", VARIANTS, ids=lambda case: case.name)
def test_it_is_mxnet_s_operator(case: Case) -> None:
    call, words = make(case), mxnet_words(case)
    given = [array for array in arrays(call) if array is not None]
    ours = result(contrib.DeformablePSROIPooling, given, call.grad_output, **words)
    theirs = result(mx.nd.contrib.DeformablePSROIPooling, [array.copy() for array in given], call.grad_output, **words)
    for name, one, other in zip(("output", "data", "rois", "trans"), ours, theirs, strict=False):
        assert_close(one, other, "float64", name)


def test_mxnet_keeps_trans_std_in_float32() -> None:
    case = ROUNDED.but(name="a tenth", channels=4, gamma=0.1)
    given = [array for array in arrays(make(case)) if array is not None]
    ours = contrib.DeformablePSROIPooling(*given, **mxnet_words(case))
    theirs = mx.nd.contrib.DeformablePSROIPooling(*given, **mxnet_words(case))
    assert_close(ours.asnumpy(), theirs.asnumpy(), "float64")


@pytest.mark.parametrize("case", [case for case in CASES if case.channels < 100], ids=lambda case: case.name)
def test_output_and_gradients(case: Case) -> None:
    call, expected = make(case), expected_gradients(case, "float64")
    given = {
        name: array for name, array in zip(("data", "boxes", "offset", "mask"), arrays(call), strict=True) if array is not None
    }

    def run(*values: Any) -> Any:
        return deform_roi_pool(**dict(zip(given, values, strict=True)), **parameters(case))

    output, *gradients = result(run, list(given.values()), call.grad_output)
    assert_close(output, expected_output(case, "float64"), "float64")
    for name, gradient in zip(given, gradients, strict=True):
        if name == "boxes":
            assert not gradient.any()
        else:
            assert_close(gradient, getattr(expected, {"data": "input"}.get(name, name)), "float64", name)


def test_symbols() -> None:
    words = mxnet_words(VARIANTS[0])
    symbol = contrib.DeformablePSROIPooling(**words, name="pool")
    assert symbol.list_arguments() == ["pool_data", "pool_rois", "pool_trans"]
    assert mx.sym.contrib.DeformablePSROIPooling(**words, name="pool").list_arguments() == symbol.list_arguments()
    assert contrib.DeformablePSROIPooling(**words | {"no_trans": True}, name="pool").list_arguments() == [
        "pool_data",
        "pool_rois",
    ]
    call = make(VARIANTS[0], "float32")
    shapes = dict(zip(symbol.list_arguments(), (array.shape for array in call.arrays[:3]), strict=True))
    assert symbol.infer_shape(**shapes)[1] == [call.spec.output_shape]
    bound = symbol.bind(mx.cpu(), [array for array in arrays(call) if array is not None])
    assert_close(bound.forward()[0].asnumpy(), expected_output(VARIANTS[0], "float32"), "float32")


def test_errors() -> None:
    call, words = make(VARIANTS[0]), mxnet_words(VARIANTS[0])
    data, rois, trans, _ = arrays(call)
    with pytest.raises(ShapeError, match=r"`data` has 36 channels, .*; expected output_dim \* group_size\^2 = 45"):
        contrib.DeformablePSROIPooling(data, rois, trans, **words | {"output_dim": 5})
    with pytest.raises(TypeError, match="`trans` is missing; expected it, or no_trans=True"):
        contrib.DeformablePSROIPooling(data, rois, **words)
    with pytest.raises(TypeError, match="`pooled_size` is missing"):
        contrib.DeformablePSROIPooling(data, rois, trans, spatial_scale=1, output_dim=4, group_size=3)
    with pytest.raises(ShapeError, match=re.escape("`boxes` has shape (12, 4)")):
        deform_roi_pool(data, rois[:, 1:])
    with pytest.raises(ShapeError, match=r"`boxes` has shape \(2, 6, 4\); .* of N images put each image's number in front"):
        deform_roi_pool(data, mx.nd.zeros((2, 6, 4), dtype="float64"))
    with pytest.raises(ShapeError, match=r"3 = 2 offsets \+ 1 mask: pass the last one as `mask`"):
        deform_roi_pool(data, rois, mx.nd.zeros((12, 3, 7, 7), dtype="float64"))


def test_the_hidden_output_is_seen_in_neither() -> None:
    words = mxnet_words(VARIANTS[0])
    for library in (mx.sym.contrib, contrib):
        symbol = library.DeformablePSROIPooling(**words, name="pool")
        assert symbol.list_outputs() == ["pool_output"] and len(symbol) == 1
        assert [name for name in symbol.get_internals().list_outputs() if name.startswith("pool_")][-1] == "pool_output"


def test_errors_of_contrib_are_in_mxnet_s_words(capfd: pytest.CaptureFixture[str]) -> None:
    """Neither `boxes` nor `offset` nor `gamma` is what its user passed."""
    call, words = make(VARIANTS[0]), mxnet_words(VARIANTS[0])
    data, rois, trans, _ = arrays(call)
    boxes_of_images = mx.nd.zeros((2, 6, 4), dtype="float64")
    for given, others, kind, expected in (
        ((data, rois[:, 1:], trans), {}, ShapeError, "`rois` has shape (12, 4); expected (R, 5)"),
        ((data, rois, trans[:, :1]), {}, ShapeError, "`trans` has 1 channel; expected 2, x before y"),
        ((data, rois, trans[:, :1]), {}, ShapeError, f"One number for each bin is a mask. {NO_MASK}"),
        ((data, rois, mx.nd.zeros((12, 3, 3, 3), dtype="float64")), {}, ShapeError, f"3 = 2 offsets + 1 mask. {NO_MASK}"),
        ((data, rois, trans.reshape((12, -1))), {}, ShapeError, "one after the other, pass `trans.reshape(-1, 2, 3, 3)`."),
        ((data, trans[0], trans), {}, ShapeError, "`rois` has shape (2, 3, 3); expected (R, 5)"),
        ((data, boxes_of_images, trans), {}, ShapeError, "of N images put each image's number in front of its rows, and join"),
        ((data, rois, trans[1:]), {}, ShapeError, "`trans` has 11 rows; expected one for each box, 12."),
        ((data, rois, trans.astype("float32")), {}, TypeError, "`trans` is float32 and `data` is float64; expected one dtype"),
        ((data, 3, trans), {}, TypeError, "`rois` is a int; expected an MXNet NDArray, as `data` is"),
        ((data, rois.tostype("row_sparse"), trans), {}, TypeError, "expected a dense array: `rois.tostype('default')`."),
        ((data, rois, trans), {"trans_std": float("nan")}, ValueError, "`trans_std` is nan; expected a finite number"),
        ((data, rois, trans), {"trans_std": True}, TypeError, "`trans_std` is True; expected a number"),
    ):
        with pytest.raises(kind, match=re.escape(expected)) as raised:
            contrib.DeformablePSROIPooling(*given, **words | others)
        assert not re.search(r"`(input|boxes|offset|mask|gamma|output_size|sampling_ratio)\b", str(raised.value))
    rois[0, 0] = 7  # values are looked at when MXNet computes, and the text is on stderr
    with pytest.raises(mx.base.MXNetError):
        contrib.DeformablePSROIPooling(data, rois, trans, **words).asnumpy()
    assert "`rois` has 7 in row 0, column 0; expected" in capfd.readouterr().err


def test_doctests() -> None:
    found = doctest.testmod(deformconv.gluon.roi_pool)
    assert found.attempted >= 5 and not found.failed


def test_numbers_in_the_place_of_others() -> None:
    x, boxes, trans = mx.nd.ones((1, 2, 5, 5)), mx.nd.array([[0, 0, 0, 3, 3]]), mx.nd.zeros((1, 2, 1, 1))
    with pytest.raises(TypeError, match=r"`offset` is 7; .* pass output_size=7"):
        deform_roi_pool(x, boxes, 7, 1 / 16)
    sizes = {"spatial_scale": 1.0, "output_dim": 2, "group_size": 1, "pooled_size": 1}
    for name, value in (("trans_std", None), ("spatial_scale", "1/16")):
        with pytest.raises(TypeError, match=f"`{name}` is {value!r}; expected a number"):
            contrib.DeformablePSROIPooling(x, boxes, trans, **{**sizes, name: value})
