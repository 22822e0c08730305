"""What the tests of both layers share: the suite in Flax's words, and arrays."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.frontends.suite import REFUSED, LayerSuite, Misfit, Refusal

from deformconv import ShapeError


@pytest.fixture
def x64() -> Iterator[None]:
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


def image(*shape: int, dtype: Any = np.float32) -> jax.Array:
    """An input (N, *S, C) that differs everywhere."""
    return jnp.asarray(np.random.default_rng(0).normal(size=shape or (2, 9, 8, 4)), dtype)


def nearly(found: Any, expected: Any, tolerance: float = 2e-6) -> bool:
    """Whether two arrays agree, relative to the largest number: within float32's rounding of sums."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    return bool(np.abs(found - expected).max() <= tolerance * np.abs(expected).max())


@pytest.mark.usefixtures("x64")
class FlaxLayerSuite(LayerSuite):
    """Images are (N, *S, C) and offsets (N, C, *O); dtypes are promoted, and the kernel's size says how many axes there are."""

    input = "inputs"
    words: ClassVar[dict[str, str]] = {
        "in_channels": "in_features",
        "stride": "strides",
        "dilation": "kernel_dilation",
        "groups": "feature_group_count",
        "bias": "use_bias",
    }
    refusals: ClassVar[list[Refusal]] = [
        ({"kernel_size": (3, 3, 3, 3)}, ShapeError, "kernel_size", "has 4 entries, (3, 3, 3, 3); expected 1, 2 or 3"),
        *REFUSED[1:],
        (
            {"padding": "SOME"},
            ShapeError,
            "padding",
            "is 'SOME'; expected 'SAME', 'SAME_LOWER', 'VALID', 'CIRCULAR', 'REFLECT'",
        ),
        ({"padding": "CAUSAL"}, ShapeError, "padding", "is 'CAUSAL'; expected 'SAME'"),
        ({"padding": (1, 1, 1, 1)}, ShapeError, "padding", "has 4 entries"),
        ({"mask_scale": 0}, ValueError, "mask_scale", "is 0; expected a number above 0"),
        ({"max_offset": -1}, ValueError, "max_offset", "is -1; expected a number above 0"),
        ({"input_dilation": 2}, ValueError, "input_dilation", "is 2; expected 1, since offsets are in pixels"),
        ({"input_dilation": (1, 2)}, ValueError, "input_dilation", "is (1, 2); expected 1"),
        ({"conv_general_dilated": len}, ValueError, "conv_general_dilated", "is <built-in function len>; expected"),
        ({"mask": np.ones((3, 3))}, ShapeError, "mask", "has shape (3, 3); expected the kernel's, (3, 3, 4, 8)"),
    ]
    misfits: ClassVar[list[Misfit]] = [
        (
            (2, 9, 9, 5),
            "float64",
            ShapeError,
            r"`inputs` has 5 features, shape \(2, 9, 9, 5\); this layer has in_features=4\.(\n|$)",
        ),
        ((9, 9), "float64", ShapeError, r"`inputs` has 2 axes, shape \(9, 9\); .* takes at least 3: \(height, width, in_f"),
        ((2, 4, 9, 9), "float64", ShapeError, r"`inputs` looks channels-first: .*`jnp.moveaxis\(inputs, -3, -1\)`"),
        ((1, 2, 9, 4), "float64", ShapeError, "`kernel_size` is 3x3; along height it spans .* for `inputs` .1, 2, 9, 4."),
        ((2, 9, 9, 4), "complex64", TypeError, "`inputs`, with the kernel, is promoted to complex128; expected floating point"),
    ]

    def array(self, array: np.ndarray) -> jax.Array:
        return jnp.asarray(np.moveaxis(array, 1, -1))

    def unturned(self, array: np.ndarray) -> jax.Array:
        return jnp.asarray(array)

    def numpy(self, array: jax.Array) -> np.ndarray:
        return np.asarray(array)

    def outputs(self, layer: Any, input: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        output, offset, mask = super().outputs(layer, input)
        return np.moveaxis(output, -1, 1), offset, mask

    def named(self, rank: int, arguments: dict[str, Any]) -> dict[str, Any]:
        """Arguments under Flax's names, for a kernel of as many axes, and with our default for padding."""
        size = arguments["kernel_size"]
        arguments = {"padding": 0} | arguments | {"kernel_size": (3,) * rank if size == 3 else size}
        return self.renamed(arguments)

    def turned(self, kernel: Any) -> np.ndarray:
        """Flax's kernel (*K, C_in, C_out) as a weight (C_out, C_in, *K)."""
        return np.moveaxis(np.asarray(kernel), (-1, -2), (0, 1))

    def turned_back(self, weight: np.ndarray) -> jax.Array:
        return jnp.asarray(np.moveaxis(weight, (0, 1), (-1, -2)))
