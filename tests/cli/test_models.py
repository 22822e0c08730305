"""The models that `--model` and `--weights` name: which are known, what is refused, and that no file runs code."""

import sys
import textwrap
import zipfile
from pathlib import Path

import pytest
import torch
from torchvision import models

from deformconv.cli.models import ModelError, model_of, tensors_of
from deformconv.studies.training import DigitNet, of_kind
from deformconv.torch import DeformConv2d
from deformconv.vision import make_deformable


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder as the current one; modules that are imported from it are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def resnet(**options):
    torch.manual_seed(0)
    net = models.resnet18(num_classes=7)
    make_deformable(net, "resnet:conv5", **options)
    for layer in net.modules():
        if isinstance(layer, DeformConv2d):
            torch.nn.init.normal_(layer.offset_conv.weight, std=0.05)
    return net.eval()


@pytest.mark.parametrize("options", [{}, {"modulated": False}, {"offset_groups": 4}, {"modulated": False, "offset_groups": 2}])
def test_a_resnet_of_torchvision_is_known_by_its_weights(here, options):
    net = resnet(**options)
    torch.save({"epoch": 3, "state_dict": torch.nn.DataParallel(net).state_dict()}, "run.pt")
    found = model_of("run.pt", None)
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(found(x), net(x))
    assert not found.training


def test_the_scale_of_masks_is_the_files(here):
    net = resnet()
    for layer in net.modules():
        if isinstance(layer, DeformConv2d):
            layer.mask_scale = 1.0
    torch.save(net.state_dict(), "run.pt")
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model_of("run.pt", None)(x), net(x))


@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_the_demos_net_is_known_by_its_weights(here, kind):
    net = of_kind(kind, DigitNet()).eval()
    torch.save({"kind": kind, "state": net.state_dict()}, "digits.pt")
    x = torch.rand(2, 1, 40, 40)
    with torch.no_grad():
        assert torch.equal(model_of("digits.pt", None)(x), net(x))


def test_a_function_makes_the_model_and_weights_are_loaded_into_it(here):
    Path("nets.py").write_text(
        "from torch import nn\nfrom deformconv.torch import DeformConv2d\n\n"
        "def build():\n    return nn.Sequential(DeformConv2d(3, 4, 3))\n\nready = build()\n"
    )
    made = model_of("nets:build", None)
    torch.save(made.state_dict(), "weights.pt")
    again = model_of("nets:build", Path("weights.pt"))
    assert torch.equal(made[0].weight, again[0].weight) and not again.training
    assert model_of("nets:ready", None) is sys.modules["nets"].ready
    torch.save({"0.weight": torch.zeros(2)}, "other.pt")
    with pytest.raises(ModelError, match=r"other\.pt does not fit the model: Missing key"):
        model_of("nets:build", Path("other.pt"))


class Harmful:
    def __reduce__(self):
        return Path.touch, (Path("ran"),)


@pytest.mark.parametrize("old", [False, True])
def test_a_file_runs_no_code(here, old):
    torch.save({"state_dict": Harmful()}, "bad.pt", _use_new_zipfile_serialization=not old)
    with pytest.raises(ModelError, match=r"asks for .*, which could run code from the file"):
        model_of("bad.pt", None)
    torch.save(resnet(), "whole.pt", _use_new_zipfile_serialization=not old)
    with pytest.raises(ModelError, match=r"whole\.pt holds more than tensors.*save its state_dict alone"):
        model_of("whole.pt", None)
    assert not Path("ran").exists()


NETS = """
import torch

class Thing:
    pass

thing = Thing()

def fails():
    raise RuntimeError("no disk")

def nothing():
    return None

def needs(size):
    return size
"""


@pytest.mark.parametrize(
    ("model", "weights", "message"),
    [
        (None, "digits.pt", "--weights has no --model to load into"),
        ("missing.pt", None, r"missing\.pt: there is no such file"),
        ("photo.jpg", None, r"photo\.jpg: expected a file of torch\.save, .*safetensors or MXNet"),
        ("half.pt", None, r"half\.pt is damaged or cut off"),
        ("number.pt", None, r"number\.pt holds an int; expected a state_dict"),
        ("list.pt", None, r"list\.pt holds a list; expected a state_dict"),
        ("plain.pt", None, "they are those of no net that is known here.*--weights plain.pt"),
        ("plain.pt", "plain.pt", "is a file of weights itself"),
        ("weights.safetensors", None, r"weights\.safetensors: expected a file of .*; it is empty"),
        ("nowhere:build", None, "there is no module nowhere"),
        ("broken:build", None, "importing broken failed: SyntaxError"),
        ("lacking:build", None, "the module lacking imports not_there, which is not installed"),
        ("nets:bild", None, "nets has no 'bild'. Functions there: Thing, fails, nothing, needs"),
        ("nets:thing", None, "nets:thing is a Thing; expected a function"),
        ("nets:fails", None, r"the call fails\(\) failed: RuntimeError: no disk"),
        ("nets:nothing", None, r"the call nothing\(\) returned a NoneType; expected a torch\.nn\.Module"),
        ("nets:needs", None, r"the call needs\(\) failed: TypeError: .*missing 1 required positional argument"),
    ],
)
def test_what_is_no_model_is_explained(here, model, weights, message):
    Path("nets.py").write_text(textwrap.dedent(NETS))
    Path("broken.py").write_text("def build(:\n")
    Path("lacking.py").write_text("import not_there\n")
    Path("photo.jpg").write_bytes(b"\xff\xd8\xff\xe0 a photograph")
    torch.save(torch.nn.Conv2d(3, 4, 3).state_dict(), "plain.pt")
    with zipfile.ZipFile("half.pt", "w") as archive:
        archive.writestr("half/data.pkl", b"")
    Path("weights.safetensors").write_bytes(b"")
    torch.save(3, "number.pt")
    torch.save([1], "list.pt")
    with pytest.raises(ModelError, match=message):
        model_of(model, None if weights is None else Path(weights))


def test_a_state_dict_is_found_in_what_training_programs_write(here):
    state = {"0.weight": torch.ones(3)}
    for wrapped in (state, {"model": state, "epoch": 1}, {"state_dict": {"module.0.weight": torch.ones(3)}}):
        torch.save(wrapped, "run.pt")
        assert list(tensors_of(Path("run.pt"))) == ["0.weight"]


def test_weights_of_safetensors(here):
    writer = pytest.importorskip("safetensors.torch")
    net = resnet()
    writer.save_file(net.state_dict(), "run.safetensors")
    with pytest.warns(UserWarning, match="Nothing in this state_dict says"):
        found = model_of("run.safetensors", None).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in net.state_dict().items())
