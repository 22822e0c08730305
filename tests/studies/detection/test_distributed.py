"""Training on two processes: the gradients of one, and an end with an error where a process is lost."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torchvision")
pytest.importorskip("lightning_fabric")
torch = pytest.importorskip("torch")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("needs PyTorch with gloo", allow_module_level=True)

from tests.studies.detection import ranks  # noqa: E402
from tests.studies.detection.small import Scenes  # noqa: E402

import deformconv  # noqa: E402
from deformconv.studies.detection.training import launched, train  # noqa: E402
from deformconv.vision import FeatureMimicking  # noqa: E402

pytestmark = pytest.mark.slow
HERE, ROOT = Path(__file__).parent, Path(__file__).parents[3]
PATIENCE = 400  # seconds; kernels may have to be compiled, on a machine that does other things too


def torchrun(*program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A program on two processes of this machine."""
    path = os.pathsep.join([str(Path(deformconv.__file__).parents[1]), str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2"]
    return subprocess.run(
        [*command, *program],
        cwd=HERE, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A training whose second process was killed at its fifth step, and the folder with the checkpoint of the fourth."""
    folder = tmp_path_factory.mktemp("ranks")
    return folder, torchrun("ranks.py", "killed", str(folder))


@pytest.fixture(scope="module")
def saved(killed: tuple[Path, subprocess.CompletedProcess[str]]) -> bytes:
    return (killed[0] / "run.pt").read_bytes()


@pytest.fixture(scope="module")
def two(killed: tuple[Path, subprocess.CompletedProcess[str]], saved: bytes) -> list[dict[str, Any]]:
    """What two processes computed, by their rank; they went on from the checkpoint, too."""
    done = torchrun("ranks.py", "gradients", str(killed[0]))
    assert done.returncode == 0, done.stderr
    return [torch.load(killed[0] / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("case", [*ranks.CASES])
def test_gradients_of_two_processes_are_those_of_one(two: list[dict[str, Any]], case: str) -> None:
    expected = ranks.gradients(case)
    scale = max(gradient.abs().max() for gradient in expected.values())
    for found in two:
        assert found["gradients"][case].keys() == expected.keys()
        for name, gradient in expected.items():
            assert (found["gradients"][case][name] - gradient).abs().max() <= 1e-10 * scale, name
    for part in ("backbone.layer3.offset_conv.weight", "offset_mask_fc.4.weight", "bbox_pred.weight"):
        assert any(name.endswith(part) and gradient.any() for name, gradient in expected.items()), part


def test_a_process_without_a_box_takes_part_in_every_gradient(two: list[dict[str, Any]]) -> None:
    parameters = {name for name, _ in ranks.model().named_parameters()}
    for found in two:
        assert found["gradients"]["lopsided"].keys() == parameters
    shares = [list(range(ranks.BATCH))[rank::2] for rank in range(2)]
    numbers, _ = ranks.drawn(0, 0, ranks.BATCH, 60)
    boxes = [[len(ranks.CASES["lopsided"][numbers[place]][1]["boxes"]) for place in share] for share in shares]
    assert min(boxes[0]) > 0 and max(boxes[1]) == 0


def test_mimicking_alone_goes_into_distributed_data_parallel(two: list[dict[str, Any]]) -> None:
    """Without the trainer too: the second rank, which has no box, gets the first's gradient."""
    assert two[0]["plain"] == two[1]["plain"] > 0


def test_a_killed_process_ends_training_with_an_error(
    killed: tuple[Path, subprocess.CompletedProcess[str]], saved: bytes
) -> None:
    folder, done = killed
    assert done.returncode != 0 and "SIGKILL" in done.stderr, done.stderr
    assert len(torch.load(io.BytesIO(saved), weights_only=True)["history"]["losses"]) == 4
    assert not [*folder.glob(".run*")]  # half a file


def test_what_was_interrupted_goes_on_as_if_it_had_not_been(tmp_path: Path, saved: bytes, two: list[dict[str, Any]]) -> None:
    """From the checkpoint of two processes, on two and on one."""
    path = tmp_path / "run.pt"
    path.write_bytes(saved)
    before = torch.load(path, weights_only=True)["history"]["losses"]
    whole = train(ranks.model(), Scenes(), steps=8, batch=ranks.BATCH).losses
    on_one = train(ranks.model(), Scenes(), steps=8, batch=ranks.BATCH, checkpoint=path).losses
    assert two[0]["losses"] == two[1]["losses"] and two[0]["losses"][:4] == on_one[:4] == before
    for losses in (two[0]["losses"], on_one):
        assert len(losses) == 8
        for found, expected in zip(losses, whole, strict=True):
            assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_a_process_that_hangs_ends_training_after_the_timeout(tmp_path: Path) -> None:
    done = torchrun("ranks.py", "hanging", str(tmp_path), TIMEOUT="8")
    assert done.returncode != 0 and "imed out" in done.stderr, done.stderr


def test_one_process_needs_no_launcher() -> None:
    fabric = launched()
    assert fabric.world_size == 1 and fabric.device == torch.device("cpu")
    assert isinstance(ranks.model(), FeatureMimicking)
