"""Write what was measured into the repository's texts: `python -m deformconv.bench.readme`, in its folder.

From benchmarks/results.json. The README gets the chart and a line, benchmarks/README.md has every table, benchmarks/speed.png
is the chart.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deformconv.bench import aims, chart, document, figures
from deformconv.bench.cases import case_of
from deformconv.bench.peers import DIRECTIONS, PEERS
from deformconv.bench.reports import REPORTS, net_means

__all__ = ["RESULTS", "everything", "replaced", "section"]

RESULTS, TABLES, CHART = "benchmarks/results.json", "benchmarks/README.md", "benchmarks/speed.png"
BEGIN, END = "<!-- benchmark:begin -->\n", "<!-- benchmark:end -->\n"

AIMS_BESIDES = """\
A dash is what this machine has nothing for, or what the processor does not do. Aims that other means measure:

- 16 threads 12 times as fast as one (c256-100, forward): [11.0 on a Xeon](../docs/performance.md#many-cores).
- A depthwise layer forward in at most 0.67 of the time before: [0.59](../docs/performance.md#what-made-a-difference).
- An image's results, and its gradients, the same bits in every batch: [tested](../tests/ops/conv/test_cpu.py).

[Why some are not reached, and what was tried](../docs/performance.md#what-is-left)."""

Document = Mapping[str, Any]


def section(found: Document) -> str:
    """The README's comparison: the chart and one line."""
    return f"""\
![Times of other libraries relative to deformconv's, case by case]({CHART})

{_line(found)} `make bench` measures it on your machine, `deformconv bench` without this repository; [every figure]({TABLES}).
"""


def _line(found: Document) -> str:
    """The means that matter, in a sentence."""
    rows = found["speed"]["rows"]
    sides = []
    for direction, words in zip(DIRECTIONS, ("forward", "forward and backward"), strict=True):
        faster = [mean for mean in figures.goals(rows) if mean.goal.direction == direction and mean.goal.under == figures.OURS]
        others = [
            f"{figures.digits(mean.mean)} times as fast as {mean.goal.what.removeprefix('faster than ')}" for mean in faster
        ]
        if others:
            sides.append(f"{words} {' and '.join(others)}")
    said = [f"**{'; '.join(sides)}**"] if sides else []
    nets = (
        {mean.direction: mean for mean in net_means(found["net"]["rows"]) if mean.machine == "idle"} if "net" in found else {}
    )
    costs = [
        f"{figures.digits(nets[direction].mean)} times {words}"
        for direction, words in zip(DIRECTIONS, ("forward", "in training"), strict=True)
        if direction in nets
    ]
    if costs:
        said.append(f"a whole net takes {' and '.join(costs)} the time of the same net of plain convolutions")
    machine = found["machine"]
    where = f"float32, {found['speed']['threads']} threads of {machine['processor']}"
    return f"Geometric means over named layers and nets: {'; '.join(said)} ({where})."


def _glance(found: Document) -> str:
    """The means with their spans, and a table with a line per case."""
    rows = found["speed"]["rows"]
    return f"""\
## At a glance

Every library in a process of its own, alternating blocks of calls, medians, after a check that the results agree.

{_nets(found)}{_means(rows)}

Milliseconds:

{_table(rows)}

{_footnotes(rows)}""".rstrip("\n")


def _nets(found: Document) -> str:
    """What a net costs, in a sentence for each direction."""
    if "net" not in found:
        return ""
    directions = {DIRECTIONS[0]: "forward", DIRECTIONS[1]: "in a step of training"}
    sentences = []
    for mean in net_means(found["net"]["rows"]):
        if mean.machine == "idle":
            most, name = mean.most
            sentences.append(
                f"**{figures.digits(mean.mean)} times** {directions[mean.direction]} (at most {figures.digits(most)}, {name})"
            )
    count = len({row["net"]["name"] for row in found["net"]["rows"]})
    return (
        f"**A whole net** with deformable layers, predictors included, takes {' and '.join(sentences)} the time of the same "
        f"net of plain convolutions; geometric means over {count} nets ([which ones](#whole-nets-milliseconds)). "
        "The operator alone:\n\n"
    )


def _where(found: Document) -> str:
    machine, threads = found["machine"], found["speed"]["threads"]
    packages = machine["packages"]
    names = ("torch", "torchvision", "onnxruntime", "openvino", "ncnn")
    versions = ", ".join(f"{name} {packages[name]}" for name in names if name in packages)
    return f"float32 on {machine['processor']}, {threads} threads; {versions}; {found['speed']['date']}."


def _means(rows: Sequence[figures.Row]) -> str:
    lines = []
    for found in figures.goals(rows):
        mean, (least, worst), (most, best) = figures.digits(found.mean), found.least, found.most
        span = f"from {figures.digits(least)} ({worst}) to {figures.digits(most)} ({best})"
        what = found.goal.what
        text = f"**{mean}** {what}" if what.startswith("times") else f"**{mean} times** {what}"
        lines.append(f"- {found.goal.direction}: {text}; {found.cases} cases, {span}")
    return "\n".join(["Geometric means:", "", *lines])


def _table(rows: Sequence[figures.Row]) -> str:
    """A line per case, with both directions."""
    forward, training = ({case_of(row["layer"]): row for row in rows if row["direction"] == d} for d in DIRECTIONS)
    columns = [
        ("forward: ours", forward, figures.OURS),
        ("ONNX Runtime or OpenVINO", forward, figures.INFERENCE),
        *([(PEERS["ncnn"].title, forward, ("ncnn",))] if any("ncnn" in row["results"] for row in rows) else []),
        ("torchvision", forward, ("torchvision",)),
        ("plain convolution", forward, ("dense",)),
        ("forward+backward: ours", training, figures.OURS),
        ("torchvision", training, ("torchvision",)),
        ("plain convolution", training, ("dense",)),
    ]
    lines = []
    for case in dict.fromkeys([*forward, *training]):
        times = [figures.time(measured[case], *names) if case in measured else "-" for _, measured, names in columns]
        lines.append([figures.layer(case), *times])
    return figures.markdown(["layer (3x3, v2, unless it says more)", *(title for title, _, _ in columns)], lines)


def _footnotes(rows: Sequence[figures.Row]) -> str:
    """Why a time is missing, if it is not for the number of axes."""
    found = [note for note in figures.notes(rows) if " has no " not in note]
    return "".join(f"{_escaped(note)}.\n\n" for note in found)


def _escaped(note: str) -> str:
    return note.replace("*", "\\*")


def everything(found: Document) -> str:
    """Every table."""
    parts = [
        "# Benchmarks",
        "Written by `python -m deformconv.bench.readme` from [results.json](results.json), which `make bench` measures.",
        _where(found),
        _machine(found["machine"]),
        "![Times relative to deformconv's](speed.png)",
        _glance(found),
    ]
    rows = found["speed"]["rows"]
    for direction in DIRECTIONS:
        parts += [f"## Speed, {direction}, in milliseconds", figures.speed_table(rows, direction)]
    parts += ["\n".join(f"- {_escaped(note)}" for note in figures.notes(rows)), "## Geometric means", figures.summary(rows)]
    parts += ["## What is aimed at", aims.table(found), AIMS_BESIDES]
    parts += ["## Spread: quartiles of the blocks' medians, over the median", _spreads(rows)]
    for name, report in REPORTS.items():
        if name in found:
            parts += [f"## {report.title}", report.write(found[name]["rows"])]
    return "\n\n".join(part for part in parts if part) + "\n"


def _machine(machine: Mapping[str, Any]) -> str:
    packages = ", ".join(f"{name} {number}" for name, number in machine["packages"].items())
    said = {
        **{name: value for name, value in machine.items() if name != "packages"},
        "vector features": ", ".join(machine["vector features"]),
        "packages": packages,
    }
    return "\n".join(f"- {name}: {value}" for name, value in said.items())


def _spreads(rows: Sequence[figures.Row]) -> str:
    names = [name for name in dict.fromkeys(name for row in rows for name in row["results"])]
    lines = []
    for row in rows:
        cells = []
        for name in names:
            result = row["results"].get(name, {})
            middle, quartiles = result.get("milliseconds"), result.get("quartiles", ())
            cells.append(" to ".join(f"{quartile / middle:.2f}" for quartile in quartiles) or "-")
        lines.append([case_of(row["layer"]).name, row["direction"], *cells])
    return figures.markdown(["case", "direction", *names], lines, 2)


def replaced(text: str, new: str, marks: tuple[str, str] = (BEGIN, END)) -> str:
    """A document with another section between its two marks."""
    before, begin, rest = text.partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not begin or not end:
        raise ValueError(f"the document has no {marks[1 if begin else 0].strip()}")
    return before + begin + new + end + after


def main(folder: Path) -> None:
    found = document.read((folder / RESULTS).read_text(encoding="utf-8"))
    readme = folder / "README.md"
    readme.write_text(replaced(readme.read_text(encoding="utf-8"), section(found)), encoding="utf-8")
    (folder / TABLES).write_text(everything(found), encoding="utf-8")
    chart.save(folder / CHART, found)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
