"""mmcv's functions and layers over our entries, one by one, beside torchvision's operators and PyTorch's grid_sample."""

from __future__ import annotations

import doctest
import subprocess
import sys

import numpy as np
import pytest
import torch
from tests.mmdet import models, oracles
from tests.mmdet.models import mmcv  # whose mmcv.ops can be imported only while an acceleration goes on
from tests.tolerances import assert_close
from torch import nn
from torchvision.ops import sigmoid_focal_loss

from deformconv.convert import attention_kernels
from deformconv.convert import mmcv as convert
from deformconv.convert.mmcv import accelerate_mmcv
from deformconv.torch import deform_attention


@pytest.fixture(autouse=True)
def accelerated():
    with accelerate_mmcv() as acceleration:
        yield acceleration


@pytest.fixture
def drawn():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def assert_same_slopes(ours, theirs, tensors, dtype="float64"):
    """The results of two functions of the same tensors, and the gradients of those that require one."""
    found, expected = ours(*tensors), theirs(*tensors)
    assert found.dtype == expected.dtype
    assert_close(found.detach().float() if dtype != "float64" else found.detach(), expected.detach().double(), dtype)
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(expected.dtype)
    given = [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]
    slopes = torch.autograd.grad(found, given, cotangent), torch.autograd.grad(expected, given, cotangent)
    for number, (slope, other) in enumerate(zip(*slopes, strict=True)):
        assert slope.dtype == other.dtype
        assert_close(slope.double(), other.double(), dtype, f"gradient {number}")


# batch, channels, out_channels, kernel, stride, padding, dilation, groups, deform_groups, size
CALLS = {
    "plain": (2, 4, 6, (3, 3), 1, 1, 1, 1, 1, (7, 8)),
    "not square": (1, 4, 6, (3, 2), (2, 1), (1, 0), (1, 2), 1, 1, (9, 8)),
    "groups": (2, 8, 6, (3, 3), 1, 1, 1, 2, 4, (6, 5)),
    "dilated": (2, 4, 4, (3, 3), 2, 2, 2, 4, 2, (9, 9)),
    "one pixel": (1, 2, 3, (1, 1), 1, 0, 1, 1, 1, (4, 5)),
    "more than im2col_step": (64, 2, 2, (3, 3), 1, 0, 1, 1, 1, (4, 4)),
}
call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


def tensors_of(call, drawn, bias):
    batch, channels, out, kernel, stride, padding, dilation, groups, deform_groups, size = call
    pairs = [(value, value) if isinstance(value, int) else value for value in (stride, padding, dilation)]
    output = [(s + 2 * p - d * (k - 1) - 1) // t + 1 for s, k, t, p, d in zip(size, kernel, *pairs, strict=True)]
    taps = kernel[0] * kernel[1] * deform_groups
    tensors = [
        drawn(batch, channels, *size),
        drawn(batch, 2 * taps, *output) * 2,
        drawn(batch, taps, *output).sigmoid(),
        drawn(out, channels // groups, *kernel),
        drawn(out) if bias else None,
    ]
    return [tensor if tensor is None else tensor.requires_grad_() for tensor in tensors], (
        stride,
        padding,
        dilation,
        groups,
        deform_groups,
    )


@call
def test_deform_conv2d(call, drawn):
    (input, offset, _, weight, _), parameters = tensors_of(call, drawn, False)
    ours, theirs = (
        lambda *tensors, function=function: function(*tensors, *parameters)
        for function in (mmcv.ops.deform_conv2d, oracles.deform_conv2d)
    )
    assert_same_slopes(ours, theirs, [input, offset, weight])


@call
@pytest.mark.parametrize("bias", [True, False])
def test_modulated_deform_conv2d(call, bias, drawn):
    tensors, parameters = tensors_of(call, drawn, bias)
    ours, theirs = (
        lambda *tensors, function=function: function(*tensors, *parameters)
        for function in (mmcv.ops.modulated_deform_conv2d, oracles.modulated_deform_conv2d)
    )
    assert_same_slopes(ours, theirs, tensors)


@pytest.mark.parametrize("form", ["turned", "channels last", "strided"])
def test_tensors_that_are_not_contiguous(form, drawn):
    def formed(tensor):
        if form == "channels last":
            return tensor.contiguous(memory_format=torch.channels_last)
        if form == "turned":
            return tensor.transpose(2, 3).contiguous().transpose(2, 3)
        return tensor.repeat_interleave(2, dim=3)[..., ::2]

    tensors, parameters = tensors_of(CALLS["groups"], drawn, True)
    given = [formed(tensor.detach()).requires_grad_() if tensor.ndim == 4 else tensor for tensor in tensors]
    assert not given[0].is_contiguous()
    assert_same_slopes(
        lambda *given: mmcv.ops.modulated_deform_conv2d(*given, *parameters),
        lambda *given: oracles.modulated_deform_conv2d(*given, *parameters),
        given,
    )


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_other_dtypes(dtype, drawn):
    """Half precision is computed in float32 and rounded once: the results of float32's operator, rounded."""
    tensors, parameters = tensors_of(CALLS["groups"], drawn, True)
    given = [tensor.detach().to(getattr(torch, dtype)).requires_grad_() for tensor in tensors]

    def widely(*given):
        wide = [tensor.double() for tensor in given]
        return oracles.modulated_deform_conv2d(*wide, *parameters).to(given[0].dtype)

    assert_same_slopes(lambda *given: mmcv.ops.modulated_deform_conv2d(*given, *parameters), widely, given, dtype)


def test_half_precision_of_the_offset_alone(drawn):
    """mmcv takes the offset's dtype, as in automatic mixed precision."""
    (input, offset, _, weight, _), parameters = tensors_of(CALLS["plain"], drawn, False)
    y = mmcv.ops.deform_conv2d(input.float(), offset.bfloat16(), weight.float(), *parameters)
    assert y.dtype == torch.bfloat16
    expected = oracles.deform_conv2d(*(t.bfloat16().double() for t in (input, offset, weight)), *parameters)
    assert_close(y.detach().double(), expected.detach(), "bfloat16")


@pytest.mark.parametrize("modulated", [False, True])
def test_packs(modulated, drawn):
    torch.manual_seed(0)
    kind = mmcv.ops.ModulatedDeformConv2dPack if modulated else mmcv.ops.DeformConv2dPack
    layer = kind(4, 6, 3, stride=2, padding=1, groups=2, deform_groups=2).double()
    zero = layer(drawn(2, 4, 9, 8))
    assert zero.shape == (2, 6, 5, 4)
    models.deform(layer)
    parameters = list(layer.parameters())
    assert len(parameters) == (4 if modulated else 3)

    def theirs(x, *parameters):
        with oracles.in_place_of_mmcvs():
            return layer(x)

    assert_same_slopes(lambda x, *parameters: layer(x), theirs, [drawn(2, 4, 9, 8).requires_grad_(), *parameters])


def test_a_map_smaller_than_the_kernel(drawn):
    """mmcv's DeformConv2d pads it; mmcv's Pack does not, and its operator refuses what ours computes."""
    layer = mmcv.ops.DeformConv2d(2, 3, 5, padding=2).double()
    x, offset = drawn(1, 2, 3, 4).requires_grad_(), drawn(1, 50, 3, 4).requires_grad_()
    assert_same_slopes(layer, lambda x, offset: oracles.deform_conv2d(x, offset, layer.weight, padding=2), [x, offset])


BOXES = torch.tensor(
    [
        [0, 3.5, 4.5, 30.2, 28.4], [1, -9.5, -7.5, 20, 20], [0, 20, 20, 60, 50], [1, 2.5, -2.5, 17.49, 30.51],
        [1, 8, 8, 12, 33], [0, 0, 0, 43, 35],
    ],
    dtype=torch.float64,
)  # fmt: skip


@pytest.mark.parametrize("sampling_ratio", [0, 1, 2])
@pytest.mark.parametrize("size", [(7, 7), (3, 2)])
@pytest.mark.parametrize("deformed", [False, True])
def test_deform_roi_pool(sampling_ratio, size, deformed, drawn):
    input, offset = drawn(2, 5, 9, 11).requires_grad_(), (drawn(len(BOXES), 2, *size) * 1.5).requires_grad_()
    ours, theirs = (
        lambda x, o, function=function: function(x, BOXES, o, size, 0.25, sampling_ratio, 0.1)
        for function in (mmcv.ops.deform_roi_pool, oracles.deform_roi_pool)
    )
    assert_same_slopes(ours, theirs, [input, offset if deformed else None])


@pytest.mark.parametrize("modulated", [False, True])
def test_pooling_packs(modulated, drawn):
    torch.manual_seed(0)
    kind = mmcv.ops.ModulatedDeformRoIPoolPack if modulated else mmcv.ops.DeformRoIPoolPack
    layer = kind((3, 3), 5, 16, spatial_scale=0.25).double()
    models.deform(layer)
    parameters = list(layer.parameters())

    def theirs(x, *parameters):
        with oracles.in_place_of_mmcvs():
            return layer(x, BOXES)

    x = drawn(2, 5, 9, 11).requires_grad_()
    assert_same_slopes(lambda x, *parameters: layer(x, BOXES), theirs, [x, *parameters])


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sampling_ratio", [0, 2, -1])
def test_roi_align(aligned, sampling_ratio, drawn):
    layer = mmcv.ops.RoIAlign((7, 5), 0.25, sampling_ratio, "avg", aligned)
    assert_same_slopes(
        lambda x: layer(x, BOXES),
        lambda x: oracles.roi_align(x, BOXES, (7, 5), 0.25, sampling_ratio, "avg", aligned),
        [drawn(2, 5, 9, 11).requires_grad_()],
    )


def test_no_boxes(drawn):
    x = drawn(2, 5, 9, 11).requires_grad_()
    for y in (mmcv.ops.roi_align(x, BOXES[:0], 7), mmcv.ops.deform_roi_pool(x, BOXES[:0], None, (7, 7))):
        assert y.shape == (0, 5, 7, 7)
        y.sum().backward()
    assert not x.grad.any()


def test_roi_align_by_the_maximum_is_refused(drawn):
    with pytest.raises(NotImplementedError, match=r'pool_mode="max" here.*expected pool_mode="avg"'):
        mmcv.ops.roi_align(drawn(2, 5, 9, 11), BOXES, 7, 1.0, 0, "max")


def overlaps(boxes, offset):
    """Intersection over union, with boxes that reach `offset` further."""
    low, high = np.maximum(boxes[:, None, :2], boxes[:, :2]), np.minimum(boxes[:, None, 2:], boxes[:, 2:])
    shared = np.clip(high - low + offset, 0, None).prod(-1)
    area = (boxes[:, 2:] - boxes[:, :2] + offset).prod(-1)
    return shared / (area[:, None] + area - shared)


def some_boxes(dtype=np.float32):
    rng = np.random.default_rng(0)
    corner = rng.integers(0, 20, (60, 2))
    boxes = np.concatenate([corner, corner + rng.integers(1, 12, (60, 2))], axis=1).astype(dtype)
    return boxes, rng.permutation(60).astype(dtype) / 60


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("threshold", [0.21, 0.47])
def test_nms(offset, threshold):
    boxes, scores = some_boxes()
    share = overlaps(boxes.astype(np.float64), offset)
    kept = []
    for box in np.argsort(-scores):
        if all(share[box, other] <= threshold for other in kept):
            kept.append(box)
    assert 5 < len(kept) < 60
    found, indices = mmcv.ops.nms(boxes, scores, threshold, offset)
    np.testing.assert_array_equal(indices, kept)
    np.testing.assert_array_equal(found, np.concatenate([boxes[kept], scores[kept, None]], axis=1))
    first = mmcv.ops.nms(torch.from_numpy(boxes), torch.from_numpy(scores), threshold, offset, score_threshold=0.5, max_num=3)
    assert first[1].tolist() == [box for box in kept if scores[box] > 0.5][:3]


def test_nms_of_classes_and_in_half_precision():
    boxes, scores = map(torch.from_numpy, some_boxes())
    classes = torch.arange(60) % 3
    found, kept = mmcv.ops.batched_nms(boxes, scores, classes, {"type": "nms", "iou_threshold": 0.3})
    alone = [mmcv.ops.nms(boxes[classes == c], scores[classes == c], 0.3)[1] * 3 + c for c in range(3)]
    assert sorted(kept.tolist()) == sorted(torch.cat(alone).tolist())
    assert (found[:-1, 4] >= found[1:, 4]).all()
    half = mmcv.ops.nms(boxes.bfloat16(), scores.bfloat16(), 0.3)[1]
    assert half.tolist() == mmcv.ops.nms(boxes, scores.bfloat16().float(), 0.3)[1].tolist()


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("method", ["naive", "linear", "gaussian"])
def test_soft_nms(method, offset):
    boxes, scores = some_boxes()
    share = overlaps(boxes.astype(np.float64), offset)
    left, soft, expected = list(range(60)), scores.astype(np.float64), []
    while left:
        best = max(left, key=lambda box: soft[box])
        expected.append((best, soft[best]))
        left.remove(best)
        for box in left:
            over = share[best, box]
            if method == "gaussian":
                soft[box] *= np.exp(-(over**2) / 0.4)
            elif over >= 0.3:
                soft[box] *= 1 - over if method == "linear" else 0
        left = [box for box in left if soft[box] >= 0.05]
    assert 5 < len(expected) < 60
    found, kept = mmcv.ops.soft_nms(boxes, scores, 0.3, 0.4, 0.05, method, offset)
    assert kept.tolist() == [box for box, _ in expected]
    np.testing.assert_allclose(found[:, 4], [score for _, score in expected], rtol=1e-5)
    np.testing.assert_array_equal(found[:, :4], boxes[kept])


def test_soft_nms_of_nothing():
    found, kept = mmcv.ops.soft_nms(torch.zeros(0, 4), torch.zeros(0))
    assert found.shape == (0, 5) and kept.shape == (0,)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("gamma", [2.0, 1.5])
def test_sigmoid_focal_loss(weighted, gamma, drawn):
    input, target = (drawn(9, 4) * 3).requires_grad_(), torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 3])
    weight = torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=torch.float64) if weighted else None
    own = nn.functional.one_hot(target, 4).double()
    factor = weight[target][:, None] if weighted else 1.0
    assert_same_slopes(
        lambda x: mmcv.ops.sigmoid_focal_loss(x, target, gamma, 0.3, weight, "none"),
        lambda x: sigmoid_focal_loss(x, own, 0.3, gamma) * factor,
        [input],
    )


def test_sigmoid_focal_loss_of_the_background_and_of_sure_predictions(drawn):
    target = torch.tensor([4, 0])
    x = torch.tensor([[-300.0, 200.0, 0.0, 1.0], [300.0, -300.0, 50.0, -50.0]], requires_grad=True)
    loss = mmcv.ops.sigmoid_focal_loss(x, target, 2.0, 0.25, None, "mean")
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(x.grad).all()
    own = nn.functional.one_hot(target, 5)[:, :4].float()
    assert_close(loss.detach(), sigmoid_focal_loss(x.detach(), own, 0.25, 2.0).sum() / 2, "float32")


def test_gradients_are_added_and_offsets_gradients_written(drawn):
    """What mmcv's C++ does with the tensors that it is given."""
    extension = sys.modules["mmcv._ext"]
    (input, offset, _, weight, _), _ = tensors_of(CALLS["plain"], drawn, False)
    input, offset, weight = input.detach(), offset.detach(), weight.detach()
    numbers = {"kW": 3, "kH": 3, "dW": 1, "dH": 1, "padW": 1, "padH": 1, "dilationW": 1, "dilationH": 1}
    numbers |= {"group": 1, "deformable_group": 1, "im2col_step": 1}
    cotangent, empty = drawn(2, 6, 7, 8), torch.empty(0)
    twice = [torch.zeros_like(tensor) for tensor in (input, offset, weight)]
    for _ in range(2):
        extension.deform_conv_backward_input(input, offset, cotangent, twice[0], twice[1], weight, empty, **numbers)
        extension.deform_conv_backward_parameters(input, offset, cotangent, twice[2], empty, empty, **numbers, scale=0.5)
    given = [tensor.requires_grad_() for tensor in (input, offset, weight)]
    slopes = torch.autograd.grad(oracles.deform_conv2d(*given, padding=1), given, cotangent)
    for found, expected in zip(twice, (2 * slopes[0], slopes[1], slopes[2]), strict=True):
        assert_close(found, expected, "float64")


def test_a_call_that_is_refused_says_why(drawn):
    with pytest.raises(ValueError, match=r"`offset` has 27 channels"):
        mmcv.ops.deform_conv2d(drawn(1, 3, 6, 6), drawn(1, 27, 6, 6), drawn(2, 3, 3, 3), 1, 1)
    with pytest.raises(ValueError, match=r"`boxes` has 7 in row 0, column 0"):
        mmcv.ops.roi_align(drawn(2, 5, 9, 11), torch.tensor([[7.0, 0, 0, 4, 4]], dtype=torch.float64), 7)


def test_what_is_not_there_says_so(drawn):
    with pytest.raises(
        NotImplementedError, match=r"'carafe_forward' needs mmcv's compiled extension.*accelerate_mmcv\(\) computes"
    ):
        mmcv.ops.carafe(drawn(1, 4, 3, 3), drawn(1, 25, 6, 6), 5, 1, 2)


LEVELS = torch.tensor([[6, 5], [3, 4], [1, 2]])


def attention(value, locations, weights):
    """mmcv's own function for CPUs, which ours is made of."""
    found = sys.modules["mmcv.ops.multi_scale_deform_attn"].multi_scale_deformable_attn_pytorch
    return found.__wrapped__(value, LEVELS, locations, weights)


def attended(drawn, dtype=torch.float64):
    tensors = drawn(2, 44, 2, 8), 0.5 + 0.5 * drawn(2, 7, 2, 3, 4, 2), drawn(2, 7, 2, 3, 4).sigmoid()
    return [tensor.to(dtype).requires_grad_() for tensor in tensors]


def test_attention_by_the_extension(drawn):
    """As mmcv calls it on a GPU."""
    function, starts = mmcv.ops.multi_scale_deform_attn.MultiScaleDeformableAttnFunction, torch.tensor([0, 30, 42])
    assert_same_slopes(lambda v, p, w: function.apply(v, LEVELS, starts, p, w, 64), attention, attended(drawn))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_attention_on_a_cpu(dtype, drawn):
    ours = mmcv.ops.multi_scale_deform_attn.multi_scale_deformable_attn_pytorch
    assert_same_slopes(lambda v, p, w: ours(v, LEVELS, p, w), attention, attended(drawn, getattr(torch, dtype)), dtype)


def test_the_layer_with_attention(drawn, monkeypatch):
    module = mmcv.ops.multi_scale_deform_attn
    layer = mmcv.ops.MultiScaleDeformableAttention(32, 4, num_levels=3, num_points=2, dropout=0.0).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    query, value, where = drawn(7, 2, 32), drawn(44, 2, 32), drawn(2, 7, 3, 2).sigmoid()
    given = {
        "value": value,
        "reference_points": where,
        "spatial_shapes": LEVELS,
        "level_start_index": torch.tensor([0, 30, 42]),
    }
    called = []
    monkeypatch.setattr(attention_kernels, "deform_attention", lambda *a: called.append(a) or deform_attention(*a))
    found = layer(query, **given)
    assert len(called) == 1
    monkeypatch.setattr(module, "multi_scale_deformable_attn_pytorch", module.multi_scale_deformable_attn_pytorch.__wrapped__)
    assert_close(found.detach(), layer(query, **given).detach(), "float64")
    assert len(called) == 1


def test_undo_and_nested_use(accelerated, drawn):
    x, offset, weight = drawn(1, 3, 6, 6), drawn(1, 18, 6, 6), drawn(2, 3, 3, 3)

    def works():
        try:
            mmcv.ops.deform_conv2d(x, offset, weight, 1, 1)
        except NotImplementedError as error:
            assert "deformconv.convert.accelerate_mmcv(), which has ended or not begun, computes deform_conv2d" in str(error)
            return False
        return True

    module = mmcv.ops.multi_scale_deform_attn
    theirs = module.multi_scale_deformable_attn_pytorch.__wrapped__
    assert works()
    with accelerate_mmcv():
        accelerated.undo()
        assert module.multi_scale_deformable_attn_pytorch is not theirs
        assert works()
        with pytest.raises(ZeroDivisionError), accelerate_mmcv():
            raise ZeroDivisionError
        assert works()
    assert not works()
    assert module.multi_scale_deformable_attn_pytorch is theirs
    with accelerated:
        assert works()
    accelerated.undo()
    assert not works()
    assert "mmcv._ext" in sys.modules  # mmcv.ops is imported, and goes on to ask it


def test_mmcvs_report_of_its_environment_goes_through():
    assert mmcv.ops.get_compiler_version() == mmcv.ops.get_compiling_cuda_version() == "n/a (deformconv's entries)"
    from mmengine.utils.dl_utils.misc import mmcv_full_available

    assert not mmcv_full_available()


def test_doctests():
    result = doctest.testmod(convert)
    assert result.failed == 0 and result.attempted > 5


BEFORE_MMCV = """
import importlib.util, sys
from deformconv.convert.mmcv import accelerate_mmcv

with accelerate_mmcv():
    assert "mmcv" not in sys.modules
    import mmcv
    assert "mmcv._ext" in sys.modules
assert "mmcv._ext" not in sys.modules
try:
    import mmcv.ops
except ModuleNotFoundError as error:
    assert "mmcv._ext" in str(error)
else:
    raise AssertionError
accelerate_mmcv()
import mmcv.ops
print(sorted(name for name in dir(mmcv.ops) if name.startswith("DeformRoI")))
"""


def test_in_a_process_of_its_own():
    """Before mmcv is imported and after it; mmcv.ops has no extension before, and finds none after an acceleration's end."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", BEFORE_MMCV], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-2] == "['DeformRoIPool', 'DeformRoIPoolPack']"
