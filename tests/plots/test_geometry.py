"""Where the cells of a map lie in the image: of each operation by an image of coordinates, and of whole nets."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torchvision  # noqa: E402
from tests.plots.test_observe import CalledWithOffsets, kornia_layer, randomised  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from deformconv.convert import to_torchvision  # noqa: E402
from deformconv.plots.geometry import Geometry  # noqa: E402
from deformconv.plots.graph import Follower  # noqa: E402
from deformconv.plots.recording import record  # noqa: E402
from deformconv.plots.rerun import Probe  # noqa: E402
from deformconv.torch import DeformConv1d, DeformConv2d, DeformConv3d  # noqa: E402
from deformconv.vision import make_deformable  # noqa: E402

ONES = torch.ones(1, 1, 5, 4) / 20


def mean_filter(kernel, **how):
    """A convolution that averages, so that of an image of coordinates it gives its window's middle."""
    weight = torch.ones(1, 1, *kernel) / np.prod(kernel)
    return lambda x: (F.conv1d, F.conv2d, F.conv3d)[len(kernel) - 1](x, weight, **how)


def spread(x):
    """What a transposed convolution spreads, divided by how often it wrote there: the mean of where it came from."""
    weight = torch.ones(1, 1, 4, 3)
    one, other = (F.conv_transpose2d(part, weight, stride=(2, 3), padding=(1, 0)) for part in (x, torch.ones_like(x)))
    return one / other


def deformed(x):
    return torchvision.ops.deform_conv2d(x, torch.zeros(1, 40, 11, 9), ONES, stride=2, padding=(1, 0), dilation=(1, 2))


def deformed_by_us(x):
    from deformconv.torch import deform_conv2d

    return deform_conv2d(x, torch.zeros(1, 40, 11, 11), ONES, stride=2, padding=((1, 0), (0, 3)), dilation=(1, 2))


def written_into(x):
    whole = torch.zeros(1, 1, 40, 40)
    whole[:, :, 4:28:1, 2:26:1].copy_(x)
    return whole[..., 2:30, 1:37] + 0


def written_by_slices_of_slices(x):
    whole = torch.zeros(3, 1, 60, 40)
    whole[1][:, 4:52:2].narrow(2, 3, 24).copy_(x[0])
    return whole[1:2, :, 4:52, 3:27]


def views_before_writing(x):
    whole = torch.zeros(1, 1, 28, 28)
    middle, border, all_of_it = whole[..., 2:26, 2:26], whole[..., :2, 2:26], whole[..., 0:28]
    with torch.no_grad():  # PyTorch lets nobody write into a second view of what has a graph
        middle.copy_(x)
        border.copy_(x[..., -2:, :])
    return all_of_it * 1


def in_windows(x):
    """A vision transformer's windows: taken apart, put into a batch, and put together again."""
    tokens = x.permute(0, 2, 3, 1).reshape(1, 6, 4, 6, 4, 1).permute(0, 1, 3, 2, 4, 5).reshape(36, 16, 1)
    tokens = F.linear(tokens, torch.ones(1, 1))
    return tokens.reshape(1, 6, 6, 4, 4, 1).permute(0, 1, 3, 2, 4, 5).reshape(1, 24, 24, 1).permute(0, 3, 1, 2)


def attended(x):
    """Attention's output lies where its query does: here each token attends to itself alone."""
    tokens = x.flatten(2).transpose(1, 2)
    return ((torch.eye(576)[None] + 0 * tokens @ tokens.transpose(1, 2)) @ tokens).transpose(1, 2).reshape(1, 1, 24, 24)


def patches(x):
    """A vision transformer's patches, as a product with a matrix."""
    parts = x.reshape(1, 1, 6, 4, 6, 4).permute(0, 2, 4, 3, 5, 1).reshape(1, 36, 16)
    return (parts @ torch.ones(16, 1) / 16).transpose(1, 2).reshape(1, 1, 6, 6)


def to_channels(x):
    parts = [x[..., row::2, column::2] for row in (0, 1) for column in (0, 1)]
    return F.conv2d(torch.cat(parts, 1), torch.ones(1, 4, 1, 1) / 4)


def viewed_to_channels(x):
    parts = x.reshape(1, 1, 12, 2, 12, 2).permute(0, 1, 3, 5, 2, 4).reshape(1, 4, 12, 12)
    return F.conv2d(parts, torch.ones(1, 4, 1, 1) / 4)


def repeated(x):
    return x[:, :, :, None, :, None].expand(1, 1, 24, 2, 24, 2).reshape(1, 1, 48, 48)


def both(x):
    """A shortcut beside an even kernel: the result is about halfway."""
    return (x[..., :-1, :-1] + F.avg_pool2d(x, 2, 1)) / 2


OPERATIONS = {
    "convolution": mean_filter((5, 4), stride=(2, 3), padding=(1, 0), dilation=(1, 2)),
    "convolution, 1-D": mean_filter((4,), stride=3, dilation=2),
    "convolution, 3-D": mean_filter((2, 3, 4), stride=(1, 2, 3)),
    "convolution, same": mean_filter((4, 3), padding="same"),
    "transposed convolution": spread,
    "torchvision's": deformed,
    "ours": deformed_by_us,
    "max_pool": lambda x: F.max_pool2d(x, (2, 3), stride=(3, 2), padding=1, dilation=(2, 1)),
    "max_pool, stride as kernel": lambda x: F.max_pool2d(x, 2, ceil_mode=True),
    "max_pool, 1-D": lambda x: F.max_pool1d(x, 2),
    "max_pool, 3-D": lambda x: F.max_pool3d(x, 2),
    "avg_pool": lambda x: F.avg_pool2d(x, (3, 2), stride=2, padding=(1, 0)),
    "avg_pool, 1-D": lambda x: F.avg_pool1d(x, 4),
    "avg_pool, 3-D": lambda x: F.avg_pool3d(x, (2, 3, 2)),
    "adaptive": lambda x: F.adaptive_avg_pool2d(x, (6, 8)),
    "adaptive, max": lambda x: F.adaptive_max_pool2d(x, 8),
    "adaptive, uneven": lambda x: F.adaptive_avg_pool2d(x, (7, 5)),
    "adaptive, one": lambda x: F.adaptive_avg_pool2d(x, 1),
    "area": lambda x: F.interpolate(x, scale_factor=0.25, mode="area"),
    "nearest": lambda x: F.interpolate(x, scale_factor=2),
    "nearest, fewer": lambda x: F.interpolate(x, scale_factor=0.5),
    "nearest-exact": lambda x: F.interpolate(x, scale_factor=3, mode="nearest-exact"),
    "nearest-exact, fewer": lambda x: F.interpolate(x, scale_factor=0.5, mode="nearest-exact"),
    "bilinear": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "bilinear, to a size": lambda x: F.interpolate(x, size=(31, 17), mode="bilinear"),
    "bilinear, a scale": lambda x: F.interpolate(x, scale_factor=0.7, mode="bilinear"),
    "bilinear, a scale anew": lambda x: F.interpolate(x, scale_factor=0.7, mode="bilinear", recompute_scale_factor=True),
    "bilinear, corners": lambda x: F.interpolate(x, size=(31, 17), mode="bilinear", align_corners=True),
    "bilinear, antialias": lambda x: F.interpolate(x, size=(12, 10), mode="bilinear", antialias=True),
    "bicubic": lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"),
    "linear": lambda x: F.interpolate(x, scale_factor=1.5, mode="linear"),
    "trilinear": lambda x: F.interpolate(x, scale_factor=2, mode="trilinear"),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x.expand(1, 4, 24, 24), 2),
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x, 2).mean(1, keepdim=True),
    "pad": lambda x: F.pad(x, (1, 2, 3, 4)),
    "pad, less": lambda x: F.pad(x, (-1, -2, -3, -4)),
    "pad, reflect": lambda x: F.pad(x, (1, 2, 3, 4), mode="reflect"),
    "pad, replicate, 1-D": lambda x: F.pad(x, (3, 1), mode="replicate"),
    "pad, circular": lambda x: F.pad(x, (1, 2, 3, 4), mode="circular"),
    "slice": lambda x: x[..., 3:-2, 1::3],
    "split": lambda x: x.split(7, 2)[1].chunk(2, -1)[1],
    "split with sizes": lambda x: x.split((5, 19), -1)[1],
    "flip": lambda x: x.flip((-1,)),
    "flip, part": lambda x: x[..., 3:20].flip((2, 3)),
    "unfold": lambda x: x.unfold(2, 4, 2).mean(-1),
    "in place": lambda x: (x * 1).add_(0).clamp_(-1e9, 1e9),
    "written into": written_into,
    "written by slices of slices": written_by_slices_of_slices,
    "views before writing": views_before_writing,
    "channels last": lambda x: (x.permute(0, 2, 3, 1) @ torch.ones(1, 1)).permute(0, 3, 1, 2).contiguous(),
    "layer norm": lambda x: x + 0 * F.layer_norm(x.movedim(1, -1), (1,)).movedim(-1, 1),
    "group and batch norm": lambda x: x + 0 * F.group_norm(x, 1) + 0 * nn.BatchNorm2d(1).eval()(x),
    "squeeze and excitation": lambda x: x * (0 * x.mean((2, 3), keepdim=True)).sigmoid() * 2,
    "pooled beside it": lambda x: torch.cat([x, F.interpolate(F.adaptive_avg_pool2d(x, 1), size=(24, 24))], 1)[:, :1],
    "windows": in_windows,
    "attention": attended,
    "scaled dot product": lambda x: x + 0 * F.scaled_dot_product_attention(*[x.flatten(2).mT] * 3).mT.reshape(x.shape),
    "patches": patches,
    "to channels": to_channels,
    "viewed to channels": viewed_to_channels,
    "stacked": lambda x: torch.stack([x, x], 1).mean(1),
    "repeated": repeated,
    "both": both,
    "dtype": lambda x: x.double().to(memory_format=torch.channels_last).detach(),
    "gated": lambda x: torch.where(x > 0, x, x) + 0 * F.prelu(x, torch.ones(1)) + 0 * F.glu(torch.cat([x, x], 1), 1),
    "softmax": lambda x: x + 0 * x.softmax(1) + 0 * x.log_softmax(1),
    "squeezed": lambda x: x.squeeze(0)[None].unsqueeze(1).select(1, 0),
    "roll of channels": lambda x: x.roll(1, 1),
}  # fmt: skip


# Operations whose outputs lie on a staircase about the line that is meant, or whose filters are not quite symmetric.
COARSE = {
    "transposed convolution", "adaptive, uneven", "nearest", "nearest-exact", "bilinear, antialias", "bicubic", "pixel_shuffle",
    "repeated",
}  # fmt: skip


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_an_operation_moves_an_image_of_coordinates_to_where_it_says(name, gradients):
    """Every operation here is linear, or a maximum: what it makes of the coordinates is where its outputs lie."""
    operation = OPERATIONS[name]
    rank = 1 if "1-D" in name or name == "linear" else 3 if "3-D" in name or name == "trilinear" else 2
    size = (24,) * rank if rank < 3 else (8, 9, 12)
    for axis in range(rank):
        ramp = torch.arange(1.0, size[axis] + 1).reshape([-1 if n == axis else 1 for n in range(rank)]).expand(1, 1, *size)
        follower = Follower()
        with torch.set_grad_enabled(gradients):
            image = ramp.clone().requires_grad_(gradients) * 1
            follower.put_image(image, rank)
            with follower:
                output = operation(image)
            # A maximum lies at its window's end, and that of the negative image at its beginning.
            lies = ((output - operation(-ramp)) / 2).detach().numpy()[0].mean(0) - 1
        place = follower.place(output)
        assert not place.doubt
        along = place.spatial(rank)[axis]
        assert along.size == lies.shape[axis]
        said = (along.origin + along.step * np.arange(along.size)).reshape([-1 if n == axis else 1 for n in range(rank)])
        inner = tuple(slice(n // 4, n - n // 4) for n in lies.shape)  # what no padding reaches
        apart = (said - lies)[inner][lies[inner] > -0.5]  # -1 is what nothing was written to
        assert apart.size > 0
        assert np.abs(apart).max() <= (0.5 * max(along.step, 1) if name in COARSE else 1e-4)
        assert np.abs(apart.mean()) <= (0.15 if name == "adaptive, uneven" else 1e-4)


def followed(operation, shape=(1, 2, 8, 8)):
    """Where an operation's outputs lie, of an image."""
    image, follower = torch.rand(shape), Follower()
    follower.put_image(image, 2)
    with follower:
        return follower.place(operation(image))


def test_an_operation_that_is_not_known_raises_doubt():
    assert followed(lambda x: x.roll(1, 2)).doubt == "aten::roll"
    sampled = followed(lambda x: F.grid_sample(x, torch.zeros(1, 4, 4, 2), align_corners=False))
    assert sampled.doubt == "aten::grid_sampler_2d"
    assert [along.step for along in sampled.spatial(2)] == [2, 2]
    assert followed(lambda x: torch.cat([x, x], 2)).doubt == "aten::cat"


@pytest.mark.parametrize("around", [lambda x: x + x.roll(1, 2), lambda x: torch.cat([x.roll(1, 2), x], 1)])
def test_a_shortcut_around_an_operation_that_is_not_known_raises_none(around):
    place = followed(around)
    assert not place.doubt
    assert [(along.origin, along.step) for along in place.spatial(2)] == [(0, 1), (0, 1)]


@pytest.mark.parametrize(
    "operation",
    [
        torch.zeros_like,
        lambda x: torch.rand(3),
        lambda x: x.new_empty(x.shape).fill_(1),
        lambda x: x.flatten(2).sort(-1)[0],
        lambda x: F.conv2d(torch.rand(1, 2, 9, 9), x[..., :3, :3]),  # the image makes the weights
        lambda x: torch.ones(8, 8) @ torch.ones(8, 8),
    ],
)
def test_what_lies_nowhere_in_the_image(operation):
    place = followed(operation)
    assert place is None or place.doubt or place.spatial(2) is None


def test_an_order_that_is_no_straight_line_is_none():
    place = followed(lambda x: x.reshape(1, 2, 2, 4, 8).transpose(2, 3).reshape(1, 2, 8, 8))
    assert place.spatial(2) is None


def test_memory_that_is_used_again_is_another_tensor():
    image, follower = torch.rand(1, 2, 64, 64), Follower()
    follower.put_image(image, 2)
    with torch.no_grad(), follower:
        for _ in range(10):
            (image * 2).sum()
            assert follower.place(torch.rand(1, 2, 64, 64)) is None


def recorded(net, image):
    with record(net.eval()) as trace, torch.no_grad():
        net(image)
    return trace


def deform(channels=4, kernel=3, **how):
    return DeformConv2d(channels, channels, kernel, **how)


def stem(**how):
    return nn.Conv2d(3, 4, **{"kernel_size": 3, "stride": 2, "padding": 1, **how})


class UNet(nn.Module):
    def __init__(self, up):
        super().__init__()
        self.down, self.inner, self.up = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), up
        self.layer = DeformConv2d(8, 4, 3, padding=1)

    def forward(self, x):
        x = self.down(x)
        return self.layer(torch.cat([x, self.up(self.inner(F.max_pool2d(x, 2)))], 1))


class Padded(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = DeformConv2d(3, 4, 3)

    def forward(self, x):
        return self.layer(F.pad(x, (1, 2, 3, 4)))


PLANE = (1, 3, 40, 48)
# A net, its image's shape, and the origins and steps of its deformable layers' inputs.
NETS = {
    "strided stem": (lambda: [stem(), deform(padding=1)], PLANE, [(0, 2)]),
    "stem of 7": (lambda: [stem(kernel_size=7, padding=3), nn.MaxPool2d(3, 2, 1), deform()], PLANE, [(0, 4)]),
    "patches": (lambda: [stem(kernel_size=4, stride=4, padding=0), deform()], PLANE, [(1.5, 4)]),
    "max pooling of 2": (lambda: [stem(stride=1), nn.MaxPool2d(2), deform()], PLANE, [(0.5, 2)]),
    "average pooling of 2": (lambda: [stem(stride=1), nn.AvgPool2d(2), deform()], PLANE, [(0.5, 2)]),
    "two poolings": (lambda: [stem(stride=1), nn.AvgPool2d(2), nn.MaxPool2d(2), deform()], PLANE, [(1.5, 4)]),
    "same": (lambda: [stem(stride=1, padding="same"), deform(padding="same"), deform()], PLANE, [(0, 1), (0, 1)]),
    "same, even": (
        lambda: [stem(kernel_size=4, stride=1, padding="same"), deform(kernel=2, padding="same"), deform()], PLANE,
        [(0.5, 1), (1, 1)],
    ),
    "no padding": (lambda: [stem(padding=0), deform(stride=2), deform()], PLANE, [(1, 2), (3, 4)]),
    "dilation": (
        lambda: [stem(stride=1, dilation=2, padding=0), deform(dilation=3, padding=1, stride=2), deform()], PLANE,
        [(2, 1), (4, 2)],
    ),
    "padding modes": (
        lambda: [deform(3, padding=2, padding_mode="circular"), deform(3, padding=2, padding_mode="reflect"), deform(3)], PLANE,
        [(0, 1), (-1, 1), (-2, 1)],
    ),
    "uneven padding": (lambda: [deform(3, padding=((2, 1), (2, 0))), deform(3)], PLANE, [(0, 1), (-1, 1)]),
    "transposed": (lambda: [stem(), nn.ConvTranspose2d(4, 4, 2, stride=2), deform()], PLANE, [(0, 2), (-0.5, 1)][1:]),
    "upsampling": (lambda: [stem(), nn.Upsample(scale_factor=2, mode="bilinear"), deform()], PLANE, [(-0.5, 1)]),
    "nearest": (lambda: [stem(), nn.Upsample(scale_factor=2), deform()], PLANE, [(-0.5, 1)]),
    "U-Net": (lambda: [UNet(nn.ConvTranspose2d(4, 4, 2, stride=2))], PLANE, [(0, 1)]),
    "U-Net, interpolated": (lambda: [UNet(nn.Upsample(scale_factor=2, mode="bilinear"))], PLANE, [(0, 1)]),
    "1-D": (lambda: [nn.Conv1d(3, 4, 3, 2), nn.MaxPool1d(2), DeformConv1d(4, 4, 3)], (1, 3, 40), [(2, 4)]),
    "3-D": (lambda: [nn.Conv3d(3, 4, 3, 2), nn.MaxPool3d(2), DeformConv3d(4, 4, 1)], (1, 3, 13, 15, 17), [(2, 4)]),
    "one image": (lambda: [stem(), deform()], PLANE[1:], [(0, 2)]),
    "a batch": (lambda: [stem(), deform()], (3, 3, 20, 24), [(0, 2)]),
    "passed": (lambda: [stem(), CalledWithOffsets(deform(padding=1, predict_offsets=False)), deform()], PLANE, [(0, 2)] * 2),
    "torchvision": (
        lambda: [stem(), CalledWithOffsets(torchvision.ops.DeformConv2d(4, 4, 3, padding=1)), deform()], PLANE, [(0, 2)] * 2
    ),
    "to_torchvision": (
        lambda: [stem(), to_torchvision(deform(stride=2, padding=((0, 1), (0, 1)))), deform()], PLANE, [(0, 2), (2, 4)]
    ),
    "kornia": (lambda: [stem(), kornia_layer(mask=True), deform()], PLANE, [(0, 2)] * 2),
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_where_a_net_puts_its_layers(name):
    make, shape, expected = NETS[name]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using padding='same' with even kernel")
        trace = recorded(nn.Sequential(*make()), torch.rand(shape))
        rank = trace.calls[0].D
        found = [trace.geometry(layer) for layer in trace.layers]
    for geometry, (origin, step) in zip(found, expected, strict=True):
        assert geometry.source == "graph"
        assert geometry.origin == pytest.approx((origin,) * rank)
        assert geometry.step == pytest.approx((step,) * rank)
        assert geometry.difference <= 2 * step


def test_every_axis_has_its_own():
    net = nn.Sequential(
        nn.Conv2d(3, 4, (3, 6), stride=(2, 3), padding=(0, 1)), DeformConv2d(4, 4, (2, 3), stride=(1, 2)), deform()
    )
    trace = recorded(net, torch.rand(PLANE))
    assert (trace.geometry("1").origin, trace.geometry("1").step) == ((1, 1.5), (2, 3))
    assert (trace.output_geometry("1").origin, trace.output_geometry("1").step) == ((2, 4.5), (2, 6))
    assert trace.geometry("2").origin == trace.output_geometry("1").origin
    assert trace.unit("1", at=(2 + 2 * 5, 4.5 + 6 * 3)) == (5, 3)


def test_padding_in_the_model_moves_the_origin():
    assert recorded(Padded(), torch.rand(PLANE)).geometry("layer").origin == (-3, -1)


def test_a_shared_layer_has_a_geometry_at_every_call():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = deform(3, padding=1)

        def forward(self, x):
            return self.layer(F.avg_pool2d(self.layer(x), 2))

    trace = recorded(Twice(), torch.rand(PLANE))
    assert (trace.geometry("layer").origin, trace.geometry("layer").step) == ((0, 0), (1, 1))
    assert (trace.geometry("layer", 1).origin, trace.geometry("layer", 1).step) == ((0.5, 0.5), (2, 2))


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_torchvisions_resnet(name):
    net = getattr(torchvision.models, name)(weights=None)
    make_deformable(net, "resnet:conv3-conv5")
    trace = recorded(net, torch.rand(1, 3, 96, 64))
    last = trace.layers[-1]
    assert last.startswith("layer4.")
    assert (trace.geometry(last).origin, trace.geometry(last).step) == ((0.0, 0.0), (32.0, 32.0))
    for number in range(1, 5):
        geometry = trace.output_geometry(f"layer{number}")
        assert (geometry.origin, geometry.step, geometry.source) == ((0.0, 0.0), (2.0 ** (number + 1),) * 2, "graph")
    assert {trace.geometry(layer).source for layer in trace.layers} == {"graph"}
    assert [layer for layer, _ in reversed(trace.before(last))] == trace.layers[:-1]
    assert trace.unit("layer4", at=(33, 17)) == (1, 1)


@pytest.mark.slow
def test_torchvisions_detectors_resize_and_pad_their_images():
    net = torchvision.models.detection.fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, min_size=96, max_size=200, rpn_post_nms_top_n_test=5
    )
    make_deformable(net.backbone.body, "resnet:conv5")
    trace = recorded(net, [torch.rand(3, 48, 64), torch.rand(3, 60, 50)])
    assert trace.size == (48, 64)
    for layer in ("backbone.body.layer4", "backbone.fpn.layer_blocks.0.0"):
        geometry = trace.output_geometry(layer)
        stride = 16 if "layer4" in layer else 2  # the image is drawn twice as large
        assert geometry.step == (stride, stride)
        assert geometry.source == "graph"
    # Of an image that is drawn larger by 2, pixel i of the larger is at (i + 0.5)/2 - 0.5.
    assert trace.output_geometry("backbone.body.layer4").origin == (-0.25, -0.25)
    assert trace.geometry("backbone.body.layer4.0.conv2").step == (8, 8)


class Detour(nn.Module):
    """A net with something between its stem and its layer."""

    def __init__(self, what, **how):
        super().__init__()
        self.stem, self.what, self.layer = stem(**how), what, deform(padding=1)

    def forward(self, x):
        return self.layer(self.what(self.stem(x)))


class OutsideOfPyTorch(torch.autograd.Function):
    """What no operation of PyTorch computes, with a derivative."""

    @staticmethod
    def forward(ctx, x):
        return torch.from_numpy(x.detach().numpy()[..., ::-1].copy() * 2)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.flip((-1,)) * 2


def sampled(x):
    return F.grid_sample(x, F.affine_grid(torch.eye(2, 3)[None], x.shape, align_corners=False), align_corners=False)


@pytest.mark.parametrize(
    ("what", "how", "origin", "step"),
    [
        (lambda x: x.roll((2, -1), (2, 3)), {}, (-4, 2), (2, 2)),
        (lambda x: x.roll(1, 3), {"kernel_size": 7, "stride": 3, "padding": 0}, (3, 0), (3, 3)),
        (sampled, {}, (0, 0), (2, 2)),
        (OutsideOfPyTorch.apply, {}, (0, 2 * 31), (2, -2)),
        (OutsideOfPyTorch.apply, {"kernel_size": 7, "stride": 4, "padding": 0}, (3, 3 + 4 * 14), (4, -4)),
        (lambda x: x.flatten(2)[..., torch.arange(24 * 32)].unflatten(-1, (24, 32)), {}, (0, 0), (2, 2)),
    ],
    ids=["roll", "roll, 3", "grid_sample", "function", "function, 4", "index"],
)
def test_what_cannot_be_followed_is_measured_by_the_gradient(what, how, origin, step):
    torch.manual_seed(0)
    geometry = recorded(Detour(what, **how), torch.rand(1, 3, 48, 64)).geometry("layer")
    assert geometry.source == "gradient"
    assert geometry.difference is None
    middle = (np.array([48, 64]) - 1) / 2 / np.abs(step)
    assert geometry.step == pytest.approx(step, rel=0.05)
    assert geometry.to_image(middle).tolist() == pytest.approx((np.array(origin) + middle * step).tolist(), abs=1.5)


def test_any_modules_output_can_be_asked_for_and_is_measured_too():
    trace = recorded(Rolling(), torch.rand(PLANE))
    assert trace.output_geometry("stem").source == "graph"
    geometry = trace.output_geometry("after")
    assert geometry.source == "gradient"
    assert geometry.step == (1, 1)
    assert geometry.origin == pytest.approx((1 - 2, 1), abs=0.5)
    assert trace.output_geometry("after") is geometry


class Rolling(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.after = deform(3, padding=1), nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.after(self.stem(x).roll(2, 2)).mean((2, 3))


def test_a_layer_whose_kernel_is_none_of_pytorchs_is_followed():
    """As mmcv's: its output is new memory, which something filled."""

    class Filled(torchvision.ops.DeformConv2d):
        def forward(self, input, offset, mask=None):
            output = super().forward(input, offset, mask)
            return torch.from_numpy(output.detach().numpy().copy())

    net = nn.Sequential(stem(), CalledWithOffsets(Filled(4, 4, 3, stride=2, padding=0, dilation=2), masked=False), deform())
    net[1].offset_predictor = nn.Conv2d(4, 18, 5, stride=2)
    trace = recorded(net, torch.rand(PLANE))
    geometry = trace.geometry("2")
    assert (geometry.origin, geometry.step, geometry.source) == ((4, 4), (4, 4), "graph")
    assert trace.before("2") == [("1.layer", 0)]


def test_layers_in_the_same_place_are_told_apart_by_their_batch():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.whole, self.copies = deform(3, padding=1), deform(3, padding=1)

        def forward(self, x):
            return self.copies(self.whole(x).expand(2, -1, -1, -1))

    trace = recorded(Net(), torch.rand(PLANE))
    assert trace.geometry("whole").step == (1, 1)
    with pytest.raises(ValueError, match="it gets 2 maps for one image"):
        trace.geometry("copies")


def detached(x):
    return x.detach()


def without_gradients(x):
    with torch.no_grad():
        return F.relu(x)


@pytest.mark.parametrize("what", [detached, without_gradients])
def test_a_part_without_gradients_is_followed(what):
    geometry = recorded(Detour(what), torch.rand(PLANE)).geometry("layer")
    assert (geometry.origin, geometry.step, geometry.source, geometry.difference) == ((0, 0), (2, 2), "graph", None)


class Regions(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = deform(3, padding=1), DeformConv2d(3, 3, 3, padding=1)

    def forward(self, x):
        boxes = torch.tensor([[0, 0.0, 0, 9, 9], [0, 3, 3, 15, 15]])
        return self.head(torchvision.ops.roi_align(self.layer(x), boxes, 7))


@pytest.mark.parametrize(
    ("make", "layer", "message"),
    [
        (
            lambda: Detour(lambda x: x.detach().roll(1, 2)), "layer",
            "where layer 'layer' lies in the image could not be found: .* since the model runs under torch.no_grad",
        ),
        (
            lambda: Detour(lambda x: x.roll(1, 2) * 0), "layer",
            "where layer 'layer' lies .* the gradient with respect to the image is 0 or not finite",
        ),
        (
            lambda: Detour(lambda x: Underivable.apply(x)), "layer",
            "where layer 'layer' lies .* gradient with respect to the image could not be computed: no derivative here",
        ),
        (Regions, "head", "where layer 'head' lies .* it gets 2 maps for one image, as layers that work on regions do"),
        (lambda: Detour(lambda x: x.mT), "layer", "where layer 'layer' lies .* are not the image's, in the image's order"),
    ],
)  # fmt: skip
def test_a_place_that_cannot_be_found_is_told_so(make, layer, message):
    trace = recorded(make(), torch.rand(PLANE))
    with pytest.raises(ValueError, match=message):
        trace.geometry(layer)
    with pytest.raises(ValueError, match=message):
        trace.unit(layer, at=(3, 4))


class Underivable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.from_numpy(x.detach().numpy() * 2)

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("no derivative here")


def test_scripts_and_checkpointed_parts_within_a_model_are_followed():
    with warnings.catch_warnings():  # jit.script is deprecated
        warnings.simplefilter("ignore")
        script = torch.jit.script(nn.Sequential(stem(), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.script, self.part, self.last = script, nn.Sequential(deform(padding=1), nn.BatchNorm2d(4)), deform()

        def forward(self, x):
            return self.last(checkpoint(self.part, self.script(x), use_reentrant=False))

    net = Net()
    with record(net) as trace:
        net(torch.rand(PLANE))
    mean = net.part[1].running_mean.clone()
    for layer in ("part.0", "last"):
        geometry = trace.geometry(layer)
        assert (geometry.origin, geometry.step, geometry.source) == ((1, 1), (4, 4), "graph")
        assert geometry.difference is not None
    assert trace.before("last") == [("part.0", 0)]
    assert torch.equal(net.part[1].running_mean, mean)
    with pytest.raises(ValueError, match=r"layer 'script' is a script of torch\.jit, .* expected a Python module"):
        Probe(trace, "script")


def test_a_followed_net_whose_gradient_fails_keeps_what_was_followed():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = deform(3, padding=1)

        def forward(self, x):
            return self.layer(x + Underivable.apply(x))

    geometry = recorded(Both(), torch.rand(PLANE)).geometry("layer")
    assert (geometry.step, geometry.source, geometry.difference) == ((1, 1), "graph", None)


def test_a_gradient_that_lies_far_from_the_operations_is_warned_of():
    """A kernel that is 0 but for one corner looks elsewhere than its window's middle."""
    net = nn.Sequential(nn.Conv2d(1, 1, 41, padding=20, bias=False), DeformConv2d(1, 1, 3, padding=1))
    nn.init.zeros_(net[0].weight)
    net[0].weight.data[0, 0, 0, 0] = 1
    trace = recorded(net, torch.rand(1, 1, 64, 64))
    with pytest.warns(
        UserWarning, match=r"layer '1': .* lies at image pixel \(31.5, 31.5\), and by the gradient at \(1\d.\d, 1\d.\d\)"
    ):
        geometry = trace.geometry("1")
    assert geometry.origin == (0, 0)
    assert geometry.difference == pytest.approx(19, abs=3)


def test_a_net_whose_offsets_are_large_is_not_warned_of():
    net = nn.Sequential(deform(3, padding=1), deform(3, padding=1))
    for layer in net:
        nn.init.constant_(layer.offset_conv.bias, 6.0)
    geometry = recorded(net, torch.rand(1, 3, 64, 64)).geometry("1")
    assert geometry.difference == pytest.approx(6, abs=1)


def test_the_gradient_of_a_unit_agrees_where_all_weights_are_alike():
    """Without a maximum and far from the border, the centroid is exactly the unit's position."""
    layers = [
        stem(padding=0),
        nn.AvgPool2d(2),
        nn.Conv2d(4, 4, 2, padding="same"),
        nn.Upsample(scale_factor=2, mode="bilinear"),
    ]
    net = nn.Sequential(*layers, deform(stride=2, padding=1))
    for parameter in net[:4].parameters():
        nn.init.ones_(parameter)
    nn.init.ones_(net[4].weight)
    x = torch.rand(1, 3, 64, 64, requires_grad=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using padding='same' with even kernel")
        trace = recorded(net, x.detach())
        (gradient,) = torch.autograd.grad(net(x)[0, :, 8, 6].sum(), x)
        weights = gradient.abs().sum((0, 1)).double()
        centroid = [float((weights.sum(1 - axis) * torch.arange(64)).sum() / weights.sum()) for axis in (0, 1)]
        geometry = trace.output_geometry("4")
    assert geometry.to_image((8, 6)).tolist() == pytest.approx(centroid, abs=1e-4)
    assert trace.unit("4", at=centroid) == (8, 6)


def test_cells_and_pixels():
    geometry = Geometry((0.5, 1.5), (2.0, 4.0), "graph", None)
    assert geometry.to_image([[0, 0], [3, 2]]).tolist() == [[0.5, 1.5], [6.5, 9.5]]
    assert geometry.to_cells(geometry.to_image([[0.25, 7]])).tolist() == [[0.25, 7]]


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("steem", "the model has no layer 'steem'; its deformable layers are 'layer'"),
        (
            "head",
            r"layer 'head' has an output of shape \(1, 5\); expected one that returns a map, \(N, C\) and 2 axes of cells",
        ),
        ("turned", "where layer 'turned' lies .* the last axes of its map are not the image's"),
        ("pair", "layer 'pair' has no call 0 that returns one tensor, in evaluation mode"),
    ],
)
def test_the_output_of_what_is_no_layer_of_maps_is_told_so(layer, message):
    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.pair, self.head, self.turned = deform(3), Pair(), nn.Linear(3, 5), nn.Linear(3, 5)

        def forward(self, x):
            x = self.layer(x)
            self.turned(x.permute(0, 2, 3, 1))
            return self.head(self.pair(x)[0].mean((2, 3)))

    with pytest.raises(ValueError, match=message):
        recorded(randomised(Net()), torch.rand(PLANE)).output_geometry(layer)


def test_a_picture_to_which_one_side_of_a_map_does_not_respond_gives_no_warning():
    torch.manual_seed(0)
    image = torch.zeros(1, 3, 96, 160)
    image[..., 70:] = torch.rand(90)  # the rest is black, and behind a ReLU without gradient
    stem = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False), nn.ReLU())
    net = nn.Sequential(stem, DeformConv2d(6, 4, 3, padding=1)).eval()
    with record(net) as trace:
        net(image)
    geometry = trace.geometry("1")
    assert (geometry.origin, geometry.step, geometry.source) == ((0.0, 0.0), (2.0, 2.0), "graph")
    assert geometry.difference is not None and geometry.difference < 4
