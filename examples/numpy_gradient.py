"""NumPy alone: move sampling points by gradient descent until the layer reproduces a shifted image.

A 1x1 kernel of weight 1 and one offset (dy, dx) for the whole image make the layer a shift by (dy, dx). The gradient
by the offset, which `deform_conv_backward` gives, finds the shift.

Run: python examples/numpy_gradient.py
"""

import numpy as np

import deformconv

rows, columns = np.mgrid[:32, :32]
x = np.exp(-((rows - 16) ** 2 + (columns - 14) ** 2) / 40)[None, None]  # (1, 1, 32, 32): a blurred spot
target = np.exp(-((rows - 13.5) ** 2 + (columns - 15.25) ** 2) / 40)[None, None]
weight = np.ones((1, 1, 1, 1))

shift = np.zeros(2)  # dy, dx in pixels
for _ in range(100):
    offset = np.broadcast_to(shift[:, None, None], (1, 2, 32, 32))
    y = deformconv.deform_conv(x, offset, weight)
    g = deformconv.deform_conv_backward(y - target, x, offset, weight, wanted=["offset"])
    shift -= 0.1 * g.offset.sum(axis=(0, 2, 3))

# What is 2.5 pixels further up in the target is found by looking 2.5 pixels further down.
print(f"dy {shift[0]:+.2f}, dx {shift[1]:+.2f}; expected +2.50, -1.25")
print(f"error {np.abs(y - target).max():.3f}")
