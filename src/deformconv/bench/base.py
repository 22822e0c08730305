"""The package that lies here beside the same package at another commit: in one run, a process for each, alternating blocks.

The commit's files come from git into a temporary folder, and its own worker answers for it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from itertools import product
from pathlib import Path
from statistics import geometric_mean
from typing import Any, NamedTuple

import numpy as np

import deformconv
from deformconv.bench.cases import Case, case_of
from deformconv.bench.figures import Row, digits, layer, markdown
from deformconv.bench.measure import Entry, Failure, Process, Progress, compare, differences, results_of
from deformconv.bench.peers import RECORDED, Deformconv, Truth
from deformconv.bench.reports import Plan, small_cases
from deformconv.bench.startup import Start

__all__ = ["REPORTS", "Report", "Tree", "Trees", "commit_here", "differing", "trees_of"]

PACKAGE = "src/deformconv"
WORKER = f"{PACKAGE}/bench/worker.py"
Rows = list[dict[str, Any]]
Runs = dict[str, dict[str, Rows]]  # what processes said, by kind and side


class Tree(NamedTuple):
    """The package's files at one commit, and what makes Python import those and no others."""

    commit: str
    folder: Path
    variables: dict[str, str]


class Trees(NamedTuple):
    base: Tree
    here: Tree


class Report(NamedTuple):
    """How one report is measured, and how its rows are written."""

    title: str
    measure: Callable[[Trees, Plan, Progress], Rows]
    write: Callable[[Sequence[Row]], str]


@contextmanager
def trees_of(revision: str) -> Iterator[Trees]:
    """The files of a revision in a temporary folder, which is removed afterwards, and the files that lie here."""
    root = _root()
    try:
        commit = _git(root, "rev-parse", "--verify", f"{revision}^{{commit}}")
    except Failure:
        raise Failure(f"there is no commit {revision!r} in {root}") from None
    base = _git(root, "rev-parse", "--short", commit)
    try:
        _git(root, "cat-file", "-e", f"{commit}:{WORKER}")
    except Failure:
        raise Failure(f"the commit {base} cannot be measured: it has no {WORKER}") from None
    here = commit_here()
    with tempfile.TemporaryDirectory(prefix="deformconv-base-") as name:
        folder = Path(name).resolve()
        archive = folder / "sources.zip"
        _git(root, "archive", "--format=zip", f"--output={archive}", commit, PACKAGE)
        zipfile.ZipFile(archive).extractall(folder)
        # A folder of its own: in a shared one, machine code of one commit could have a name that the other commit looks for.
        cache = {"DEFORMCONV_CACHE_DIR": str(folder / "kernels")}
        trees = Trees(Tree(base, folder, _importing(folder) | cache), Tree(here, root, _importing(root)))
        for tree in trees:
            _check_import(tree)
        yield trees


def commit_here() -> str:
    """The commit that lies here, and whether its files were changed; Failure outside of a git checkout."""
    root = _root()
    commit = _git(root, "rev-parse", "--short", "HEAD")
    return f"{commit} with changes" if _git(root, "status", "--porcelain", "--", PACKAGE) else commit


def _root() -> Path:
    """The git checkout that the running package lies in."""
    package = Path(deformconv.__file__).resolve().parent
    if shutil.which("git") is None:
        raise Failure("another commit's files come from git, which is not installed here")
    try:
        root = Path(_git(package, "rev-parse", "--show-toplevel")).resolve()
    except Failure as failure:
        raise Failure(f"{package} is not in a git checkout: {failure}") from None
    if root / PACKAGE != package:  # an installed package, in a checkout of something else
        raise Failure(f"{package} is not in a git checkout of deformconv, where it would be {root / PACKAGE}")
    return root


def _git(folder: Path, *arguments: str) -> str:
    ran = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    if ran.returncode:
        raise Failure((ran.stderr.strip().splitlines() or [f"git {arguments[0]} failed"])[-1])
    return ran.stdout.strip()


def _importing(folder: Path) -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(folder / "src"), os.environ.get("PYTHONPATH")]))}


def _check_import(tree: Tree) -> None:
    """Raise if an editable install comes before PYTHONPATH: then a commit would be compared with itself."""
    ran = subprocess.run(
        [sys.executable, "-c", "import deformconv; print(deformconv.__file__)"],
        capture_output=True, text=True, check=False, cwd=tree.folder, env={**os.environ, **tree.variables},
    )  # fmt: skip
    if ran.returncode:
        last = (ran.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise Failure(f"the commit {tree.commit} cannot be imported: {last}")
    found = Path(ran.stdout.strip()).resolve().parent
    if found != tree.folder / PACKAGE:
        raise Failure(f"the commit {tree.commit} cannot be measured: Python imports {found} in the place of its files")


def speed(trees: Trees, plan: Plan, progress: Progress) -> Rows:
    return _layers(trees, plan.cases, plan.directions, plan, progress)


def small(trees: Trees, plan: Plan, progress: Progress) -> Rows:
    """What the smallest call costs, without and with a gradient recorded."""
    return _layers(trees, small_cases(quick=True)[:1], ("forward", RECORDED), plan, progress)


def _layers(trees: Trees, cases: Sequence[Case], directions: Sequence[str], plan: Plan, progress: Progress) -> Rows:
    rows = []
    progress.begin(len(cases) * len(directions))
    started = (Truth.name, trees.here), (Deformconv.name, trees.base), (Deformconv.name, trees.here)
    for tree in trees:
        # A process that compiles a kernel may round otherwise than one that finds it on disk: so both find theirs there.
        with closing(Process(Deformconv.name, plan.threads, tree.folder, **tree.variables)) as first, suppress(Failure):
            for case, direction in product(cases, directions):
                results_of(first, case, direction)
    with ExitStack() as stack:
        truth, base, here = (
            stack.enter_context(closing(Process(library, plan.threads, tree.folder, **tree.variables)))
            for library, tree in started
        )
        for case, direction in product(cases, directions):
            progress.step(f"{case.name}, {direction}")
            rows.append(_commits(trees) | _layer_row(case, direction, truth, base, here, plan))
    return rows


def _layer_row(case: Case, direction: str, truth: Any, base: Any, here: Any, plan: Plan) -> dict[str, Any]:
    """Both times, if both results are right, and how far results are apart whose bits differ."""
    results = compare({"base": Entry(base, case), "here": Entry(here, case)}, direction, truth, plan.pace)
    row = {"layer": case._asdict(), "direction": direction, "results": results}
    if not any("reason" in result for result in results.values()):
        theirs, ours = (results_of(process, case, direction) for process in (base, here))
        errors = differences(ours, theirs)
        row["differences"] = {name: errors[name] for name in theirs if ours[name].tobytes() != theirs[name].tobytes()}
    return row


def _commits(trees: Trees) -> dict[str, Any]:
    return {"commits": {"base": trees.base.commit, "here": trees.here.commit}}


def differing(rows: Sequence[Row]) -> bool:
    """Whether a result differs in a bit from the base's."""
    return any(row.get("differences") or not row.get("same results", True) for row in rows)


def write_layers(rows: Sequence[Row], unit: str, factor: float) -> str:
    parts = [_said(rows)]
    for direction in dict.fromkeys(row["direction"] for row in rows):
        lines, ratios = [], []
        for row in (row for row in rows if row["direction"] == direction):
            case, sides = case_of(row["layer"]), [row["results"][side] for side in ("base", "here")]
            base, here = (side.get("milliseconds") for side in sides)
            cells = [digits(None if time is None else factor * time) for time in (base, here)]
            compared = ["-", "-"]
            if base is not None and here is not None:
                ratios.append((here / base, case.name))
                compared = [f"{here / base:.3f}", f"{100 * max(map(_spread, sides)):.0f} %"]
            lines.append([case.name, layer(case), *cells, *compared, _verdict(row)])
        head = ["case", "layer", f"base, {unit}", f"here, {unit}", "here / base", "spread", "results"]
        parts += [direction, markdown(head, lines, 2)]
        if ratios:
            mean, (most, name) = geometric_mean(ratio for ratio, _ in ratios), max(ratios)
            parts.append(f"here / base: geometric mean {mean:.3f} of {len(ratios)}, {most:.3f} at the most ({name})")
    return "\n\n".join([*parts, LIMITS])


LIMITS = """\
Times are medians of alternating blocks of calls. The spread is the quartiles' distance over the median, of the side where it is
wider: a ratio that is no further from 1 says nothing. Another machine, dtype or number of threads may answer otherwise."""


def _said(rows: Sequence[Row]) -> str:
    commits = rows[0]["commits"]
    return f"base is {commits['base']}, here is {commits['here']}"


def _spread(result: dict[str, Any]) -> float:
    low, high = result["quartiles"]
    spread: float = (high - low) / result["milliseconds"]
    return spread


def _verdict(row: Row) -> str:
    for side, result in row["results"].items():
        if "reason" in result:
            return f"refused: {side} {result['reason']}"
    worst = max(row["differences"].items(), key=lambda item: item[1], default=None)
    return "equal" if worst is None else f"differ by {worst[1]:.1e} in {worst[0]}"


def startup(trees: Trees, plan: Plan, progress: Progress) -> Rows:
    """What the first forward and backward of a process costs, with machine code on disk and without any."""
    cold, warm = (1, 3) if plan.quick else (3, 7)
    runs: Runs = {kind: {"base": [], "here": []} for kind in ("cold", "warm")}
    progress.begin(cold + warm)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(cold + warm):
            kind = "cold" if number < cold else "warm"
            progress.step(f"the first call, {kind}")
            for side, tree in trees._asdict().items():
                cache = Path(folder, side, str(min(number, cold - 1)))  # the warm ones find what the last cold one left
                start = Start(tree.folder, **tree.variables | {"DEFORMCONV_CACHE_DIR": str(cache)})
                runs[kind][side].append(start.end())
    return [row | _commits(trees) for row in _startup_rows(runs)]


def _startup_rows(runs: Runs) -> Rows:
    same = len({run["results"] for sides in runs.values() for found in sides.values() for run in found}) == 1
    parts: list[tuple[str, str, Callable[[dict[str, Any]], float]]] = [
        ("import deformconv.torch, after torch", "warm", lambda run: run["load"]),
        ("the first call, warm", "warm", lambda run: run["first"] - run["load"]),
        ("the first call, cold: it compiles", "cold", lambda run: run["first"] - run["load"]),
    ]
    rows = []
    for what, kind, seconds in parts:
        results = {}
        for side, found in runs[kind].items():
            low, middle, high = np.quantile([seconds(run) for run in found], (0.25, 0.5, 0.75)).tolist()
            results[side] = {"seconds": middle, "quartiles": [low, high], "processes": len(found)}
        rows.append({"what": what, "results": results, "same results": same})
    return rows


def write_startup(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        base, here = (row["results"][side] for side in ("base", "here"))
        quartiles = (f"{digits(side['seconds'])} ({' to '.join(map(digits, side['quartiles']))})" for side in (base, here))
        lines.append([row["what"], *quartiles, f"{here['seconds'] / base['seconds']:.3f}", str(here["processes"])])
    head = ["part", "base, seconds (quartiles)", "here, seconds (quartiles)", "here / base", "processes"]
    same = "Results are equal bit for bit." if rows[0]["same results"] else "Results DIFFER."
    return "\n\n".join([_said(rows), markdown(head, lines), f"{same} Medians of alternating processes, in one run."])


REPORTS = {
    "speed": Report("Speed beside another commit", speed, partial(write_layers, unit="ms", factor=1)),
    "small": Report("The smallest call beside another commit's", small, partial(write_layers, unit="µs", factor=1000)),
    "startup": Report("The first call beside another commit's", startup, write_startup),
}
