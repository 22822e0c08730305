"""Draw docs/images/attention_points.jpg: where queries of a small trained layer of deformable attention look.

The layer is trained here, for some minutes, on regions of photographs, to sample within the query's own region; its queries are
made of what the package's example net sees. The photograph that is drawn is none of those. It needs what
`deformconv.studies.regions` does: scikit-image, scikit-learn and SciPy.

Run from anywhere: python docs/draw_attention.py [output.jpg] [steps]
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from skimage import data
from torch import Tensor, nn
from torch.nn import functional as F

from deformconv.plots import draw_query_points, query_points, record, style
from deformconv.plots.example import STEP, example_net
from deformconv.studies.regions import Scene, material, scene
from deformconv.torch import DeformAttention, parameter_groups

LEVELS, HEADS, POINTS, WIDTH = 3, 4, 4, 64  # a pyramid of three maps
# The cost of a sample a cell away from its region; of one a pixel further from its query, or nearer, than at first; and of one
# a pixel away from its first place: samples turn around their query where something is in the way, and else stay.
OUTSIDE, FURTHER, MOVED = 0.1, 0.02, 0.002
AT = (164, 387), (262, 130)  # the rim of the cup, the saucer


class Net(nn.Module):
    """Attention of every cell of a map to a pyramid of that map."""

    def __init__(self) -> None:
        super().__init__()
        self.guide = example_net().guide
        self.query = nn.Sequential(nn.Conv2d(32, WIDTH, 3, padding=1), nn.ReLU(), nn.Conv2d(WIDTH, WIDTH, 1))
        self.attention = DeformAttention(WIDTH, num_levels=LEVELS, num_heads=HEADS, num_points=POINTS)

    def forward(self, images: Tensor) -> Tensor:
        query, reference, levels = self.queries(images)
        finest = query.transpose(1, 2).unflatten(2, levels[0])
        maps = [finest, *(F.avg_pool2d(finest, 2**level, ceil_mode=True) for level in range(1, LEVELS))]
        value = torch.cat([one.flatten(2).transpose(1, 2) for one in maps], 1)  # (N, L, WIDTH)
        result: Tensor = self.attention(query, reference, value, levels)
        return result

    def queries(self, images: Tensor) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
        """Each cell's query, its place, and the sizes of the levels."""
        query = self.query(self.guide(images))
        height, width = query.shape[2:]
        y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
        reference = torch.stack([x, y], -1).reshape(1, -1, 1, 2).expand(len(images), -1, -1, -1)
        levels = [(-(-height // 2**level), -(-width // 2**level)) for level in range(LEVELS)]
        return query.flatten(2).transpose(1, 2), reference, levels


def outside(one: Scene, locations: Tensor) -> Tensor:
    """How far samples (Q, points, 2) lie outside of their query's region, in cells."""
    found, own = np.unique(one.regions[::STEP, ::STEP], return_inverse=True)
    own = own.reshape(one.regions[::STEP, ::STEP].shape)
    away = torch.from_numpy(np.stack([ndimage.distance_transform_edt(own != number) for number in range(len(found))])).float()
    number = torch.from_numpy(own).reshape(-1, 1, 1).expand(-1, locations.shape[1], 1)
    grid = torch.cat([2 * locations - 1, (2 * number + 1) / len(found) - 1], -1)  # (Q, points, 3): x, y, the region
    return F.grid_sample(away[None, None], grid[None, :, :, None], padding_mode="border", align_corners=False)


def train(net: Net, steps: int) -> None:
    random, photographs = np.random.default_rng(0), material(sides=(240, 360))
    start = net.attention.sampling_offsets.bias.detach().clone().unflatten(0, (-1, 2))
    optimizer = torch.optim.AdamW(parameter_groups(net, 3e-3, offset_lr_scale=1.0))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [group["lr"] for group in optimizer.param_groups], steps)
    for step in range(steps):
        scenes = [scene(random, photographs) for _ in range(4)]
        images = torch.from_numpy(np.stack([one.image.transpose(2, 0, 1) for one in scenes]))
        query, reference, levels = net.queries(images)
        locations, weights = net.attention.locations_and_weights(query, reference, levels)
        far = torch.stack([outside(one, where.flatten(1, 3)) for one, where in zip(scenes, locations, strict=True)])
        far = far.reshape(weights.shape)
        offset = net.attention.sampling_offsets(query).unflatten(2, (-1, 2))
        further = (offset.square().sum(3) + 1e-6).sqrt() - start.norm(dim=1)
        loss = OUTSIDE * (far.mean() + (far * weights).sum((2, 3, 4)).mean() / HEADS)
        loss = loss + FURTHER * further.square().mean() + MOVED * (offset - start).square().mean()
        loss = loss + 0.02 * (weights * weights.log()).sum((3, 4)).mean()  # weights as even as may be
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step}: samples are {far.mean().item():.3f} cells outside of their region", flush=True)


def main(path: Path, steps: int) -> None:
    torch.manual_seed(0)
    net = Net()
    train(net.train(), steps)
    image = data.coffee()
    with record(net.eval()) as trace, torch.no_grad():
        net(torch.from_numpy(image.transpose(2, 0, 1)[None] / np.float32(255)))
    figure = style.new_figure(figsize=(12, 4.4), dpi=100, layout="constrained")
    for axes, at in zip(figure.subplots(1, 2), AT, strict=True):
        draw_query_points(axes, image, query_points(trace, "attention", at), zoom=(70, 105))
    style.save(figure, path, pil_kwargs={"quality": 90} if path.suffix == ".jpg" else {})


if __name__ == "__main__":
    default = Path(__file__).parent / "images" / "attention_points.jpg"
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else default, int(sys.argv[2]) if len(sys.argv) > 2 else 1000)
