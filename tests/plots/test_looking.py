"""One call from a model and a picture to a page: what it shows, what it leaves as it was, and what it refuses."""

import html
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import deformconv
from deformconv import plots
from deformconv.errors import ShapeError
from deformconv.torch import DeformConv1d, DeformConv2d


def net(channels: int = 3) -> nn.Sequential:
    """A stem of stride 2 and two deformable layers, whose offsets are some pixels."""
    torch.manual_seed(0)
    layers = DeformConv2d(6, 6, 3, padding=1), DeformConv2d(6, 4, 3, padding=1, stride=2, modulated=False)
    for layer in layers:
        nn.init.normal_(layer.offset_conv.weight, std=0.2)
    return nn.Sequential(nn.Conv2d(channels, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), layers[0], nn.ReLU(), layers[1])


IMAGE = np.random.default_rng(0).integers(0, 255, (24, 32, 3), np.uint8)


@pytest.fixture(scope="module")
def seen():
    return deformconv.look(net(), IMAGE, fields=4, progress=False)


def test_three_lines_from_a_model_and_a_photograph_to_the_page(tmp_path, monkeypatch):
    image = pytest.importorskip("PIL.Image")
    image.fromarray(IMAGE).save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    model = net()
    program = """
import deformconv
deformconv.look(model, "photo.png").save("look.html")
"""
    exec(program, {"model": model})
    assert "<html" in Path("look.html").read_text(encoding="utf-8")


def test_the_last_layer_and_the_middle_come_first(seen):
    assert (seen.layer, seen.at) == ("4", (11.5, 15.5))
    assert seen.trace.layers == ["2", "4"] and seen.image.shape == (24, 32, 3)
    assert repr(seen).startswith("Look at '4', position (11.5, 15.5)\nTrace of 1 forward pass")


def test_a_notebook_shows_the_page_in_a_frame(seen):
    text = seen._repr_html_()
    (frame,) = re.findall(r'<iframe [^>]*sandbox="allow-scripts" srcdoc="([^"]*)"></iframe>', text)
    assert html.unescape(frame) == seen.html()
    assert "http://" not in seen.html().replace("http://www.w3.org/2000/svg", "") and "https://" not in seen.html()


def test_a_page_has_receptive_fields_of_every_layer(seen):
    import json

    (text,) = re.findall(r'<script[^>]*type="application/json"[^>]*>(.*?)</script>', seen.html(), re.S)
    document = json.loads(text)
    assert [layer["name"] for layer in document["layers"]] == ["2", "4"]
    assert all(len(layer["fields"]["units"]) == 4 for layer in document["layers"])
    assert document["layers"][1]["before"] == [0]
    assert document["start"] == {"layer": 1, "at": [11.5, 15.5]}


@pytest.mark.parametrize(
    ("name", "begins"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml"), ("a.gif", b"GIF89a"), ("a.HTML", b"<!")]
)
def test_the_suffix_says_what_is_written(seen, tmp_path, name, begins):
    written = seen.save(tmp_path / name, None if name.lower().endswith(("html", "gif")) else "points")
    assert written == tmp_path / name and written.read_bytes().lower().startswith(begins.lower())
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("name", "view", "message"),
    [
        ("a.jpg", None, r"a file ending in '\.jpg' cannot be written; expected one of \.html, \.png, \.svg, \.gif"),
        ("look", None, "a file ending in 'nothing' cannot be written"),
        ("a.png", "flows", r"`view` is 'flows', and a \.png file has all, points, erf, locations, saliency, flow"),
        ("a.gif", "erf", r"`view` is 'erf', and a \.gif file has points"),
        ("a.html", "erf", r"a \.html file has all views, to choose from"),
    ],
)
def test_what_cannot_be_written_is_said_before_anything_is(seen, tmp_path, name, view, message):
    with pytest.raises(ValueError, match=message):
        seen.save(tmp_path / name, view)
    assert not list(tmp_path.iterdir())


def test_the_model_is_left_as_it_was():
    model = net().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.random.get_rng_state()
    deformconv.look(model, IMAGE, progress=False).html()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    "image", [IMAGE, IMAGE[..., 0], torch.from_numpy(IMAGE).permute(2, 0, 1) / 255, IMAGE.astype(float) / 255]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_of_any_form_for_models_of_grey_and_colour(image, channels):
    seen = deformconv.look(net(channels), image, progress=False)
    assert tuple(seen.trace.image.shape) == (1, channels, 24, 32)
    assert float(seen.trace.image.min()) >= 0 and float(seen.trace.image.max()) <= 1


def test_a_tensor_of_a_batch_goes_into_the_model_as_it_is():
    x = torch.randn(1, 5, 24, 32)
    seen = deformconv.look(net(5), x, progress=False)
    assert torch.equal(seen.trace.image, x) and seen.image.shape == (24, 32)


def test_preprocessing_is_between_the_picture_and_the_model():
    seen = deformconv.look(net(), IMAGE, preprocess=lambda x: (x - 0.5) / 0.25, progress=False)
    assert float(seen.trace.image.min()) < -1.9
    np.testing.assert_allclose(seen.image, IMAGE / 255)
    for wrong, message in ((lambda x: x[..., ::2], r"what has shape \(1, 3, 24, 16\)"), (lambda x: None, "type NoneType")):
        with pytest.raises(ShapeError, match=f"`preprocess` returned .*{message}.*of the picture's size, 24x32"):
            deformconv.look(net(), IMAGE, preprocess=wrong, progress=False)


def test_a_detector_of_torchvision_takes_a_list():
    detection = pytest.importorskip("torchvision.models.detection")
    from deformconv.vision import make_deformable

    model = detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=2)
    names = make_deformable(model, "backbone.features.0.2.block.1.0")
    seen = deformconv.look(model, IMAGE, progress=False)
    assert seen.trace.layers == list(names)
    assert seen.trace.geometry(names[0]).step[0] == pytest.approx(2 * 24 / 320)  # its transform makes it 320 pixels high


@pytest.mark.parametrize(
    ("model", "image", "options", "error", "message"),
    [
        (None, IMAGE, {}, TypeError, "`model` is a builtins.NoneType; expected a torch.nn.Module"),
        (nn.Conv2d(3, 4, 3), IMAGE, {}, ValueError, "`model`, a Conv2d, has no deformable layer"),
        (net(), IMAGE, {"layer": "7"}, ValueError, "'7'.*'2', '4'"),
        (net(), IMAGE, {"at": (30, 3)}, ValueError, r"`at` is \(30, 3\), outside the image of 24 x 32 pixels"),
        (net(), IMAGE, {"at": (3,)}, ValueError, "expected 2 numbers"),
        (net(), np.zeros((5, 24, 32)), {}, ShapeError, "`image` has shape"),
        (net(), torch.rand(2, 3, 24, 32), {}, ShapeError, r"`image` has 2 pictures, shape \(2, 3, 24, 32\); expected one"),
        (net(), "nowhere.png", {}, FileNotFoundError, r"nowhere\.png"),
        (net(), IMAGE, {"fields": -1}, ValueError, "`fields` is -1; expected an integer, 0 or more"),
        (net(), IMAGE, {"fields": "3"}, ValueError, "`fields` is '3'; expected an integer"),
        (net(), IMAGE, {"at": 3}, ValueError, "`at` is 3; expected 2 numbers"),
        (net(), IMAGE, {"preprocess": 3}, TypeError, "`preprocess` is of type int; expected a function"),
    ],
)
def test_what_cannot_be_shown_is_explained(model, image, options, error, message):
    with pytest.raises(error, match=message):
        deformconv.look(model, image, progress=False, **options)


def test_a_sequence_is_no_picture():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Flatten(2), DeformConv1d(3, 2, 3))
    with pytest.raises(ValueError, match=r"layer '2' of `model` has 1 spatial axes; expected 2: a page shows pictures"):
        deformconv.look(model, IMAGE, progress=False)


def test_a_model_without_gradients_has_a_page_without_receptive_fields():
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, image):
            with torch.no_grad():
                return self.net(image)

    with pytest.raises(ValueError, match=r"torch.no_grad.*A page without receptive fields needs no gradient: fields=0"):
        deformconv.look(Frozen(), IMAGE, progress=False).html()
    assert "<html" in deformconv.look(Frozen(), IMAGE, fields=0, progress=False).html()


def test_a_page_begins_with_a_deformable_layer():
    with pytest.raises(ValueError, match="no deformable layer '0' was recorded; the layers that were called are '2', '4'"):
        deformconv.look(net(), IMAGE, layer="0", progress=False).html()


@pytest.mark.parametrize(("view", "layers"), [("all", 1), ("erf", 2), ("flow", 0)])
def test_layers_are_for_samples(seen, tmp_path, view, layers):
    with pytest.raises(ValueError, match=f"`layers` is {layers}, a depth for samples; expected it with the view 'points'"):
        seen.draw(view, layers)
    with pytest.raises(ValueError, match="`layers` is 1, a depth for samples"):
        seen.save(tmp_path / "look.html", layers=1)


@pytest.mark.parametrize(
    "function",
    [plots.unit_points, plots.receptive_field, plots.sampling_locations, plots.saliency_region, plots.offset_field],
)
def test_what_is_no_trace_is_told_by_every_view(seen, function):
    with pytest.raises(TypeError, match=r"`trace` is of type Sequential; expected what deformconv.plots.record yields"):
        function(net(), "2")
    with pytest.raises(TypeError, match=r"`trace` is of type Look; .* It has one: pass its `trace`"):
        function(seen, "2")
    with pytest.raises(TypeError, match="`trace` is of type Sequential"):
        plots.offset_statistics(net())


@pytest.mark.parametrize("function", [plots.unit_points, plots.offset_field, plots.receptive_field, plots.saliency_region])
def test_images_of_a_batch_have_whole_numbers(seen, function):
    with pytest.raises(ValueError, match=r"`image` is 0\.5; .* counted from 0"):
        function(seen.trace, "2", image=0.5)


def test_one_number_is_no_position(seen):
    with pytest.raises(ValueError, match=r"`at` is 7; expected 2 numbers, \(y, x\)"):
        plots.receptive_field(seen.trace, "2", at=7)
    with pytest.raises(ValueError, match=r"`offset_group` is 0\.5; layer '2' has 1 offset group"):
        plots.unit_points(seen.trace, "2", offset_group=0.5)


def test_locations_are_of_the_layer_at_that_depth(seen):
    assert seen.draw("locations", 1).get_suptitle().startswith("Samples of layer 4 that move layer 4's unit")
    assert seen.draw("locations").get_suptitle().startswith("Samples of layer 2 that move layer 4's unit")
    with pytest.raises(ValueError, match="`layers` is 3, and layer '4' has 1 deformable layer before it"):
        seen.draw("locations", 3)
