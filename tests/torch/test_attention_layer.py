"""The layer of deformable attention: transformers' module with its weights, the authors' initialisation, and errors."""

from __future__ import annotations

import copy
import doctest
import math
import pickle
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from tests.tolerances import assert_close
from torch import nn
from torch.nn import functional as F

from deformconv.torch import DeformAttention, DeformConv2d, deform_attention, parameter_groups, reset_predictors
from deformconv.torch.attention import functional, modules

LEVELS = ((5, 7), (3, 4))
TOKENS = 5 * 7 + 3 * 4

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
]


class Given(NamedTuple):
    """A call of the layer, but for its levels."""

    query: Any
    reference_points: Any
    value: Any

    def of(self, function: Any) -> Given:
        return Given(*map(function, self))


def layer_of(dtype: torch.dtype = torch.float64, scale: float = 0.4, **others: Any) -> DeformAttention:
    """A layer of two levels whose predictors predict something."""
    layer = DeformAttention(16, num_levels=2, num_heads=4, num_points=3, dtype=dtype, **others)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return layer


def given(dtype: torch.dtype = torch.float64, queries: int = 9, coordinates: int = 2, requires_grad: bool = False) -> Given:
    random = torch.Generator().manual_seed(1)
    made = (
        torch.randn(2, queries, 16, generator=random),
        0.1 + 0.8 * torch.rand(2, queries, 2, coordinates, generator=random),
        torch.randn(2, TOKENS, 16, generator=random),
    )
    return Given(*(tensor.to(dtype).requires_grad_(requires_grad) for tensor in made))


def padding() -> Any:
    """The right columns of the second image's maps."""
    maps = [torch.zeros(2, *size, dtype=torch.bool) for size in LEVELS]
    for one in maps:
        one[1, :, -2:] = True
    return torch.cat([one.flatten(1) for one in maps], 1)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("coordinates", [2, 4])
def test_it_computes_what_transformers_computes_with_the_same_weights(coordinates: int, mask: bool) -> None:
    pytest.importorskip("transformers")
    from transformers import DeformableDetrConfig
    from transformers.models.deformable_detr.modeling_deformable_detr import DeformableDetrMultiscaleDeformableAttention

    config = DeformableDetrConfig(d_model=16, num_feature_levels=2)
    theirs, ours = DeformableDetrMultiscaleDeformableAttention(config, 4, 3).double(), layer_of()
    theirs.load_state_dict(ours.state_dict())
    mine, others = (given(coordinates=coordinates, requires_grad=True) for _ in range(2))
    is_padding = padding() if mask else None
    output = ours(*mine, LEVELS, is_padding)
    expected, _ = theirs(
        others.query, None if is_padding is None else ~is_padding, others.value, reference_points=others.reference_points,
        spatial_shapes=torch.tensor(LEVELS), spatial_shapes_list=LEVELS, level_start_index=torch.tensor([0, 35]),
    )  # fmt: skip
    assert_close(output.detach(), expected.detach(), "float64")
    grad_output = torch.randn_like(output)
    output.backward(grad_output)
    expected.backward(grad_output)
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert_close(parameter.grad, gradients[name].grad, "float64", name)
    for name, one, other in zip(Given._fields, mine, others, strict=True):
        assert_close(one.grad, other.grad, "float64", name)


def test_parameters_of_the_authors_names_and_shapes() -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in DeformAttention().state_dict().items()}
    assert shapes == {
        "sampling_offsets.weight": (256, 256), "sampling_offsets.bias": (256,),
        "attention_weights.weight": (128, 256), "attention_weights.bias": (128,),
        "value_proj.weight": (256, 256), "value_proj.bias": (256,),
        "output_proj.weight": (256, 256), "output_proj.bias": (256,),
    }  # fmt: skip


def authors_bias(heads: int, levels: int, points: int) -> Any:
    """A direction for each head on the edge of a square, as many pixels along it as the point's number."""
    found = []
    for head in range(heads):
        x, y = math.cos(2 * math.pi * head / heads), math.sin(2 * math.pi * head / heads)
        longest = max(abs(x), abs(y))
        found += [[x / longest * number, y / longest * number] for _ in range(levels) for number in range(1, points + 1)]
    return torch.tensor(found).flatten()


@pytest.mark.parametrize(("heads", "levels", "points"), [(8, 4, 4), (6, 1, 3), (1, 2, 2)])
def test_it_begins_as_the_authors_module(heads: int, levels: int, points: int) -> None:
    layer = DeformAttention(48, num_levels=levels, num_heads=heads, num_points=points)

    def check() -> None:
        assert torch.allclose(layer.sampling_offsets.bias, authors_bias(heads, levels, points), atol=1e-6)
        zeros = (layer.sampling_offsets.weight, *layer.attention_weights.parameters())
        assert not any(tensor.any() for tensor in zeros)

    check()
    for projection in (layer.value_proj, layer.output_proj):
        bound = math.sqrt(6 / 96)  # Xavier's
        assert 0.95 * bound < projection.weight.abs().max() <= bound and not projection.bias.any()
    for parameter in layer.parameters():  # as the authors' model fills everything first
        nn.init.constant_(parameter, 1.0)
    reset_predictors(layer)
    check()
    assert layer.value_proj.weight.eq(1).all()
    layer.reset_parameters()
    assert layer.value_proj.weight.std() > 0.05 and not layer.output_proj.bias.any()


def test_loops_that_initialise_linear_layers_leave_the_predictors() -> None:
    layer = DeformAttention(16, num_heads=4)
    before = copy.deepcopy(layer.state_dict())
    for module in layer.modules():
        if isinstance(module, nn.Linear) or "Linear" in type(module).__name__:
            nn.init.ones_(module.weight)
    same = {name for name, tensor in layer.state_dict().items() if torch.equal(tensor, before[name])}
    assert before.keys() - same == {"value_proj.weight", "output_proj.weight"}


@pytest.mark.parametrize("coordinates", [2, 4])
def test_an_axis_of_one_stands_for_equal_points_in_all_levels(coordinates: int) -> None:
    layer, (query, points, value) = layer_of(), given(coordinates=coordinates)
    same = points[:, :, :1]
    assert torch.equal(layer(query, same, value, LEVELS), layer(query, same.expand(-1, -1, 2, -1), value, LEVELS))


def test_offsets_are_pixels_of_a_level_and_for_boxes_parts_of_the_box() -> None:
    layer = DeformAttention(16, num_levels=2, num_heads=4, num_points=3)
    query, centre = torch.zeros(1, 1, 16), torch.full((1, 1, 2, 2), 0.5)
    locations, weights = layer.locations_and_weights(query, centre, LEVELS)
    assert locations.shape == (1, 1, 4, 2, 3, 2) and torch.allclose(weights, torch.full((1, 1, 4, 2, 3), 1 / 6))
    right = locations[0, 0, 0]  # the first head looks to the right
    for level, (_, width) in enumerate(LEVELS):
        assert torch.allclose(right[level, :, 0], 0.5 + torch.arange(1.0, 4) / width)
    assert torch.allclose(right[..., 1], torch.tensor(0.5))
    boxes = torch.tensor([0.5, 0.5, 0.2, 0.4]).expand(1, 1, 2, 4)
    found = layer.locations_and_weights(query, boxes, LEVELS)[0][0, 0, :, :, 2]  # the last point, on the box's edge
    assert torch.allclose(found[0, :, 0], torch.tensor(0.6)) and torch.allclose(found[1, :, 1], torch.tensor(0.7))


def test_padding_has_no_influence_and_no_gradient() -> None:
    layer, (query, points, value) = layer_of(), given(requires_grad=True)
    is_padding = padding()
    changed = torch.where(is_padding[..., None], torch.full_like(value, math.nan), value)
    found = layer(query, points, changed, LEVELS, is_padding)
    assert torch.equal(found, layer(query, points, value, LEVELS, is_padding))
    assert not torch.allclose(found[1], layer(query, points, value, LEVELS)[1])
    layer(query, points, value, LEVELS, is_padding).sum().backward()
    assert not value.grad[is_padding].any() and value.grad[0].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_predicts_in_float32(dtype: torch.dtype) -> None:
    layer, call = layer_of(torch.float32).to(dtype), given(torch.float32).of(lambda tensor: tensor.to(dtype))
    locations, weights = layer.locations_and_weights(call.query, call.reference_points, LEVELS)
    assert locations.dtype is weights.dtype is torch.float32
    exact = copy.deepcopy(layer).float()
    wanted = exact.locations_and_weights(call.query.float(), call.reference_points.float(), LEVELS)
    assert_close(locations.detach(), wanted[0].detach(), "float32")
    output = layer(*call, LEVELS)
    assert output.dtype is dtype
    assert (output - exact(*call.of(torch.Tensor.float), LEVELS)).abs().max() < 0.05


def test_autocast() -> None:
    layer, call = layer_of(torch.float32), given(torch.float32)
    expected = layer.locations_and_weights(call.query, call.reference_points, LEVELS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer.locations_and_weights(call.query, call.reference_points, LEVELS)
        output = layer(*call, LEVELS)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert output.dtype is torch.bfloat16 and (output - layer(*call, LEVELS)).abs().max() < 0.1


def test_it_is_the_operator_between_its_projections() -> None:
    layer, call = layer_of(), given()
    value = F.linear(call.value, layer.value_proj.weight, layer.value_proj.bias).reshape(2, TOKENS, 4, 4)
    found = layer.locations_and_weights(call.query, call.reference_points, LEVELS)
    summed = deform_attention(value, LEVELS, *found)
    assert torch.equal(layer(*call, LEVELS), layer.output_proj(summed))
    for levels in (torch.tensor(LEVELS), [list(size) for size in LEVELS]):
        assert torch.equal(layer(*call, levels), layer(*call, LEVELS))


def test_compiled_exported_traced_and_recorded() -> None:
    layer, call = layer_of(), given()
    net = Net(layer)
    expected = net(*call)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(*call), expected, atol=1e-12)
    gradients = (torch.autograd.grad(run(*call).sin().sum(), [*layer.parameters()]) for run in (compiled, net))
    assert all(torch.allclose(one, other, atol=1e-12) for one, other in zip(*gradients, strict=True))
    images, queries = torch.export.Dim("images", min=1), torch.export.Dim("queries", min=1)
    dynamic = ({0: images, 1: queries}, {0: images, 1: queries}, {0: images})
    program = torch.export.export(net, tuple(call), dynamic_shapes=dynamic).module()
    traced = torch.jit.trace(net, tuple(call))  # type: ignore[no-untyped-call]
    recorded = torch.fx.symbolic_trace(net)
    more = given(queries=5).of(lambda tensor: torch.cat([tensor, tensor.flip(0)]))
    for run in (program, traced, recorded):
        assert torch.allclose(run(*more), net(*more), atol=1e-12)


class Net(nn.Module):
    """A net that knows its maps' sizes."""

    def __init__(self, attention: DeformAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, query: Any, reference_points: Any, value: Any) -> Any:
        return self.attention(query, reference_points, value, LEVELS)


def test_scripts_are_refused() -> None:
    with pytest.raises(
        NotImplementedError, match=r"torch\.jit\.script cannot compile a DeformAttention; expected torch\.jit\.trace"
    ):
        torch.jit.script(nn.ModuleList([layer_of()]))


def test_copies_and_what_it_says_of_itself() -> None:
    layer, call = layer_of(), given()
    for other in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        assert torch.equal(other(*call, LEVELS), layer(*call, LEVELS))
    assert repr(layer).splitlines() == [
        "DeformAttention(",
        "  16, num_levels=2, num_heads=4, num_points=3",
        "  (sampling_offsets): _SamplingOffsets(in_features=16, out_features=48)",
        "  (attention_weights): _Predictor(in_features=16, out_features=24)",
        "  (value_proj): Linear(in_features=16, out_features=16, bias=True)",
        "  (output_proj): Linear(in_features=16, out_features=16, bias=True)",
        ")",
    ]
    meta = DeformAttention(16, num_heads=4, device="meta", dtype=torch.float16)
    assert {(p.device.type, p.dtype) for p in meta.parameters()} == {("meta", torch.float16)}


def test_sampling_offsets_train_slower() -> None:
    net = nn.Sequential(DeformConv2d(3, 4, 3), DeformAttention(16, num_heads=4))
    groups = parameter_groups(net, lr=0.1)
    names = [{name for name, p in net.named_parameters() if any(p is other for other in group["params"])} for group in groups]
    assert names[1] == {
        "0.offset_conv.weight", "0.offset_conv.bias", "1.sampling_offsets.weight", "1.sampling_offsets.bias",
    }  # fmt: skip
    assert "1.attention_weights.weight" in names[0]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"embed_dim": 30}, "`embed_dim` is 30 and `num_heads` 8; expected a multiple: every head has embed_dim / num_heads"),
        ({"num_points": 0}, "`num_points` is 0; expected at least 1"),
        ({"num_heads": 0}, "`num_heads` is 0; expected at least 1"),
        ({"num_levels": -1}, "`num_levels` is -1; expected at least 1"),
        ({"embed_dim": 0}, "`embed_dim` is 0; expected at least 1"),
    ],
)
def test_a_layer_that_cannot_be(arguments: dict[str, int], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        DeformAttention(**arguments)


def test_words_of_other_libraries() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'n_levels'; here: num_levels"):
        DeformAttention(256, n_levels=4)
    with pytest.raises(TypeError, match="unexpected keyword argument 'embed_dims'; here: embed_dim"):
        DeformAttention(embed_dims=256)
    with pytest.raises(TypeError, match="positional"):
        DeformAttention(256, 4, 8, 4)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"query": (2, 9, 15)}, ValueError, r"`query` has shape \(2, 9, 15\); expected \(N, Q, 16\)"),
        ({"query": (9, 16)}, ValueError, r"`query` has shape \(9, 16\); expected \(N, Q, 16\)"),
        ({"query": (3, 9, 16)}, ValueError, "`query` has 3 images, shape .*, and `value` 2, shape .*; expected as many"),
        ({"value": (2, TOKENS, 15)}, ValueError, r"`value` has shape \(2, 47, 15\); expected \(N, L, 16\): the pixels"),
        ({"value": (2, 16, 5, 7)}, ValueError, r"`value` has shape \(2, 16, 5, 7\); expected \(N, L, 16\)"),
        ({"value": (2, 46, 16)}, ValueError, r"`value` has 46 tokens, .*`spatial_shapes` has 5\*7 \+ 3\*4 = 47"),
        ({"reference_points": (2, 9, 2)}, ValueError, r"the same point in all levels pass `reference_points\[:, :, None\]`"),
        ({"reference_points": (2, 9, 3, 2)}, ValueError, r"has shape \(2, 9, 3, 2\); expected \(N, Q, 2, 2\), x and y"),
        ({"reference_points": (2, 9, 2, 3)}, ValueError, r"or \(N, Q, 2, 4\), boxes, with \(N, Q\) = \(2, 9\) as `query` has"),
        ({"reference_points": (2, 8, 2, 2)}, ValueError, r"with \(N, Q\) = \(2, 9\) as `query` has\.$"),
        ({"spatial_shapes": [(47, 1)]}, ValueError, "has 1 level; this layer has num_levels=2: build it with num_levels=1"),
        ({"padding_mask": torch.zeros(2, 46) > 1}, ValueError, r"`padding_mask` has shape \(2, 46\); expected .* \(2, 47\)"),
        ({"padding_mask": torch.zeros(2, 47)}, TypeError, "`padding_mask` is float32; expected booleans, True where"),
        ({"query": torch.zeros(2, 9, 16)}, TypeError, "`query` is float32 and this layer's .* are float64; .* cast `query`"),
        ({"value": torch.zeros(2, 47, 16)}, TypeError, "`value` is float32 and this layer's parameters are float64"),
    ],
)  # fmt: skip
def test_a_wrong_call_is_explained(change: dict[str, Any], error: type[Exception], text: str) -> None:
    call: dict[str, Any] = {**given()._asdict(), "spatial_shapes": LEVELS}
    for name, value in change.items():
        call[name] = torch.zeros(value, dtype=torch.float64) if isinstance(value, tuple) else value
    with pytest.raises(error, match=text):
        layer_of()(**call)


def test_doctests() -> None:
    for module, least in ((modules, 8), (functional, 9)):
        result = doctest.testmod(module)
        assert result.failed == 0 and result.attempted >= least
