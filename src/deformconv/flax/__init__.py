"""Deformable convolution for Flax: `DeformConv` stands where flax.nnx.Conv stood, `linen.DeformConv` where flax.linen.Conv."""

try:
    import flax as _flax  # noqa: F401
except ModuleNotFoundError as error:
    if error.name not in ("flax", "jax", "jaxlib"):
        raise
    from deformconv.installation import command as _command

    raise ModuleNotFoundError(
        f"deformconv.flax needs Flax, which is not installed: {_command('flax', 'flax')}", name=error.name
    ) from None

from deformconv.flax import linen
from deformconv.flax.nnx import DeformConv

__all__ = ["DeformConv", "linen"]
