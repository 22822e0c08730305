"""Tables, verdicts and the chart of what a GPU was measured to do, from rows alone.

`python -m deformconv.bench.gpu_figures`, in the repository's folder, writes them from benchmarks/gpu.json into
docs/performance.md, and benchmarks/gpu.png.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from deformconv.bench import document
from deformconv.bench.cases import Case, case_of, shapes_of
from deformconv.bench.figures import OURS, Row, digits, layer, markdown, milliseconds, ratio
from deformconv.bench.peers import DIRECTIONS
from deformconv.bench.readme import replaced

__all__ = [
    "CHART", "DENSE", "GOALS", "LIBRARIES", "MARKS", "PAGE", "RESULTS", "Goal", "Verdict", "details", "floor", "kernel_table",
    "line", "notes", "ours", "page", "roofline", "save_chart", "section", "speed_table", "verdict_table", "verdicts",
]  # fmt: skip

RESULTS, CHART, PAGE = "benchmarks/gpu.json", "benchmarks/gpu.png", "docs/performance.md"
MARKS = "<!-- gpu:begin -->\n", "<!-- gpu:end -->\n"
FORWARD, TRAINING = DIRECTIONS
DENSE = ("dense", "dense-channels-last")
LIBRARIES = {
    "deformconv": "deformconv", "dense": "plain", "dense-channels-last": "plain, channels last", "torchvision": "torchvision",
    "deformops": "deformops", "portable": "portable",
}  # fmt: skip
BYTES = {"bf16": 2, "fp32": 4, "tf32": 4, "fp16": 2}
LAYOUTS = "ours / plain: the plain convolution's faster layout."
PINNED = (
    "deformops runs one configuration of its kernels for each direction (blocks of 64x64x32 forward, 32x32x32 backward, "
    "4 warps, 2 stages); of itself it searches 24 and 16 of them for each dtype and size, which takes minutes."
)
UNMEASURED = (
    "No GPU has measured anything yet. What `make bench-gpu` writes into benchmarks/gpu.json, "
    "`python -m deformconv.bench.gpu_figures` writes here.\n"
)

Document = Mapping[str, Any]


class Goal(NamedTuple):
    """A ratio of times and its bound, on some layers in some dtypes and directions."""

    what: str
    over: tuple[str, ...]
    under: tuple[str, ...]
    bound: float
    dtypes: tuple[str, ...]
    directions: tuple[str, ...]
    most: bool = False  # whether the bound is one from above
    cases: tuple[str, ...] = ("c256-56", "c256-100")

    @property
    def asked(self) -> str:
        """The bound in words."""
        return f"at {'most' if self.most else 'least'} {self.bound:g}"

    def counts(self, row: Row) -> bool:
        """Whether a row is of the goal's dtypes and directions."""
        return row["dtype"] in self.dtypes and row["direction"] in self.directions


GOALS = (
    Goal("portable / ours", ("portable",), OURS, 10, ("bf16", "fp32"), DIRECTIONS),
    Goal("torchvision / ours", ("torchvision",), OURS, 3, ("fp32",), (FORWARD,)),
    Goal("torchvision / ours", ("torchvision",), OURS, 3, ("fp32",), (TRAINING,)),
    Goal("deformops / ours", ("deformops",), OURS, 5, ("bf16",), (FORWARD,)),
    Goal("ours / plain convolution", OURS, DENSE, 3, ("bf16",), (FORWARD,), most=True),
)


class Verdict(NamedTuple):
    """What became of a goal: the ratio that is worst for it on its layers, and on all layers that were measured."""

    goal: Goal
    worst: tuple[float, str] | None
    everywhere: tuple[float, str] | None
    measured: int
    wanted: int

    @property
    def said(self) -> str:
        """Met or missed, in words."""
        if self.worst is None:
            return "not measured"
        met = self.worst[0] <= self.goal.bound if self.goal.most else self.worst[0] >= self.goal.bound
        if not met:
            return "missed"
        return "met" if self.measured == self.wanted else f"met by {self.measured} of {self.wanted}, the others not measured"


def verdicts(rows: Iterable[Row]) -> list[Verdict]:
    """Every goal beside what was measured; a plain convolution's time is that of its faster layout."""
    rows, found = list(rows), []
    for goal in GOALS:
        ratios = [
            (value, f"{case_of(row['layer']).name}, {row['dtype']}, {row['direction']}", case_of(row["layer"]).name)
            for row in rows
            if goal.counts(row) and (value := ratio(row, goal.over, goal.under)) is not None
        ]
        worst = max if goal.most else min
        pairs = [(value, where) for value, where, _ in ratios]
        named = [(value, where) for value, where, case in ratios if case in goal.cases]
        wanted = len(goal.cases) * len(goal.dtypes) * len(goal.directions)
        found.append(Verdict(goal, worst(named, default=None), worst(pairs, default=None), len(named), wanted))
    return found


def _said(found: tuple[float, str] | None) -> str:
    return "-" if found is None else f"{digits(found[0])} ({found[1]})"


def verdict_table(rows: Sequence[Row]) -> str:
    lines = [
        [
            one.goal.what, ", ".join(one.goal.dtypes), " and ".join(one.goal.directions), one.goal.asked, one.said,
            _said(one.worst), _said(one.everywhere),
        ]
        for one in verdicts(rows)
    ]  # fmt: skip
    head = [
        "times",
        "dtype",
        "direction",
        "asked for",
        "verdict",
        f"worst of {' and '.join(GOALS[0].cases)}",
        "worst of all layers",
    ]
    return markdown(head, lines, 5)


def _time(row: Row, library: str) -> str:
    """A time in microseconds, or in a word why there is none."""
    result = row["results"].get(library, {})
    if (found := milliseconds(row, library)) is not None:
        return digits(1000 * found) + {"events": "*", "wall": " (wall)"}.get(result.get("by", ""), "")
    reason = result.get("reason", "")
    return next((word for word in ("differs", "failed", "not installed") if reason.startswith(word)), "-")


def _measured(rows: Sequence[Row]) -> list[str]:
    """The libraries that were tried, in the tables' order."""
    return [name for name in LIBRARIES if any(name in row["results"] for row in rows)]


def _label(row: Row) -> list[str]:
    return [case_of(row["layer"]).name, layer(case_of(row["layer"])), row["dtype"]]


def speed_table(rows: Sequence[Row], direction: str) -> str:
    """One direction's times in microseconds, and ratios of them."""
    names = _measured(rows)
    ratios = [
        ("portable / ours", ("portable",), OURS), ("torchvision / ours", ("torchvision",), OURS),
        ("deformops / ours", ("deformops",), OURS), ("ours / plain", OURS, DENSE),
    ]  # fmt: skip
    lines = [
        [*_label(row), *(_time(row, name) for name in names), *(digits(ratio(row, over, under)) for _, over, under in ratios)]
        for row in rows
        if row["direction"] == direction
    ]
    head = ["case", "layer", "dtype", *(LIBRARIES[name] for name in names), *(title for title, _, _ in ratios)]
    return markdown(head, lines, 3)


SHOWN = ("deformconv", "torchvision", "deformops", "portable")


def details(rows: Sequence[Row]) -> str:
    """What is not the GPU's time: to issue a call, memory, errors and bits, of the libraries in SHOWN, between slashes."""

    def written(row: Row, key: str, form: Callable[[Any], str]) -> str:
        results = [row["results"].get(name, {}) for name in SHOWN]
        return " / ".join("-" if result.get(key) is None else form(result[key]) for result in results)

    lines = [
        [
            case_of(row["layer"]).name, row["dtype"], row["direction"],
            written(row, "issue", lambda value: digits(1000 * value)),
            written(row, "peak", lambda value: digits(value / 2**20)),
            written(row, "error", "{:.0e}".format), written(row, "same bits", lambda same: "yes" if same else "no"),
        ]
        for row in rows
        if any(name in row["results"] for name in SHOWN)
    ]  # fmt: skip
    head = ["case", "dtype", "direction", "to issue a call, µs", "peak, MiB", "error", "same bits again"]
    return markdown(head, lines, 3)


def ours(rows: Sequence[Row]) -> str:
    """How far our results are from float64 in each dtype, and whether a second run gives the same, in a sentence."""
    results = [(row, row["results"]["deformconv"]) for row in rows if "error" in row["results"].get("deformconv", {})]
    if not results:
        return ""
    errors: dict[str, float] = {}
    for row, result in results:
        errors[row["dtype"]] = max(errors.get(row["dtype"], 0.0), result["error"])
    said = ", ".join(f"{dtype} {error:.1e}" for dtype, error in errors.items())
    same = sum(result["same bits"] for _, result in results)
    return (
        f"Our results, gradients included, are off from float64 on the same numbers by at the most {said} (of the largest "
        f"number); a second run gives the same bits in {same} of {len(results)} measurements."
    )


def floor(case: Case, dtype: str, direction: str, ceilings: Mapping[str, float]) -> tuple[float, float]:
    """The seconds that the products of a case take at the measured ceiling, and those of its bytes at the rate of a copy.

    Forward is one product, forward and backward three. Backward reads the arguments again, and the gradient of the output,
    and writes a gradient of each.
    """
    sizes = {name: math.prod(shape) for name, shape in shapes_of(case).items() if name != "mask" or case.masked}
    numbers = {name: size * (4 if name in ("offset", "mask") else BYTES[dtype]) for name, size in sizes.items()}
    output = numbers.pop("grad_output")
    products = 1 if direction == FORWARD else 3
    operations = 2.0 * products * sizes["grad_output"] * math.prod(case.kernel) * case.in_channels / case.groups
    moved = sum(numbers.values()) + output if direction == FORWARD else 3 * sum(numbers.values()) + 2 * output
    return operations / ceilings[dtype], moved / ceilings["copy"]


def roofline(rows: Sequence[Row], ceilings: Mapping[str, float]) -> str:
    """Our times beside the floors, in microseconds, and the share of the higher floor that is reached."""
    lines = []
    for row in rows:
        measured = milliseconds(row, *OURS)
        if measured is None or row["dtype"] not in ceilings:
            continue
        floors = [1e6 * part for part in floor(case_of(row["layer"]), row["dtype"], row["direction"], ceilings)]
        share = f"{100 * max(floors) / (1000 * measured):.0f} %"
        lines.append([*_label(row), row["direction"], *map(digits, floors), digits(1000 * measured), share])
    head = ["case", "layer", "dtype", "direction", "products at the peak", "bytes at a copy's rate", "measured", "share"]
    return markdown(head, lines, 4)


def notes(found: Document) -> list[str]:
    """What the signs stand for, why a time is missing, and what was left out."""
    part, reasons = found["gpu"], dict[str, dict[str, None]]()
    for row in part["rows"]:
        where = f"{case_of(row['layer']).name} {row['dtype']} {row['direction']}"
        for name, result in row["results"].items():
            if "reason" in result:
                general = result["reason"].startswith(("has no", "not installed"))
                reasons.setdefault(f"{LIBRARIES[name]}: {result['reason']}", {})["" if general else where] = None
            elif result.get("by") == "events":
                why = f"not recorded as a graph, so gaps count ({result.get('not recorded', 'no reason given')})"
                reasons.setdefault(f"* {LIBRARIES[name]}: {why}", {})[where] = None
    said = [f"{reason}" + (f" ({', '.join(where)})" if any(where) else "") for reason, where in reasons.items()]
    if any(milliseconds(row, *DENSE) is not None for row in part["rows"]):
        said.append(LAYOUTS)
    if any("deformops" in row["results"] and "reason" not in row["results"]["deformops"] for row in part["rows"]):
        said.append(PINNED)
    older: dict[str, dict[str, list[str]]] = {}
    for row in part["rows"]:
        for name, result in row["results"].items():
            if "milliseconds" in result and "commit" in result:
                where = f"{case_of(row['layer']).name} {row['dtype']} {row['direction']}"
                older.setdefault(result["commit"], {}).setdefault(LIBRARIES[name], []).append(where)
    for commit, names in older.items():
        said.append(
            f"Measured at commit {commit}, on such a card with the same versions: " + _of_all(part["rows"], names) + "."
        )
    if part.get("left out"):
        said.append(f"{part['left out']} of the measurements were left out, since their time of {part['budget']:g} s was over.")
    return said


def _of_all(rows: Sequence[Row], names: Mapping[str, list[str]]) -> str:
    """Libraries, each with the number of its results that are meant, if these are not all of them."""
    timed = {LIBRARIES[name]: 0 for name in LIBRARIES}
    for row in rows:
        for name, result in row["results"].items():
            timed[LIBRARIES[name]] += "milliseconds" in result
    return ", ".join(
        title if len(where) == timed[title] else f"{title} in {len(where)} of {timed[title]} results"
        for title, where in names.items()
    )


def kernel_table(found: Sequence[Mapping[str, Any]]) -> str:
    """The kernels of one call, the longest first, and their sum."""
    total = sum(one["microseconds"] for one in found)
    lines = [
        [one["kernel"][:100].replace("|", "/"), digits(one["microseconds"]), f"{100 * one['microseconds'] / total:.0f} %",
         f"{one['times']:g}"]
        for one in found
    ]  # fmt: skip
    return markdown(
        ["kernel", "µs", "share", "times"], [*lines, ["all", digits(total), "", f"{sum(o['times'] for o in found):g}"]]
    )


def line(found: Document) -> str:
    """The card, what its figures depend on, and its ceilings, in some lines."""
    machine, part, peaks = found["machine"], found["gpu"], found.get("ceilings", {})
    packages = ", ".join(f"{name} {number}" for name, number in machine["packages"].items())
    if machine["device"] == "cpu":
        return f"A smoke run on a CPU, by the clock on the wall: no figure. {packages}."
    laid = " Inputs lie with channels last." if part["channels last"] else ""
    said = ", ".join(f"{name} {peaks[name] / 1e12:.0f} TFLOP/s" for name in BYTES if name in peaks)
    measured = f" Measured ceilings: a copy {peaks['copy'] / 1e12:.2f} TB/s; products {said}." if peaks else ""
    return (
        f"{machine['device']} (capability {machine['capability']}, {machine['memory']}, driver {machine['driver']}, "
        f"CUDA {machine['CUDA']}); {packages}; commit {part['commit']}; {part['date']}.{laid}{measured}"
    )


def _timed(found: Document, *libraries: str) -> list[Row]:
    """The rows of calls that were timed, by one of these libraries or by any: a run that ends early leaves others."""
    return [row for row in found["gpu"]["rows"] if any(milliseconds(row, name) is not None for name in libraries or LIBRARIES)]


def page(found: Document) -> str:
    """Every table."""
    rows = _timed(found)
    parts = [line(found), verdict_table(rows), ours(rows)]
    for direction in DIRECTIONS:
        if any(row["direction"] == direction for row in rows):
            parts += [f"GPU time of a call, {direction}, microseconds:", speed_table(rows, direction)]
    parts += ["\n".join(f"- {note.replace('*', chr(92) + '*')}" for note in notes(found))]
    if "ceilings" in found:
        parts += ["Our times beside the least that the card allows, microseconds (a cache may move bytes faster than a copy):"]
        parts += [roofline(rows, found["ceilings"])]
    shown = " / ".join(LIBRARIES[name] for name in SHOWN)
    parts += [f"What else was measured, of {shown} (peak: memory beyond the arguments, results included):", details(rows)]
    return "\n\n".join(part for part in parts if part) + "\n"


def section(found: Document | None) -> str:
    """What docs/performance.md says; ValueError for what no GPU has measured."""
    if found is None:
        return UNMEASURED
    if "gpu" not in found or found["machine"]["device"] == "cpu":
        raise ValueError("no GPU has measured it: its times are no figures")
    return f"{page(found)}\n![Times of other libraries on the GPU, relative to deformconv's](../{CHART})\n"


def save_chart(path: Path, found: Document) -> None:
    """Draw times relative to ours, a row of panels for each dtype, into a file whose suffix chooses the format."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from deformconv.bench import chart

    rows = _timed(found, "deformconv")
    dtypes = [name for name in BYTES if chart.relative([row for row in rows if row["dtype"] == name])]
    if not dtypes:
        raise ValueError("there is nothing to draw: no other library has a time, or deformconv has none")
    cases = {case_of(row["layer"]).name for row in rows}
    figure = Figure(figsize=(13.0, (1.7 + 0.4 * (len(cases) + 1)) * len(dtypes)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subfigures(len(dtypes), 1, squeeze=False)[:, 0]
    for panel, dtype in zip(panels, dtypes, strict=True):
        where = f"{found['machine']['device']}, {dtype}, {found['gpu']['date']}"
        caption = f"{where}. GPU time. Left of 1x is faster than deformconv. Bars: quartiles."
        chart.draw(panel, [row for row in rows if row["dtype"] == dtype], caption)
    figure.savefig(path, dpi=80)


def main(folder: Path) -> None:
    file, guide = folder / RESULTS, folder / PAGE
    found = document.read(file.read_text(encoding="utf-8")) if file.exists() else None
    guide.write_text(replaced(guide.read_text(encoding="utf-8"), section(found), MARKS), encoding="utf-8")
    if found is not None:
        save_chart(folder / CHART, found)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
