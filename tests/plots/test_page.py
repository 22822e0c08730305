"""A page's document holds the offsets as exactly as it says, in a file that is small enough and fetches nothing."""

from __future__ import annotations

import base64
import doctest
import io
import json
import re
import zlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tests.plots.pages import FakeTrace, call, field, picture, small_trace

from deformconv.errors import ShapeError
from deformconv.plots import packing
from deformconv.plots import page as pages
from deformconv.plots.packing import TOLERANCE, quantised
from deformconv.plots.page import LIMIT, build, page, spread_units

Image = pytest.importorskip("PIL.Image")


def unpacked(stored: dict[str, Any]) -> np.ndarray:
    """What the page reads."""
    data = zlib.decompress(base64.b64decode(stored["data"]), -zlib.MAX_WBITS)
    dtype = np.dtype(stored["dtype"]).newbyteorder("<")
    columns = np.frombuffer(data, np.uint8).reshape(dtype.itemsize, -1)
    return np.ascontiguousarray(columns.T).view(dtype).reshape(stored["shape"]) * stored["scale"]


def offsets(call: Any) -> np.ndarray:
    return call.offset[0].astype(np.float64).reshape(call.offset_groups, call.K, 2, *call.output_size)


@pytest.mark.parametrize("largest, dtype", [(0.0, "int8"), (1.0, "int8"), (200.0, "int16"), (1e6, "int32")])
def test_the_smallest_integers_within_the_tolerance(largest, dtype):
    values = np.append(np.random.default_rng(0).uniform(-largest, largest, 999), largest)
    integers, scale = quantised(values, 0.01)
    assert integers.dtype == dtype
    error = np.abs(integers * scale - values).max()
    assert error <= 0.01
    if largest > 1:
        assert error > 0.0099  # no finer than it has to be


def test_what_is_no_number_has_an_integer_of_its_own():
    integers, _ = quantised([np.nan, 1.0, -1.27], 0.005)
    assert integers.tolist() == [-128, 100, -127]
    integers, _ = quantised([np.nan, np.inf, -np.inf], 0.05)
    assert integers.tolist() == [-(2**31), 2**31 - 1, -(2**31) + 1]


def test_offsets_and_masks_are_those_of_the_trace():
    trace = small_trace()
    document = build(trace, picture())
    assert [entry["name"] for entry in document["layers"]] == ["stem", "body.down", "body.wide"]
    assert [entry["before"] for entry in document["layers"]] == [[], [0], [1, 0]]
    assert document["left_out"] == []
    for entry, made in zip(document["layers"], trace.calls, strict=True):
        error = np.abs(unpacked(entry["offset"]) - offsets(made)) * made.geometry.step[0]
        assert 0 < error.max() <= 0.002  # there is room for more than is promised
        if made.mask is None:
            assert entry["mask"] is None
        else:
            masks = made.mask[0].reshape(made.offset_groups, made.K, *made.output_size)
            np.testing.assert_allclose(unpacked(entry["mask"]), masks, atol=2 / 255)
    down, wide = document["layers"][1:]
    assert (down["stride"], down["padding"], down["input"], down["output"]) == ([2, 2], [1, 1], [48, 64], [24, 32])
    assert (wide["dilation"], wide["padding"], wide["groups"], wide["step"]) == ([2, 2], [2, 2], 2, [4.0, 4.0])
    json.dumps(document, allow_nan=False)


def test_masks_below_zero_and_tensors():
    torch = pytest.importorskip("torch")
    trace = small_trace()
    signed = np.random.default_rng(1).normal(size=trace.calls[0].mask.shape)
    trace.calls[0].mask = torch.tensor(signed, dtype=torch.bfloat16, requires_grad=True)
    trace.calls[0].offset = torch.tensor(trace.calls[0].offset)
    entry = build(trace, picture())["layers"][0]
    assert entry["mask"]["dtype"] == "int8"
    np.testing.assert_allclose(unpacked(entry["mask"]).ravel(), signed.ravel(), atol=0.03)
    assert np.abs(unpacked(entry["offset"]) - trace.calls[0].offset[0].reshape(1, 9, 2, 48, 64).numpy()).max() <= 0.005


def test_statistics_are_those_of_the_offsets():
    trace = small_trace()
    made = trace.calls[1]
    made.offset[0, 0, 0, 0] = -40  # outside, of a window whose first tap is in the padding already
    entry = build(trace, picture())["layers"][1]
    values = offsets(made) * 2.0
    found = entry["statistics"]
    np.testing.assert_allclose(found["mean"], values.mean((0, 1, 3, 4)))
    assert found["deviation"] == pytest.approx(np.sqrt(values[:, :, 0].var() + values[:, :, 1].var()))
    assert found["largest"] == pytest.approx(80)
    assert found["mask_mean"] is None
    outside, moved = 0, values / 2
    for group, tap, row, column in np.ndindex(2, 9, 24, 32):
        y = row * 2 - 1 + tap // 3 + moved[group, tap, 0, row, column]
        x = column * 2 - 1 + tap % 3 + moved[group, tap, 1, row, column]
        outside += not (-1 < y < 48 and -1 < x < 64)
    assert found["outside"] == pytest.approx(outside / (2 * 9 * 24 * 32)) and outside > 0


def test_padding_that_is_not_of_zeros_is_read():
    trace = small_trace()
    made = trace.calls[2]
    made.padding_mode = "reflect"
    made.offset[:] = 0
    zeros, reflects = (build(trace, picture())["layers"][number] for number in (1, 2))
    assert zeros["reads"] == {"before": [0, 0], "size": [48, 64]}
    assert reflects["reads"] == {"before": [2, 2], "size": [28, 36]}
    assert reflects["statistics"]["outside"] == 0
    made.offset[0, 0] = -0.5  # the first tap's rows: those of the first row of units hang over the padding's edge
    assert build(trace, picture())["layers"][2]["statistics"]["outside"] == 0
    made.offset[0, 0] = -1.0
    found = build(trace, picture())["layers"][2]["statistics"]["outside"]
    assert found == pytest.approx(32 / (2 * 9 * 24 * 32))


def test_offsets_that_are_not_finite_are_said():
    trace = small_trace()
    trace.calls[0].offset[0, 3, 5, 5] = np.nan
    document = build(trace, picture())
    entry = document["layers"][0]
    integers = unpacked(entry["offset"]) / entry["offset"]["scale"]
    assert np.argwhere(np.round(integers) == -(2**15)).tolist() == [[0, 1, 1, 5, 5]]
    assert entry["statistics"]["mean"] == [pytest.approx(offsets(trace.calls[0])[:, :, 0].mean() * 2), None]
    page(document)


def test_receptive_fields_are_cut_to_where_they_matter():
    trace = small_trace()
    fields = {"stem": [field((10, 10), (20.5, 20.5), width=3.0), field((40, 2), (80.5, 4.5), width=3.0)], ("stem", 1): []}
    entry = build(trace, picture(), receptive_fields=fields)["layers"][0]
    packed = entry["fields"]
    assert packed["units"] == [[10, 10], [40, 2]] and packed["radius"] == [7.5, 7.5] and packed["step"] == [1, 1]
    values = unpacked(packed)
    assert values.shape == (2, 22, 22) and values.max((1, 2)).tolist() == [255, 255]  # 2*sqrt(2*log(510))*3 pixels
    for part, (y, x), whole in zip(values, packed["origin"], fields["stem"], strict=True):
        rows, columns = int(y) + np.arange(22), int(x) + np.arange(22)
        expected = np.zeros((22, 22))
        inside = np.ix_((rows < 96), (columns < 128))
        expected[inside] = whole.field[np.ix_(rows[rows < 96], columns[columns < 128])]
        np.testing.assert_allclose(part, 255 * expected / expected.max(), atol=0.5)


def test_large_fields_are_averaged():
    trace = small_trace()
    everywhere = SimpleNamespace(unit=(0, 0), field=np.add.outer(np.arange(96.0), np.ones(128)), radius=50.0)
    packed = build(trace, picture(), receptive_fields={"stem": [everywhere]})["layers"][0]["fields"]
    assert packed["step"] == [2, 2] and packed["shape"] == [1, 48, 64] and packed["origin"] == [[0.5, 0.5]]
    means = (everywhere.field[::2] + everywhere.field[1::2])[:, ::2] / 2
    np.testing.assert_allclose(unpacked(packed)[0], 255 * means / means.max(), atol=0.5)


def test_units_spread_over_a_map():
    assert spread_units((10, 4), 2) == [(2, 1), (2, 3), (7, 1), (7, 3)]
    assert spread_units((1, 1)) == [(0, 0)]
    assert len(spread_units((64, 64))) == 25


@pytest.mark.parametrize("shape, kind", [((28, 28), "png"), ((90, 200), "webp"), ((90, 200, 3), "webp"), ((200, 2048), "webp")])
def test_pictures_of_any_size(shape, kind):
    values = np.random.default_rng(0).random(shape) ** 2
    given = (values * 255).astype(np.uint8) if len(shape) == 3 else values
    source = build(small_trace(), given)["image"]["src"]
    start, text = source.split(",")
    assert start == f"data:image/{kind};base64"
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB"), np.float64) / 255
    assert shown.shape == ((100, 1024, 3) if shape == (200, 2048) else (*shape[:2], 3))
    assert shown.mean() == pytest.approx(values.mean(), abs=0.02)


def test_a_large_trace_fits_into_the_file():
    """A ResNet-50's layers of 3x3 taps at 800 x 1216 pixels, made of noise, which packs worst."""
    random = np.random.default_rng(0)
    calls = [
        call(f"layer{stage}.{number}", random, input_size=size, output_size=size, step=step, origin=0.0)
        for stage, size, step, count in [(2, (100, 152), 8.0, 4), (3, (50, 76), 16.0, 6), (4, (25, 38), 32.0, 3)]
        for number in range(count)
    ]
    trace = FakeTrace(calls, (800, 1216))
    document = build(trace, random.random((800, 1216, 3)))
    assert len(page(document).encode()) <= LIMIT
    assert document["left_out"] == []
    places = [entry["every"] for entry in document["layers"]]
    assert set(places[:4]) == {1, 2} and set(places[4:]) == {1}  # of the largest, as few as possible are made coarser
    for entry, made in zip(document["layers"], calls, strict=True):
        kept = offsets(made)[..., :: entry["every"], :: entry["every"]]
        error = np.abs(unpacked(entry["offset"]) - kept).max() * made.geometry.step[0]
        assert 0.01 < error <= TOLERANCE


def test_what_has_no_room_is_left_out_and_said():
    trace = small_trace()
    whole = build(trace, picture())
    packed = sum(len(json.dumps(entry)) for entry in whole["layers"])
    least = len(page(whole).encode()) - packed
    limit = least + packed // 3
    document = build(trace, picture(), limit=limit)
    assert len(page(document).encode()) <= limit and document["left_out"] == []
    assert {entry["every"] for entry in document["layers"]} != {1}
    document = build(trace, picture(), limit=least + 6_000, start=("stem", (1, 2)))
    assert document["left_out"] and [entry["name"] for entry in document["layers"]] == ["stem"]
    assert document["layers"][0]["before"] == [] and document["start"] == {"layer": 0, "at": [1.0, 2.0]}
    with pytest.raises(
        ValueError, match=r"`limit` = 1000 bytes has no room for any of the layers: a page without one takes \d+"
    ):
        build(trace, picture(), limit=1000)


def test_nothing_is_fetched():
    text = page(build(small_trace(), picture()))
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', text)[1]
    assert "default-src 'none'" in policy and "img-src data:;" in policy and "connect-src" not in policy
    assert "unsafe" not in policy
    without_data = re.sub(r'<script type="application/json".*?</script>', "", text, flags=re.S)
    assert not re.search(
        r"""(src|href)\s*=\s*["']?\s*(https?:)?//|@import|url\(|fetch\(|XMLHttpRequest|WebSocket|import\(""", without_data
    )
    assert re.findall(r"https?://[^\s\"'<]+", without_data) == ["http://www.w3.org/2000/svg"]  # a name, and no address
    assert not re.search(r"<(link|img|iframe|object|embed)\b", text)


def test_names_cannot_end_the_script():
    trace = small_trace()
    evil = "</script><script>alert(1)</script><!--"
    for made in trace.calls:
        made.layer += evil
    document = build(trace, picture(), title=evil, alt=evil)
    text = page(document)
    assert "alert(1)" in text and "<script>alert" not in text and "<!--" not in text
    assert text.count("</script>") == 2
    read = json.loads(re.search(r'id="document">(.*?)</script>', text, re.S)[1])
    assert read == document and read["layers"][0]["name"] == "stem" + evil
    assert "<title>&lt;/script&gt;" in text


def test_the_last_forward_pass_and_repeated_calls():
    trace = small_trace()
    random = np.random.default_rng(3)
    again = call("stem", random, input_size=(48, 64), output_size=(48, 64), step=2.0, index=1)
    earlier = call("stem", random, input_size=(48, 64), output_size=(48, 64), step=2.0)
    for made in [*trace.calls, again]:
        made.forward = 1
    trace.calls = [*trace.calls, again, earlier]
    document = build(trace, picture())
    assert [(entry["name"], entry["index"]) for entry in document["layers"]][-1] == ("stem", 1)
    assert len(document["layers"]) == 4 and document["layers"][3]["before"] == [2, 1, 0]


def test_what_cannot_be_shown_is_said():
    trace = small_trace()
    with pytest.raises(ShapeError, match=r"`image` has shape \(4, 96, 128\); expected \(H, W\) or \(H, W, 3\)"):
        build(trace, np.zeros((4, 96, 128)))
    with pytest.raises(ValueError, match=r"`start` names the layer 'head'; recorded were 'stem', 'body.down', 'body.wide'"):
        build(trace, picture(), start=("head", (0, 0)))
    with pytest.raises(ValueError, match="`trace` has no calls: run the model within"):
        build(FakeTrace([], (96, 128)), picture())
    trace.calls[1].kernel_size = (3, 3, 3)
    with pytest.raises(ShapeError, match=r"the layer 'body.down' has 3 axes, and a page shows pictures, which have 2"):
        build(trace, picture())
    with pytest.raises(ValueError, match="`document` has version 2; a page shows version 1"):
        page({"version": 2})
    with pytest.raises(ValueError, match="`document` has no layers"):
        page({"version": 1, "layers": []})


def test_doctests():
    pytest.importorskip("torch")
    for module, tried in ((packing, 3), (pages, 9)):
        result = doctest.testmod(module)
        assert result.failed == 0 and result.attempted >= tried
