"""The exceptions that deformconv raises on its own account."""

from __future__ import annotations

__all__ = ["BackendError", "ShapeError"]


class ShapeError(ValueError):
    """A shape, or the value of a parameter that shapes follow from, does not fit the call."""


class BackendError(RuntimeError):
    """No backend, or not the one asked for, can run the call."""
