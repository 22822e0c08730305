"""The file that mmengine's own runner writes, with its logs and a moving average, read without mmengine."""

from __future__ import annotations

import sys

import pytest
import torch
from tests.mmdet.models import mmcv
from torch import nn

from deformconv.convert import convert_state_dict, load_checkpoint
from deformconv.convert.mmcv import accelerate_mmcv
from deformconv.torch import DeformConv2d


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model after two epochs, and its file."""
    with accelerate_mmcv():
        from mmengine.model import BaseModel
        from mmengine.runner import Runner

        class Model(BaseModel):
            def __init__(self):
                super().__init__()
                self.conv = mmcv.ops.ModulatedDeformConv2dPack(3, 4, 3, padding=1)
                nn.init.normal_(self.conv.conv_offset.weight)

            def forward(self, inputs, mode="tensor"):
                found = self.conv(torch.stack(list(inputs)))
                return {"loss": found.square().mean()} if mode == "loss" else found

            def train_step(self, data, optim_wrapper):
                loss, logged = self.parse_losses(self(data, "loss"))
                optim_wrapper.update_params(loss)
                return logged

        folder = tmp_path_factory.mktemp("run")
        runner = Runner(
            Model(), str(folder), log_level="ERROR", train_cfg={"by_epoch": True, "max_epochs": 2},
            train_dataloader={
                "batch_size": 2, "num_workers": 0, "dataset": list(torch.rand(4, 3, 8, 8)),
                "sampler": {"type": "DefaultSampler", "shuffle": True},
            },
            optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.1, "momentum": 0.9}},
            param_scheduler=[{"type": "MultiStepLR", "milestones": [1]}], custom_hooks=[{"type": "EMAHook"}],
        )  # fmt: skip
        runner.train()
        return runner.model, folder / "epoch_2.pth"


@torch.no_grad()
def test_the_file_of_a_runner(trained, monkeypatch):
    theirs, path = trained
    for name in [name for name in sys.modules if name.startswith("mmengine")]:
        monkeypatch.setitem(sys.modules, name, None)  # an import of it would fail
    ours = nn.ModuleDict({"conv": DeformConv2d(3, 4, 3, padding=1)})
    # With the hook, the average is under "state_dict", and the model's own parameters are under "ema_state_dict".
    for key in ("state_dict", "ema_state_dict"):
        state = load_checkpoint(path, key=key)
        ours.load_state_dict(convert_state_dict(state, source="mmcv", model=ours))
    x = torch.rand(2, 3, 9, 9)
    with accelerate_mmcv():
        torch.testing.assert_close(ours["conv"](x), theirs.conv(x))
