"""MXNet's operators by their names and with their arguments, for code that calls them: one import changes.

`DeformableConvolution` stands for `mxnet.nd.contrib.DeformableConvolution` and `mxnet.sym.contrib.DeformableConvolution`, and
`ModulatedDeformableConvolution` and `DeformablePSROIPooling` for their namesakes. They take NDArrays and Symbols alike, and run
`deformconv.gluon.deform_conv` and `deformconv.gluon.deform_roi_pool`.
"""

from __future__ import annotations

from numbers import Real
from typing import Any

import mxnet as mx
import numpy as np
from mxnet.symbol import Symbol

from deformconv.errors import ShapeError
from deformconv.gluon import calls
from deformconv.gluon.functional import DEFORM_CONV
from deformconv.gluon.roi_pool import DEFORM_PSROI_POOL
from deformconv.ops.window import count, integers

__all__ = ["DeformableConvolution", "DeformablePSROIPooling", "ModulatedDeformableConvolution"]


def DeformableConvolution(
    data: Any = None,
    offset: Any = None,
    weight: Any = None,
    bias: Any = None,
    kernel: Any = None,
    stride: Any = (),
    dilate: Any = (),
    pad: Any = (),
    num_filter: int | None = None,
    num_group: int = 1,
    num_deformable_group: int = 1,
    workspace: int = 1024,
    no_bias: bool = False,
    layout: str | None = None,
    name: str | None = None,
    *,
    boundary: str = "inside",
) -> Any:
    """Deformable convolution v1 with the arguments of MXNet's operator.

    Args:
        data, offset, weight, bias: all NDArrays or all Symbols. Where one is not passed and no other is an NDArray, MXNet makes
            a variable of the name `<name>_data`, `<name>_offset`, `<name>_weight` or `<name>_bias`, and so does this.
        kernel, num_filter: required; they must be those of `weight`.
        stride, dilate, pad: one integer per axis; () is 1, 1 and 0.
        num_group, num_deformable_group: deformconv's `groups` and `offset_groups`.
        no_bias: True leaves `bias` out.
        workspace, layout: of no effect; `layout` is MXNet's only one, the channels before the axes.
        name: the Symbol's name.
        boundary: "inside" is MXNet's rule for v1; "zeros" that for v2.

    Returns:
        The output, shape (N, num_filter, *O), of the kind that was passed.

    Raises:
        ShapeError, TypeError, ValueError: as `deformconv.gluon.deform_conv`, and for `kernel` and `num_filter`.

    Example:
        The thread's, with an offset of 18 channels in place of 27.

        >>> import mxnet as mx
        >>> from deformconv.gluon import contrib
        >>> data, offset = mx.sym.var("data"), mx.sym.var("offset")
        >>> symbol = contrib.DeformableConvolution(
        ...     data, offset, kernel=(3, 3), pad=(1, 1), num_filter=3, no_bias=True, name="conv0"
        ... )
        >>> symbol.list_arguments()
        ['data', 'offset', 'conv0_weight']
        >>> symbol.infer_shape(data=(10, 3, 100, 100), offset=(10, 18, 100, 100))[1]
        [(10, 3, 100, 100)]

    Paper: arXiv 1703.06211, equation 2.
    """
    operands = {"data": data, "offset": offset, "weight": weight, "bias": bias}
    groups = {"groups": num_group, "offset_groups": num_deformable_group, "boundary": boundary}
    return _call(operands, kernel, stride, dilate, pad, num_filter, groups, no_bias, name, "deformableconvolution")


def ModulatedDeformableConvolution(
    data: Any = None,
    offset: Any = None,
    mask: Any = None,
    weight: Any = None,
    bias: Any = None,
    kernel: Any = None,
    stride: Any = (),
    dilate: Any = (),
    pad: Any = (),
    num_filter: int | None = None,
    num_group: int = 1,
    num_deformable_group: int = 1,
    workspace: int = 1024,
    no_bias: bool = False,
    im2col_step: int = 64,
    layout: str | None = None,
    name: str | None = None,
    *,
    boundary: str = "zeros",
) -> Any:
    """Deformable convolution v2 with the arguments of MXNet's operator; see `DeformableConvolution`.

    `im2col_step` has no effect: a batch may have any size. MXNet's own has no backward pass on the CPU, this has.

    Example:
        >>> import mxnet as mx
        >>> from deformconv.gluon import contrib
        >>> x, offset, mask = mx.nd.ones((10, 3, 100, 100)), mx.nd.zeros((10, 18, 100, 100)), mx.nd.ones((10, 9, 100, 100))
        >>> weight = mx.nd.ones((3, 3, 3, 3))
        >>> contrib.ModulatedDeformableConvolution(
        ...     x, offset, mask, weight, kernel=(3, 3), pad=(1, 1), num_filter=3, no_bias=True
        ... ).shape
        (10, 3, 100, 100)

    Paper: arXiv 1811.11168, equation 1.
    """
    operands = {"data": data, "offset": offset, "mask": mask, "weight": weight, "bias": bias}  # the order of list_arguments()
    groups = {"groups": num_group, "offset_groups": num_deformable_group, "boundary": boundary}
    return _call(operands, kernel, stride, dilate, pad, num_filter, groups, no_bias, name, "modulateddeformableconvolution")


def _call(
    operands: dict[str, Any],
    kernel: Any,
    stride: Any,
    dilate: Any,
    pad: Any,
    num_filter: Any,
    groups: dict[str, Any],
    no_bias: bool,
    name: str | None,
    hint: str,
) -> Any:
    for key, value in (("kernel", kernel), ("num_filter", num_filter)):
        if value is None:
            raise TypeError(f"`{key}` is missing; expected it, as MXNet's operator does.")
    D = len(kernel) if isinstance(kernel, (tuple, list)) and 1 <= len(kernel) <= 3 else 2
    kernel, outputs = integers("kernel", kernel, D, 1), count("num_filter", num_filter)
    if no_bias:
        operands["bias"] = None
    if all(value is None or isinstance(value, Symbol) for value in operands.values()):
        name = _with_variables(operands, name, hint, without="bias" if no_bias else None)
    else:
        if operands["bias"] is None and not no_bias:
            raise TypeError("`bias` is missing; expected it, or no_bias=True.")
        shape = getattr(operands["weight"], "shape", None)
        if shape is not None and (shape[0], *shape[2:]) != (outputs, *kernel):
            raise ShapeError(
                f"`weight` has shape {tuple(shape)}; expected {(outputs, '*', *kernel)}, from num_filter={outputs} and "
                f"kernel={kernel}.".replace("'*'", "C_in/num_group")
            )
    window = {
        "stride": integers("stride", stride or 1, D, 1),
        "padding": integers("pad", pad or 0, D, 0),
        "dilation": integers("dilate", dilate or 1, D, 1),
    }
    return calls.call(DEFORM_CONV, operands, window | groups, None, name, {"weight_shape": (outputs, 0, *kernel)})


def _with_variables(operands: dict[str, Any], name: str | None, hint: str, without: str | None) -> str:
    """Make a variable of each operand that is not there, but for one that is left out, as MXNet does; the symbol's name."""
    found: str = mx.name.NameManager.current.get(name, hint)
    for key, value in operands.items():
        if value is None and key != without:
            operands[key] = mx.sym.var(f"{found}_{key}")
    return found


def DeformablePSROIPooling(
    data: Any = None,
    rois: Any = None,
    trans: Any = None,
    spatial_scale: float | None = None,
    output_dim: int | None = None,
    group_size: int | None = None,
    pooled_size: int | None = None,
    part_size: int = 0,
    sample_per_part: int = 1,
    trans_std: float = 0.0,
    no_trans: bool = False,
    name: str | None = None,
) -> Any:
    """Deformable position-sensitive RoI pooling with the arguments of MXNet's operator.

    Args:
        data: shape (N, output_dim * group_size^2, H, W).
        rois: shape (R, 5), rows (image, x1, y1, x2, y2).
        trans: shape (R, 2 * classes, part_size, part_size), x before y; left out with no_trans=True. As with
            `DeformableConvolution`, what is not passed beside Symbols becomes a variable.
        spatial_scale, output_dim, group_size, pooled_size: required, as in MXNet's.
        part_size: 0 is `pooled_size`.
        sample_per_part: samples of a bin along either axis.
        trans_std: what offsets are multiplied by. 0, which is MXNet's default, means that nothing is deformed.
        no_trans: whether there are no offsets.
        name: the Symbol's name.

    Returns:
        The output, shape (R, output_dim, pooled_size, pooled_size), of the kind that was passed. MXNet's has a second output,
        the number of samples that count, which it hides: neither a call nor a symbol gives it, and here it is not made.

    Raises:
        ShapeError, TypeError, ValueError: as `deformconv.gluon.deform_roi_pool`. MXNet's own reads other memory where a number
        of an image, `output_dim` or the shape of `trans` is wrong.

    Example:
        >>> import mxnet as mx
        >>> from deformconv.gluon import contrib
        >>> x, rois = mx.nd.ones((1, 8 * 49, 20, 20)), mx.nd.array([[0, 16, 16, 160, 200]])
        >>> trans = mx.nd.zeros((1, 2, 7, 7))
        >>> contrib.DeformablePSROIPooling(
        ...     x, rois, trans, spatial_scale=1 / 16, output_dim=8, group_size=7, pooled_size=7, sample_per_part=4,
        ...     trans_std=0.1,
        ... ).shape
        (1, 8, 7, 7)

    Paper: arXiv 1703.06211, section 2.2.
    """
    required = {"spatial_scale": spatial_scale, "output_dim": output_dim, "group_size": group_size, "pooled_size": pooled_size}
    for key, value in required.items():
        if value is None:
            raise TypeError(f"`{key}` is missing; expected it, as MXNet's operator does.")
    bins, groups, outputs = (count(key, required[key]) for key in ("pooled_size", "group_size", "output_dim"))
    operands = {"data": data, "rois": rois, "trans": None if no_trans else trans}
    if all(value is None or isinstance(value, Symbol) for value in operands.values()):
        name = _with_variables(operands, name, "deformablepsroipooling", without="trans" if no_trans else None)
    else:
        if operands["trans"] is None and not no_trans:
            raise TypeError("`trans` is missing; expected it, or no_trans=True.")
        shape = getattr(data, "shape", None)
        if shape is not None and len(shape) == 4 and shape[1] != outputs * groups**2:
            raise ShapeError(
                f"`data` has {shape[1]} channels, shape {tuple(shape)}; expected output_dim * group_size^2 = "
                f"{outputs * groups**2}."
            )
    parameters = {
        "output_size": bins,
        "spatial_scale": _single("spatial_scale", spatial_scale),
        "sampling_ratio": count("sample_per_part", sample_per_part),
        "convention": "rounded",
        "gamma": _single("trans_std", trans_std),
        "group_size": groups,
        "part_size": count("part_size", part_size) if part_size else bins,
    }
    return calls.call(DEFORM_PSROI_POOL, operands, parameters, None, name, {"channels": outputs * groups**2})


def _single(name: str, value: Any) -> float:
    """A number in MXNet's precision, in which equal results need it."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"`{name}` is {value!r}; expected a number.")
    return float(np.float32(value))
