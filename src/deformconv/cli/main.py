"""The command `deformconv`: parse, then call. What a command needs is imported when it runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from deformconv import __version__
from deformconv.installation import command

__all__ = ["main"]

INTERRUPTED = 130  # what shells report for a program that Ctrl-C ended
HALF, WHOLE = ("float16", "bfloat16"), ("float32", "float64")
MODULES = {"lightning-fabric": "lightning_fabric", "scikit-image": "skimage", "scikit-learn": "sklearn"}  # by their packages


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="deformconv %(version)s")
def deformconv() -> None:
    """Deformable convolution for Python, with no compiler and no CUDA toolkit.

    \b
    To see it work:           deformconv demo
    Where a net looks:        deformconv look photo.jpg
    When something is wrong:  deformconv doctor
    In a container's build:   deformconv warmup
    How fast it is here:      deformconv bench
    The paper's detector:     deformconv experiment detect
    """


def _need(user: str, extra: str, *packages: str) -> None:
    """Say in one sentence what to install."""
    missing = [name for name in packages if find_spec(MODULES.get(name, name)) is None]
    if missing:
        raise click.ClickException(f"{user} needs {', '.join(missing)}, not installed here: {command(extra, *missing)}")


_FIRST_SEED = click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="The first of the seeds.")


def _output(default: str, text: str) -> Callable[[Any], Any]:
    """The option of a folder that a command makes."""
    kind = click.Path(file_okay=False, writable=True, path_type=Path)
    return click.option("--output", type=kind, default=default, show_default=True, help=text)


def _make(output: Path) -> None:
    """Make a folder now, not after minutes of training."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.ClickException(f"cannot make the folder {output}: {error.strerror}") from None


def _let_threads_sleep() -> None:
    """Have PyTorch's threads sleep while they wait, which it reads when it is imported.

    By default they spin, which takes the processor from other threads and from other programs, and on a busy machine makes
    every step several times slower.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@deformconv.command()
@click.option("--fast", is_flag=True, help="A few training steps only: under 30 seconds, for a first look.")
@click.option("--seeds", type=click.IntRange(1), help="Train every net this many times.  [default: 3, fast: 1]")
@_FIRST_SEED
@_output("demo-output", "The folder for pictures and the trained net.")
def demo(fast: bool, seeds: int | None, seed: int, output: Path) -> int:
    """Run v1 and v2, fine-tune a net, draw where it looks.

    \b
    1. The classic example on random input, beside a plain convolution.
    2. A net is trained on real handwritten digits at random scale, rotation
       and position; then it is trained on as it is, and as v1 and v2.
    3. Pictures of the points where the v2 net samples.
    4. The trained net, saved and loaded again.

    Ends with 1 if a check fails. Ctrl-C leaves no half-written file.
    """
    _need("the demo", "demo", "torch", "matplotlib", "mlxtend", "rich")
    _make(output)
    _let_threads_sleep()
    from deformconv.studies.demo import run

    return run(output, fast=fast, seeds=seeds or (1 if fast else 3), first_seed=seed)


class _Position(click.ParamType):
    """Y,X: two numbers."""

    name = "Y,X"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[float, float]:
        if isinstance(value, tuple):
            return value
        try:
            y, x = map(float, value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not two numbers; expected Y,X, pixels from the top and from the left, as in 120,200")
        return y, x


@deformconv.command()
@click.argument("photo", type=click.Path(path_type=Path))
@click.option("--model", metavar="MODEL", help="module:function, or a file of weights; see above.  [default: a net of our own]")
@click.option("--weights", type=click.Path(path_type=Path), help="A file of weights for the model of module:function.")
@click.option("--layer", metavar="NAME", help="The layer that is shown first.  [default: the last deformable one]")
@click.option("--at", type=_Position(), help="The position that is shown first, in pixels of PHOTO.  [default: the middle]")
@click.option(
    "--view",
    type=click.Choice(["points", "erf", "locations", "saliency", "flow"]),
    help="What a picture shows.  [default: an overview; .gif: points]",
)
@click.option(
    "--depth", type=click.IntRange(1, 3), help="Through how many deformable layers samples are followed.  [default: up to 3]"
)
@click.option(
    "--out", type=click.Path(dir_okay=False, writable=True, path_type=Path), default="look.html", show_default=True,
    help="A page (.html), a picture (.png, .svg), or the offsets as they grow (.gif).",
)  # fmt: skip
@click.option(
    "--size", type=click.IntRange(16), default=512, show_default=True,
    help="PHOTO is made smaller, for its longer side to have at most so many pixels.",
)  # fmt: skip
@click.option(
    "--fields", type=click.IntRange(0), metavar="N",
    help="Receptive fields of each layer in a page, at most: each takes four backward passes.  [default: 100 passes in all]",
)  # fmt: skip
@click.option("--imagenet", is_flag=True, help="Normalise the colours as ImageNet's models have them.")
def look(photo: Path, **options: Any) -> int:
    """Show where a net looks in a photograph.

    Writes a page that works without a network: choose a layer and a position,
    and see where it samples, its receptive field, and its offsets.

    \b
    MODEL is one of
      module:function  imports the module, from this folder too, and calls the
                       function, which returns the model: this runs their code
      FILE             weights that torch.save has written of a ResNet of
                       torchvision made deformable or of the demo's net; no
                       code in the file is run

    \b
    VIEW is one of
      points     where the layer, and up to two deformable ones before it,
                 sample for a position of their output
      erf        the effective receptive field: which pixels move the output
      locations  how much each sample, of the layer or of one before it,
                 moves the output
      saliency   the smallest region that gives the same output
      flow       the offsets of the whole layer
    """
    _need("`deformconv look`", "look", "torch", "matplotlib", "rich")
    _let_threads_sleep()
    from deformconv.cli.look import run

    return run(photo, **options)


@deformconv.command("demo-gluon")
@click.option("--fast", is_flag=True, help="A few training steps only, for a first look.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of weights and batches.")
def demo_gluon(fast: bool, seed: int) -> int:
    """Train the demo's net in MXNet Gluon.

    With v1 and with v2, on handwritten digits. First MXNet's own blocks and ours are compared, with the same weights.
    Ends with 1 if they differ.
    """
    _need("the Gluon demo", "demo-gluon", "mxnet", "mlxtend", "rich")
    from deformconv.studies.gluon_demo import run

    return run(fast=fast, seed=seed)


@deformconv.group()
def experiment() -> None:
    """Experiments of the papers, small enough for this machine."""


@experiment.command()
@click.option("--fast", is_flag=True, help="A few steps on small scenes: a minute, to see that it runs.")
@click.option("--seeds", type=click.IntRange(1), default=1, show_default=True, help="Train everything this many times.")
@_FIRST_SEED
@click.option("--arms", metavar="ARM,...", help="Only these of the arms above, and regular.  [default: all]")
@click.option("--sweep", is_flag=True, help="Also scenes whose digits vary less in scale and form.")
@click.option("--steps", type=click.IntRange(1), help="Of every arm.  [default: 600, fast: 10]")
@click.option("--base-steps", type=click.IntRange(1), help="Of the detector they are cut from.  [default: 1500, fast: 20]")
@click.option("--images", type=click.IntRange(1), help="To test on.  [default: 1000, fast: 24]")
@click.option("--workers", type=click.IntRange(1), default=2, show_default=True, help="Processes, of one thread each.")
@_output("detect-output", "The folder for all that comes out.")
def detect(arms: str | None, output: Path, **options: Any) -> int:
    """Train the DCNv2 paper's detectors, and a regular one.

    A small Faster R-CNN learns to find handwritten digits of many sizes,
    aspect ratios and rotations over photographs. Each ARM is cut out of the
    same trained detector and trained on with the same scenes:

    \b
      regular    the detector as it is
      seconds    regular, for as many seconds as v2 takes
      wide       regular, with as many parameters more as v2's pooling has
      v1         conv5 deformable, and deformable RoI pooling
      v2-conv    conv3 to conv5 modulated deformable
      v2         the same, and modulated deformable RoI pooling
      v2-mimic   the same, and feature mimicking
      scratch    v2-conv, trained from the start

    One seed takes some 20 minutes on two free processors. What is done is kept
    in the folder: after Ctrl-C, which leaves no half-written file, or a crash
    the same command goes on, to the same precision, and one with more seeds or
    arms trains what is missing. The tables are of what a command asks for.
    """
    _need(
        "the experiment", "experiment", "torch", "torchvision", "lightning-fabric", "matplotlib", "mlxtend", "pycocotools",
        "rich", "scikit-image", "scikit-learn", "scipy",
    )  # fmt: skip
    from deformconv.cli.experiment import known_arms, run

    chosen = known_arms(arms)
    _make(output)
    return run(chosen, output, **options)


@deformconv.command()
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float64", "float16", "bfloat16", "all"]),
    help="The dtype of the calls to come; on a CPU, half precision has kernels of its own for convolution alone, and is "
    "computed by those for float32 elsewhere.  [default: float32; with --gpu also float16 and bfloat16]",
)
@click.option(
    "--rank",
    "ranks",
    type=click.Choice(["1", "2", "3"]),
    multiple=True,
    help="Spatial axes; may be given more than once.  [default: all three]",
)
@click.option(
    "--cpu",
    "cpu_name",
    metavar="NAME",
    help="For processors of this level: x86-64-v3, x86-64-v4, neoverse-n1, ... or native, for this one alone.  "
    "[default: DEFORMCONV_CPU, or native]",
)
@click.option("--rois", is_flag=True, help="Also deformable RoI pooling.")
@click.option("--attention", is_flag=True, help="Also deformable attention.")
@click.option("--aggregate", is_flag=True, help="Also deformable aggregation, of DCNv3 and DCNv4.")
@click.option("--gpu", is_flag=True, help="The kernels for the GPUs of this machine, not the CPU's.")
def warmup(
    dtype: str | None, ranks: tuple[str, ...], cpu_name: str | None, rois: bool, attention: bool, aggregate: bool, gpu: bool
) -> int:
    """Compile the kernels now, not at the first call.

    The machine code is kept in a folder (see `deformconv doctor`, or set DEFORMCONV_CACHE_DIR), so this is
    done once per machine; in a container's build it saves every container the time. Ends with 1 if nothing
    can be kept.

    GPU kernels are compiled by Triton, for the GPUs that are there, and kept in its own folder (set
    TRITON_CACHE_DIR).

    Code for this very processor is found again on processors of the same kind only. An image that runs on
    others sets DEFORMCONV_CPU to a level that all of them have, for this command and for the programs that
    load the kernels: x86-64-v3 (AVX2) is nearly every x86 server since 2015, x86-64-v4 has AVX-512.
    """
    from deformconv.cli import warmup

    if gpu:
        others = {"--rank": ranks, "--cpu": cpu_name}
        if given := [name for name, value in others.items() if value]:
            raise click.UsageError(f"{', '.join(given)}: of the CPU's kernels alone, not of --gpu")
        dtypes = {None: HALF + WHOLE[:1], "all": HALF + WHOLE}.get(dtype, (str(dtype),))
        return warmup.run_on_gpus(dtypes, rois, attention, aggregate)
    dtypes = HALF + WHOLE if dtype == "all" else (dtype or "float32",)
    return warmup.run(dtypes, [int(rank) for rank in ranks or "123"], cpu_name, rois, attention, aggregate)


@deformconv.command()
def doctor() -> int:
    """Report what there is, what is used, and whether it computes.

    Versions, processor, threads, cache folder, which backends run and why the others do not, GPUs; then a tiny
    forward and backward pass is compared with the reference, on every GPU as well. Ends with 1 if that fails.
    """
    from deformconv.cli.doctor import run

    return run()


@deformconv.command()
@click.argument("reports", nargs=-1, metavar="[REPORT]...")
@click.option("--quick", is_flag=True, help="A few small cases and short blocks: under a minute.")
@click.option("--case", "cases", multiple=True, help="Only this case; may be given more than once, as the next two.")
@click.option("--library", "libraries", multiple=True, help="Beside this library only.")
@click.option("--direction", "directions", multiple=True, help="Only forward, or only forward+backward.")
@click.option("--base", metavar="REV", help="Beside another commit of this git checkout; see below.")
@click.option("--threads", type=click.IntRange(1), help="Threads of every library.  [default: one per processor]")
@click.option("--blocks", type=click.IntRange(1), help="Blocks of calls of every library.  [default: 7, quick: 3]")
@click.option(
    "--seconds", type=click.FloatRange(0, min_open=True), help="About how long a block is.  [default: 0.3, quick: 0.05]"
)
@click.option(
    "--json", "json", type=click.Path(dir_okay=False, path_type=Path), help="Write the results to a file, or add them to it."
)
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw the speed (.png, .svg or .pdf).")
@click.option(
    "--from", "source", type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Measure nothing: print and draw what a file of --json has.",
)  # fmt: skip
def bench(**options: Any) -> int:
    """Measure the speed beside other libraries', on named cases.

    \b
    REPORT is one or more of
      speed     beside ONNX Runtime, OpenVINO, ncnn, torchvision, kornia
                and a plain convolution, whichever are installed (the
                default)
      net       whole nets, beside those of plain convolutions,
                torchvision's and kornia's layers; also on a busy machine
      rois      pooling of boxes, beside torchvision's RoI align
      attention multi-scale deformable attention, beside transformers',
                kornia's and mmcv's
      aggregate what DCNv3 and DCNv4 add up, beside torchvision's
                deformable convolution and PyTorch's grid_sample
      offsets   with offsets of three kinds
      half      in bfloat16 and float16, beside float32
      small     what a call costs when there is little to compute
      scaling   time against work, and with 1 and 2 threads
      memory    the peak of forward and backward
      startup   the first call, with and without compiled kernels
      jax       in JAX, beside XLA's convolution and NumPy's front end
      keras     Keras' layer beside its Conv2D, on each backend there is
      all       all of these that can be measured here

    Every library runs in a process of its own, in alternating blocks of
    calls, after its results were compared with those of array operations
    in float64: a wrong result has no time.

    With --base the reports speed, small and startup compare the files that
    lie here with those of another commit. Ends with 1 if a result differs
    in a bit.
    """
    from deformconv.cli.bench import Options, run

    return run(Options(**options))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    try:
        # Not click's standalone mode, in which an interrupt ends with 1.
        code: int | None = deformconv.main(arguments, "deformconv", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted: nothing is left half-written.", err=True)
        return INTERRUPTED
    return code or 0
