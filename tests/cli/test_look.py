"""`deformconv look`: a page and pictures of a photograph, and a sentence for what cannot be looked at."""

from __future__ import annotations

import re
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deformconv.cli.main import main

NETS = """
import torch
from torch import nn
from deformconv.torch import DeformConv2d

def build():
    torch.manual_seed(0)
    layers = DeformConv2d(4, 4, 3, padding=1), DeformConv2d(4, 4, 3, padding=1)
    for layer in layers:
        nn.init.normal_(layer.offset_conv.weight, std=0.3)
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), *layers)

def grey():
    return nn.Sequential(DeformConv2d(1, 2, 3, padding=1))

def plain():
    return nn.Conv2d(3, 4, 3)

def small():
    return nn.Sequential(DeformConv2d(3, 2, 3, padding=1), nn.Flatten(), nn.Linear(7, 2))
"""


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Several threads would wait for one another for longer than such small nets take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with nets and photographs, as the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    Path("look_nets.py").write_text(NETS)
    pixels = np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8)
    Image.fromarray(pixels).save("photo.png")
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_a_photograph_alone_becomes_a_page_by_the_packages_own_net(here, capsys):
    assert main(["look", "photo.png"]) == 0
    out = capsys.readouterr().out
    assert out.endswith("Written: look.html\n") and "Look at" in out
    page = Path("look.html").read_text(encoding="utf-8")
    assert "<title>photo.png" in page and len(page) < 3_000_000


@pytest.mark.parametrize("view", ["points", "erf", "locations", "saliency", "flow", None])
def test_every_view_as_a_picture(here, view, capsys):
    more = [] if view is None else ["--view", view]
    assert main(["look", "photo.png", "--model", "look_nets:build", "--at", "14,20", "--out", "out.png", *more]) == 0
    with Image.open("out.png") as image:
        assert min(image.size) > 300
        values = np.asarray(image.convert("RGB"))
    assert len(np.unique(values.reshape(-1, 3), axis=0)) > 100
    assert sorted(path.name for path in here.glob("out*")) == ["out.png"]
    capsys.readouterr()


def test_vectors_and_an_animation(here, capsys):
    model = ["--model", "look_nets:build", "--layer", "1"]
    assert main(["look", "photo.png", *model, "--view", "points", "--depth", "1", "--out", "out.svg"]) == 0
    texts = re.findall(r"<text [^>]*>([^<]*)</text>", Path("out.svg").read_text(encoding="utf-8"))
    assert any("layer 1" in text and "y = " in text for text in texts)
    assert main(["look", "photo.png", *model, "--out", "out.gif"]) == 0
    with Image.open("out.gif") as image:
        assert image.n_frames > 10
    capsys.readouterr()


def test_a_photograph_is_made_smaller_and_a_position_goes_with_it(here, capsys):
    Image.fromarray(np.zeros((300, 600, 3), np.uint8)).save("large.png")
    assert main(["look", "large.png", "--model", "look_nets:build", "--at", "299,599", "--size", "100"]) == 0
    assert "position (49, 99)" in capsys.readouterr().out
    assert main(["look", "large.png", "--model", "look_nets:build", "--at", "100,200", "--size", "100"]) == 0
    found = re.search(r"position \(([\d.]+), ([\d.]+)\)", capsys.readouterr().out)
    np.testing.assert_allclose([float(value) for value in found.groups()], [100.5 / 6 - 0.5, 200.5 / 6 - 0.5], atol=1e-3)


def test_a_model_of_grey_pictures_gets_grey(here, capsys):
    assert main(["look", "photo.png", "--model", "look_nets:grey", "--view", "flow", "--out", "out.png"]) == 0
    assert main(["look", "photo.png", "--model", "look_nets:grey", "--imagenet"]) == 1
    assert "--imagenet is for colours, and the model takes 1 channel" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.jpg"], "nowhere.jpg"),
        (["look_nets.py"], "look_nets.py"),
        (["."], "`image` is '.', which is a folder; expected the path of one picture"),
        (["broken.png"], "broken.png"),
        (["bomb.png"], "bomb.png"),
        (["photo.png", "--layer", "9"], "the model has no layer '9'; its deformable layers are '1', '2'"),
        (["photo.png", "--layer", "0"], "no deformable layer '0' was recorded; the layers that were called are '1', '2'"),
        (["photo.png", "--at", "31,3"], "31 pixels down are outside the photograph, which has 30"),
        (["photo.png", "--at", "3,-2"], "-2 pixels to the right are outside the photograph, which has 40"),
        (["photo.png", "--at", "3"], "'3' is not two numbers; expected Y,X"),
        (["photo.png", "--at", "a,b"], "'a,b' is not two numbers"),
        (["photo.png", "--view", "heat"], "'heat' is not one of"),
        (["photo.png", "--view", "erf", "--out", "x.gif"], "`view` is 'erf', and a .gif file has points"),
        (["photo.png", "--out", "x.jpg"], "a file ending in '.jpg' cannot be written; expected one of .html, .png, .svg, .gif"),
        (["photo.png", "--out", "photo.png/x.html"], "cannot write photo.png/x.html: "),
        (["photo.png", "--depth", "4"], "4 is not in the range 1<=x<=3"),
        (["photo.png", "--depth", "3", "--view", "points", "--out", "x.png"], "layers"),
        (
            ["photo.png", "--depth", "1"],
            "`layers` is 1, a depth for samples",
        ),
        (["photo.png", "--model", "look_nets:plain"], "has no deformable layer"),
        (["photo.png", "--model", "look_nets:small"], "the model failed on a picture of 30x40: RuntimeError: mat1 and mat2"),
        (["photo.png", "--model", "look_nets:bild"], "look_nets has no 'bild'"),
        (["photo.png", "--model", "photo.png"], "photo.png: expected a file of torch.save, a pickle of arrays"),
        (["photo.png", "--size", "3"], "--size"),
        ([], "Missing argument 'PHOTO'"),
    ],
)
def test_what_cannot_be_looked_at_is_said_in_a_sentence(here, arguments, message, capsys):
    Path("broken.png").write_bytes(Path("photo.png").read_bytes()[:400])
    # A picture of 4 thousand million pixels, in less than 100 bytes.
    head = b"\x89PNG\r\n\x1a\n" + b"\x00\x00\x00\rIHDR" + (65000).to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00"
    Path("bomb.png").write_bytes(head + b"\x00" * 40)
    model = [] if "--model" in arguments else ["--model", "look_nets:build"]
    assert main(["look", *arguments, *model]) in (1, 2)
    captured = capsys.readouterr()
    assert message in " ".join(captured.err.split()) and "Traceback" not in captured.err
    assert not captured.out
    assert not list(here.glob("*look.html*")) and not list(here.glob("*x.*"))


GUIDE = (Path(__file__).parents[2] / "docs" / "looking.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^deformconv look (.*)$", GUIDE, re.M)


def test_every_picture_of_the_guide_is_made_by_a_command_in_it():
    pictures = re.findall(r"\]\((images/look_\w+\.\w+)\)", GUIDE)
    made = [command.split("--out docs/")[1].split()[0] for command in COMMANDS if "--out docs/" in command]
    made += re.findall(r"`python docs/draw_page\.py look\.html docs/(\S+)`", GUIDE)
    assert len(pictures) >= 5 and sorted(pictures) == sorted(made)


@pytest.mark.parametrize("command", [command for command in COMMANDS if "--model" not in command])
def test_a_command_of_the_guide_runs(here, command, capsys):
    data = pytest.importorskip("skimage.data")
    name = command.split()[0]
    Image.fromarray(getattr(data, Path(name).stem)()).save(name)
    assert main(["look", *command.split(), "--size", "48", "--fields", "1"]) == 0
    written = Path(capsys.readouterr().out.split("Written: ")[1].strip())
    assert written.is_file() and written.stat().st_size > 1000


def test_a_folder_that_goes_away_is_said(here, monkeypatch, capsys):
    def gone(*_):
        raise FileNotFoundError(2, "No such file or directory", ".x-1f.html")

    monkeypatch.setattr("deformconv.plots.looking.Look.save", gone)
    assert main(["look", "photo.png", "--model", "look_nets:build", "--out", "x.html"]) == 1
    assert capsys.readouterr().err == "Error: cannot write x.html: No such file or directory\n"


def test_a_warning_is_said_without_its_line_of_code(here, monkeypatch, capsys):
    from deformconv.cli import look as command

    def warned(*arguments, **options):
        warnings.warn("far aside", stacklevel=1)
        return look(*arguments, **options)

    look = command.look
    monkeypatch.setattr(command, "look", warned)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main(["look", "photo.png", "--model", "look_nets:build", "--fields", "0"]) == 0
    assert capsys.readouterr().err == "Warning: far aside\n"
