"""Gluon blocks that predict their own offsets: MXNet's constructors, parameters and names, on this library's kernels."""

from __future__ import annotations

from math import gcd
from typing import Any, ClassVar, NoReturn

import mxnet as mx
import numpy as np
from mxnet.gluon.contrib import cnn
from mxnet.gluon.parameter import DeferredInitializationError
from mxnet.ndarray import NDArray

from deformconv.errors import ShapeError
from deformconv.gluon.arrays import operand
from deformconv.gluon.calls import check_array
from deformconv.gluon.functional import DEFORM_CONV, deform_conv
from deformconv.ops.conv.layer import MASK_SCALE, Predicted, activated, check_divides, predicted
from deformconv.ops.conv.spec import Operand, check_input
from deformconv.ops.window import count, integers
from deformconv.ops.words import unexpected
from deformconv.sampling.rule import check_boundary

__all__ = ["DeformableConvolution", "ModulatedDeformableConvolution"]


class _Deformable:
    """What both blocks add to MXNet's class. That is the next base class, and makes the parameters."""

    _kwargs_offset: dict[str, Any]
    _kwargs_deformable_conv: dict[str, Any]
    act: Any
    offset_weight: Any
    offset_bias: Any
    deformable_conv_weight: Any
    deformable_conv_bias: Any
    _in_channels: int

    version_boundary: ClassVar[str]
    modulated: ClassVar[bool]

    def __init__(
        self,
        channels: int,
        kernel_size: Any = (1, 1),
        strides: Any = (1, 1),
        padding: Any = (0, 0),
        dilation: Any = (1, 1),
        groups: int = 1,
        num_deformable_group: int = 1,
        layout: str = "NCHW",
        use_bias: bool = True,
        in_channels: int = 0,
        activation: str | None = None,
        weight_initializer: Any = None,
        bias_initializer: Any = "zeros",
        offset_weight_initializer: Any = "zeros",
        offset_bias_initializer: Any = "zeros",
        offset_use_bias: bool = True,
        op_name: str | None = None,
        adj: Any = None,
        prefix: str | None = None,
        params: Any = None,
        *,
        boundary: str | None = None,
        **unknown: NoReturn,
    ) -> None:
        if unknown:
            raise unexpected(_Deformable.__init__, unknown, type(self).__name__)
        self._boundary = self.version_boundary if boundary is None else boundary
        check_boundary(self._boundary)
        if layout != "NCHW":
            raise ValueError(f"`layout` is {layout!r}; expected 'NCHW', the only one that MXNet's own operator runs as well.")
        kernel_size = integers("kernel_size", kernel_size, 2, 1)
        _check_groups(channels, in_channels, groups, num_deformable_group, predicted(kernel_size, 1, self.modulated))
        self._predicted = predicted(kernel_size, num_deformable_group, self.modulated)
        super().__init__(
            channels,
            kernel_size,
            integers("strides", strides, 2, 1),
            integers("padding", padding, 2, 0),
            integers("dilation", dilation, 2, 1),
            groups, num_deformable_group, layout, use_bias, in_channels, activation,
            weight_initializer, bias_initializer, offset_weight_initializer, offset_bias_initializer, offset_use_bias,
            op_name, adj, prefix, params,
        )  # type: ignore[call-arg]  # fmt: skip

    def forward(self, x: Any, *arguments: Any) -> Any:
        """Check an array before MXNet sees it, since MXNet passes on no text; a Symbol is checked when it is bound."""
        if isinstance(x, NDArray):
            self._check(x)
        return super().forward(x, *arguments)  # type: ignore[misc]

    def hybrid_forward(
        self,
        F: Any,
        x: Any,
        offset_weight: Any,
        deformable_conv_weight: Any,
        offset_bias: Any = None,
        deformable_conv_bias: Any = None,
    ) -> Any:
        """Predict offsets and mask, and convolve with them."""
        offset, mask = self._predict(F, x, offset_weight, offset_bias)
        window = self._kwargs_deformable_conv
        output = deform_conv(
            x, offset, deformable_conv_weight, deformable_conv_bias,
            window["stride"], window["pad"], window["dilate"], mask,
            groups=window["num_group"], offset_groups=window["num_deformable_group"], boundary=self._boundary, name="fwd",
        )  # fmt: skip
        return output if self.act is None else self.act(output)

    def offsets_and_mask(self, x: Any) -> tuple[Any, Any]:
        """Return what the block predicts for the NDArray `x`: offsets in input pixels, and the mask or, in v1, None."""
        self._check(x)
        try:
            self.offset_weight.data(x.context)
        except DeferredInitializationError:
            with mx.autograd.pause():
                self(x)  # type: ignore[operator]
        bias = None if self.offset_bias is None else self.offset_bias.data(x.context)
        return self._predict(mx.nd, x, self.offset_weight.data(x.context), bias)

    def _predict(self, F: Any, x: Any, weight: Any, bias: Any) -> tuple[Any, Any]:
        raise NotImplementedError

    def _raw(self, F: Any, x: Any, weight: Any, bias: Any) -> Any:
        parameters = (weight,) if bias is None else (weight, bias)
        return F.Convolution(x, *parameters, cudnn_off=True, **self._kwargs_offset)

    def __repr__(self) -> str:
        """MXNet's text for v1, for v2 as well, with the arguments that it leaves out."""
        window = self._kwargs_deformable_conv
        outputs, inputs = self.deformable_conv_weight.shape[:2]
        in_channels = max(0, self._in_channels or inputs * window["num_group"]) or None
        shown = [f"{in_channels} -> {outputs}, kernel_size={window['kernel']}, stride={window['stride']}"]
        for name, key, default in (
            ("padding", "pad", (0, 0)), ("dilation", "dilate", (1, 1)), ("groups", "num_group", 1),
            ("num_deformable_group", "num_deformable_group", 1),
        ):  # fmt: skip
            if window[key] != default:
                shown.append(f"{name}={window[key]}")
        shown += ["bias=False"] * (self.deformable_conv_bias is None) + ["offset_use_bias=False"] * (self.offset_bias is None)
        if self._boundary != self.version_boundary:
            shown.append(f"boundary={self._boundary!r}")
        shown += [str(self.act)] * bool(self.act)
        return f"{type(self).__name__}({', '.join(shown)})"

    def _check(self, x: Any) -> None:
        """Raise what the operator would raise for this input, before the offsets are predicted."""
        check_array("data", x)
        window, data = self._kwargs_deformable_conv, operand(x)
        outputs, inputs, *kernel = self.deformable_conv_weight.shape
        in_channels = inputs * window["num_group"] if inputs > 0 else None
        if inputs < 1:  # deferred
            inputs = max(1, data.shape[1] // window["num_group"]) if len(data.shape) > 1 else 1
        weight = Operand((outputs, inputs, *kernel), np.dtype(self.deformable_conv_weight.dtype).name, data.device)
        try:
            check_input(
                data, weight,
                stride=tuple(window["stride"]),
                padding=tuple((amount, amount) for amount in window["pad"]),
                dilation=tuple(window["dilate"]),
                groups=window["num_group"],
                rank=None,
                in_channels=in_channels,
            )  # fmt: skip
        except (ShapeError, TypeError, ValueError) as error:
            raise DEFORM_CONV.in_gluon_words(error) from None


class DeformableConvolution(_Deformable, cnn.DeformableConvolution):
    """Deformable convolution v1 that predicts its own offsets: `mxnet.gluon.contrib.cnn.DeformableConvolution`.

    It is a subclass of MXNet's block, with its constructor and its parameters, their names and their first values: a net
    changes one import and loads the `.params` that it saved. It computes, forward and backward, with this library's kernels on
    the CPU. The offsets are usually trained at a tenth of the learning rate:
    `net.collect_params(".*_offset_(weight|bias)").setattr("lr_mult", 0.1)`.

    Args:
        channels, kernel_size, strides, padding, dilation, groups, num_deformable_group, use_bias, in_channels, activation: as
            MXNet's block.
        weight_initializer, bias_initializer, offset_weight_initializer, offset_bias_initializer, offset_use_bias: as well.
        layout: "NCHW"; MXNet's accepts another and then fails to run.
        op_name, adj, prefix, params: as MXNet's block.
        boundary: "inside", MXNet's rule for v1, which None means; or "zeros", the rule of v2 and of torchvision: see
            `deformconv.deform_conv`.

    Shape:
        data (N, in_channels, H, W), output (N, channels, H_out, W_out).

    Raises:
        ShapeError: an array's shape does not fit. Within a hybridized parent, MXNetError, and the text is on stderr.

    Example:
        >>> import mxnet as mx
        >>> from deformconv.gluon import DeformableConvolution
        >>> layer = DeformableConvolution(8, kernel_size=3, padding=1)
        >>> layer.initialize()
        >>> layer(mx.nd.ones((10, 3, 100, 100))).shape
        (10, 8, 100, 100)
        >>> layer
        DeformableConvolution(3 -> 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))

    Paper: arXiv 1703.06211, equation 2.
    """

    version_boundary = "inside"
    modulated = False

    def _predict(self, F: Any, x: Any, weight: Any, bias: Any) -> tuple[Any, Any]:
        return self._raw(F, x, weight, bias), None


class ModulatedDeformableConvolution(_Deformable, cnn.ModulatedDeformableConvolution):
    """Deformable convolution v2 that predicts offsets and masks: `mxnet.gluon.contrib.cnn.ModulatedDeformableConvolution`.

    It trains on the CPU, where MXNet's block has no backward pass. Masks are 2*sigmoid of what is predicted, so that a fresh
    block's are 1.

    Args:
        boundary: "zeros", MXNet's rule for v2, which None means; or "inside". The other arguments are those of
            `DeformableConvolution`.

    Example:
        >>> import mxnet as mx
        >>> from deformconv.gluon import ModulatedDeformableConvolution
        >>> layer = ModulatedDeformableConvolution(8, kernel_size=3, padding=1)
        >>> layer.initialize()
        >>> with mx.autograd.record():
        ...     y = layer(mx.nd.ones((10, 3, 100, 100)))
        >>> y.backward()
        >>> offset, mask = layer.offsets_and_mask(mx.nd.ones((10, 3, 100, 100)))
        >>> offset.shape, mask.shape
        ((10, 18, 100, 100), (10, 9, 100, 100))
        >>> layer
        ModulatedDeformableConvolution(3 -> 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))

    Paper: arXiv 1811.11168, equation 1.
    """

    version_boundary = "zeros"
    modulated = True

    def _predict(self, F: Any, x: Any, weight: Any, bias: Any) -> tuple[Any, Any]:
        raw = self._raw(F, x, weight, bias)
        offset = F.slice_axis(raw, axis=1, begin=0, end=self._predicted.offsets)
        mask = F.slice_axis(raw, axis=1, begin=self._predicted.offsets, end=None)
        return activated(offset, mask, MASK_SCALE, None, F.tanh, F.sigmoid)


def _check_groups(channels: Any, in_channels: Any, groups: Any, offset_groups: Any, one_group: Predicted) -> None:
    """Check what MXNet would check in its own words, or not at all; `one_group` is what is predicted for one offset group."""
    groups, offset_groups = count("groups", groups), count("num_deformable_group", offset_groups)
    numbers = {"channels": count("channels", channels)}
    if in_channels:
        numbers["in_channels"] = count("in_channels", in_channels)
        check_divides("num_deformable_group", offset_groups, "in_channels", in_channels)
    for name, number in numbers.items():
        check_divides("groups", groups, name, number)
    each = one_group.channels
    if each * offset_groups % groups:
        raise ShapeError(
            f"`groups` is {groups}; in MXNet's block the predictor has as many groups, so it must divide its channels, "
            f"num_deformable_group x {each} = {offset_groups * each}: expected num_deformable_group to be a multiple "
            f"of {groups // gcd(groups, each)}."
        )
