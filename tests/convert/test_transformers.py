"""Our kernels under transformers' multi-scale deformable attention: every model that has it computes what it computed."""

from __future__ import annotations

import copy
import doctest
import importlib
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.24")  # whose models are listed, in its words for backbones

from tests.convert import attention_models  # noqa: E402
from tests.tolerances import TOLERANCE, assert_close, error  # noqa: E402
from torch import nn  # noqa: E402

from deformconv.convert import accelerate_transformers, attention_kernels  # noqa: E402
from deformconv.convert import transformers_attention as convert  # noqa: E402
from deformconv.convert.transformers_attention import MODELS  # noqa: E402

attention = attention_kernels.deform_attention


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def module_of(name):
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")


def test_doctests():
    result = doctest.testmod(convert)
    assert result.failed == 0
    assert result.attempted > 5


def test_every_model_of_the_installed_transformers_is_known():
    """A model's file has the class or the function, or its own of another name: what is new there is new here too."""
    found = set()
    for file in (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"):
        text = file.read_text(encoding="utf-8")
        if "multiscaledeformableattention" in text.replace("_", "").lower() or "MSDeformAttn" in text:
            found.add(file.parent.name)
            assert file.name == f"modeling_{file.parent.name}.py"
    assert found == set(MODELS) == set(attention_models.MAKERS)


@pytest.fixture
def counted(monkeypatch):
    """The shapes of the values with which our operator was called."""
    calls = []

    def counting(value, *arguments):
        calls.append(value.shape)
        return attention(value, *arguments)

    monkeypatch.setattr(attention_kernels, "deform_attention", counting)
    return calls


def calls_of(model, name):
    """How many calls of ours a model makes: one for each layer, and for D-FINE's layers one for each level."""
    layers = sum(key.endswith("sampling_offsets.weight") for key in model.state_dict())
    return layers * (3 if name == "d_fine" else 1)


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_in_training(name, counted, monkeypatch):
    model, inputs = attention_models.make(name).train(), attention_models.inputs_of(name)
    expected = attention_models.outputs_of(model, inputs)
    expected_gradients = attention_models.gradients(model, expected)
    assert counted == []
    with accelerate_transformers():
        found = attention_models.outputs_of(model, inputs)
        assert len(counted) == calls_of(model, name) > 0
        found_gradients = attention_models.gradients(model, found)
        monkeypatch.setattr(attention_kernels, "deform_attention", lambda *arguments: 0 * attention(*arguments))
        without = attention_models.outputs_of(model, inputs)
    for key, output in expected.items():
        assert_within(found[key].detach(), output.detach(), 1e-10, key)
    assert any(
        error(without[key].detach(), output.detach()) > 0.01 for key, output in expected.items() if output.isfinite().all()
    )
    assert found_gradients.keys() == expected_gradients.keys()
    # Those of a bias before a normalisation are 0 but for roundings.
    floor = 1e-3 * max(slope.abs().max() for slope in expected_gradients.values())
    for key, slope in expected_gradients.items():
        assert (found_gradients[key] - slope).abs().max() <= 1e-10 * max(slope.abs().max(), floor), key
        assert slope.any() or not key.endswith(("sampling_offsets.weight", "attention_weights.weight")), key
    again = attention_models.outputs_of(model, inputs)
    assert all(torch.equal(again[key], output) or not output.isfinite().all() for key, output in expected.items())
    assert len(counted) == calls_of(model, name)


def assert_within(found, expected, limit, what):
    finite = expected.isfinite()
    assert torch.equal(found[~finite], expected[~finite]), what
    assert error(found[finite], expected[finite]) <= limit, what


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_in_float32(name, counted):
    model, inputs = attention_models.make(name, torch.float32), attention_models.inputs_of(name, torch.float32)
    expected = attention_models.outputs_of(model, inputs)
    slopes = attention_models.gradients(model, expected)
    with accelerate_transformers():
        found = attention_models.outputs_of(model, inputs)
        ours = attention_models.gradients(model, found)
    assert len(counted) == calls_of(model, name)
    for key, output in expected.items():
        assert_within(found[key].detach(), output.detach(), TOLERANCE["float32"], key)
    ours, slopes = (torch.cat([slope.flatten() for slope in of.values()]) for of in (ours, slopes))
    assert slopes.isfinite().all()
    if not error(ours, slopes) <= TOLERANCE["float32"]:
        # Rounding grows on the way through a model, on some processors more: then ours are to be as near to the truth as
        # transformers' own are.
        exact = copy.deepcopy(model).double()
        wide = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
        truth = attention_models.gradients(exact, attention_models.outputs_of(exact, wide))
        truth = torch.cat([slope.flatten() for slope in truth.values()])
        assert error(ours, truth) <= max(TOLERANCE["float32"], 1.5 * error(slopes, truth))


def held():
    """What is in the places of ours, by place."""
    found = {}
    for name, holder in MODELS.items():
        module = module_of(name)
        owner = getattr(module, holder)
        if isinstance(owner, type):
            found |= {(name, key): value for key, value in vars(owner).items() if key in ("forward", "ms_deformable_attn_core")}
        for key in ("multi_scale_deformable_attention", "multi_scale_deformable_attention_v2"):
            found[name, key] = getattr(module, key, None)
    return found


def test_undo_restores_the_very_same_functions():
    before, finders = held(), list(sys.meta_path)
    first, second = accelerate_transformers(), accelerate_transformers()
    changed = held()
    places = {key for key, value in changed.items() if before.get(key) is not value}
    assert {name for name, _ in places} == set(MODELS)
    assert all(hasattr(changed[key], "__wrapped__") for key in places if key in before)
    first.undo()
    first.undo()
    assert held() == changed
    second.undo()
    assert held() == before and sys.meta_path == finders
    with second:
        assert held().keys() == changed.keys() and held() != before
    with pytest.raises(ZeroDivisionError), accelerate_transformers():
        raise ZeroDivisionError
    assert held() == before and sys.meta_path == finders
    assert all(held()[key] is value for key, value in before.items())


def test_a_model_whose_module_is_imported_later(counted, monkeypatch):
    package = importlib.import_module("transformers.models.rt_detr")
    name = "transformers.models.rt_detr.modeling_rt_detr"
    monkeypatch.setattr(package, "modeling_rt_detr", module_of("rt_detr"), raising=False)
    monkeypatch.delitem(sys.modules, name)
    with accelerate_transformers():
        later = importlib.import_module(name)
        layer, tensors = later.MultiScaleDeformableAttention(), call()
        found = layer(*tensors)
        assert len(counted) == 1
    assert_close(found, layer(*tensors), "float64")
    assert len(counted) == 1
    assert not hasattr(later.MultiScaleDeformableAttention.forward, "__wrapped__")


@pytest.mark.parametrize("name", ["d_fine", "deimv2", "mask2former", "deformable_detr"])
def test_models_from_before_and_from_within_and_their_copies(name, counted):
    """Also where a layer keeps the function from its making on."""
    before, inputs = attention_models.make(name), attention_models.inputs_of(name)
    expected = attention_models.outputs_of(before, inputs)
    with accelerate_transformers():
        within = attention_models.make(name)
        copied = copy.deepcopy(before)
        number = len(counted)
        for model in (before, within, copied):
            attention_models.outputs_of(model, inputs)
            number += calls_of(model, name)
            assert len(counted) == number
    for model in (before, within, copied):
        found = attention_models.outputs_of(model, inputs)
        assert all(torch.equal(found[key], output) for key, output in expected.items())
    assert len(counted) == number


def test_a_function_of_somebody_elses_stays(counted):
    layer = nn.Module.__new__(getattr(module_of("d_fine"), MODELS["d_fine"]))
    nn.Module.__init__(layer)
    with accelerate_transformers():
        assert layer.ms_deformable_attn_core is None
        layer.ms_deformable_attn_core = len
        assert layer.ms_deformable_attn_core is len
    assert layer.ms_deformable_attn_core is len


SHAPES = [(6, 5), (3, 4), (2, 2)]


def drawn(dtype=torch.float64, points=4):
    """A value, locations and weights for three levels, as the class takes them."""
    generator = torch.Generator().manual_seed(0)
    value, locations, weights = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((2, 46, 2, 8), (2, 7, 2, 3, points, 2), (2, 7, 2, 3, points))
    )
    weights = weights.flatten(3).softmax(3).view_as(weights)
    return value.to(dtype), (0.5 + 0.4 * locations).to(dtype), weights.to(dtype)


def call(dtype=torch.float64, shapes=SHAPES):
    value, locations, weights = drawn(dtype)
    return value, torch.tensor(shapes), shapes, torch.tensor([0, 30, 42]), locations, weights, 64


def layer_of(name):
    return module_of(name).MultiScaleDeformableAttention()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_rounded_once(dtype, counted):
    tensors = call(getattr(torch, dtype))
    wide = [
        tensor.double() if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() else tensor for tensor in tensors
    ]
    with accelerate_transformers():
        found = layer_of("rt_detr")(*tensors)
    assert len(counted) == 1 and found.dtype == tensors[0].dtype
    assert_close(found.double(), layer_of("rt_detr")(*wide), dtype)


def test_a_model_in_bfloat16(counted):
    """On average as near to float64 as with the model's own attention; the farthest number is chance's."""
    model, inputs = attention_models.make("mask2former"), attention_models.inputs_of("mask2former")
    exact = attention_models.outputs_of(model, inputs)["masks_queries_logits"].detach()
    model.bfloat16()
    inputs = {key: value.bfloat16() for key, value in inputs.items()}
    theirs = attention_models.outputs_of(model, inputs)["masks_queries_logits"].detach()
    with accelerate_transformers():
        ours = attention_models.outputs_of(model, inputs)["masks_queries_logits"].detach()
    assert len(counted) == 2 and ours.dtype == theirs.dtype == torch.bfloat16
    far, as_far = ((output.double() - exact).square().mean() / exact.square().mean() for output in (ours, theirs))
    assert far < 2 * as_far < 0.01


def test_autocast_gives_what_it_gave(counted):
    """Values in bfloat16 beside float32's locations and weights: the result is float32's, as it was."""
    value, *others = call(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer_of("rt_detr")(value.bfloat16(), *others)
        with accelerate_transformers():
            found = layer_of("rt_detr")(value.bfloat16(), *others)
    assert len(counted) == 1 and found.dtype == expected.dtype == torch.float32
    assert_close(found, expected, "float32")


@pytest.mark.parametrize("points", [[4, 4, 4], [3, 6, 3], [1, 2, 9]])
@pytest.mark.parametrize("method", ["default", "discrete"])
def test_any_points_of_a_level_and_the_discrete_method(points, method, counted):
    value, locations, weights = (tensor.requires_grad_() for tensor in drawn())
    arguments = value, SHAPES, locations.flatten(3, 4), weights.flatten(3, 4), points, method
    expected = module_of("rt_detr_v2").multi_scale_deformable_attention_v2(*arguments)
    with accelerate_transformers():
        found = module_of("rt_detr_v2").multi_scale_deformable_attention_v2(*arguments)
    assert len(counted) == (0 if method == "discrete" else 1 if points == [4, 4, 4] else 3)
    assert_close(found.detach(), expected.detach(), "float64")
    given = (value, weights) if method == "discrete" else (value, locations, weights)
    slopes = (torch.autograd.grad(output.square().sum(), given) for output in (found, expected))
    for ours, theirs in zip(*slopes, strict=True):
        assert_close(ours, theirs, "float64")


def test_what_is_not_ours_is_theirs(counted):
    """Another device; dtypes that differ, which their error names."""
    layer, (value, *others) = layer_of("rt_detr"), call()
    with pytest.raises(RuntimeError) as expected:
        layer(value.float(), *others)
    with accelerate_transformers():
        with pytest.raises(RuntimeError) as found:
            layer(value.float(), *others)
        moved = [tensor.to("meta") if isinstance(tensor, torch.Tensor) else tensor for tensor in (value, *others)]
        assert layer(*moved).is_meta
    assert str(found.value) == str(expected.value)
    assert counted == []


class Attends(nn.Module):
    """The class within a module, with tensors alone for arguments."""

    def __init__(self):
        super().__init__()
        self.attention = layer_of("rt_detr")

    def forward(self, value, locations, weights):
        shapes = torch.tensor(SHAPES)
        return self.attention(value, shapes, SHAPES, shapes, locations, weights, 64)


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_programs_that_leave_need_nothing_of_ours(counted):
    """torch.export and torch.jit.trace."""
    tensors = drawn()
    with accelerate_transformers():
        exported = torch.export.export(Attends(), tensors)
        traced = torch.jit.trace(Attends(), tensors, check_trace=False)
    assert counted == []
    assert "deform_attention" not in str(exported.graph) and "grid_sampler" in str(exported.graph)
    assert "deform_attention" not in str(traced.inlined_graph) and "grid_sampler" in str(traced.inlined_graph)
    assert_close(exported.module()(*tensors), Attends()(*tensors), "float64")


@pytest.mark.parametrize("name", ["rt_detr", "rt_detr_v2", "mask2former"])
def test_compiled(name):
    """One graph, in which our operator is."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.code)
        return graph.forward

    module, (value, locations, weights) = module_of(name), drawn()
    arguments = value, locations, weights
    if name == "rt_detr_v2":
        arguments = value, locations.flatten(3, 4), weights.flatten(3, 4)
    functions = {
        "rt_detr": Attends(),
        "rt_detr_v2": lambda a, b, c: module.multi_scale_deformable_attention_v2(a, SHAPES, b, c, [3, 6, 3]),
        "mask2former": lambda a, b, c: module.multi_scale_deformable_attention(a, SHAPES, b, c),
    }
    function = functions[name]
    expected = function(*arguments)
    with accelerate_transformers():
        found = torch.compile(function, backend=backend, fullgraph=True)(*arguments)
    assert len(graphs) == 1 and "deform_attention" in graphs[0] and "grid_sample" not in graphs[0]
    assert_close(found, expected, "float64")
    torch._dynamo.reset()


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"^accelerate_transformers needs transformers, .* pip install transformers$"
    ) as caught:
        accelerate_transformers()
    assert caught.value.name == "transformers"
