"""Layers that stand where nn.ConvNd stood: one text for 1, 2 and 3 spatial axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function

from deformconv.ops.conv.layer import (
    MASK_SCALE,
    LayerPadding,
    Predicted,
    activated,
    check_passed,
    check_predictor,
    checked_layer,
    describe,
    layer_padding,
    predicted,
)
from deformconv.ops.window import integers
from deformconv.ops.words import unexpected
from deformconv.torch import modes
from deformconv.torch.conv import prediction
from deformconv.torch.conv.functional import check_layer_input, deform_conv1d, deform_conv2d, deform_conv3d
from deformconv.torch.loading import Loading
from deformconv.torch.observed import Observed
from deformconv.torch.predictor import Predictor
from deformconv.torch.tensors import HALF

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


class OffsetPredictor(Predictor):
    """A predictor of offsets and masks: a convolution that computes in float32 where the net is in half precision.

    It has an nn.ConvNd's parameters and attributes, but is no nn.ConvNd, nor has its class "Conv" in its name: by these the
    loops that initialise nets find what to fill with random numbers, and a net would begin with random offsets. Its zeros
    are made as zeros, since some loaders switch torch.nn.init off.
    """

    groups, padding_mode, transposed = 1, "zeros", False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any,
        padding: Any,
        dilation: Any,
        device: Any,
        dtype: Any,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel_size
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.weight = nn.Parameter(torch.zeros((out_channels, in_channels, *kernel_size), device=device, dtype=dtype))
        self.bias: nn.Parameter | None = nn.Parameter(torch.zeros(out_channels, device=device, dtype=dtype))

    def forward(self, input: Tensor) -> Tensor:
        return _convolve(input, self.weight, self.bias, self.stride, self.padding, self.dilation)

    def extra_repr(self) -> str:
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"]
        rank = len(self.kernel_size)
        for name, default in (("padding", (0,) * rank), ("dilation", (1,) * rank)):
            if getattr(self, name) != default:
                parts.append(f"{name}={getattr(self, name)}")
        return ", ".join(parts)


def _convolve(input: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any) -> Tensor:
    """A convolution of float32 or float64: bfloat16 knows an offset of 20 pixels to 0.125 only.

    For tracers that record calls of functions, torch.fx for one, it is one, so that its dtypes are looked at later.
    """
    if has_torch_function((input, weight)):
        result: Tensor = handle_torch_function(_convolve, (input, weight), input, weight, bias, stride, padding, dilation)
        return result
    convolution: Any = (F.conv1d, F.conv2d, F.conv3d)[weight.ndim - 3]
    if weight.dtype in HALF or input.dtype in HALF or modes.autocast(input.device.type):
        whole = (t if t is None or t.dtype not in HALF else t.float() for t in (input, weight, bias))
        with modes.without_autocast(input.device.type):
            result = convolution(*whole, stride, padding, dilation)
    else:
        result = convolution(input, weight, bias, stride, padding, dilation)
    return result


class _DeformConvNd(Observed, Loading, nn.modules.conv._ConvNd):
    """An nn.ConvNd to everything that asks: what is done to a net's convolutions is done to the layer's `weight` and `bias`."""

    rank: ClassVar[int]
    _operator: ClassVar[Callable[..., Tensor]]
    _offset_convolution = OffsetPredictor
    _predictors = ("offset_conv",)
    _prepacked: ClassVar[Callable[[_DeformConvNd], _DeformConvNd]]  # a class derived from this one, which puts itself here
    _pack: Callable[..., Any] | None = None  # what has packed weights for the kernel that predicts and convolves

    padding: Any  # pairs as well
    offset_conv: OffsetPredictor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | tuple[tuple[int, int], ...] | str = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        modulated: bool = True,
        offset_groups: int | None = 1,
        predict_offsets: bool = True,
        mask_scale: float = MASK_SCALE,
        max_offset: float | None = None,
        boundary: str = "zeros",
        **unknown: NoReturn,
    ) -> None:
        if unknown:
            raise unexpected(_DeformConvNd.__init__, unknown, type(self).__name__)
        nn.Module.__init__(self)  # nn.ConvNd's would draw the random numbers before there is a predictor
        layer = checked_layer(
            self.rank, in_channels, out_channels, kernel_size, stride, padding, dilation, groups,
            offset_groups=offset_groups, predict_offsets=predict_offsets, mask_scale=mask_scale, max_offset=max_offset,
            boundary=boundary, padding_mode=padding_mode, padding_modes=PADDING_MODES,
        )  # fmt: skip
        self.in_channels, self.out_channels = layer.in_channels, layer.out_channels
        self.kernel_size, self.stride, self.dilation = layer.kernel_size, layer.stride, layer.dilation
        self.groups, self.offset_groups = layer.groups, layer.offset_groups
        self.mask_scale, self.max_offset = layer.mask_scale, layer.max_offset
        self.padding_mode: Any = padding_mode
        self.modulated, self.boundary = modulated, boundary
        self.transposed, self.output_padding = False, (0,) * self.rank  # as every nn.ConvNd has them
        self._set_padding(layer.padding)

        self.weight = nn.Parameter(torch.empty(layer.weight_shape, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(self.out_channels, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.offset_conv = self._predictor() if predict_offsets else None
        self.reset_parameters()

    def _set_padding(self, padding: LayerPadding) -> None:
        """Keep the padding as given, and as the operator, the predictor and F.pad take it."""
        vars(self)["padding"], self._pairs, symmetric = padding.shown, padding.pairs, padding.symmetric
        amounts = [amount for pair in reversed(self._pairs) for amount in pair]
        self._reversed_padding_repeated_twice = amounts  # nn.ConvNd's name for it
        zeros = self.padding_mode == "zeros"
        self._operator_padding = (0,) * self.rank if not zeros else self.padding if symmetric else self._pairs
        # In another mode the input is padded first, for the operator and the predictor alike; zeros that
        # nn.ConvNd cannot add itself, different amounts on two sides, for the predictor alone.
        self._input_padding = [] if zeros else amounts
        self._predictor_input_padding = amounts if zeros and not symmetric else []
        self._predictor_padding = tuple(before if zeros and symmetric else 0 for before, _ in self._pairs)

    def __setattr__(self, name: str, value: Any) -> None:
        """What changes a convolution's window in place, as backbones are made denser, changes the predictor's too."""
        super().__setattr__(name, value)
        if name in ("stride", "padding", "dilation", "padding_mode") and "_pairs" in vars(self):
            for each in ("stride", "dilation"):
                vars(self)[each] = integers(each, getattr(self, each), self.rank, 1)
            self._set_padding(layer_padding(self.padding, self.kernel_size, self.stride, self.dilation))
            if isinstance(predictor := self.offset_conv, OffsetPredictor):
                predictor.stride, predictor.dilation, predictor.padding = self.stride, self.dilation, self._predictor_padding

    def _predictor(self) -> OffsetPredictor:
        return self._offset_convolution(
            self.in_channels,
            self._predicted.channels,
            self.kernel_size,
            self.stride,
            self._predictor_padding,
            self.dilation,
            device=self.weight.device,
            dtype=self.weight.dtype,
        )

    @property
    def _predicted(self) -> Predicted:
        return predicted(self.kernel_size, self.offset_groups or 1, self.modulated)

    def reset_parameters(self) -> None:
        """Initialise `weight` and `bias` as nn.ConvNd does, and the predictor with zeros."""
        super().reset_parameters()
        if isinstance(self.offset_conv, OffsetPredictor):
            self.offset_conv.reset_parameters()

    def forward(self, input: Tensor, offset: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Convolve with predicted offsets and masks, or with exactly those passed: without mask, v1."""
        check_passed(offset, mask, self.modulated)
        weight = self.weight  # once, since a parametrization computes it at every access
        self._check_input(input, weight)
        padded = self._padded(input)
        if offset is None:
            if (output := self._forward_at_once(padded, weight)) is not None:
                if self._observers:
                    with torch.no_grad():  # what the kernel kept to itself
                        self._show(input, *self._predict(padded), output)
                return output
            offset, mask = self._predict(padded)
        shown = offset, mask
        if self._observers and offset.ndim == self.rank + 1:
            # What is shown has a batch axis, and lies on the way to the output, so that it has a gradient.
            shown = offset[None], None if mask is None else mask[None]
            offset, mask = shown[0][0], None if shown[1] is None else shown[1][0]
        output = self._operator(
            padded, offset, weight, self.bias, self.stride, self._operator_padding, self.dilation, mask,
            groups=self.groups, offset_groups=self.offset_groups, boundary=self.boundary,
        )  # fmt: skip
        if self._observers:
            self._show(input, *shown, output)
        return output

    def _forward_at_once(self, input: Tensor, weight: Tensor) -> Tensor | None:
        """The output, prediction and convolution in one kernel; None where something must see what lies between."""
        own, predictor = type(self), self.offset_conv
        usual = own._predict is _DeformConvNd._predict and type(predictor) is own._offset_convolution
        # A compiler is asked about first: PyTorch's of 2.5 does not read how a module is found to be plain.
        if modes.compiling() or predictor is None or not usual or not prediction.is_plain(predictor):
            return None
        window = predictor.stride, predictor.padding, predictor.dilation
        if window != (self.stride, self._predictor_padding, self.dilation):
            return None
        return prediction.forward(
            input, (weight, self.bias, predictor.weight, predictor.bias), self._predicted,
            (self.stride, self._operator_padding, self.dilation, self.groups, self.offset_groups, self.boundary),
            (self.mask_scale, self.max_offset), self._pack,
        )  # fmt: skip

    def offsets_and_mask(self, input: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return what the layer predicts for `input`: offsets in input pixels, and the mask or, in v1, None.

        `layer(input, *layer.offsets_and_mask(input))` computes what `layer(input)` computes; without gradients the latter
        predicts and convolves in one kernel, which rounds some sums otherwise.
        """
        self._check_input(input, self.weight)
        offset, mask = self._predict(self._padded(input))
        # PyTorch lets nobody change one of the views that a split has made.
        return offset if mask is None or self.max_offset is not None else offset.clone(), mask

    def prepack(self) -> _DeformConvNd:
        """Return a copy for inference whose weight is packed once, and not at each call: a `PrepackedDeformConv`.

        Its outputs have the same bits. The layer stays as it is, and shares nothing with the copy.

        Example:
            >>> import torch
            >>> from deformconv.torch import DeformConv2d
            >>> packed = DeformConv2d(64, 64, 3, padding=1).prepack()
            >>> with torch.inference_mode():
            ...     packed(torch.rand(1, 64, 28, 28)).shape
            torch.Size([1, 64, 28, 28])
        """
        return type(self)._prepacked(self)

    def _check_input(self, input: Tensor, weight: Tensor) -> None:
        """Say in the operator's words what the predictor or F.pad would say in theirs."""
        check_layer_input(
            input, weight,
            stride=self.stride, padding=self._pairs, dilation=self.dilation, groups=self.groups, rank=self.rank,
            in_channels=self.in_channels,
        )  # fmt: skip

    def _padded(self, input: Tensor) -> Tensor:
        return F.pad(input, self._input_padding, self.padding_mode) if self._input_padding else input

    def _predict(self, input: Tensor) -> tuple[Tensor, Tensor | None]:
        predictor = check_predictor(self.offset_conv)
        if self._predictor_input_padding:
            input = F.pad(input, self._predictor_input_padding)
        offset, mask = predictor(input), None
        if self.modulated:
            # Views that the kernels read in place, split along the channels, with and without a batch. Two slices would be
            # the same views, but backward each of them fills an array of all channels, and these are added.
            offset, mask = offset.split(tuple(self._predicted), -1 - self.rank)
        return activated(offset, mask, self.mask_scale, self.max_offset, torch.tanh, torch.sigmoid)

    def __prepare_scriptable__(self) -> NoReturn:
        """torch.jit.script asks every module of a net for this before it compiles."""
        raise NotImplementedError(
            f"torch.jit.script cannot compile a {type(self).__name__}; expected torch.jit.trace(net, example_input) or "
            "torch.export.export(net, (example_input,)), which record the operator, or, over two axes, "
            "torch.jit.script(deformconv.convert.to_torchvision(net)), a copy with torchvision's layers."
        )

    def extra_repr(self) -> str:
        return describe(self, biased=self.bias is not None, predicts=self.offset_conv is not None)


class DeformConv2d(_DeformConvNd, nn.Conv2d):
    """Deformable convolution (v1 or v2) that stands where nn.Conv2d stood, and predicts its own offsets.

    It is an nn.Conv2d to `isinstance`, so that loops which initialise, prune or normalise a net's convolutions reach its
    weight. `layer(x)` predicts an offset for every tap at every output position and, in v2, a mask. A fresh layer
    predicts offsets 0 and masks 1, so it computes what the convolution with its weights computes.
    `layer(x, offset)` and `layer(x, offset, mask)` use exactly what is passed: without mask, v1.

    `weight` and `bias` have nn.Conv2d's names and shapes: `layer.load_state_dict(conv.state_dict(),
    strict=False)` takes a trained convolution. The predictor is `layer.offset_conv`, a convolution over the
    same window, which such loops pass by: first 2*K channels of offsets per offset group (dy before dx), then K of
    masks. It is usually trained at a tenth of the learning rate: see `parameter_groups`.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as
            nn.Conv2d. `padding` may also be pairs ((top, bottom), (left, right)).
        modulated: True is v2, False is v1 (no masks).
        offset_groups: the channels are split into that many groups with offsets of their own; None, without a
            predictor, takes the number from the offsets that are passed.
        predict_offsets: False leaves out the predictor; offsets are then passed in the call.
        mask_scale: masks are mask_scale*sigmoid(raw). A state_dict notes the number, and one of other masks does not load.
        max_offset: bounds predicted offsets smoothly, to max_offset*tanh(raw/max_offset) input pixels.
        boundary: "zeros" or "inside", as in `deformconv.deform_conv`.

    Shape:
        input (N, C_in, H, W), output (N, C_out, H_out, W_out); for the K taps of the kernel offset
        (N, offset_groups*2*K, H_out, W_out) and mask (N, offset_groups*K, H_out, W_out).

    Raises:
        ShapeError: a shape or an argument's value does not fit.
        TypeError: no offset for a layer that predicts none, a mask without an offset, or mixed dtypes.

    Example:
        >>> import torch
        >>> from deformconv.torch import DeformConv2d
        >>> layer = DeformConv2d(3, 8, 3, padding=1)
        >>> x = torch.rand(10, 3, 100, 100)
        >>> layer(x).shape
        torch.Size([10, 8, 100, 100])
        >>> offset, mask = layer.offsets_and_mask(x)
        >>> offset.shape, mask.shape
        (torch.Size([10, 18, 100, 100]), torch.Size([10, 9, 100, 100]))

    Papers: v1, arXiv 1703.06211, equation 2; v2, arXiv 1811.11168, equation 1.
    """

    rank = 2
    _operator = staticmethod(deform_conv2d)


class DeformConv1d(_DeformConvNd, nn.Conv1d):
    """Where nn.Conv1d stood: input (N, C_in, W). The arguments are explained in `DeformConv2d`.

    Example:
        >>> import torch
        >>> from deformconv.torch import DeformConv1d
        >>> DeformConv1d(16, 8, 5, padding="same")(torch.rand(4, 16, 200)).shape
        torch.Size([4, 8, 200])
    """

    rank = 1
    _operator = staticmethod(deform_conv1d)


class DeformConv3d(_DeformConvNd, nn.Conv3d):
    """Where nn.Conv3d stood: input (N, C_in, D, H, W). The arguments are explained in `DeformConv2d`.

    Example:
        >>> import torch
        >>> from deformconv.torch import DeformConv3d
        >>> DeformConv3d(4, 6, 3, padding=1)(torch.rand(1, 4, 8, 16, 16)).shape
        torch.Size([1, 6, 8, 16, 16])
    """

    rank = 3
    _operator = staticmethod(deform_conv3d)


def parameter_groups(model: nn.Module, lr: float, offset_lr_scale: float = 0.1) -> list[dict[str, Any]]:
    """Split a model's parameters into groups for an optimizer, in which predictors of offsets train slower.

    Args:
        model: any module; the predictors are the `offset_conv` of deformable convolutions within, the `sampling_offsets` of
            deformable attention, the `offset` of DCNv3 and the `offset_mask` of DCNv4.
        lr: the learning rate of all other parameters.
        offset_lr_scale: the predictors' learning rate is lr*offset_lr_scale.

    Returns:
        At most two groups, the others' before the predictors'; frozen parameters are in neither, shared ones
        in one.

    Example:
        >>> import torch
        >>> from deformconv.torch import DeformConv2d, parameter_groups
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), DeformConv2d(8, 8, 3))
        >>> optimizer = torch.optim.SGD(parameter_groups(net, lr=0.1), momentum=0.9)
        >>> [round(group["lr"], 6) for group in optimizer.param_groups]
        [0.1, 0.01]
    """
    found = (_predictor_of_offsets(module) for module in model.modules())
    predictors = {id(parameter) for predictor in found if predictor is not None for parameter in predictor.parameters()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) not in predictors], "lr": lr},
        {"params": [p for p in trained if id(p) in predictors], "lr": lr * offset_lr_scale},
    ]
    return [group for group in groups if group["params"]]


def _predictor_of_offsets(module: nn.Module) -> nn.Module | None:
    """What a deformable convolution predicts its offsets by, or a module that trains as slowly itself."""
    if isinstance(module, _DeformConvNd):
        return module.offset_conv
    return module if isinstance(module, Predictor) and module.is_slow else None


def reset_predictors(model: nn.Module) -> None:
    """Set every predictor in a model to zero, so that its layers begin as plain convolutions and poolings: offsets 0, masks 1.

    A new layer's predictor is zero, and stays so in loops that initialise the nn.Conv2d of a net. It is needed after
    what fills all parameters alike, or leaves memory as it was: `for p in net.parameters(): nn.init.xavier_uniform_(p)`,
    an initialiser for a named part (`override` in mmengine), and in a `_init_weights` of transformers, whose `from_pretrained`
    asks it to fill what a checkpoint lacks.

    Args:
        model: any module, such a predictor among them. Predictors that you put in place of a layer's own are left alone, and
            so are the hidden layers of those that pool boxes, whose last layer alone begins as zeros.

    Example:
        >>> import torch
        >>> from deformconv.torch import DeformConv2d, reset_predictors
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), DeformConv2d(8, 8, 3))
        >>> for parameter in net.parameters():
        ...     _ = torch.nn.init.normal_(parameter)
        >>> reset_predictors(net)
        >>> net[1].offset_conv.weight.any().item()
        False
    """
    for module in model.modules():
        if isinstance(module, Predictor):
            module.reset_parameters()
