"""mmcv's layer of deformable attention and ours: its weights load, and compute the same."""

from __future__ import annotations

import pytest
import torch
from tests.mmdet.models import mmcv  # whose mmcv.ops can be imported only while an acceleration goes on
from tests.tolerances import assert_close
from torch import nn

from deformconv.convert import accelerate_mmcv
from deformconv.torch import DeformAttention

LEVELS = ((5, 7), (3, 4))


@pytest.mark.parametrize("coordinates", [2, 4])
def test_weights_of_mmcv_load_and_compute_the_same(coordinates: int) -> None:
    with accelerate_mmcv():
        theirs = mmcv.ops.MultiScaleDeformableAttention(32, 4, 2, 3, batch_first=True, dropout=0.0).double()
        ours = DeformAttention(32, num_heads=4, num_levels=2, num_points=3, dtype=torch.float64)
        assert torch.allclose(ours.sampling_offsets.bias, theirs.sampling_offsets.bias, atol=1e-6)
        generator = torch.Generator().manual_seed(0)
        for parameter in theirs.parameters():
            nn.init.normal_(parameter, std=0.3, generator=generator)
        ours.load_state_dict(theirs.state_dict())
        query, value = (torch.randn(2, n, 32, generator=generator, dtype=torch.float64) for n in (9, 47))
        reference_points = torch.rand(2, 9, 2, coordinates, generator=generator, dtype=torch.float64)
        is_padding = torch.rand(2, 47, generator=generator) < 0.2
        expected = theirs(
            query, value=value, identity=torch.zeros_like(query), reference_points=reference_points,
            key_padding_mask=is_padding, spatial_shapes=torch.tensor(LEVELS), level_start_index=torch.tensor([0, 35]),
        )  # fmt: skip
        found = ours(query, reference_points, value, LEVELS, is_padding)
    assert_close(found.detach(), expected.detach(), "float64")
