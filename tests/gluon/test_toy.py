"""The toy operator of tests/ops/toy in MXNet: what is described, and a name for MXNet, is all that an operator needs there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.ops.toy.operator import SCALE

mx = pytest.importorskip("mxnet")
custom = pytest.importorskip("deformconv.gluon.custom")
calls = pytest.importorskip("deformconv.gluon.calls")

from deformconv import ShapeError  # noqa: E402


def complete(shapes: dict[str, list[int]], parameters: dict[str, Any], kept: dict[str, Any]) -> None:
    """A bias of a number a channel, and a mask of one channel."""
    batch, channels, size = shapes["data"]
    if "shift" in shapes and not shapes["shift"]:
        shapes["shift"] = [channels]
    shapes["factor"] = shapes["factor"] or [batch, kept["mask_channels"], size]


OP = custom.Registered(
    SCALE,
    "toy_scale",
    complete,
    words={"input": "data", "mask": "factor", "bias": "shift"},
    kept=("mask_channels",),
)


def scale(data: Any, factor: Any, shift: Any = None, power: int = 2, backend: str | None = None) -> Any:
    operands = {"data": data, "factor": factor, "shift": shift}
    return calls.call(OP, operands, {"power": power}, backend, None, {"mask_channels": 1})


def arrays(biased: bool) -> list[Any]:
    random = np.random.default_rng(0)
    shapes = [(3, 2, 5), (3, 1, 5)] + [(2,)] * biased
    return [mx.nd.array(random.random(shape), dtype="float64") for shape in shapes]


@pytest.mark.parametrize("biased", [False, True])
def test_arrays_and_their_gradients(biased: bool) -> None:
    given = arrays(biased)
    for array in given:
        array.attach_grad()
    with mx.autograd.record():
        output = scale(*given)
    output.backward()
    x, mask, *bias = (array.asnumpy() for array in given)
    np.testing.assert_allclose(output.asnumpy(), x * mask**2 + (bias[0][:, None] if biased else 0))
    np.testing.assert_allclose(given[0].grad.asnumpy(), np.broadcast_to(mask**2, x.shape))
    np.testing.assert_allclose(given[1].grad.asnumpy(), (2 * x * mask).sum(1, keepdims=True))
    if biased:
        np.testing.assert_allclose(given[2].grad.asnumpy(), np.full(2, 15.0))


def test_a_symbol_infers_shapes_and_computes() -> None:
    given = arrays(True)
    symbol = scale(*map(mx.sym.var, ("data", "factor", "shift")))
    assert symbol.list_arguments() == ["data", "factor", "shift"]
    shapes, outputs, _ = symbol.infer_shape(data=(3, 2, 5))
    assert shapes == [(3, 2, 5), (3, 1, 5), (2,)] and outputs == [(3, 2, 5)]
    (output,) = symbol.bind(mx.cpu(), dict(zip(symbol.list_arguments(), given, strict=True))).forward()
    np.testing.assert_array_equal(output.asnumpy(), scale(*given).asnumpy())
    loaded = mx.sym.load_json(symbol.tojson())
    (output,) = loaded.bind(mx.cpu(), dict(zip(symbol.list_arguments(), given, strict=True))).forward()
    np.testing.assert_array_equal(output.asnumpy(), scale(*given).asnumpy())


def test_texts_have_mxnet_s_words() -> None:
    data, factor = arrays(False)
    with pytest.raises(ShapeError, match=r"^`factor` has shape \(3, 2, 5\); expected \(N, 1, L\)"):
        scale(data, data)
    with pytest.raises(TypeError, match="`factor` is None; expected an MXNet NDArray"):
        scale(data, None)
    with pytest.raises(TypeError, match=r"`factor` is a numpy.ndarray; expected an MXNet NDArray, as `data` is: pass `mxnet"):
        scale(data, factor.asnumpy())
    with pytest.raises(ValueError, match=r'`backend` is .cpu.; expected "numbers"'):
        scale(mx.sym.var("data"), mx.sym.var("factor"), backend="cpu")
