"""Pooling of boxes that predicts its bins, here and in other libraries, and what makes up for its masks."""

from __future__ import annotations

from collections.abc import Container, Mapping

from torch import Tensor

from deformconv.convert.names import Names, layer_named

__all__ = ["readers"]


def _pools(names: Names, state: Mapping[str, Tensor]) -> list[str]:
    return [name for name in names.pools if any(key.startswith(f"{name}." if name else "") for key in state)]


def readers(names: Names, state: Mapping[str, Tensor]) -> dict[str, float]:
    """The weights that make up for the masks of pools before them, and how much larger than theirs our masks are."""
    claimed = names.detector.readers() if names.detector is not None else {}
    scales: dict[str, float] = {}
    for name in _pools(names, state):
        _check_pool(name, names, claimed)
        pool, theirs = names.pools[name], names.layout.mask_scale
        if pool.modulated and theirs is not None and pool.mask_scale != theirs:
            if claimed[name] not in state:
                raise ValueError(
                    f"`state` has {layer_named(name)} and not {claimed[name]!r}, whose weight makes up for its masks."
                )
            scales[claimed[name]] = pool.mask_scale / theirs
    return scales


def _check_pool(name: str, names: Names, claimed: Container[str]) -> None:
    """Raise for a pooling of boxes that computes something else there."""
    pool, layout = names.pools[name], names.layout
    if layout.mask_scale is None:
        return
    named = layer_named(name)
    if layout.pools is None:
        raise ValueError(f"{named} is a DeformRoIPool; {layout.library} has no pooling of boxes that predicts its offsets.")
    trunk, convention = layout.pools
    if pool.convention != convention:
        raise ValueError(
            f"{named} pools by convention={pool.convention!r} and {layout.library} by {convention!r}: other numbers. "
            f"Build it with convention={convention!r}."
        )
    if pool.modulated and pool.trunk != trunk:
        raise ValueError(
            f"{named} predicts with trunk={pool.trunk!r} and {layout.library} with {trunk!r}; neither gives the other. "
            f"Build it with trunk={trunk!r}."
        )
    if pool.modulated and pool.mask_scale != layout.mask_scale and name not in claimed:
        raise ValueError(
            f"{named} has masks of {pool.mask_scale:g}*sigmoid and {layout.library} of {layout.mask_scale:g}*sigmoid, and no "
            f"weight that could make up for it: build it with mask_scale={layout.mask_scale!r}."
        )
