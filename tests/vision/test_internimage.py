"""DCNv3 and DCNv4: an oracle by grid_sample with gradients, the authors' names and first values, identities, and errors."""

from __future__ import annotations

import copy
import doctest
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tests.tolerances import assert_close
from tests.vision import internimage_oracle as oracle
from torch import nn
from torch.nn import functional as F

from deformconv.torch import parameter_groups, reset_predictors
from deformconv.vision import DCNv3, DCNv4, aggregates, dcnv3, dcnv4

SIZE = (5, 7)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def random_layer(make: Callable[..., Any], dtype: torch.dtype = torch.float64, **arguments: Any) -> Any:
    """A layer of 6 channels in 2 groups whose parameters are all random; offsets reach some pixels."""
    layer = make(6, group=2, **arguments).to(dtype)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


def map_of(dtype: torch.dtype = torch.float64, images: int = 2, size: tuple[int, int] = SIZE) -> Any:
    return torch.randn(images, *size, 6, dtype=dtype)


def window_of(layer: Any) -> tuple[int, int, int, int]:
    return layer.kernel_size, layer.stride, layer.pad, layer.dilation


def assert_as_the_oracle(layer: Any, expected_of: Callable[..., Any], input: Any, *more: Any) -> None:
    """The same output, and the same gradients of the input and of every parameter."""
    state = {name: tensor.detach().clone().requires_grad_() for name, tensor in layer.named_parameters()}
    mine, others = input.clone().requires_grad_(), input.clone().requires_grad_()
    arguments = {"scale": layer.offset_scale, "remove_center": layer.remove_center}
    output, expected = layer(mine, *more), expected_of(state, others, window=window_of(layer), group=2, **arguments)
    assert_close(output.detach(), expected.detach(), "float64")
    grad_output = torch.randn_like(output)
    output.backward(grad_output)
    expected.backward(grad_output)
    assert_close(mine.grad, others.grad, "float64", "input")
    for name, parameter in layer.named_parameters():
        if not (name == "dw_conv.0.bias" and "dw_conv.1.0.weight" in state):  # what a norm by batch takes away again
            assert_close(parameter.grad, state[name].grad, "float64", name)


WINDOWS = [
    {"kernel_size": 5, "pad": 2},
    {"dilation": 2, "pad": 2, "offset_scale": 0.5},
    {"offset_scale": 2.0, "stride": 2},
    {"pad": 0, "stride": 2, "center_feature_scale": True},
    {"remove_center": True, "offset_scale": 1.5, "center_feature_scale": True},
    {"kernel_size": 2, "pad": 0, "dw_kernel_size": 3},
    {"kernel_size": 2, "dilation": 2, "dw_kernel_size": 3, "offset_scale": 1.5},
    {"kernel_size": 4, "dilation": 1, "dw_kernel_size": 5, "offset_scale": 2.0},
    {"kernel_size": 1, "pad": 0},
]


@pytest.mark.parametrize("arguments", [{}, {"norm_layer": "BN", "act_layer": "SiLU"}, {"act_layer": "ReLU"}, *WINDOWS], ids=str)
def test_v3_is_the_sum_of_samples_by_grid_sample(arguments: dict[str, Any]) -> None:
    act = {"GELU": F.gelu, "SiLU": F.silu, "ReLU": F.relu}[arguments.get("act_layer", "GELU")]
    expected = lambda state, input, **rest: oracle.dcnv3(state, input, act, **rest)  # noqa: E731
    assert_as_the_oracle(random_layer(DCNv3, **arguments), expected, map_of())


OF_V4 = [{"output_bias": False, "dw_kernel_size": 3}, {"without_pointwise": True}]


@pytest.mark.parametrize("arguments", [{}, *OF_V4, *WINDOWS], ids=str)
def test_v4_is_the_sum_of_samples_by_grid_sample(arguments: dict[str, Any]) -> None:
    layer = random_layer(DCNv4, **arguments)
    expected = lambda state, input, **rest: oracle.dcnv4(state, input, SIZE, **rest)  # noqa: E731
    assert_as_the_oracle(layer, expected, map_of().flatten(1, 2), SIZE)


def test_v4_takes_maps_without_a_shape_for_square() -> None:
    layer, input = random_layer(DCNv4), map_of(size=(5, 5)).flatten(1, 2)
    assert torch.equal(layer(input), layer(input, (5, 5)))
    assert torch.equal(layer(input), layer(input, torch.Size([5, 5])))
    assert not torch.allclose(layer(input), layer(input, (1, 25)))


def shapes(layer: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}


def test_parameters_of_the_authors_names_shapes_and_order() -> None:
    ends = {"offset.weight": (72, 64), "offset.bias": (72,), "mask.weight": (36, 64), "mask.bias": (36,)}
    projections = {
        "input_proj.weight": (64, 64), "input_proj.bias": (64,), "output_proj.weight": (64, 64), "output_proj.bias": (64,),
    }  # fmt: skip
    convolution = {"dw_conv.0.weight": (64, 1, 3, 3), "dw_conv.0.bias": (64,)}
    norm = {"dw_conv.1.1.weight": (64,), "dw_conv.1.1.bias": (64,)}
    expected = convolution | norm | ends | projections
    assert shapes(DCNv3()) == expected and list(shapes(DCNv3())) == list(expected)
    by_batch = shapes(DCNv3(norm_layer="BN"))
    assert {name for name in by_batch if "dw_conv.1" in name} == {
        f"dw_conv.1.0.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    }
    center = {"center_feature_scale_proj_weight": (4, 64), "center_feature_scale_proj_bias": (4,)}
    without = {name: (shape[0] // 9 * 8, *shape[1:]) for name, shape in ends.items()}
    large = {"dw_conv.0.weight": (64, 1, 5, 5), "dw_conv.0.bias": (64,)}
    found = shapes(DCNv3(center_feature_scale=True, remove_center=True, dw_kernel_size=5))
    assert found == center | large | norm | without | projections and list(found)[:2] == list(center)


@pytest.mark.parametrize(
    ("arguments", "rows", "more"),
    [
        ({}, 112, {}),  # 4 groups of 27, and 4 to fill up
        ({"remove_center": True}, 96, {}),
        ({"group": 3, "channels": 48, "kernel_size": 5, "pad": 2}, 232, {}),
        ({"dw_kernel_size": 3}, 112, {"offset_mask_dw.weight": (64, 1, 3, 3), "offset_mask_dw.bias": (64,)}),
    ],
    ids=str,
)
def test_v4_packs_offsets_and_masks_to_a_multiple_of_8(
    arguments: dict[str, Any], rows: int, more: dict[str, tuple[int, ...]]
) -> None:
    C = arguments.get("channels", 64)
    names = ("value_proj", "output_proj")
    projections = {f"{name}.{end}": shape for name in names for end, shape in (("weight", (C, C)), ("bias", (C,)))}
    both = {"offset_mask.weight": (rows, C), "offset_mask.bias": (rows,)}
    assert shapes(DCNv4(**arguments)) == more | both | projections
    assert shapes(DCNv4(**arguments, without_pointwise=True)) == more | both
    del projections["output_proj.bias"]
    assert shapes(DCNv4(**arguments, output_bias=False)) == more | both | projections


def test_a_fresh_v3_is_a_mean_between_its_projections_and_a_fresh_v4_its_bias() -> None:
    input = map_of(torch.float32)
    layer = DCNv3(6, group=2)
    mean = F.avg_pool2d(layer.input_proj(input).permute(0, 3, 1, 2), 3, 1, 1).permute(0, 2, 3, 1)
    assert torch.allclose(layer(input), layer.output_proj(mean), atol=1e-6)
    v4 = DCNv4(6, group=2)
    assert not v4(input.flatten(1, 2), SIZE).any()
    half = DCNv3(6, group=2, center_feature_scale=True)
    half.load_state_dict(layer.state_dict(), strict=False)
    assert torch.allclose(half(input), layer.output_proj((mean + layer.input_proj(input)) / 2), atol=1e-6)


@pytest.mark.parametrize("make", [DCNv3, DCNv4])
def test_first_values_survive_what_the_authors_nets_do(make: Any) -> None:
    layer = make(48, group=3, center_feature_scale=True)
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=5.0)
            nn.init.ones_(module.bias)
    predictors = [tensor for name, tensor in layer.named_parameters() if "offset" in name or "mask" in name]
    assert len(predictors) >= 2 and not any(tensor.any() for tensor in predictors)
    layer._reset_parameters()
    bound = (6 / 96) ** 0.5  # Xavier's
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            assert 0.9 * bound < module.weight.abs().max() <= bound and not module.bias.any()
    for parameter in layer.parameters():
        nn.init.ones_(parameter)
    reset_predictors(layer)
    assert not any(tensor.any() for tensor in predictors) and layer.output_proj.weight.eq(1).all()
    layer.reset_parameters()
    assert not layer.center_feature_scale_proj_weight.any() and not layer.output_proj.bias.any()


@pytest.mark.parametrize("make", [DCNv3, DCNv4])
def test_a_scale_with_offsets_of_zero_is_a_dilation(make: Any) -> None:
    """Two pixels between taps are one pixel, scaled by 2."""
    layer, other = (random_layer(make, **arguments) for arguments in ({"offset_scale": 2.0}, {"dilation": 2, "pad": 2}))
    for one in (layer, other):
        one.load_state_dict(layer.state_dict())
        for name, parameter in one.named_parameters():
            if name in ("offset.weight", "offset.bias"):
                nn.init.zeros_(parameter)
            elif name.startswith("offset_mask"):
                rows = parameter.data[:54].unflatten(0, (2, 27))
                rows[:, :18] = 0
    input = map_of() if make is DCNv3 else map_of().flatten(1, 2)
    more = () if make is DCNv3 else (SIZE,)
    assert layer(input, *more).std() > 0.01
    assert torch.allclose(layer(input, *more), other(input, *more), atol=1e-12)


@pytest.mark.parametrize("make", [DCNv3, DCNv4])
def test_strides_and_less_padding_give_a_part_of_the_whole_output(make: Any) -> None:
    whole = random_layer(make, center_feature_scale=True, dw_kernel_size=3)
    input = map_of() if make is DCNv3 else map_of().flatten(1, 2)
    more = () if make is DCNv3 else (SIZE,)
    expected = whole(input, *more).reshape(2, *SIZE, 6)
    for arguments, part in (
        ({"stride": 2}, expected[:, ::2, ::2]),
        ({"pad": 0}, expected[:, 1:-1, 1:-1]),
        ({"pad": 0, "stride": 3}, expected[:, 1:-1:3, 1:-1:3]),
    ):
        layer = random_layer(make, center_feature_scale=True, dw_kernel_size=3, **arguments)
        layer.load_state_dict(whole.state_dict())
        assert torch.allclose(layer(input, *more).reshape(part.shape), part, atol=1e-12)


@pytest.mark.parametrize("make", [DCNv3, DCNv4])
def test_channels_are_last_all_the_way_and_nothing_is_copied(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    true = aggregates.deform_aggregate2d

    def watching(*operands: Any, **keywords: Any) -> Any:
        seen.extend(operands[:3])
        output = true(*operands, **keywords)
        seen.append(output)
        return output

    monkeypatch.setattr(aggregates, "deform_aggregate2d", watching)
    layer = random_layer(make, torch.float32)
    made = {}
    for name, module in layer.named_children():
        module.register_forward_hook(lambda module, inputs, output, name=name: made.update({name: output}))
    input = map_of(torch.float32)
    layer(input) if make is DCNv3 else layer(input.flatten(1, 2), SIZE)
    assert len(seen) == 4 and all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in seen)
    origins = (made["input_proj"], made["offset"]) if make is DCNv3 else (made["value_proj"], *made["offset_mask"])
    for tensor, origin in zip(seen, origins, strict=False):
        assert tensor.untyped_storage().data_ptr() == origin.untyped_storage().data_ptr()


@pytest.mark.parametrize("make", [DCNv3, DCNv4])
def test_half_precision_and_autocast_predict_in_float32(make: Any) -> None:
    exact = random_layer(make, torch.float32, offset_scale=2.0, remove_center=True)
    input, more = map_of(torch.float32), ()
    if make is DCNv4:
        input, more = input.flatten(1, 2), (SIZE,)
    predicted: list[Any] = []
    predictors = [module for name, module in exact.named_children() if name in ("offset", "mask", "offset_mask")]
    for predictor in predictors:
        predictor.register_forward_hook(lambda module, inputs, output: predicted.append(output))
    expected = exact(input, *more)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = exact(input, *more)
    assert found.dtype is torch.bfloat16 and (found - expected).abs().max() < 0.1 * expected.abs().max()
    for dtype in (torch.bfloat16, torch.float16):
        low = copy.deepcopy(exact).to(dtype)
        output = low(input.to(dtype), *more)
        assert output.dtype is dtype
        high = copy.deepcopy(low).float()(input.to(dtype).float(), *more)
        assert (output - high).abs().max() < 0.1 * high.abs().max()
        output.sum().backward()
        assert all(parameter.grad.dtype is dtype for parameter in low.parameters())
    tensors = [one for output in predicted for one in (output if isinstance(output, tuple) else (output,))]
    assert len(tensors) == 2 * 6 and {tensor.dtype for tensor in tensors} == {torch.float32}


class Flat(nn.Module):
    """DCNv4 on a map whose size it reads."""

    def __init__(self, layer: DCNv4) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, input: Any) -> Any:
        size = input.shape[1:3]
        return self.layer(input.flatten(1, 2), size).unflatten(1, size)


@pytest.mark.parametrize("make", [DCNv3, DCNv4])
def test_compiled_exported_traced_and_recorded(make: Any) -> None:
    layer = random_layer(make, offset_scale=2.0, remove_center=True, center_feature_scale=True)
    net, input = layer if make is DCNv3 else Flat(layer), map_of()
    expected = net(input)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(input), expected, atol=1e-12)
    gradients = (torch.autograd.grad(run(input).sin().sum(), [*layer.parameters()]) for run in (compiled, net))
    assert all(torch.allclose(one, other, atol=1e-12) for one, other in zip(*gradients, strict=True))
    images, height, width = (torch.export.Dim(name, min=2) for name in ("images", "height", "width"))
    program = torch.export.export(net, (input,), dynamic_shapes=({0: images, 1: height, 2: width},)).module()
    traced = torch.jit.trace(net, (input,))
    more = map_of(images=3, size=(6, 8))
    assert torch.allclose(program(more), net(more), atol=1e-12)
    assert torch.allclose(traced(more[:, :5, :7]), net(more[:, :5, :7]), atol=1e-12)
    if make is DCNv3:
        recorded = torch.fx.symbolic_trace(net)
        assert torch.allclose(recorded(more), net(more), atol=1e-12)


def test_gradients_of_one_image_by_torch_func() -> None:
    layer, input = random_layer(DCNv3), map_of()
    parameters = dict(layer.named_parameters())

    def loss(parameters: Any, image: Any) -> Any:
        return torch.func.functional_call(layer, parameters, (image[None],)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, input)
    for image in range(2):
        expected = torch.autograd.grad(loss(parameters, input[image]), [*parameters.values()])
        for name, one in zip(parameters, expected, strict=True):
            assert_close(found[name][image].detach(), one, "float64", name)


@pytest.mark.parametrize("make", [DCNv3, DCNv4])
def test_scripts_are_refused(make: Any) -> None:
    with pytest.raises(NotImplementedError, match=rf"torch\.jit\.script cannot compile a {make.__name__}; expected torch"):
        torch.jit.script(nn.ModuleList([make(8, group=2)]))


def test_predictors_of_offsets_train_slower() -> None:
    net = nn.ModuleDict({"v3": DCNv3(6, group=2), "v4": DCNv4(6, group=2, dw_kernel_size=3)})
    groups = parameter_groups(net, lr=0.5, offset_lr_scale=0.2)
    assert [group["lr"] for group in groups] == [0.5, 0.1]
    slow = {id(parameter) for parameter in groups[1]["params"]}
    names = [name for name, parameter in net.named_parameters() if id(parameter) in slow]
    assert names == ["v3.offset.weight", "v3.offset.bias", "v4.offset_mask.weight", "v4.offset_mask.bias"]
    assert sum(len(group["params"]) for group in groups) == len(list(net.parameters()))


def test_copies_and_what_they_say_of_themselves() -> None:
    layer, input = random_layer(DCNv3, offset_scale=2.0, dilation=2, pad=2, remove_center=True), map_of()
    for other in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        assert torch.equal(other(input), layer(input))
    assert (
        repr(layer).splitlines()[1]
        == "  6, kernel_size=3, stride=1, pad=2, dilation=2, group=2, offset_scale=2.0, remove_center=True"
    )
    assert "(offset): _OffsetPredictor(in_features=6, out_features=32)" in repr(layer)
    assert repr(DCNv4(32, group=2, output_bias=False)).splitlines() == [
        "DCNv4(",
        "  32, kernel_size=3, stride=1, pad=1, group=2",
        "  (offset_mask): _OffsetMaskPredictor(in_features=32, out_features=56)",
        "  (value_proj): Linear(in_features=32, out_features=32, bias=True)",
        "  (output_proj): Linear(in_features=32, out_features=32, bias=False)",
        ")",
    ]
    for make in (DCNv3, DCNv4):
        meta = make(center_feature_scale=True, dw_kernel_size=3, device="meta", dtype=torch.float16)
        assert {(p.device.type, p.dtype) for p in meta.parameters()} == {("meta", torch.float16)}
        made = meta.to_empty(device="cpu").float()
        made.load_state_dict(make(center_feature_scale=True, dw_kernel_size=3).state_dict())
        input = torch.rand(1, 4, 4, 64)
        output = made(input if make is DCNv3 else input.flatten(1, 2))
        assert output.isfinite().all()


@pytest.mark.parametrize("make", [DCNv3, DCNv4])
@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"channels": 64, "group": 3}, ValueError, "`group` is 3; expected a divisor of channels = 64: every group has"),
        ({"channels": 0}, ValueError, "`channels` is 0; expected at least 1"),
        ({"group": 0}, ValueError, "`group` is 0; expected at least 1"),
        ({"pad": -1}, ValueError, "`pad` is -1; expected at least 0"),
        (
            {"pad": 2},
            ValueError,
            r"`pad` is 2; expected at most dilation\*\(kernel_size - 1\)//2 = 1: offsets are predicted at",
        ),
        ({"kernel_size": (3, 3)}, TypeError, r"`kernel_size` is \(3, 3\), which holds .*; expected integers"),
        ({"stride": 0}, ValueError, "`stride` is 0; expected at least 1"),
        ({"dilation": 1.5}, TypeError, "`dilation` is 1.5, .*; expected integers"),
        ({"dw_kernel_size": 4}, ValueError, "`dw_kernel_size` is 4; expected an odd number, so that the depthwise"),
        ({"remove_center": True, "kernel_size": 4, "dw_kernel_size": 3}, ValueError, "`kernel_size` is 4; expected an odd"),
        (
            {"remove_center": True, "kernel_size": 1, "pad": 0},
            ValueError,
            "`kernel_size` is 1; expected an odd kernel_size from 3",
        ),
        ({"offset_scale": "2"}, ValueError, "`offset_scale` is '2'; expected a finite number"),
        ({"offset_scale": float("nan")}, ValueError, "`offset_scale` is nan; expected a finite number"),
        ({"padding": 1}, TypeError, r"DCNv\d\(\) got an unexpected keyword argument 'padding'; here: pad"),
        ({"groups": 4}, TypeError, "unexpected keyword argument 'groups'; here: group"),
        ({"kernel": 3}, TypeError, "unexpected keyword argument 'kernel'; here: kernel_size"),
        ({"center_scale": True}, TypeError, "'center_scale'; did you mean 'center_feature_scale'"),
    ],
    ids=str,
)
def test_a_layer_that_cannot_be(make: Any, arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        make(**arguments)


def test_names_of_norms_and_activations() -> None:
    with pytest.raises(ValueError, match="`norm_layer` is 'GN'; expected one of 'LN', 'BN'"):
        DCNv3(norm_layer="GN")
    with pytest.raises(ValueError, match="`act_layer` is 'gelu'; expected one of 'GELU', 'SiLU', 'ReLU'"):
        DCNv3(act_layer="gelu")
    with pytest.raises(ValueError, match="`dw_kernel_size` is 2; expected an odd number"):
        DCNv3(kernel_size=2, pad=0)
    assert shapes(DCNv4(act_layer="GELU", norm_layer="LN")) == shapes(DCNv4())


@pytest.mark.parametrize(
    ("make", "shape", "text"),
    [
        (DCNv3, (1, 6, 5, 7), r"shape \(1, 6, 5, 7\); expected \(N, H, W, 6\), .*: pass `input\.permute\(0, 2, 3, 1\)`"),
        (
            DCNv3,
            (1, 5, 7, 8),
            r"has shape \(1, 5, 7, 8\); expected \(N, H, W, 6\), channels last, with this layer's channels\.$",
        ),
        (DCNv3, (5, 7, 6), r"pass one image as `input\[None\]`, and a row of pixels .* `input\.unflatten\(1, \(H, W\)\)`"),
        (DCNv3, (6,), r"`input` has shape \(6,\); expected \(N, H, W, 6\)"),
        (DCNv4, (1, 5, 7, 6), r"expected \(N, H\*W, 6\), .*: pass `input\.flatten\(1, 2\)` and shape=\(5, 7\)"),
        (DCNv4, (1, 6, 5, 7), r": pass `input\.flatten\(2\)\.transpose\(1, 2\)` and shape=\(5, 7\)"),
        (DCNv4, (1, 6, 35), r": pass `input\.transpose\(1, 2\)`"),
        (DCNv4, (1, 35, 7), r"has shape \(1, 35, 7\); expected \(N, H\*W, 6\), pixels with this layer's channels\.$"),
        (DCNv4, (1, 35, 6), r"has 35 pixels, shape \(1, 35, 6\), which is no square; expected `shape`, the height and width"),
    ],
)
def test_an_input_that_does_not_fit_is_explained(make: Any, shape: tuple[int, ...], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make(6, group=2)(torch.zeros(shape))


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ((5, 6), r"`input` has 35 pixels, .*; `shape` is \(5, 6\) and has 5\*6 = 30\."),
        (35, "`shape` is 35; expected two integers, the height and width of the maps"),
        ((1, 5, 7), r"`shape` is \(1, 5, 7\); expected two integers"),
    ],
)
def test_a_shape_that_does_not_fit_is_explained(shape: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        DCNv4(6, group=2)(torch.zeros(1, 35, 6), shape)


@pytest.mark.parametrize(
    ("shape", "error", "text"),
    [
        ((5.0, 7.0), TypeError, r"`shape` is \(5\.0, 7\.0\), which holds 5\.0 of type float; expected integers"),
        ("57", TypeError, r"`shape` is \('5', '7'\), which holds '5' of type str; expected integers"),
        ((-5, -7), ValueError, r"`shape` is \(-5, -7\); expected at least 1"),
    ],
)
def test_a_shape_of_what_are_no_sizes_is_explained(shape: Any, error: type[Exception], text: str) -> None:
    layer, input = DCNv4(6, group=2), torch.rand(1, 35, 6)
    with pytest.raises(error, match=text):
        layer(input, shape)
    assert torch.equal(layer(input, torch.tensor((5, 7))), layer(input, (5, 7)))


@pytest.mark.parametrize("make", [DCNv3, DCNv4])
def test_dtypes_and_windows_that_do_not_fit(make: Any) -> None:
    layer = make(6, group=2)
    with pytest.raises(TypeError, match=r"`input` is a numpy\.ndarray; expected a PyTorch tensor\. Pass `torch\.from_numpy"):
        layer(map_of().numpy())
    with pytest.raises(TypeError, match="`input` is None; expected a PyTorch tensor"):
        layer(None)
    with pytest.raises(
        TypeError, match=r"`input` is int64 and .* float32; .*: cast `input` by `input\.to\(torch\.float32\)`\.$"
    ):
        layer(torch.zeros(1, 5, 7, 6, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"`input` is float64 and this layer's parameters are float32; .* cast `input`"):
        layer(map_of() if make is DCNv3 else map_of().flatten(1, 2))
    large = make(6, group=2, kernel_size=5, pad=0)
    input = map_of(torch.float32, size=(3, 7))
    with pytest.raises(ValueError, match="5x5"):
        large(input) if make is DCNv3 else large(input.flatten(1, 2), (3, 7))


def test_doctests() -> None:
    for module in (dcnv3, dcnv4):
        result = doctest.testmod(module)
        assert result.failed == 0 and result.attempted >= 4
