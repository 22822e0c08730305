"""`python -m deformconv.bench.gpu`: deformable convolution on a GPU, beside other libraries and a plain convolution.

Every result is printed at once, and the file of `--json` is whole after each, so that a run that is ended keeps what it has.
What matters most comes first, and nothing begins that would not end before `--budget`. It needs PyTorch, NumPy and deformconv
alone: a library that is missing has a reason in the place of a time.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch

from deformconv.bench import base, document, gpu_clock, gpu_figures
from deformconv.bench.cases import Case, case_of
from deformconv.bench.figures import digits
from deformconv.bench.gpu_peers import (
    DTYPES,
    GPU_CASES,
    GPU_PEERS,
    MAIN,
    TINY,
    Given,
    allow_tf32,
    copies,
    given,
    reason_against,
    step,
    truth,
)  # fmt: skip
from deformconv.bench.peers import DIRECTIONS

__all__ = ["Lost", "Plan", "Run", "jobs", "joined", "main", "measure", "profile", "said", "words_of"]

CASES = {case.name: case for case in (*GPU_CASES, TINY)}
NAMES = tuple(case.name for case in GPU_CASES)
INPUTS = 4  # that a library is called with in turn
LONGEST = {"deformops": 45.0}  # seconds of a library's first result, to compile included
LONG = 15.0  # the same of other libraries


class Lost(RuntimeError):
    """The GPU no longer answers, and no later call would."""


class Plan(NamedTuple):
    """What was asked for."""

    device: str = "cuda"
    cases: Sequence[str] = NAMES
    dtypes: Sequence[str] = tuple(DTYPES)
    libraries: Sequence[str] = tuple(GPU_PEERS)
    directions: Sequence[str] = DIRECTIONS
    budget: float = 540.0
    seconds: float = 1.0  # at the most, for the blocks of one result
    channels_last: bool = False


def jobs(plan: Plan) -> list[tuple[Case, str, str]]:
    """Cases, dtypes and directions, the figures that matter most first."""
    pairs = [(case, dtype) for case in plan.cases for dtype in plan.dtypes]
    pairs.sort(key=lambda pair: not (pair[0] in MAIN and pair[1] in ("bf16", "fp32")))  # a stable sort
    return [(CASES[case], dtype, direction) for case, dtype in pairs for direction in plan.directions]


class Run:
    """A run: what it has found, what it has told, and the time that it has left."""

    def __init__(self, plan: Plan, commit: str, tell: Callable[[Any], None], began: float | None = None) -> None:
        self.plan, self.tell = plan, tell
        self.began = time.monotonic() if began is None else began
        self.longest: dict[str, float] = {}
        self.right: tuple[Any, Given] | None = None
        part = {"date": date.today().isoformat(), "commit": commit, "budget": plan.budget, "channels last": plan.channels_last}
        self.found: dict[str, Any] = {"machine": gpu_clock.machine(plan.device), "gpu": {**part, "rows": [], "left out": 0}}

    def fits(self, library: str) -> bool:
        """Whether another result of a library would be there in time, if it takes as long as the longest before."""
        spent = time.monotonic() - self.began
        return spent + self.longest.get(library, LONGEST.get(library, LONG)) < self.plan.budget

    def rows(self) -> Iterator[dict[str, Any]]:
        """Measure; yield a row as often as it has a new result."""
        for case, dtype, direction in jobs(self.plan):
            row: dict[str, Any] = {"layer": case._asdict(), "dtype": dtype, "direction": direction, "results": {}}
            tensors: Given | None = None
            for library in self.plan.libraries:
                if (reason := reason_against(library, dtype)) is None and not self.fits(library):
                    self.found["gpu"]["left out"] += 1
                    continue
                if reason is not None:
                    result = {"reason": reason}
                else:
                    began = time.monotonic()
                    allow_tf32(DTYPES[dtype].tf32)
                    tensors = tensors or given(case, dtype, self.plan.device, self.plan.channels_last)
                    result = self.result(library, case, dtype, direction, tensors)
                    self.longest[library] = max(self.longest.get(library, 0.0), time.monotonic() - began)
                if not row["results"]:
                    self.found["gpu"]["rows"].append(row)
                row["results"][library] = result
                self.tell(said(row, library))
                yield row

    def result(self, library: str, case: Case, dtype: str, direction: str, tensors: Given) -> dict[str, Any]:
        """A library's result: its time if it is right, else the reason why it has none."""
        try:
            return self._measured(library, case, dtype, direction, tensors)
        except Exception as error:  # what a library cannot do is a result of the comparison
            first = next(iter(str(error).splitlines()), "")
            return {"reason": f"failed: {type(error).__name__}: {first[:200]}"}
        finally:
            try:
                gpu_clock.clear(self.plan.device)
            except RuntimeError as error:
                raise Lost(f"the GPU is lost after {library}, {case.name}, {dtype}, {direction}: {error}") from error

    def _measured(self, library: str, case: Case, dtype: str, direction: str, tensors: Given) -> dict[str, Any]:
        peer, device = GPU_PEERS[library](1), self.plan.device
        expected = self._expected(case, dtype, direction, tensors) if peer.deforms else None
        operate, more = _operator(peer, case, device)
        sets = copies(library, tensors, 1 if device == "cpu" else INPUTS)
        found, peak = gpu_clock.memory(lambda: step(operate, sets[0], direction), device)
        more |= {} if peak is None else {"peak": peak}
        again = step(operate, sets[0], direction)
        more["same bits"] = all(torch.equal(again[name], found[name]) for name in found)
        if expected is not None:
            more["errors"] = errors = {name: _error(found.get(name), right) for name, right in expected.items()}
            worst = max(errors, key=lambda name: errors[name])
            more["error"] = errors[worst]
            if not errors[worst] <= max(DTYPES[dtype].limit, case.tolerance):
                return {"reason": f"differs by {errors[worst]:.1e} in {worst}", **more}
        del found, again
        return more | gpu_clock.times(
            lambda number: step(operate, sets[number], direction), len(sets), device, self.plan.seconds
        )

    def _expected(self, case: Case, dtype: str, direction: str, tensors: Given) -> Given:
        """What is right, computed once for a case's numbers."""
        key = (case.name, dtype)
        if self.right is None or self.right[0] != key:
            self.right = None  # before the next is computed, since they may be large
            self.right = key, truth(case, tensors, "forward" if self.plan.directions == ("forward",) else "forward+backward")
        return {name: right for name, right in self.right[1].items() if name == "output" or direction != "forward"}


def _operator(peer: Any, case: Case, device: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    """What to call; in a smoke run on a CPU without a backend for GPUs, the portable one stands in for ours."""
    operate = peer.operator(case)
    if device != "cpu" or getattr(peer, "backend", None) != "gpu":
        return operate, {}
    try:
        step(peer.operator(TINY), copies(peer.name, given(TINY, "fp32", device), 1)[0], "forward")
    except (RuntimeError, ValueError):
        peer.backend = "portable"
        return peer.operator(case), {"backend": "portable"}
    return operate, {}


def _error(actual: Any, right: Any) -> float:
    """As `deformconv.accuracy.error` has it, on the device; infinite for a result that is missing, misshapen or NaN."""
    if actual is None or actual.shape != right.shape:
        return float("inf")
    scale = right.abs().max().item() or 1.0
    found = (actual.double() - right).abs().max().item() / scale
    return found if found == found else float("inf")


def said(row: dict[str, Any], library: str) -> str:
    """A result in a line."""
    label = f"{case_of(row['layer']).name:12} {row['dtype']:4}  {row['direction']:16}  {library:19}"
    return f"{label} {words_of(row['results'][library])}"


def words_of(result: dict[str, Any]) -> str:
    """What there is in a result."""
    words = [f"{1000 * result['milliseconds']:10.1f} us by {result['by']}"] if "milliseconds" in result else []
    words += [result["reason"]] if "reason" in result else []
    words += [f"{digits(1000 * result['issue'])} us to issue"] if "issue" in result else []
    words += [f"peak {digits(result['peak'] / 2**20)} MiB"] if "peak" in result else []
    words += [f"error {result['error']:.1e}"] if "error" in result and "reason" not in result else []
    words += ["the same bits" if result["same bits"] else "OTHER BITS"] if "same bits" in result else []
    words += [f"not recorded: {result['not recorded']}"] if "not recorded" in result else []
    words += [f"backend {result['backend']}"] if "backend" in result else []
    return ", ".join(words)


def measure(run: Run, file: Path | None = None) -> dict[str, Any]:
    """Measure the ceilings, then everything; the file is whole after every result."""
    torch.backends.cudnn.benchmark = True  # so that the plain convolution has the best that cuDNN has
    if run.plan.device != "cpu":
        run.tell("measuring the ceilings")
        run.found["ceilings"] = gpu_clock.ceilings()
    run.tell(gpu_figures.line(run.found))
    _write(file, run.found)
    try:
        for _ in run.rows():
            _write(file, run.found)
    except Lost as lost:
        run.found["gpu"]["ended"] = str(lost)
        run.tell(f"ENDED: {lost}")
    _write(file, run.found)
    if run.found["gpu"]["left out"]:
        run.tell(f"Out of time: {run.found['gpu']['left out']} measurements were left out.")
    return run.found


def profile(run: Run, file: Path | None = None) -> dict[str, Any]:
    """The kernels of one call of ours, instead of everything."""
    run.tell(gpu_figures.line(run.found))
    run.found["kernels"] = []
    for case, dtype, direction in jobs(run.plan):
        if not run.fits("deformconv"):
            run.tell("Out of time.")
            break
        try:
            kernels = _kernels(run.plan, case, dtype, direction)
        except Exception as error:  # a backend that cannot run it says why
            run.tell(f"\n{case.name}, {dtype}, {direction}: failed: {type(error).__name__}: {error}")
            continue
        run.found["kernels"].append({"layer": case._asdict(), "dtype": dtype, "direction": direction, "kernels": kernels})
        run.tell(f"\n{case.name}, {dtype}, {direction}\n\n{gpu_figures.kernel_table(kernels)}")
        _write(file, run.found)
    return run.found


def joined(earlier: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """Both runs' results, the later ones where both have some; what is left of another commit's says which that was.

    Raises ValueError for runs on other cards or with other versions, whose times cannot stand side by side.
    """
    if earlier["machine"] != later["machine"]:
        raise ValueError("The two runs are not of one kind of card with the same versions; their times cannot be compared.")
    old, new = earlier["gpu"], later["gpu"]
    known = {} if old["commit"] == new["commit"] else {"commit": old["commit"]}
    rows = {_key(row): {**row, "results": {name: known | one for name, one in row["results"].items()}} for row in old["rows"]}
    for row in new["rows"]:
        rows.setdefault(_key(row), {**row, "results": {}})["results"].update(row["results"])
    for row in rows.values():  # in the order of the tables
        row["results"] = {name: row["results"][name] for name in GPU_PEERS if name in row["results"]}
    counts = {"budget": old["budget"] + new["budget"], "left out": old["left out"]}
    return {**earlier, **later, "gpu": {**old, **new, **counts, "rows": list(rows.values())}}


def _key(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["layer"]["name"], row["dtype"], row["direction"]


def _kernels(plan: Plan, case: Case, dtype: str, direction: str) -> list[dict[str, Any]]:
    allow_tf32(DTYPES[dtype].tf32)
    peer = GPU_PEERS["deformconv"](1)
    operate = peer.operator(case)
    sets = copies(peer.name, given(case, dtype, plan.device, plan.channels_last), INPUTS)
    return gpu_clock.kernels(lambda number: step(operate, sets[number], direction), INPUTS)


def _write(file: Path | None, found: dict[str, Any]) -> None:
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(file.name + ".part")
        part.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        part.replace(file)


def _commit(given: str | None) -> str:
    try:
        return given or base.commit_here()
    except RuntimeError:  # a wheel, or files without their history
        return "unknown"


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m deformconv.bench.gpu", description="Deformable convolution on a GPU.")

    def some(name: str, known: Sequence[str], default: Sequence[str] | None = None) -> None:
        def names(text: str) -> tuple[str, ...]:
            chosen = tuple(filter(None, text.split(",")))
            if not chosen or set(chosen) - set(known):
                raise argparse.ArgumentTypeError(f"{text!r}: expected one or more of {','.join(known)}")
            return chosen

        said = f"some of {', '.join(known)}, with commas (default: {'all' if default is None else ', '.join(default)})"
        parser.add_argument(f"--{name}", type=names, help=said)

    some("cases", tuple(CASES), NAMES)
    some("dtypes", tuple(DTYPES))
    some("libraries", tuple(GPU_PEERS))
    some("directions", DIRECTIONS)
    parser.add_argument("--budget", type=float, default=Plan().budget, help="seconds to end within (default: 540)")
    parser.add_argument("--seconds", type=float, default=Plan().seconds, help="seconds of a result's blocks (default: 1)")
    parser.add_argument("--channels-last", action="store_true", help="inputs that lie with channels last")
    parser.add_argument("--profile", action="store_true", help="the kernels of one call of ours, instead of everything")
    parser.add_argument("--commit", help="what to call these files, where git does not say")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a smoke run, for no figure")
    parser.add_argument("--json", type=Path, help="write what was measured to this file, after every result")
    parser.add_argument("--from", dest="source", type=Path, help="read such a file in the place of measuring")
    said = "with --from: a later file, whose results take the place of that one's; --json names the file of both"
    parser.add_argument("--join", type=Path, metavar="FILE", help=said)
    parser.add_argument("--chart", type=Path, help="draw the times relative to ours into this file (.png, .svg, .pdf)")
    parser.add_argument("--markdown", action="store_true", help="print every table at the end")
    options = parser.parse_args(arguments)
    if options.chart is not None and importlib.util.find_spec("matplotlib") is None:
        parser.error("--chart needs matplotlib, not installed here; --from FILE --chart draws elsewhere what --json wrote")
    for name, file in (("--from", options.source), ("--join", options.join)):
        if file is not None and not file.is_file():
            parser.error(f"{name} {file}: there is no such file")
    if options.join is not None and options.source is None:
        parser.error("--join is for a file that --from names")
    if options.source is None and options.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch finds no GPU here; --device cpu makes a smoke run, whose times are no figures")
    if options.profile and options.device == "cpu":
        parser.error("--profile counts the kernels of a GPU, and --device cpu has none")
    return options


def _plan(options: argparse.Namespace) -> Plan:
    default = Plan(cases=(TINY.name,) if options.device == "cpu" else MAIN if options.profile else NAMES)
    if options.profile:
        default = default._replace(dtypes=("bf16", "fp32"))
    names = ("cases", "dtypes", "libraries", "directions")
    chosen = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return default._replace(
        **chosen, device=options.device, budget=options.budget, seconds=options.seconds, channels_last=options.channels_last
    )


def main(arguments: Sequence[str] | None = None) -> None:
    began = time.monotonic()
    options = _options(arguments)

    def tell(text: str) -> None:
        print(text, flush=True)

    if options.source is not None:
        found = document.read(options.source.read_text(encoding="utf-8"))
        if options.join is not None:
            found = joined(found, document.read(options.join.read_text(encoding="utf-8")))
            _write(options.json, found)
    else:
        run = Run(_plan(options), _commit(options.commit), tell, began)
        found = (profile if options.profile else measure)(run, options.json)
    if not options.profile:
        tell("\n" + (gpu_figures.page(found) if options.markdown else gpu_figures.verdict_table(found["gpu"]["rows"])))
    if options.chart is not None:
        gpu_figures.save_chart(options.chart, found)


if __name__ == "__main__":
    main()
