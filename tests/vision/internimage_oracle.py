"""What DCNv3 and DCNv4 compute, written from the authors' kernels: grid_sample, tap by tap in their order, absolute positions.

Nothing of deformconv is imported: a layer is its state_dict and its arguments.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F


def added_up(
    value: Any, offset: Any, mask: Any, *, kernel_size: int, stride: int, pad: int, dilation: int, group: int, scale: float,
    remove_center: bool,
) -> Any:  # fmt: skip
    """value (N, H, W, C), offset (N, *O, G, taps, 2) with x before y, mask (N, *O, G, taps): (N, *O, C)."""
    images, height, width, channels = value.shape
    rows, columns = offset.shape[1:3]
    centre = (dilation * (kernel_size - 1)) >> 1
    x0 = (torch.arange(columns) * stride - pad + centre).to(value.dtype)[None, :, None]
    y0 = (torch.arange(rows) * stride - pad + centre).to(value.dtype)[:, None, None]
    maps = value.unflatten(-1, (group, -1)).permute(0, 3, 4, 1, 2).flatten(0, 1)
    total: Any = 0
    tap = 0
    for i in range(kernel_size):
        for j in range(kernel_size):
            if remove_center and (i, j) == (kernel_size // 2, kernel_size // 2):
                continue
            x = x0 + (i * dilation - centre + offset[..., tap, 0]) * scale
            y = y0 + (j * dilation - centre + offset[..., tap, 1]) * scale
            places = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], -1)  # (N, *O, G, 2)
            places = places.permute(0, 3, 1, 2, 4).flatten(0, 1)
            samples = F.grid_sample(maps, places, align_corners=False).unflatten(0, (images, group))  # (N, G, d, *O)
            total = total + samples.permute(0, 3, 4, 1, 2) * mask[..., tap, None]
            tap += 1
    return total.reshape(images, rows, columns, channels)


def under_centres(map: Any, kernel_size: int, stride: int, pad: int, dilation: int) -> Any:
    """The pixels of (N, H, W, C) under the centres of windows, one by one."""
    reach = dilation * (kernel_size - 1)
    counts = [(size + 2 * pad - reach - 1) // stride + 1 for size in map.shape[1:3]]
    rows, columns = ([p * stride - pad + (reach >> 1) for p in range(count)] for count in counts)
    return torch.stack([torch.stack([map[:, y, x] for x in columns], 1) for y in rows], 1)


def linear(state: dict[str, Any], name: str, input: Any) -> Any:
    return input @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0)


def mixed(state: dict[str, Any], output: Any, value: Any, features: Any, group: int) -> Any:
    if "center_feature_scale_proj_weight" not in state:
        return output
    logits = features @ state["center_feature_scale_proj_weight"].T + state["center_feature_scale_proj_bias"]
    part = logits.sigmoid().repeat_interleave(output.shape[-1] // group, -1)
    return output * (1 - part) + value * part


def dcnv3(state: dict[str, Any], input: Any, act: Any, window: tuple[int, int, int, int], group: int, **arguments: Any) -> Any:
    """`window` is kernel_size, stride, pad, dilation; a norm by batch is in training."""
    value = linear(state, "input_proj", input)
    weight = state["dw_conv.0.weight"]
    features = input.permute(0, 3, 1, 2)
    features = F.conv2d(features, weight, state["dw_conv.0.bias"], padding=weight.shape[-1] // 2, groups=weight.shape[0])
    if "dw_conv.1.0.weight" in state:
        features = F.batch_norm(features, None, None, state["dw_conv.1.0.weight"], state["dw_conv.1.0.bias"], training=True)
        features = features.permute(0, 2, 3, 1)
    else:
        features = features.permute(0, 2, 3, 1)
        features = F.layer_norm(features, features.shape[-1:], state["dw_conv.1.1.weight"], state["dw_conv.1.1.bias"], 1e-6)
    features = under_centres(act(features), *window)
    offset = linear(state, "offset", features).unflatten(-1, (group, -1, 2))
    mask = linear(state, "mask", features).unflatten(-1, (group, -1)).softmax(-1)
    named = dict(zip(("kernel_size", "stride", "pad", "dilation"), window, strict=True))
    output = added_up(value, offset, mask, group=group, **named, **arguments)
    return linear(state, "output_proj", mixed(state, output, under_centres(value, *window), features, group))


def dcnv4(
    state: dict[str, Any], input: Any, size: tuple[int, int], window: tuple[int, int, int, int], group: int, **arguments: Any
) -> Any:
    kernel_size, _, _, _ = window
    map = input.reshape(input.shape[0], *size, -1)
    value = linear(state, "value_proj", map) if "value_proj.weight" in state else map
    features = map
    if "offset_mask_dw.weight" in state:
        weight = state["offset_mask_dw.weight"]
        features = F.conv2d(
            map.permute(0, 3, 1, 2), weight, state["offset_mask_dw.bias"], padding=weight.shape[-1] // 2, groups=weight.shape[0]
        ).permute(0, 2, 3, 1)
    taps = kernel_size**2 - arguments["remove_center"]
    both = linear(state, "offset_mask", under_centres(features, *window))[..., : 3 * group * taps].unflatten(-1, (group, -1))
    named = dict(zip(("kernel_size", "stride", "pad", "dilation"), window, strict=True))
    offset, mask = both[..., : 2 * taps].unflatten(-1, (taps, 2)), both[..., 2 * taps :]
    output = added_up(value, offset, mask, group=group, **named, **arguments)
    output = mixed(state, output, under_centres(value, *window), output, group).flatten(1, 2)
    return linear(state, "output_proj", output) if "output_proj.weight" in state else output
