"""`deformconv bench`: what is asked for, measured, printed, written and drawn."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import click

from deformconv.bench import base, chart, document, figures
from deformconv.bench.cases import CASES, QUICK, Case
from deformconv.bench.measure import Pace, Progress, speed
from deformconv.bench.nets import NETS, QUICK_NETS
from deformconv.bench.peers import DIRECTIONS, PEERS, missing
from deformconv.bench.reports import OTHERS, REPORTS, THEIRS, Plan, Report
from deformconv.files import whole_file
from deformconv.installation import command

__all__ = ["Options", "run"]

ALL = ("speed", *REPORTS)
BASE = {f"base {name}": report for name, report in base.REPORTS.items()}  # by the names of a file's sections
FULL, QUICK_PACE = Pace(blocks=7, seconds=0.3), Pace(blocks=3, seconds=0.05)
PICTURES = (".png", ".svg", ".pdf")

Document = dict[str, Any]


class Options(NamedTuple):
    """The command line."""

    reports: Sequence[str] = ()
    cases: Sequence[str] = ()
    libraries: Sequence[str] = ()
    directions: Sequence[str] = ()
    threads: int | None = None
    blocks: int | None = None
    seconds: float | None = None
    quick: bool = False
    json: Path | None = None
    plot: Path | None = None
    source: Path | None = None
    base: str | None = None


class Bar(Progress):
    """A progress bar on standard error, one for each report."""

    def __init__(self) -> None:
        self.bar: Any = None

    def begin(self, steps: int) -> None:
        self.end()
        # What is being done is measured in steps of very different length: a time that remains would be a guess.
        self.bar = click.progressbar(
            length=steps, file=sys.stderr, show_eta=False, show_pos=True, show_percent=False, width=20,
            bar_template="[%(bar)s]  %(info)s  %(label)s",
        )  # fmt: skip
        self.begun = False

    def step(self, what: str) -> None:
        self.bar.label = what
        self.bar.make_step(int(self.begun))  # the step before this one is done
        self.bar.render_progress()
        self.begun = True

    def end(self) -> None:
        if self.bar is not None:
            self.bar.render_finish()
            self.bar = None


def run(options: Options) -> int:
    """Measure, or read what was measured; print, write and draw it. Return the exit code: 1 if our own results are wrong."""
    known = ALL if options.base is None else tuple(base.REPORTS)
    what = "report" if options.base is None else "report with --base"
    reports = _chosen(what, options.reports, (*known, "all")) or ["speed"]
    reports = list(known) if "all" in reports else reports
    _check_base(options)
    _check_files(options, reports)
    if options.source is not None:
        found = _read(options.source)
        wanted = reports if options.reports else ALL
        names = [name for name in (*ALL, *BASE) if name in found and name.removeprefix("base ") in wanted]
        if not names:
            raise click.ClickException(f"{options.source} has no {' and no '.join(reports)}")
        for name in names:
            _print(name, found[name]["rows"])
        _draw(options.plot, found)
        return 0
    plan, absent = _plan(options)
    reports = _with_cases(reports, plan, "all" in options.reports)
    reports = _installed(reports, options)
    found = document.machine()
    sections = {name: name if options.base is None else f"base {name}" for name in reports}
    earlier = _earlier(options.json, found, list(sections.values()))
    wrong = differing = False
    with _trees(options) as trees:
        for name, section in sections.items():
            bar = Bar()
            try:
                rows = _measure(name, plan, bar, trees)
            except RuntimeError as error:
                raise click.ClickException(f"{name}: {error}") from None
            finally:
                bar.end()
            wrong |= _is_wrong(rows)
            differing |= base.differing(rows)
            earlier = document.join(earlier, found, section, document.section(rows, plan.threads, *plan.pace))
            _print(section, rows)
            if options.json is not None:  # after every report, since the next may be interrupted
                _write(options.json, earlier)
    if absent:
        click.echo(f"\nNot installed, so not compared: {', '.join(absent)}. {_install()} brings all of them.")
    for line in [] if options.base is not None else _absent_of(reports):
        click.echo("\n" + line)
    click.echo("\n" + _machine_line(found, plan.threads))
    _draw(options.plot, earlier)
    if wrong:
        raise click.ClickException("deformconv failed, or its results are wrong: see above")
    if differing:
        raise click.ClickException("the results of here are not those of the base, bit for bit: see above")
    return 0


def _install() -> str:
    return command("bench", *sorted({package for peer in PEERS.values() for package in peer.packages} | {"matplotlib"}))


def _absent_of(reports: Sequence[str]) -> list[str]:
    """What is to be said of libraries that have another operator than convolution and are not installed, report by report."""
    lacking = {other.word: other.absent() for other in OTHERS if other.word in reports}
    ways = {
        word: "; ".join(f"{title} (pip install {name})" for title, name in found.items()) for word, found in lacking.items()
    }
    return [f"Not installed, so not compared in the report {word}: {text}." for word, text in ways.items() if text]


def _installed(reports: Sequence[str], options: Options) -> list[str]:
    """The reports that can be measured here; each that was asked for by its name has to be."""
    lacking = {name: needed for name in reports if name in REPORTS and (needed := missing(REPORTS[name].packages))}
    for name, needed in lacking.items():
        if name in options.reports:
            extra = REPORTS[name].extra
            how = _install() if extra is None else command(extra, *needed)
            raise click.ClickException(f"the report {name} cannot be measured: {', '.join(needed)} not installed here. {how}")
        click.echo(f"Not measured: {name}, for which {', '.join(needed)} is not installed here.", err=True)
    return [name for name in reports if name not in lacking]


def _chosen(what: str, given: Sequence[str], known: Sequence[str]) -> list[str]:
    for name in given:
        if name not in known:
            raise click.UsageError(f"there is no {what} {name!r}; there are {', '.join(known)}")
    return [name for name in known if name in given]


def _plan(options: Options) -> tuple[Plan, list[str]]:
    """What to measure, and the titles of the libraries that are not installed."""
    known = [case.name for case in (*CASES, *NETS, *chain(*(other.cases for other in OTHERS)))]
    named = _chosen("case", options.cases, known)
    names = named or ((*QUICK, *QUICK_NETS) if options.quick else known)
    cases: list[Case] = [case for case in CASES if case.name in names]
    nets = [net for net in NETS if net.name in names]
    wanted = _chosen("library", options.libraries, tuple(PEERS))
    directions = _chosen("direction", options.directions, DIRECTIONS) or DIRECTIONS
    absent = {name: packages for name, peer in PEERS.items() if (packages := missing(peer.packages))}
    for name in ("deformconv", *wanted):
        if name in absent:
            raise click.ClickException(f"{name} cannot be measured: {', '.join(absent[name])} not installed here. {_install()}")
    libraries = [name for name in PEERS if name not in absent and (not wanted or name in wanted or name == "deformconv")]
    from deformconv.runtime.processors import available_processors

    pace = QUICK_PACE if options.quick else FULL
    pace = Pace(options.blocks or pace.blocks, options.seconds or pace.seconds)
    plan = Plan(cases, libraries, directions, options.threads or available_processors(), pace, options.quick, nets, named)
    return plan, [] if wanted or options.base is not None else [PEERS[name].title for name in absent]


def _with_cases(reports: Sequence[str], plan: Plan, all_of_them: bool) -> list[str]:
    """The reports that measure something that --case names; each has to, unless all were asked for."""
    own = {name: ("a case of its own", not plan.named) for name, report in REPORTS.items() if not report.has_cases}
    own |= {"net": ("nets", plan.nets)} | {other.word: ("cases of its own", other.wanted(plan)) for other in OTHERS}
    idle = {name: what for name in reports for what, chosen in [own.get(name, ("layers", plan.cases))] if not chosen}
    if not all_of_them:
        for name, what in idle.items():
            raise click.UsageError(f"the report {name} measures {what}, and --case names none")
    return [name for name in reports if name not in idle]


def _measure(name: str, plan: Plan, bar: Bar, trees: base.Trees | None) -> list[dict[str, Any]]:
    if trees is not None:
        return base.REPORTS[name].measure(trees, plan, bar)
    if name == "speed":
        return speed(plan.cases, plan.libraries, plan.directions, plan.threads, plan.pace, bar)
    return REPORTS[name].measure(plan, bar)


def _is_wrong(rows: Sequence[figures.Row]) -> bool:
    """Whether a result of ours was refused, or a cache was damaged."""
    for row in rows:
        # Labels that are no library's are results of ours: kinds of offsets, numbers of threads.
        results = row.get("results", {}).items()
        ours = [result for label, result in results if label == "deformconv" or label not in (*PEERS, *THEIRS)]
        sound = row.get("results agree", True) and row.get("cache is whole", True)
        if not sound or any("reason" in result for result in ours):
            return True
    return False


def _print(name: str, rows: Sequence[figures.Row]) -> None:
    if name != "speed":
        report: Report | base.Report = BASE[name] if name in BASE else REPORTS[name]
        click.secho(f"\n{report.title}\n", bold=True)
        click.echo(report.write(rows))
        return
    for direction in DIRECTIONS:
        if any(row["direction"] == direction for row in rows):
            click.secho(f"\nSpeed, {direction}, milliseconds\n", bold=True)
            click.echo(figures.speed_table(rows, direction))
    for note in figures.notes(rows):
        click.echo(note)
    if means := figures.summary(rows):
        click.secho("\nGeometric means\n", bold=True)
        click.echo(means)


def _machine_line(found: Document, threads: int) -> str:
    packages = ", ".join(f"{name} {number}" for name, number in found["packages"].items())
    return f"{found['processor']}, {threads} threads; Python {found['python']}, {packages}"


@contextmanager
def _trees(options: Options) -> Iterator[base.Trees | None]:
    """What --base names and what lies here; None without it."""
    with ExitStack() as stack:
        try:
            trees = None if options.base is None else stack.enter_context(base.trees_of(options.base))
        except RuntimeError as error:
            raise click.ClickException(f"--base: {error}") from None
        yield trees


def _check_base(options: Options) -> None:
    for option, given in (("--library", options.libraries), ("--plot", options.plot), ("--from", options.source)):
        if options.base is not None and given:
            raise click.UsageError(f"--base measures deformconv alone, at two commits: {option} has no place beside it")


def _check_files(options: Options, reports: Sequence[str]) -> None:
    """Whatever would fail at the end fails now, not after minutes."""
    if options.plot is not None:
        if options.plot.suffix.lower() not in PICTURES:
            raise click.UsageError(f"--plot {options.plot}: expected a name that ends with {', '.join(PICTURES)}")
        if options.source is None and "speed" not in reports:
            raise click.UsageError("--plot draws the report speed, which is not among those asked for")
        if find_spec("matplotlib") is None:
            raise click.ClickException(f"--plot needs matplotlib, not installed here: {_install()}")
    for option, path in (("--json", options.json), ("--plot", options.plot)):
        if path is None:
            continue
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path.parent):
                pass
        except OSError as error:
            raise click.ClickException(f"cannot write {option} {path}: {error.strerror}") from None


def _read(path: Path) -> Document:
    try:
        return document.read(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise click.ClickException(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise click.ClickException(f"{path} is not a benchmark's file: {error}") from None


def _earlier(path: Path | None, found: Document, reports: Sequence[str]) -> Document | None:
    """What the file has already, and will keep; it must be of this machine."""
    if path is None or not path.exists():
        return None
    earlier = _read(path)
    if set(earlier) <= {"machine", *reports}:
        return None  # all of it is measured anew
    try:
        document.join(earlier, found, "", {})
    except ValueError as error:
        raise click.ClickException(f"cannot add to {path}: {error}") from None
    return earlier


def _write(path: Path, found: Document) -> None:
    with whole_file(path) as part:
        part.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _draw(path: Path | None, found: Document | None) -> None:
    if path is None or found is None:
        return
    if "speed" not in found:
        raise click.ClickException("--plot draws the report speed, which the file does not have")
    if not chart.relative(found["speed"]["rows"]):
        raise click.ClickException("nothing to draw: no other library has a time, or deformconv has none")
    with whole_file(path) as part:
        chart.save(part, found)
    click.echo(f"\nThe chart is in {path}", err=True)
