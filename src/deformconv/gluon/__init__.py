"""Deformable convolution for MXNet Gluon: an operator for NDArray and Symbol, and blocks that stand where MXNet's own stood."""

try:
    import mxnet as _mxnet  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "mxnet":
        raise
    from deformconv.installation import command as _command

    raise ModuleNotFoundError(
        f"deformconv.gluon needs MXNet, which is not installed: {_command('gluon', 'mxnet==1.9.1', 'numpy<1.24')}", name="mxnet"
    ) from None
except AttributeError as error:  # MXNet asks for names such as numpy.bool, which NumPy 1.24 and later dropped
    import numpy as _numpy

    from deformconv.installation import command as _command

    if [int(part) for part in _numpy.__version__.split(".")[:2]] < [1, 24]:
        raise
    raise ImportError(
        f"deformconv.gluon needs MXNet, and MXNet does not load with NumPy {_numpy.__version__}; it needs one below 1.24, "
        f"in an environment of its own: {_command('gluon', 'mxnet==1.9.1', 'numpy<1.24')}"
    ) from error

from deformconv.gluon.blocks import DeformableConvolution, ModulatedDeformableConvolution
from deformconv.gluon.functional import deform_conv
from deformconv.gluon.roi_pool import deform_roi_pool

__all__ = ["DeformableConvolution", "ModulatedDeformableConvolution", "deform_conv", "deform_roi_pool"]
