"""Programs that run once are compiled quickly."""

from tests.jax.arrays import quickly_compiled  # noqa: F401
