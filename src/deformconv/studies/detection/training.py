"""A detector's training: on one process or several, from the start or from where it was interrupted."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies.ddp import DDPStrategy
from torch import Tensor, nn

from deformconv.files import whole_file
from deformconv.studies.detection.checks import SettingsError, check_numbers, check_scenes, checked
from deformconv.studies.detection.per_image import check_detector, drawn, per_image
from deformconv.torch import parameter_groups

__all__ = ["History", "Scenes", "StepSchedule", "launched", "train"]

WEIGHT_DECAY = 1e-4
CLIP = 5.0  # of the gradient's norm


class Scenes(Protocol):
    """Images with boxes, by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Tensor, dict[str, Tensor]]:
        """An image (3, H, W), and its `boxes` (n, 4) and `labels` (n,): float32, but for int64 labels."""


@dataclass(frozen=True)
class StepSchedule:
    """The learning rate's factor: a linear rise over the first steps, 1, and `factor` for the rest."""

    warmup: int = 50  # steps
    drop: float = 0.7  # of the whole training
    factor: float = 0.1

    def __call__(self, step: int, done: float) -> float:
        """The factor at a step, counted from 0, before which a share `done` of the training was over."""
        return min(1.0, (step + 1) / max(self.warmup, 1)) * (1.0 if done < self.drop else self.factor)


@dataclass
class History:
    """How a training went, from its first step on, also where it was interrupted."""

    losses: list[dict[str, float]] = field(default_factory=list)  # one a step, means over all images of the step
    seconds: float = 0.0  # CPU time of the first process, for all steps

    @property
    def steps(self) -> int:
        return len(self.losses)


@dataclass(frozen=True)
class _Settings:
    """What a checkpoint and what goes on from it must have in common."""

    steps: int | None
    seconds: float | None
    batch: int
    learning_rate: float
    schedule: StepSchedule
    seed: int

    def done(self, history: History) -> float:
        """Which share of the training is over: of its steps or of its time, what is more."""
        by_steps = history.steps / self.steps if self.steps else 0.0
        return max(by_steps, history.seconds / self.seconds if self.seconds else 0.0)


def launched(accelerator: str = "cpu", timeout: float = 600.0) -> Fabric:
    """Lightning Fabric over the processes that torchrun started, or over this one alone.

    Args:
        accelerator: "cpu", "cuda" or "auto", as Fabric takes it.
        timeout: after how many seconds of waiting for another process training ends with an error.
    """
    world, local = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    strategy = DDPStrategy(timeout=timedelta(seconds=timeout)) if world > 1 else "auto"
    fabric = Fabric(accelerator=accelerator, devices=local, num_nodes=world // local, strategy=strategy)
    fabric.launch()
    return fabric


def train(
    model: nn.Module,
    scenes: Scenes,
    *,
    steps: int | None = None,
    seconds: float | None = None,
    batch: int = 8,
    learning_rate: float = 5e-4,
    schedule: StepSchedule = StepSchedule(),
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    every: int = 100,
    progress: Callable[[float, dict[str, float]], None] | None = None,
    fabric: Fabric | None = None,
) -> History:
    """Train a detector in place by AdamW, predictors of convolutions' offsets at a tenth of the learning rate.

    A step's scenes, and what is chosen in them, depend on `seed` and the step alone, and every process takes its share of
    them, so that any number of processes computes the same gradients within rounding.

    Args:
        model: torchvision's FasterRCNN, or a FeatureMimicking of one.
        scenes: what it is trained on, images of one size; each step draws `batch` different ones.
        steps, seconds: training ends after so many steps, or before the first step that would begin after so many seconds of
            CPU time of the first process, all its threads together, whichever comes first. CPU time, since it does not
            depend on what else the machine does.
        batch: images in a step, over all processes together.
        learning_rate: the peak, of all that predicts no convolution's offsets.
        schedule: the learning rate's factor over the training.
        seed: what draws scenes, anchors and boxes.
        checkpoint: a file from which training goes on if it is there, and which is written every `every` steps and at the
            end, in one piece. One process reads and writes it.
        progress: called after each step in the first process, with the share of the training that is over and the losses.
        fabric: what `launched` gave; otherwise it is called.

    Returns:
        The losses of all steps, those before the checkpoint among them.

    Raises:
        TypeError: `model` is not such a detector, `scenes` have no length, or a scene is not what `Scenes` says.
        ValueError: a number is out of range, or a scene's shapes are.
        SettingsError: a ValueError: neither `steps` nor `seconds` is given, `batch` is no multiple of the number of processes
            or more than there are scenes, or `checkpoint` is none of this function's, or that of a training with other
            settings.
        FloatingPointError: a loss or the gradient is not finite.
    """
    check_detector(model)
    check_scenes(scenes)
    check_numbers(steps=steps, seconds=seconds, batch=batch, learning_rate=learning_rate, seed=seed, every=every)
    fabric, path = fabric or launched(), None if checkpoint is None else Path(checkpoint)
    settings = _Settings(steps, seconds, batch, learning_rate, schedule, seed)
    _check(settings, len(scenes), fabric.world_size)
    optimizer = torch.optim.AdamW(parameter_groups(model, learning_rate), weight_decay=WEIGHT_DECAY)
    peaks = [group["lr"] for group in optimizer.param_groups]
    history = _resumed(fabric, path, settings, model, optimizer)
    with ExitStack() as stack:
        stack.enter_context(per_image(model))
        stack.enter_context(torch.random.fork_rng(range(torch.cuda.device_count())))
        model.train()
        module, stepper = fabric.setup(model, optimizer)
        while (done := _agreed(fabric, settings, history)) < 1:
            started = time.process_time()
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * schedule(history.steps, done)
            history.losses.append(_step(fabric, module, stepper, scenes, settings, history.steps))
            history.seconds += time.process_time() - started
            if progress is not None and fabric.is_global_zero:
                progress(min(settings.done(history), 1.0), history.losses[-1])
            if path is not None and history.steps % every == 0:
                _save(fabric, path, settings, model, optimizer, history)
    if path is not None:
        _save(fabric, path, settings, model, optimizer, history)
    return history


def _agreed(fabric: Fabric, settings: _Settings, history: History) -> float:
    """The share of the training that is over, by the first process' clock."""
    done = settings.done(history)
    return done if settings.seconds is None else float(fabric.broadcast(done))


def _step(fabric: Fabric, module: Any, optimizer: Any, scenes: Scenes, settings: _Settings, step: int) -> dict[str, float]:
    """One step on this process' share of its scenes; returns the losses' means over all of them."""
    numbers, draws = drawn(settings.seed, step, settings.batch, len(scenes))
    mine = range(fabric.global_rank, settings.batch, fabric.world_size)
    dtype = next(parameter.dtype for parameter in module.parameters())
    images, targets = [], []
    for place in mine:
        image, target = checked(scenes[numbers[place]], numbers[place])
        images.append(image.to(fabric.device, dtype))
        found = {**target, "boxes": target["boxes"].to(dtype), "image_id": torch.tensor(draws[place])}
        targets.append({name: value.to(fabric.device) for name, value in found.items() if isinstance(value, Tensor)})
    # Layers that draw by themselves, as dropout, need no state in the checkpoint either.
    torch.manual_seed(draws[mine[0]])
    losses = module(images, targets)
    optimizer.zero_grad()
    fabric.backward(torch.stack([*losses.values()]).sum())
    means: Any = fabric.all_reduce(torch.stack([loss.detach() for loss in losses.values()]), reduce_op="mean")
    values = dict(zip(losses, means.tolist(), strict=True))
    norm = fabric.clip_gradients(module, optimizer, max_norm=CLIP, error_if_nonfinite=False)
    if not all(map(math.isfinite, (*values.values(), float(norm if norm is not None else 0.0)))):
        raise FloatingPointError(
            f"the losses of step {step + 1} are {values} and the norm of their gradient is {norm}; expected finite numbers. A "
            "lower learning rate may help."
        )
    optimizer.step()
    return values


def _check(settings: _Settings, size: int, processes: int) -> None:
    if settings.steps is None and settings.seconds is None:
        raise SettingsError("neither `steps` nor `seconds` is given; expected one of them, or both, at which training ends.")
    if settings.batch % processes:
        raise SettingsError(
            f"`batch` is {settings.batch} for {processes} processes; expected a multiple of {processes}, as each takes an "
            "equal share."
        )
    if settings.batch > size:
        raise SettingsError(
            f"`batch` is {settings.batch} and there are {size} scenes; expected at most so many, all different."
        )


def _save(
    fabric: Fabric, path: Path, settings: _Settings, model: nn.Module, optimizer: torch.optim.Optimizer, history: History
) -> None:
    if fabric.is_global_zero:
        parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        with whole_file(path) as part:
            torch.save({"settings": asdict(settings), "history": asdict(history), **parts}, part)
    fabric.barrier()


def _resumed(
    fabric: Fabric, path: Path | None, settings: _Settings, model: nn.Module, optimizer: torch.optim.Optimizer
) -> History:
    """What the checkpoint tells, its weights in model and optimizer; an empty history without one."""
    found: Any = None
    if path is not None and fabric.is_global_zero and path.exists():
        found = _loaded(path)
    found = fabric.broadcast(found)  # other machines may not have the file
    if found is None:
        return History()
    if not isinstance(found, dict) or not found.keys() >= {"settings", "history", "model", "optimizer"}:
        raise SettingsError(
            f"`checkpoint` {path} holds {_described(found)}; expected the settings, history, model and optimizer that this "
            "function writes, or the path of another file."
        )
    for name, value in asdict(settings).items():
        if found["settings"][name] != value:
            raise SettingsError(
                f"`checkpoint` {path} is that of a training with `{name}` {found['settings'][name]!r}, and `{name}` is "
                f"{value!r}; expected the same, or the path of another file."
            )
    model.load_state_dict(found["model"])
    optimizer.load_state_dict(found["optimizer"])
    return History(**found["history"])


def _loaded(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise SettingsError(f"`checkpoint` {path} cannot be read: {error.strerror}; expected a file, or none yet.") from None
    except Exception as error:  # whatever its reader stumbles over: PyTorch promises no kind of error
        raise SettingsError(
            f"`checkpoint` {path} is no file of torch.save, or only a part of one, or holds more than tensors and numbers "
            f"({type(error).__name__}); expected one that this function wrote, or the path of another file."
        ) from error


def _described(found: Any) -> str:
    """What a file that is no checkpoint holds instead."""
    if not isinstance(found, dict):
        return f"a {type(found).__module__}.{type(found).__qualname__}"
    return f"a dict with the keys {', '.join(map(repr, list(found)[:4]))}{', ...' * (len(found) > 4)}"
