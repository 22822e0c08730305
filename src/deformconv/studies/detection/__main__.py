"""`torchrun --nproc-per-node 2 -m deformconv.studies.detection MODULE:FUNCTION`: train a detector of one's own."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, cast

import click

from deformconv.studies.detection.checks import SettingsError
from deformconv.studies.detection.training import launched, train

_WHAT = "MODULE:FUNCTION"


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("build", metavar=_WHAT)
@click.option("--steps", type=click.IntRange(1), help="End after so many steps.")
@click.option("--seconds", type=click.FloatRange(0, min_open=True), help="End after so many seconds of CPU time.")
@click.option("--batch", type=click.IntRange(1), default=8, help="Images in a step, over all processes together.")
@click.option("--learning-rate", type=click.FloatRange(0, min_open=True), default=5e-4, help="Its peak.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Of the scenes and of what is chosen in them.")
@click.option(
    "--checkpoint", type=click.Path(dir_okay=False, path_type=Path), help="Go on from this file if it is there; write it."
)
@click.option("--every", type=click.IntRange(1), default=100, help="Steps between checkpoints.")
@click.option("--accelerator", type=click.Choice(["cpu", "cuda", "auto"]), default="cpu", help="What computes.")
@click.option("--timeout", type=click.FloatRange(0, min_open=True), default=600.0, help="Seconds to wait for another process.")
def main(build: str, accelerator: str, timeout: float, **settings: Any) -> None:
    """Train the detector that FUNCTION of MODULE returns, together with its scenes.

    Under torchrun every process takes its share of each step. The last line is JSON: steps, CPU seconds and the losses of
    the last step.
    """
    if settings["steps"] is None and settings["seconds"] is None:
        raise click.UsageError("neither --steps nor --seconds is given; expected one of them, or both.")
    make = _function(build)
    fabric = launched(accelerator, timeout)
    made = make()
    if not isinstance(made, (tuple, list)) or len(made) != 2:
        raise click.BadParameter(
            f"{build!r} returned a {type(made).__module__}.{type(made).__qualname__}; expected a detector and its scenes.",
            param_hint=_WHAT,
        )
    model, scenes = made
    shown = sys.stderr if fabric.is_global_zero else io.StringIO()
    with click.progressbar(length=1000, label="Training", file=shown) as bar:

        def progress(done: float, losses: dict[str, float]) -> None:
            bar.update(int(done * 1000) - bar.pos)

        try:
            history = train(model, scenes, progress=progress, fabric=fabric, **settings)
        except SettingsError as error:
            raise click.ClickException(str(error)) from None
    if fabric.is_global_zero:
        last = history.losses[-1] if history.losses else {}
        click.echo(json.dumps({"steps": history.steps, "seconds": history.seconds, "losses": last}))


def _function(name: str) -> Callable[[], Any]:
    """What `build` names, as a function."""
    expected = "expected a module and a function in it, as train:build."
    try:
        found = resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise click.BadParameter(f"{name!r} cannot be imported: {error}; {expected}", param_hint=_WHAT) from None
    if not callable(found):
        raise click.BadParameter(f"{name!r} is a {type(found).__qualname__}; {expected}", param_hint=_WHAT)
    return cast(Callable[[], Any], found)


if __name__ == "__main__":
    main()
