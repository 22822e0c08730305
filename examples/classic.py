"""The classic example: deformable convolution v1 and v2 on random images, with offsets that you make yourself.

Run: python examples/classic.py
"""

import torch

from deformconv.torch import deform_conv2d

torch.manual_seed(0)
x = torch.rand(10, 3, 100, 100)  # (N, C_in, H, W)
weight = torch.rand(5, 3, 3, 3)  # (C_out, C_in, 3, 3): 9 taps
plain = torch.conv2d(x, weight, padding=1)

# v1: two numbers (dy, dx) for each of the 9 taps, at every output position.
offset = torch.zeros(10, 18, 100, 100)
y = deform_conv2d(x, offset, weight, padding=1)
print("v1, zero offsets:", tuple(y.shape), "as the plain convolution:", torch.allclose(y, plain, atol=1e-4))

# Every tap looks one pixel down (dy = channels 0, 2, 4, ...): the plain convolution, shifted by one row.
offset[:, 0::2] = 1
y = deform_conv2d(x, offset, weight, padding=1)
print("v1, dy = 1: row 50 is the plain row 51:", torch.allclose(y[:, :, 50], plain[:, :, 51], atol=1e-4))

# v2: a mask besides, one factor for each of the 9 taps.
mask = torch.full((10, 9, 100, 100), 0.5)
y = deform_conv2d(x, torch.zeros(10, 18, 100, 100), weight, padding=1, mask=mask)
print("v2, mask 0.5: half the plain convolution:", torch.allclose(y, plain / 2, atol=1e-4))

# Offsets and masks are learned, so they have gradients.
offset, mask = torch.randn(10, 18, 100, 100, requires_grad=True), mask.requires_grad_()
deform_conv2d(x, offset, weight, padding=1, mask=mask).sum().backward()
print("gradients:", tuple(offset.grad.shape), tuple(mask.grad.shape))
