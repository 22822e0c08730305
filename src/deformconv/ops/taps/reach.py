"""Whether a call's positions are counted in 32 bits, as compiled kernels count them."""

from __future__ import annotations

from deformconv.ops.taps.spec import WindowSpec

__all__ = ["reasons_against_int32"]

_PIXELS, _AXIS = 2**31 - 1, 2**29  # the first numbers of an image's pixels, and of an axis, that are too large


def reasons_against_int32(spec: WindowSpec) -> list[str]:
    """Why pixels and positions of a call are not counted in 32 bits, as sentences; none if they are."""
    reasons = []
    if spec.pixels >= _PIXELS:
        reasons.append(f"an image of {spec.pixels} pixels exceeds its 32-bit pixel numbers")
    for axis in range(spec.rank):
        reach = (
            spec.input_size[axis] + sum(spec.padding[axis]) + spec.dilation[axis] * spec.kernel_size[axis] + spec.stride[axis]
        )
        if reach >= _AXIS:
            reasons.append(
                f"axis {axis} spans {reach} pixels with padding, window and stride, and its positions are 32-bit numbers"
            )
    return reasons
