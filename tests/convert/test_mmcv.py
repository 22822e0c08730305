"""accelerate_mmcv without mmcv, over stand-ins for its two forms; tests/mmdet has mmcv's own."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest

torch = pytest.importorskip("torch")

from tests.tolerances import assert_close  # noqa: E402
from torchvision.ops import deform_conv2d  # noqa: E402

from deformconv.convert import mmcv as convert  # noqa: E402
from deformconv.convert.mmcv import accelerate_mmcv  # noqa: E402
from deformconv.convert.mmcv_kernels import DEFORMABLE, OTHERS  # noqa: E402

NUMBERS = {"kW": 3, "kH": 3, "dW": 1, "dH": 1, "padW": 1, "padH": 1, "dilationW": 1, "dilationH": 1}
NUMBERS |= {"group": 1, "deformable_group": 1, "im2col_step": 1}


@pytest.fixture
def package(monkeypatch):
    """A package of mmcv's name with nothing in it, as far as an extension is concerned."""
    found = ModuleType("mmcv")
    found.__spec__ = ModuleSpec("mmcv", None, is_package=True)
    monkeypatch.setitem(sys.modules, "mmcv", found)
    monkeypatch.delitem(sys.modules, "mmcv._ext", raising=False)
    monkeypatch.delitem(sys.modules, "mmcv.ops", raising=False)
    return found


def call(entry, device="cpu"):
    """One call of the forward entry of v1, and what it has to give."""
    generator = torch.Generator().manual_seed(0)
    shapes = (1, 3, 5, 6), (4, 3, 3, 3), (1, 18, 5, 6)
    input, weight, offset = (torch.randn(shape, generator=generator) for shape in shapes)
    tensors = [tensor.to(device) for tensor in (input, weight, offset, torch.empty(1, 4, 5, 6), torch.empty(0), torch.empty(0))]
    said = entry(*tensors, **NUMBERS)
    return said, tensors[3], deform_conv2d(input, offset, weight, padding=1)


def test_without_mmcv():
    if "mmcv" in sys.modules or convert.find_spec("mmcv") is not None:
        pytest.skip("mmcv is installed")
    with pytest.raises(
        ModuleNotFoundError, match=r"^accelerate_mmcv needs mmcv, .* pip install mmcv-lite==2\.1\.0 \("
    ) as caught:
        accelerate_mmcv()
    assert caught.value.name == "mmcv"


def test_without_torchvision(package, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ModuleNotFoundError, match=r"torchvision"):
        accelerate_mmcv()
    assert "mmcv._ext" not in sys.modules


def test_an_mmcv_without_an_extension(package):
    """A module stands in its place: every entry is there, ours compute, and it leaves as long as nothing has asked it."""
    with accelerate_mmcv() as first, accelerate_mmcv():
        first.undo()
        extension = sys.modules["mmcv._ext"]
        _, found, expected = call(extension.deform_conv_forward)
        assert_close(found, expected, "float32")
        assert all(getattr(extension, name) is entry for name, entry in (DEFORMABLE | OTHERS).items())
        with pytest.raises(
            NotImplementedError, match=r"^mmcv's operator 'roi_pool_forward' needs .*accelerate_mmcv\(\) computes"
        ):
            extension.roi_pool_forward()
        with pytest.raises(AttributeError, match="no attribute '__path__'"):
            extension.__path__  # noqa: B018
    assert "mmcv._ext" not in sys.modules
    with pytest.raises(
        NotImplementedError, match=r"'deform_conv_forward' .*which has ended or not begun, computes deform_conv2d"
    ):
        call(extension.deform_conv_forward)


def test_once_mmcvs_operators_are_imported_the_module_stays(package, monkeypatch):
    with accelerate_mmcv():
        extension = sys.modules["mmcv._ext"]
        monkeypatch.setitem(sys.modules, "mmcv.ops", ModuleType("mmcv.ops"))
    assert sys.modules["mmcv._ext"] is extension
    with pytest.raises(NotImplementedError, match="has ended"):
        extension.nms()
    with accelerate_mmcv():
        assert sys.modules["mmcv._ext"] is extension
        call(extension.deform_conv_forward)


@pytest.fixture
def compiled(package, monkeypatch):
    """An extension that says what it was called with."""
    found = ModuleType("mmcv._ext")
    for name in ("nms", *DEFORMABLE):
        setattr(found, name, lambda *arguments, name=name, **keywords: (name, len(arguments) + len(keywords)))
    monkeypatch.setitem(sys.modules, "mmcv._ext", found)
    return found


def test_a_compiled_extension_keeps_all_but_our_operators_on_a_cpu(compiled):
    before = dict(vars(compiled))
    acceleration = accelerate_mmcv()
    said, found, expected = call(compiled.deform_conv_forward)
    assert said is None
    assert_close(found, expected, "float32")
    assert call(compiled.deform_conv_forward, "meta")[0] == ("deform_conv_forward", 17)
    assert compiled.nms() == ("nms", 0)
    by_name = {"input": torch.empty(1, device="meta"), "rois": torch.empty(1, device="meta")}
    assert compiled.deform_roi_pool_forward(**by_name) == ("deform_roi_pool_forward", 2)
    assert {name for name, value in vars(compiled).items() if before[name] is not value} == set(DEFORMABLE)
    acceleration.undo()
    acceleration.undo()
    assert vars(compiled) == before


def test_a_compiled_extension_on_the_disk_is_loaded(package, tmp_path, monkeypatch):
    """Here a file of Python in its place: what counts is that it is found beside mmcv, not what it is written in."""
    entries = "\n".join(f"def {name}(*arguments, **keywords): return 'theirs'" for name in DEFORMABLE)
    (tmp_path / "_ext.py").write_text(entries)
    package.__path__ = package.__spec__.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setitem(sys.modules, "mmcv._ext", None)
    del sys.modules["mmcv._ext"]
    with accelerate_mmcv():
        extension = sys.modules["mmcv._ext"]
        assert extension.__file__ == str(tmp_path / "_ext.py")
        assert call(extension.deform_conv_forward, "meta")[0] == "theirs"
        assert call(extension.deform_conv_forward)[0] is None
    assert call(extension.deform_conv_forward)[0] == "theirs"
