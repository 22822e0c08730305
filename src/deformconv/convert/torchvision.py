"""Our kernels under torchvision's operator, for code that one cannot edit."""

from __future__ import annotations

from collections.abc import Callable

from deformconv.convert.acceleration import Acceleration, Place
from deformconv.installation import import_for

__all__ = ["accelerate_torchvision"]


def accelerate_torchvision() -> Acceleration:
    """Put this library's kernels under `torchvision.ops.deform_conv2d`, forward and backward, on CPUs and GPUs.

    Every caller gets them, however it imported the function or the layer: models of a hub, subclasses of
    `torchvision.ops.DeformConv2d`, compiled and traced graphs. Calls that this library refuses, as a mask with
    too few channels, go to torchvision's own kernel and raise what they always raised. It lasts until `undo()`
    of the result, or until the end of its `with` block, for the whole process.

    Tensors on a GPU run this library's GPU kernels, with PyTorch 2.9 or newer. What they cannot run, for want of
    Triton or of a C compiler as an example, goes to torchvision's own kernel as well (`deformconv doctor` says
    what is missing); with a torchvision that was built for CPUs alone it runs PyTorch operations. Where there is
    no GPU nothing else changes, and other devices are left alone.

    Returns:
        An Acceleration, with `undo()`, to be used as a context manager or not.

    Raises:
        ModuleNotFoundError: PyTorch or torchvision is not installed.

    Example:
        >>> import torch
        >>> from torchvision.ops import deform_conv2d
        >>> from deformconv.convert import accelerate_torchvision
        >>> x, offset, weight = torch.rand(2, 3, 9, 9), torch.randn(2, 18, 7, 7), torch.rand(4, 3, 3, 3)
        >>> expected = deform_conv2d(x, offset, weight)
        >>> with accelerate_torchvision():
        ...     y = deform_conv2d(x, offset, weight)         # this library's kernels
        >>> torch.allclose(y, expected, atol=1e-4)
        True
    """
    import deformconv.torch  # noqa: F401  (it says what to install where PyTorch is missing)

    import_for("accelerate_torchvision", "torchvision", "torchvision")  # it registers the operator
    return Acceleration(_TORCHVISION)


def _put() -> Callable[[], None]:
    """Registrations that last until what is returned is called."""
    import torch

    from deformconv.convert.torchvision_kernels import dispatch_keys, kernels

    library = torch.library.Library("torchvision", "IMPL")
    for key in dispatch_keys():
        for name, kernel in kernels(key).items():
            library.impl(name, kernel, key, with_keyset=True)
    destroy: Callable[[], None] = library._destroy
    return destroy


_TORCHVISION = Place(_put)
