"""Deformable convolution for JAX: functions for arrays and tracers, under every transformation."""

try:
    import jax as _jax  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "jax":
        raise
    from deformconv.installation import command as _command

    raise ModuleNotFoundError(
        f"deformconv.jax needs JAX, which is not installed: {_command('jax', 'jax')}", name="jax"
    ) from None

from deformconv.jax.functional import deform_conv, deform_conv1d, deform_conv2d, deform_conv3d, explain
from deformconv.jax.labels import offset_labels

__all__ = ["deform_conv", "deform_conv1d", "deform_conv2d", "deform_conv3d", "explain", "offset_labels"]
