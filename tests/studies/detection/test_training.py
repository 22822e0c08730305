"""The trainer in one process; on two, test_distributed.py."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torchvision")
pytest.importorskip("lightning_fabric")
torch = pytest.importorskip("torch")

from click.testing import CliRunner  # noqa: E402
from tests.studies.detection.small import Scenes, detector  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from deformconv.studies.detection import training  # noqa: E402
from deformconv.studies.detection.__main__ import main  # noqa: E402
from deformconv.studies.detection.training import History, StepSchedule, launched, train  # noqa: E402
from deformconv.vision import FeatureMimicking  # noqa: E402


class Dropped(nn.Module):
    """A box head that draws by itself."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.head(x), 0.2, self.training)


def model() -> FeatureMimicking:
    inner = detector(torch.float32)
    inner.roi_heads.box_head = Dropped(inner.roi_heads.box_head)
    torch.manual_seed(1)
    return FeatureMimicking(inner, rois_per_image=3, crop=64)


@pytest.mark.slow
def test_training_lowers_the_losses() -> None:
    trained = detector(torch.float32)
    history = train(trained, Scenes(8, empty=100), steps=60, batch=4, learning_rate=1e-2, schedule=StepSchedule(warmup=5))
    totals = [sum(losses.values()) for losses in history.losses]
    assert history.steps == 60 and sum(totals[-8:]) < 0.6 * sum(totals[:8])
    assert trained.training and history.seconds > 0


@pytest.mark.parametrize("stopped", [3, 4, 5])
def test_what_was_interrupted_goes_on_bit_for_bit(tmp_path: Path, stopped: int) -> None:
    """Weights, moments of the optimizer, the classifier of mimicking and what dropout draws."""
    settings: dict[str, Any] = {"steps": 6, "batch": 2, "seed": 3, "every": 2}
    expected = model()
    whole = train(expected, Scenes(), **settings)
    path, calls = tmp_path / "run.pt", itertools.count(1)

    def stop(done: float, losses: dict[str, float]) -> None:
        if next(calls) == stopped:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(model(), Scenes(), **settings, checkpoint=path, progress=stop)
    assert len(torch.load(path, weights_only=True)["history"]["losses"]) == (stopped - 1) // 2 * 2
    torch.manual_seed(stopped)  # it must not matter
    found, again = model(), model()
    resumed = train(found, Scenes(), **settings, checkpoint=path)
    assert resumed.losses == whole.losses
    assert train(again, Scenes(), **settings, checkpoint=path) == resumed  # what is over is over
    for other in (found, again):
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in expected.state_dict().items())
    assert [each.name for each in tmp_path.iterdir()] == ["run.pt"]


def test_training_ends_with_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr(training, "time", SimpleNamespace(process_time=lambda: float(next(clock))))  # a step takes 1 s
    shares: list[float] = []
    history = train(detector(), Scenes(), seconds=2.5, batch=2, progress=lambda done, losses: shares.append(done))
    assert history.steps == 3 and history.seconds == 3 and shares == [0.4, 0.8, 1.0]
    assert train(detector(), Scenes(), seconds=2.5, steps=2, batch=2).steps == 2


def test_learning_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth for predictors of convolutions, the full one for those of pooling, each times the schedule's factor."""
    rates: list[list[float]] = []
    trained = detector()
    offsets = {id(parameter) for name, parameter in trained.named_parameters() if "offset_conv" in name}
    update = torch.optim.AdamW.step

    def step(optimizer: Any, *given: Any, **named: Any) -> Any:
        slow = [group for group in optimizer.param_groups if {id(p) for p in group["params"]} == offsets]
        (fast,) = (group for group in optimizer.param_groups if group not in slow)
        assert any(id(p) in map(id, fast["params"]) for p in trained.roi_heads.box_roi_pool.parameters())
        rates.append([fast["lr"], slow[0]["lr"]])
        return update(optimizer, *given, **named)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    train(trained, Scenes(), steps=5, batch=2, learning_rate=1e-3, schedule=StepSchedule(warmup=2, drop=0.6, factor=0.5))
    assert rates == pytest.approx([pytest.approx([f * 1e-3, f * 1e-4]) for f in (0.5, 1, 1, 0.5, 0.5)])


def test_the_gradient_is_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "CLIP", 1e-3)
    trained = detector()
    train(trained, Scenes(), steps=1, batch=2)
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in trained.parameters() if p.grad is not None))
    assert norm == pytest.approx(1e-3, rel=1e-3)


def test_the_caller_s_random_numbers_are_left_alone() -> None:
    trained = detector()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(trained, Scenes(), steps=1, batch=2)
    assert torch.equal(torch.rand(3), expected)


def test_sentences_for_what_cannot_be(tmp_path: Path) -> None:
    def attempt(**settings: Any) -> History:
        return train(detector(), Scenes(), **{"steps": 1, "batch": 2, **settings})

    with pytest.raises(ValueError, match="neither `steps` nor `seconds` is given; expected one of them, or both"):
        attempt(steps=None)
    for name in ("steps", "seconds", "batch", "learning_rate", "every"):
        with pytest.raises(ValueError, match=f"`{name}` is -1; expected an? (number|integer) above 0"):
            attempt(**{name: -1})
    with pytest.raises(ValueError, match="`batch` is 61 and there are 60 scenes; expected at most so many, all different"):
        attempt(batch=61)
    fabric: Any = SimpleNamespace(world_size=2)
    with pytest.raises(ValueError, match="`batch` is 3 for 2 processes; expected a multiple of 2, as each takes an equal"):
        attempt(batch=3, fabric=fabric)
    with pytest.raises(FloatingPointError, match=r"the losses of step \d+ are \{.*\} and the norm .*; expected finite numbers"):
        attempt(steps=5, learning_rate=1e30, schedule=StepSchedule(warmup=0))
    torch.save(detector().state_dict(), tmp_path / "weights.pt")
    with pytest.raises(
        ValueError, match=r"weights.pt holds a dict with the keys 'backbone.layer1.weight', .*, \.\.\.; expected the"
    ):
        attempt(checkpoint=tmp_path / "weights.pt")
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"list\.pt holds a builtins\.list; expected the settings, history, model"):
        attempt(checkpoint=str(tmp_path / "list.pt"))
    whole = (tmp_path / "list.pt").read_bytes()
    for content in (b"", b"hello world, no checkpoint", whole[: len(whole) // 2]):
        (tmp_path / "part.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"part\.pt is no file of torch\.save, or only a part of one, .*; expected"):
            attempt(checkpoint=tmp_path / "part.pt")
    with pytest.raises(ValueError, match=r"cannot be read: .*; expected a file, or none yet"):
        attempt(checkpoint=tmp_path)
    attempt(checkpoint=tmp_path / "run.pt")
    with pytest.raises(ValueError, match=r"run.pt is that of a training with `seed` 0, and `seed` is 1; expected the same, or"):
        attempt(checkpoint=tmp_path / "run.pt", seed=1)


class Changed(Scenes):
    """Scenes of which something was changed."""

    def __init__(self, change: Any) -> None:
        super().__init__()
        self.change = change

    def __getitem__(self, index: int, /) -> Any:
        return self.change(*super().__getitem__(index))


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        (lambda image, target: (image, target, 3), TypeError, r"scene \d+ is a tuple of 3; expected two things, an image and"),
        (lambda image, target: image, TypeError, r"scene \d+ is a torch.Tensor; expected two things, an image and its target"),
        (lambda image, target: (image.numpy(), target), TypeError, r"the image of scene \d+ is a numpy.ndarray; expected a Py"),
        (lambda image, target: ((image * 255).byte(), target), TypeError, r"the image of scene \d+ is uint8; .* `image / 255`"),
        (lambda image, target: (image[None], target), ValueError, r"has shape \(1, 3, 64, 64\); expected \(3, H, W\)"),
        (
            lambda image, target: (image, [target]),
            TypeError,
            r"the target of scene \d+ is a list; expected a dict with `box",
        ),
        (lambda image, target: (image, {"boxes": target["boxes"]}), ValueError, r"has 'boxes', and no 'labels'; expected `box"),
        (lambda image, target: (image, {**target, "boxes": target["boxes"].numpy()}), TypeError, "`boxes` of scene .* numpy"),
        (lambda image, target: (image, {**target, "boxes": target["boxes"][:, :3]}), ValueError, r"has `boxes` \(\d, 3\) and"),
        (lambda image, target: (image, {**target, "labels": target["labels"].float()}), TypeError, "`labels` of .* is float32"),
    ],
)
def test_sentences_for_scenes(change: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        train(detector(), Changed(change), steps=1, batch=2)


def test_a_target_may_have_more_than_tensors() -> None:
    """As those of torchvision's COCO, which have their file's number."""
    found = train(
        detector(), Changed(lambda image, target: (image, {**target, "file": "1.png", "image_id": 7})), steps=1, batch=2
    )
    assert found == History(train(detector(), Scenes(), steps=1, batch=2).losses, found.seconds)


NO_NUMBERS = (
    ("batch", 2.5, "an integer above 0"),
    ("seed", True, "an integer of at least 0"),
    ("learning_rate", "a", "a number above 0"),
)


def test_sentences_for_what_is_no_detector_no_scenes_or_no_number() -> None:
    with pytest.raises(TypeError, match=r"`model` is a builtins\.str; expected torchvision's FasterRCNN, or a FeatureMim"):
        train("fasterrcnn", Scenes(), steps=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`scenes` is a generator; expected what has a length and gives, for a number"):
        train(detector(), (scene for scene in []), steps=1)  # type: ignore[arg-type]
    for name, value, what in NO_NUMBERS:
        with pytest.raises(TypeError, match=f"`{name}` is {value!r}; expected {what}"):
            train(detector(), Scenes(), **{"steps": 1, "batch": 2, name: value})
    with pytest.raises(ValueError, match="`seed` is -1; expected an integer of at least 0"):
        train(detector(), Scenes(), steps=1, batch=2, seed=-1)


def test_one_process_needs_no_launcher() -> None:
    fabric = launched()
    assert fabric.world_size == 1 and fabric.device == torch.device("cpu")


def build() -> tuple[nn.Module, Scenes]:
    """What the entry is given."""
    return model(), Scenes()


def test_the_entry(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    options = ["--steps", "2", "--batch", "2", "--seed", "4", "--every", "1", "--checkpoint", str(path)]
    done = CliRunner().invoke(main, [f"{__name__}:build", *options])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout.splitlines()[-1])
    expected = train(*build(), steps=2, batch=2, seed=4)
    assert report["steps"] == 2 and report["losses"] == expected.losses[-1] and path.exists()


def test_what_cannot_be_is_a_sentence_of_the_entry(tmp_path: Path) -> None:
    """And no traceback, as an error of one's own module is."""
    (tmp_path / "run.pt").write_bytes(b"no checkpoint")
    for options, expected in (
        (["--batch", "61"], "Error: `batch` is 61 and there are 60 scenes; expected at most so many, all different."),
        (["--batch", "2", "--checkpoint", str(tmp_path / "run.pt")], "is no file of torch.save, or only a part of one"),
    ):
        done = CliRunner().invoke(main, [f"{__name__}:build", "--steps", "1", *options])
        assert done.exit_code == 1 and expected in done.output and isinstance(done.exception, SystemExit)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["no_such_module:build", "--steps", "1"], "'no_such_module:build' cannot be imported"),
        (["json:no_such_function", "--steps", "1"], "expected a module and a function in it, as train:build"),
        (["json", "--steps", "1"], "'json' is a module; expected a module and a function in it, as train:build"),
        (["builtins:dict", "--steps", "1"], "'builtins:dict' returned a builtins.dict; expected a detector and its scenes"),
        (["json:dumps"], "neither --steps nor --seconds is given; expected one of them, or both"),
    ],
)
def test_sentences_of_the_entry(given: list[str], expected: str) -> None:
    done = CliRunner().invoke(main, given)
    assert done.exit_code == 2
    assert expected in " ".join(done.output.replace("│", " ").split())
