"""Draw docs/images/attention_points.jpg: where queries of a small trained layer of deformable attention look.

The net is trained here, for some minutes, on regions of photographs: each head of a query is to gather what belongs to the
query's own region. The photograph that is drawn is none of those. Needs what `deformconv.studies.regions` does, the extra `demo`.

Run from anywhere: python docs/draw_attention.py [output.jpg] [steps]
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from skimage import data
from torch import Tensor, nn
from torch.nn import functional as F

from deformconv.plots import draw_query_points, query_points, record, style
from deformconv.studies.regions import material, scene
from deformconv.torch import DeformAttention, deform_attention, parameter_groups

STEP, LEVELS, HEADS, POINTS, WIDTH = 4, 3, 4, 4, 48  # image pixels between queries; a pyramid of three maps
MARKS, NOISE = 8, 0.5  # numbers by which regions are told apart, and the noise over them
AT = (167, 386), (262, 130), (60, 60)  # a rim of the cup, the spoon, the table


class Net(nn.Module):
    """A pyramid of a picture's maps, and attention of every cell of the finest to all three."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 24, 3, 2, 1), nn.ReLU(), nn.Conv2d(24, WIDTH, 3, 2, 1), nn.ReLU(),
            *(part for dilation in (1, 2, 4, 8) for part in (nn.Conv2d(WIDTH, WIDTH, 3, 1, dilation, dilation), nn.ReLU())),
            nn.Conv2d(WIDTH, WIDTH, 1),
        )  # fmt: skip
        self.attention = DeformAttention(WIDTH, num_levels=LEVELS, num_heads=HEADS, num_points=POINTS)

    def forward(self, images: Tensor) -> Tensor:
        query, reference, levels = self.queries(images)
        value = pyramid(self.stem(images))
        result: Tensor = self.attention(query, reference, value, levels)
        return result

    def queries(self, images: Tensor) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
        """Each cell's query, its place, and the sizes of the levels."""
        finest = self.stem(images)
        height, width = finest.shape[2:]
        y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
        reference = torch.stack([x, y], -1).reshape(1, -1, 1, 2).expand(len(images), -1, -1, -1)
        levels = [(-(-height // 2**level), -(-width // 2**level)) for level in range(LEVELS)]
        return finest.flatten(2).transpose(1, 2), reference, levels


def pyramid(finest: Tensor) -> Tensor:
    """A map (N, C, H, W) and means of 2x2 and 4x4 cells of it, pixels in a row: (N, L, C)."""
    maps = [finest] + [F.avg_pool2d(finest, 2**level, ceil_mode=True) for level in range(1, LEVELS)]
    return torch.cat([one.flatten(2).transpose(1, 2) for one in maps], 1)


def train(net: Net, steps: int) -> None:
    random, photographs = np.random.default_rng(0), material(sides=(240, 360))
    optimizer = torch.optim.AdamW(parameter_groups(net, 2e-3, offset_lr_scale=0.5))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [group["lr"] for group in optimizer.param_groups], steps)
    for step in range(steps):
        scenes = [scene(random, photographs) for _ in range(4)]
        images = torch.from_numpy(np.stack([one.image.transpose(2, 0, 1) for one in scenes]))
        regions = torch.from_numpy(np.stack([one.regions[::STEP, ::STEP] for one in scenes]))
        marks = F.normalize(torch.randn(len(scenes), int(regions.max()) + 1, MARKS), dim=2)
        own = torch.stack([mark[region] for mark, region in zip(marks, regions, strict=True)])  # (N, h, w, MARKS)
        query, reference, levels = net.queries(images)
        locations, weights = net.attention.locations_and_weights(query, reference, levels)
        noisy = own + NOISE * torch.randn_like(own)  # so that the mean of many is good
        value = pyramid(noisy.permute(0, 3, 1, 2))[:, :, None].expand(-1, -1, HEADS, -1)
        gathered = deform_attention(value, levels, locations, weights).unflatten(2, (HEADS, MARKS))
        each = deform_attention(value, levels, locations, torch.full_like(weights, 1 / weights[0, 0, 0].numel()))
        target = own.flatten(1, 2)[:, :, None]
        away = F.mse_loss(gathered, target.expand_as(gathered))
        away = away + F.mse_loss(each.unflatten(2, (HEADS, MARKS)), target.expand_as(gathered))
        moved = net.attention.sampling_offsets(query) - 1.5 * net.attention.sampling_offsets.start
        loss = MARKS * away + 0.004 * moved.square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(step, f"{MARKS * away.item():.3f}", flush=True)


def main(path: Path, steps: int) -> None:
    torch.manual_seed(0)
    net = Net()
    net.attention.sampling_offsets.register_buffer("start", net.attention.sampling_offsets.bias.detach().clone())
    train(net, steps)
    image = data.coffee()
    with record(net.eval()) as trace, torch.no_grad():
        net(torch.from_numpy(image.transpose(2, 0, 1)[None] / np.float32(255)))
    figure = style.new_figure(figsize=(12, 5.2), dpi=100, layout="constrained")
    for axes, at in zip(figure.subplots(1, 2), AT, strict=False):
        draw_query_points(axes, image, query_points(trace, "attention", at), zoom=(100, 150))
    style.save(figure, path, pil_kwargs={"quality": 90})


if __name__ == "__main__":
    default = Path(__file__).parent / "images" / "attention_points.jpg"
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else default, int(sys.argv[2]) if len(sys.argv) > 2 else 3000)
