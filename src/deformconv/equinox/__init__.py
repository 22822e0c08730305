"""Deformable convolution for Equinox: layers that stand where eqx.nn.Conv and its 1d, 2d and 3d stood."""

try:
    import equinox as _equinox  # noqa: F401
except ModuleNotFoundError as error:
    if error.name not in ("equinox", "jax", "jaxlib"):
        raise
    from deformconv.installation import command as _command

    raise ModuleNotFoundError(
        f"deformconv.equinox needs Equinox, which is not installed: {_command('equinox', 'equinox')}", name=error.name
    ) from None

from deformconv.equinox.layers import DeformConv, DeformConv1d, DeformConv2d, DeformConv3d

__all__ = ["DeformConv", "DeformConv1d", "DeformConv2d", "DeformConv3d"]
