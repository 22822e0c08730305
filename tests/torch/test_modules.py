"""DeformConv1d, 2d and 3d: layers where nn.ConvNd stood."""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.frontends.suite import LayerSuite
from tests.tolerances import assert_close
from torch import nn

from deformconv import ShapeError
from deformconv.torch import (
    DeformConv1d,
    DeformConv2d,
    DeformConv3d,
    deform_conv2d,
    parameter_groups,
)
from deformconv.torch.conv import modules

LAYERS = {1: (DeformConv1d, nn.Conv1d), 2: (DeformConv2d, nn.Conv2d), 3: (DeformConv3d, nn.Conv3d)}
SIZE = (7, 6, 8)


def image(rank, channels=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, channels, *SIZE[:rank], dtype=dtype, generator=generator)


def moved(layer, std=0.4):
    """The layer with a predictor that predicts something."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.offset_conv.parameters():
            parameter.copy_(std * torch.randn(parameter.shape, dtype=parameter.dtype, generator=generator))
    return layer


class TestLayers(LayerSuite):
    module = modules

    def array(self, array):
        return torch.from_numpy(array.copy())

    def numpy(self, array):
        return array.detach().numpy()

    def layer(self, rank, *, modulated, **arguments):
        return LAYERS[rank][0](modulated=modulated, dtype=torch.float64, **arguments)

    def weights(self, layer):
        predictor = layer.offset_conv
        parameters = {"weight": layer.weight, "bias": layer.bias}
        parameters |= {"offset_weight": predictor.weight, "offset_bias": predictor.bias}
        return {name: None if p is None else self.numpy(p) for name, p in parameters.items()}

    def set_predictor(self, layer, weight, bias):
        layer.offset_conv.load_state_dict({"weight": self.array(weight), "bias": self.array(bias)})


def test_the_first_arguments_are_those_of_a_convolution():
    theirs = list(inspect.signature(nn.Conv2d).parameters.values())
    for layer, _ in LAYERS.values():
        ours = list(inspect.signature(layer).parameters.values())
        assert [(p.name, p.default) for p in ours[: len(theirs)]] == [(p.name, p.default) for p in theirs]
        assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(theirs) : -1])
        assert ours[-1].kind is inspect.Parameter.VAR_KEYWORD  # for the error that names another library's word


CONFIGURATIONS = [
    {},
    {"padding": 1},
    {"padding": 1, "stride": 2, "dilation": 2},
    {"padding": "same"},
    {"padding": "valid", "bias": False},
    {"padding": 1, "groups": 2},
    {"padding": 1, "groups": 4, "offset_groups": 2},
    {"padding": 2, "padding_mode": "reflect"},
    {"padding": 1, "padding_mode": "replicate", "stride": 2},
    {"padding": "same", "padding_mode": "circular", "dilation": 2},
]


@pytest.mark.parametrize("modulated", [True, False], ids=["v2", "v1"])
@pytest.mark.parametrize("arguments", CONFIGURATIONS, ids=str)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_fresh_layer_is_the_convolution(rank, arguments, modulated):
    """Also with its weights, for the same seed, and without disturbing the random numbers that follow."""
    ours, theirs = LAYERS[rank]
    torch.manual_seed(0)
    arguments_of_conv = {k: v for k, v in arguments.items() if k != "offset_groups"}
    convolution = theirs(4, 8, 3, dtype=torch.float64, **arguments_of_conv)
    follows = torch.rand(1)
    torch.manual_seed(0)
    layer = ours(4, 8, 3, dtype=torch.float64, modulated=modulated, **arguments)
    assert torch.equal(torch.rand(1), follows)
    for name, parameter in convolution.named_parameters():
        assert torch.equal(getattr(layer, name), parameter)
    x = image(rank)
    assert_close(layer(x).detach(), convolution(x).detach(), "float64")
    offset, mask = layer.offsets_and_mask(x)
    assert not offset.any()
    assert (mask == 1).all() if modulated else mask is None


@pytest.mark.parametrize("kernel", [2, (4, 3), (1, 2)])
def test_even_kernels_with_padding_same(kernel):
    layer = DeformConv2d(4, 3, kernel, padding="same", dtype=torch.float64)
    x = image(2)
    assert layer(x).shape[2:] == x.shape[2:]
    size = (kernel, kernel) if isinstance(kernel, int) else kernel
    pad = [amount for k in reversed(size) for amount in ((k - 1) // 2, k // 2)]
    assert_close(layer(x).detach(), F.conv2d(F.pad(x, pad), layer.weight, layer.bias).detach(), "float64")


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [1, (2, 1), ((0, 2), (1, 3)), "same"], ids=str)
def test_padding_reaches_the_predictor_and_the_operator(padding, mode):
    """A layer is what its parts are on an input that was padded before."""
    kernel = (3, 4) if padding == "same" else 3
    layer = moved(DeformConv2d(4, 3, kernel, padding=padding, padding_mode=mode, dtype=torch.float64))
    pairs = {1: ((1, 1), (1, 1)), (2, 1): ((2, 2), (1, 1)), "same": ((1, 1), (1, 2))}.get(padding, padding)
    amounts = [amount for pair in reversed(pairs) for amount in pair]
    x = F.pad(image(2), amounts, "constant" if mode == "zeros" else mode)
    raw = F.conv2d(x, layer.offset_conv.weight, layer.offset_conv.bias)
    taps = layer.weight[0, 0].numel()
    offset, mask = raw[:, : 2 * taps], 2 * torch.sigmoid(raw[:, 2 * taps :])
    expected = deform_conv2d(x, offset, layer.weight, layer.bias, mask=mask)
    assert_close(layer(image(2)).detach(), expected.detach(), "float64")
    for found, wanted in zip(layer.offsets_and_mask(image(2)), (offset, mask), strict=True):
        assert_close(found.detach(), wanted.detach(), "float64")


def test_offsets_are_read_group_by_group_then_tap_by_tap_then_dy_before_dx():
    layer = DeformConv2d(2, 2, 3, padding=1, groups=2, offset_groups=2, bias=False, dtype=torch.float64)
    x = image(2, channels=2)
    nn.init.zeros_(layer.weight)
    with torch.no_grad():
        layer.weight[1, 0, 1, 1] = 1  # the centre tap, 4, of the second group
        layer.offset_conv.bias[18 + 2 * 4] = 1  # its dy
    expected = torch.zeros_like(x)
    expected[:, 1, :-1] = x[:, 1, 1:]
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("arguments", [{}, {"modulated": False}, {"max_offset": 3.0}], ids=str)
def test_what_a_layer_predicts_may_be_changed_in_place(arguments):
    layer, x = DeformConv2d(4, 6, 3, padding=1, **arguments), image(2).float()
    offset, mask = layer.offsets_and_mask(x)
    offset.clamp_(-2, 2)
    if mask is not None:
        mask.mul_(0.5)
    layer(x, offset, mask).sum().backward()
    assert layer.offset_conv.weight.grad.abs().sum() > 0


def test_passed_offsets_and_masks_are_used_as_they_are():
    layer = moved(DeformConv2d(4, 3, 3, padding=1, dtype=torch.float64, max_offset=0.1))
    x = image(2)
    offset, mask = torch.randn(2, 18, 7, 6).double(), torch.rand(2, 9, 7, 6).double()
    expected = deform_conv2d(x, offset, layer.weight, layer.bias, padding=1)
    assert torch.equal(layer(x, offset), expected)
    expected = deform_conv2d(x, offset, layer.weight, layer.bias, padding=1, mask=mask)
    assert torch.equal(layer(x, offset, mask), expected)
    assert_close(layer(x, *layer.offsets_and_mask(x)).detach(), layer(x).detach(), "float64")
    no_predictor = DeformConv2d(4, 3, 3, padding=1, dtype=torch.float64, predict_offsets=False)
    no_predictor.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    assert torch.equal(no_predictor(x, offset, mask), expected)


def test_mask_scale_and_max_offset():
    layer = moved(DeformConv2d(4, 3, 3, mask_scale=1, max_offset=1.5, dtype=torch.float64), std=5)
    raw = layer.offset_conv(image(2))
    offset, mask = layer.offsets_and_mask(image(2))
    assert raw[:, :18].abs().max() > 5
    assert offset.abs().max() <= 1.5
    assert_close(offset.detach(), 1.5 * torch.tanh(raw[:, :18] / 1.5).detach(), "float64")
    assert_close(mask.detach(), torch.sigmoid(raw[:, 18:]).detach(), "float64")
    small = moved(DeformConv2d(4, 3, 3, max_offset=1e6, dtype=torch.float64))
    unbounded = small.offset_conv(image(2))[:, :18]
    torch.testing.assert_close(small.offsets_and_mask(image(2))[0], unbounded)


def test_numbers_of_numpy():
    layer = DeformConv2d(4, 3, 3, mask_scale=np.float32(1.5), max_offset=np.int64(3))
    assert (layer.mask_scale, layer.max_offset) == (1.5, 3.0)
    assert type(layer.mask_scale) is type(layer.max_offset) is float


def test_keywords_reach_the_operator(monkeypatch):
    seen = {}

    def spy(*arguments, **keywords):
        seen.update(keywords)
        return arguments[0]

    monkeypatch.setattr(DeformConv2d, "_operator", staticmethod(spy))
    DeformConv2d(4, 8, 3, groups=2, offset_groups=4, boundary="inside")(torch.rand(1, 4, 5, 5))
    assert seen == {"groups": 2, "offset_groups": 4, "boundary": "inside"}


def assert_the_same_layer(found, expected):
    """Parameters are the same to the bit; the predictor is PyTorch's convolution, which promises no bits."""
    ours, theirs = found.state_dict(), expected.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
    x = image(2, dtype=torch.float32)
    assert_close(found(x).detach(), expected(x).detach(), "float32")
    offset, mask = (part.detach() for part in expected.offsets_and_mask(x))
    assert torch.equal(found(x, offset, mask), expected(x, offset, mask))


class TestState:
    def test_names_and_shapes(self):
        shapes = {k: tuple(v.shape) for k, v in DeformConv2d(4, 8, 3, groups=2).state_dict().items()}
        assert shapes == {
            "weight": (8, 2, 3, 3),
            "bias": (8,),
            "offset_conv.weight": (27, 4, 3, 3),
            "offset_conv.bias": (27,),
        }
        assert list(DeformConv1d(4, 8, 3, predict_offsets=False, bias=False).state_dict()) == ["weight"]

    def test_round_trip(self):
        layer, other = moved(DeformConv2d(4, 3, 3)), DeformConv2d(4, 3, 3)
        assert not other.load_state_dict(layer.state_dict()).missing_keys
        assert_the_same_layer(other, layer)

    @pytest.mark.parametrize("rank", [1, 2, 3])
    def test_a_convolution_loads(self, rank):
        ours, theirs = LAYERS[rank]
        convolution = theirs(4, 8, 3, padding=1, groups=2).double()
        layer = ours(4, 8, 3, padding=1, groups=2, dtype=torch.float64)
        result = layer.load_state_dict(convolution.state_dict(), strict=False)
        assert result.missing_keys == ["offset_conv.weight", "offset_conv.bias"]
        assert not result.unexpected_keys
        assert_close(layer(image(rank)).detach(), convolution(image(rank)).detach(), "float64")

    def test_strict_loading_names_what_a_convolution_lacks(self):
        net = nn.Sequential(nn.Conv2d(4, 4, 3), DeformConv2d(4, 3, 3))
        plain = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 3, 3))
        with pytest.raises(RuntimeError, match=r"1\.offset_conv\.weight.*1\.offset_conv\.bias"):
            net.load_state_dict(plain.state_dict())
        net.load_state_dict(plain.state_dict(), strict=False)
        assert torch.equal(net[1].weight, plain[1].weight)
        without_predictor = DeformConv2d(4, 3, 3, predict_offsets=False)
        assert not without_predictor.load_state_dict(plain[1].state_dict()).missing_keys

    def test_another_version_does_not_load(self):
        v1 = DeformConv2d(4, 3, 3, modulated=False)
        with pytest.raises(RuntimeError, match=r"offset_conv\.weight"):
            v1.load_state_dict(DeformConv2d(4, 3, 3).state_dict())

    @pytest.mark.parametrize(
        "copied",
        [
            copy.deepcopy,
            lambda layer: pickle.loads(pickle.dumps(layer)),
            lambda layer: torch.load(io.BytesIO(_saved(layer)), weights_only=False),
        ],
        ids=["deepcopy", "pickle", "torch.save"],
    )
    def test_copies(self, copied):
        layer = moved(DeformConv2d(4, 3, 3, padding=((1, 0), (0, 1)), max_offset=2.0))
        other = copied(layer)
        assert_the_same_layer(other, layer)
        assert repr(other) == repr(layer)
        with torch.no_grad():
            other.weight.zero_()
        assert layer.weight.any()

    def test_to(self):
        layer = moved(DeformConv2d(4, 3, 3))
        x, y = image(2, dtype=torch.float32), layer(image(2, dtype=torch.float32))
        double = copy.deepcopy(layer).to(torch.float64)
        assert double.offset_conv.weight.dtype == torch.float64
        assert_close(y.detach(), double(x.double()).detach(), "float32")
        assert layer.to("meta")(x.to("meta")).is_meta

    def test_made_on_a_device_in_a_dtype(self):
        layer = DeformConv2d(4, 3, 3, device="meta", dtype=torch.float64)
        assert all(p.is_meta and p.dtype == torch.float64 for p in layer.parameters())
        with torch.device("meta"):
            assert all(p.is_meta for p in DeformConv2d(4, 3, 3).parameters())
        layer = layer.to_empty(device="cpu")
        layer.reset_parameters()
        assert layer(image(2)).isfinite().all()

    def test_reset_parameters(self):
        layer, convolution = moved(DeformConv2d(4, 3, 3)), nn.Conv2d(4, 3, 3)
        torch.manual_seed(5)
        convolution.reset_parameters()
        torch.manual_seed(5)
        layer.reset_parameters()
        assert torch.equal(layer.weight, convolution.weight)
        assert torch.equal(layer.bias, convolution.bias)
        assert not any(p.any() for p in layer.offset_conv.parameters())


def _saved(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    return file.getvalue()


def test_repr():
    assert DeformConv2d(4, 8, 3).extra_repr() == "4, 8, kernel_size=(3, 3), stride=(1, 1)"
    layer = DeformConv2d(
        4, 8, (3, 2), stride=2, padding=((0, 1), (2, 0)), dilation=2, groups=2, bias=False, modulated=False,
        padding_mode="reflect", offset_groups=4, predict_offsets=False, mask_scale=1, max_offset=3, boundary="inside",
    )  # fmt: skip
    assert layer.extra_repr() == (
        "4, 8, kernel_size=(3, 2), stride=(2, 2), padding=((0, 1), (2, 0)), dilation=(2, 2), groups=2, "
        "padding_mode='reflect', modulated=False, offset_groups=4, mask_scale=1.0, max_offset=3.0, "
        "boundary='inside', bias=False, predict_offsets=False"
    )
    assert "padding='same'" in repr(DeformConv1d(4, 8, 3, padding="same"))
    assert "padding=(1, 1, 1)" in repr(DeformConv3d(4, 8, 3, padding=1))


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "error", "text"),
        [
            ({"padding": (1, 1, 1, 1)}, ShapeError, r"`padding` has 4 entries.*write pairs: \(\(before, after\)"),
            ({"padding": "full"}, ShapeError, "`padding` is 'full'; expected 'same', 'valid'"),
            ({"padding": "same", "stride": 2}, ShapeError, "`padding` is 'same' with stride 2x2"),
            ({"groups": 3}, ShapeError, "`groups` is 3; expected a divisor of in_channels = 4"),
            ({"groups": 4, "out_channels": 6}, ShapeError, "`groups` is 4; expected a divisor of out_channels = 6"),
            ({"in_channels": 0}, ShapeError, "`in_channels` is 0; expected at least 1"),
            ({"padding_mode": "mirror"}, ValueError, "`padding_mode` is 'mirror'; expected one of zeros, reflect"),
            ({"boundary": "clamp"}, ValueError, "`boundary` is 'clamp'; expected one of zeros, inside"),
            ({"mask_scale": 0}, ValueError, "`mask_scale` is 0; expected a number above 0"),
            ({"max_offset": -1}, ValueError, "`max_offset` is -1; expected a number above 0"),
            ({"max_offset": "3"}, ValueError, "`max_offset` is '3'; expected a number above 0"),
            ({"max_offset": float("nan")}, ValueError, "`max_offset` is nan; expected a number above 0"),
            ({"stride": 2**70}, ShapeError, r"`stride` is 1180591620717411303424; expected less than 2\*\*40"),
            ({"max_offset": True}, ValueError, "`max_offset` is True; expected a number above 0"),
        ],
        ids=lambda value: str(value) if isinstance(value, dict) else "",
    )  # fmt: skip
    def test_construction(self, arguments, error, text):
        with pytest.raises(error, match=text):
            DeformConv2d(**{"in_channels": 4, "out_channels": 8, "kernel_size": 3, **arguments})

    @pytest.mark.parametrize(
        ("word", "rest"),
        [
            ("deform_groups", "; here: offset_groups."),
            ("deformable_groups", "; here: offset_groups."),
            ("num_deformable_group", "; here: offset_groups."),
            ("modulation", "; here: modulated."),
            ("use_bias", "; here: bias."),
            ("pad", "; here: padding."),
            ("im2col_step", "; leave it out, a batch may have any size."),
            ("max_offsets", "; did you mean 'max_offset'?"),
            ("deterministic", "."),
        ],
    )
    @pytest.mark.parametrize("layer", [DeformConv1d, DeformConv2d, DeformConv3d])
    def test_another_librarys_word(self, layer, word, rest):
        with pytest.raises(TypeError) as raised:
            layer(4, 8, 3, **{word: 1})
        assert str(raised.value) == f"{layer.__name__}() got an unexpected keyword argument {word!r}{rest}"

    def test_a_layer_that_predicts_nothing_needs_offsets(self):
        layer = DeformConv2d(4, 3, 3, predict_offsets=False)
        text = r"`offset` is missing and this layer predicts none \(predict_offsets=False\); expected layer\("
        for call in (layer, layer.offsets_and_mask):
            with pytest.raises(TypeError, match=text):
                call(torch.rand(1, 4, 5, 5))

    def test_a_mask_alone(self):
        with pytest.raises(TypeError, match="`mask` was passed without `offset`; expected both, or neither"):
            DeformConv2d(4, 3, 3)(torch.rand(1, 4, 5, 5), mask=torch.rand(1, 9, 3, 3))

    def test_a_mask_for_v1(self):
        layer = DeformConv2d(4, 3, 3, modulated=False)
        x, offset, mask = torch.rand(1, 4, 5, 5), torch.zeros(1, 18, 3, 3), torch.rand(1, 9, 3, 3)
        with pytest.raises(ValueError, match=r"without modulation \(v1\).*modulated=True"):
            layer(x, offset, mask)
        assert layer(x, offset).shape == (1, 3, 3, 3)

    def test_shapes_of_what_is_passed(self):
        layer, x = DeformConv2d(4, 3, 3, offset_groups=2), torch.rand(1, 4, 5, 5)
        offset = torch.zeros(1, 36, 3, 3)
        with pytest.raises(ShapeError, match=r"`mask` has 9 channels; expected 9 taps x 2 offset groups = 18"):
            layer(x, offset, torch.rand(1, 9, 3, 3))
        with pytest.raises(ShapeError, match=r"`offset` has 18 channels.*offset_groups=2 takes 36"):
            layer(x, torch.zeros(1, 18, 3, 3))
        with pytest.raises(ShapeError, match="54 = 36 offsets"):
            layer(x, torch.zeros(1, 54, 3, 3))
        with pytest.raises(ShapeError, match="`offset` has spatial size 5x5; expected the output's, 3x3"):
            layer(x, torch.zeros(1, 36, 5, 5))

    def test_the_wrong_rank(self):
        layer = DeformConv2d(4, 3, 3, predict_offsets=False)
        with pytest.raises(ShapeError, match=r"`input` has 2 axes.*deform_conv2d takes 4"):
            layer(torch.rand(4, 5), torch.zeros(1, 18, 3, 3))
        with pytest.raises(ShapeError, match=r"`offset` has 4 axes.*`input` has 3.*one image; expected a batch axis in both"):
            layer(torch.rand(4, 5, 5), torch.zeros(1, 18, 3, 3))

    @pytest.mark.parametrize("mode", ["zeros", "reflect"])
    @pytest.mark.parametrize(
        ("x", "error", "text"),
        [
            (np.zeros((1, 4, 9, 9), "float32"), TypeError, r"`input` is a numpy.ndarray; expected .* `torch.from_numpy"),
            (None, TypeError, "`input` is None; expected a PyTorch tensor"),
            (torch.zeros(1, 4, 9, 9).to_sparse(), TypeError, "`input` has the layout torch.sparse_coo"),
            (torch.zeros(9, 9), ShapeError, r"`input` has 2 axes.*deform_conv2d takes 4: \(N, C_in, height, width\)"),
            (torch.zeros(1, 4, 9), ShapeError, r"`input` has 1 channel,.*has 3 axes, .*one image without a batch axis"),
            (torch.zeros(1, 2, 4, 9, 9), ShapeError, r"`input` has 5 axes.*for deform_conv3d"),
            (torch.zeros(1, 5, 9, 9), ShapeError, r"`input` has 5 channels, shape \(1, 5, 9, 9\); .* in_channels=4\.$"),
            (torch.zeros(1, 8, 9, 9), ShapeError, r"`input` has 8 channels, shape \(1, 8, 9, 9\); .* in_channels=4\.$"),
            (torch.zeros(1, 9, 9, 4), ShapeError, "`input` has 9 channels,.*in_channels=4. `input` looks channels-last"),
            (torch.zeros(1, 4, 9, 9).double(), TypeError, "`weight` is float32 and `input` is float64; expected one dtype"),
            (torch.zeros(1, 4, 9, 9).half(), TypeError, "`weight` is float32 and `input` is float16; expected one dtype"),
            (torch.zeros(1, 4, 9, 9).byte(), TypeError, "`input` is uint8; expected floating point"),
            (torch.zeros(1, 4, 9, 9, device="meta"), ValueError, "`weight` is on cpu and `input` is on meta; expected one"),
            (torch.zeros(1, 4, 9, 2), ShapeError, r"it spans 3\*\(3 - 1\) \+ 1 = 7 .*the padded input's 2 \+ 2 \+ 2 = 6"),
            (torch.zeros(1, 4, 9, 0), ShapeError, "the padded input's 0"),
        ],
        ids=lambda value: str(getattr(value, "shape", "")),
    )  # fmt: skip
    def test_an_input_that_does_not_fit(self, x, error, text, mode):
        """The operator's words, not those of the predictor or of F.pad."""
        layer = DeformConv2d(4, 3, 3, padding=2, dilation=3, padding_mode=mode)
        for call in (layer, layer.offsets_and_mask, lambda x: layer(x, torch.zeros(1, 18, 7, 7))):
            with pytest.raises(error, match=text):
                call(x)

    def test_an_input_that_does_not_fit_under_autocast(self):
        layer = DeformConv2d(4, 3, 3)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(torch.zeros(1, 4, 9, 9).bfloat16()).shape == layer(torch.zeros(1, 4, 9, 9)).shape
            with pytest.raises(TypeError, match="`input` is uint8; expected floating point"):
                layer(torch.zeros(1, 4, 9, 9).byte())
            with pytest.raises(TypeError, match="`weight` is float32 and `input` is float64"):
                layer(torch.zeros(1, 4, 9, 9).double())

    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
    @pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
    def test_a_nested_input(self, layout):
        x = torch.nested.nested_tensor([torch.rand(3, 8, 8), torch.rand(3, 8, 8)], layout=layout)
        for call in (DeformConv2d(3, 4, 3), DeformConv2d(3, 4, 3).offsets_and_mask):
            with pytest.raises(TypeError, match=r"`input` is a nested tensor; expected a dense one: `input.to_padded_tensor"):
                call(x)

    def test_an_input_without_images(self):
        assert DeformConv2d(4, 3, 3)(torch.zeros(0, 4, 9, 9)).shape == (0, 3, 7, 7)


@pytest.mark.filterwarnings("ignore:`torch.jit.:FutureWarning")
def test_scripting_says_what_to_do():
    layer, x = DeformConv2d(4, 3, 3), torch.rand(1, 4, 5, 5)
    text = (
        r"torch\.jit\.script cannot compile a DeformConv2d; expected torch\.jit\.trace\(net, example_input\) or "
        r"torch\.export\.export\(net, \(example_input,\)\), which record the operator, or, over two axes, "
        r"torch\.jit\.script\(deformconv\.convert\.to_torchvision\(net\)\), a copy with torchvision's layers\."
    )
    for net in (layer, nn.Sequential(nn.ReLU(), nn.Sequential(layer))):
        with pytest.raises(NotImplementedError, match=text):
            torch.jit.script(net)
        assert torch.equal(torch.jit.trace(net, x)(x), net(x))
        assert torch.equal(torch.export.export(net, (x,)).module()(x), net(x))


def test_a_parametrization_is_computed_once():
    class Count(nn.Module):
        calls = 0

        def forward(self, weight):
            Count.calls += 1
            return 2 * weight

    layer = DeformConv2d(4, 3, 3)
    nn.utils.parametrize.register_parametrization(layer, "weight", Count())
    Count.calls = 0
    layer(torch.zeros(1, 4, 9, 9))
    assert Count.calls == 1


def _digits(count, generator):
    """Bars that lie or stand, somewhere."""
    images, labels = torch.zeros(count, 1, 8, 8), torch.arange(count) % 2
    for index in range(count):
        place = int(torch.randint(1, 7, (1,), generator=generator))
        images[index, 0][(place, slice(None)) if labels[index] else (slice(None), place)] = 1
    return images + 0.1 * torch.randn(images.shape, generator=generator), labels


@pytest.mark.parametrize("modulated", [True, False], ids=["v2", "v1"])
def test_training_lowers_the_loss(modulated):
    torch.manual_seed(0)
    images, labels = _digits(32, torch.Generator().manual_seed(0))
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), DeformConv2d(8, 8, 3, padding=1, modulated=modulated, max_offset=3),
        nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(8, 2),
    )  # fmt: skip
    optimizer = torch.optim.Adam(parameter_groups(net, lr=1e-2))
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 3
    assert all(p.any() for p in net[2].offset_conv.parameters())


def test_bfloat16_autocast_trains():
    layer = moved(DeformConv2d(4, 3, 3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(image(2, dtype=torch.float32))
    y.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


class TestParameterGroups:
    def test_every_parameter_once(self):
        shared = DeformConv2d(4, 4, 3, padding=1)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), shared, nn.ModuleList([shared, DeformConv1d(4, 4, 3)]))
        groups = parameter_groups(net, lr=0.5, offset_lr_scale=0.2)
        assert [group["lr"] for group in groups] == [0.5, 0.1]
        ids = [id(p) for group in groups for p in group["params"]]
        assert len(set(ids)) == len(ids)
        assert set(ids) == {id(p) for p in net.parameters()}
        predictors = [*shared.offset_conv.parameters(), *net[2][1].offset_conv.parameters()]
        assert list(map(id, groups[1]["params"])) == list(map(id, predictors))
        torch.optim.SGD(groups, lr=1.0)

    def test_a_parameter_that_a_predictor_shares(self):
        layer, other = DeformConv2d(4, 4, 3), nn.Conv2d(4, 27, 3)
        other.weight = layer.offset_conv.weight
        groups = parameter_groups(nn.Sequential(other, layer), lr=1.0)
        assert sum(p is other.weight for group in groups for p in group["params"]) == 1
        assert any(p is other.weight for p in groups[1]["params"])

    def test_frozen_parameters_are_left_out(self):
        layer = DeformConv2d(4, 4, 3)
        layer.weight.requires_grad_(False)
        layer.offset_conv.requires_grad_(False)
        groups = parameter_groups(layer, lr=1.0)
        assert [[id(p) for p in group["params"]] for group in groups] == [[id(layer.bias)]]

    def test_without_predictors(self):
        for net in (nn.Conv2d(3, 4, 3), DeformConv2d(4, 4, 3, predict_offsets=False)):
            assert len(parameter_groups(net, lr=1.0)) == 1

    def test_a_layer_with_parametrised_weights(self):
        layer = nn.utils.parametrizations.weight_norm(DeformConv2d(4, 4, 3))
        x = torch.rand(1, 4, 5, 5)
        layer(x).sum().backward()
        groups = parameter_groups(layer, lr=1.0)
        assert sum(len(group["params"]) for group in groups) == len(list(layer.parameters()))
