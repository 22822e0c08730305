"""What the experiment found, as numbers, in a terminal and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import mean, stdev
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from deformconv.bench import document
from deformconv.bench.figures import markdown
from deformconv.studies.detection.evaluation import octave_names
from deformconv.studies.detection.plan import BASE, CLOCK, SCRATCH, SWEPT, TITLES, USUAL, Budget

__all__ = ["Difference", "difference", "everything", "page", "print_report", "summary", "tables"]

Result = Mapping[str, Any]

CONFIDENCE = 0.95
# What others measured, on COCO. The paper: arXiv 1811.11168, Table 1, ResNet-50 without a pyramid, 1000 pixels. mmdetection:
# its model zoo's Faster R-CNN with a pyramid, ResNet-50, 12 epochs. Box AP, each group's first one is the regular detector.
PUBLISHED = {
    "the paper": {"regular": 34.7, "v1: conv5, pooling": 38.0, "v2: conv3 to conv5, pooling": 41.7},
    "mmdetection": {
        "regular": 37.4, "v1: conv3 to conv5 (dconv)": 41.3, "v2: conv3 to conv5 (mdconv)": 41.4,
        "deformable pooling alone (dpool)": 38.9, "modulated pooling alone (mdpool)": 38.7,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Difference:
    """The mean over seeds of what one arm has more than another, each pair of the same seed."""

    mean: float
    low: float | None  # the ends of the interval; None for fewer than two seeds
    high: float | None
    seeds: int


def difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference | None:
    """Paired by seed, with Student's t interval of 95 % over the seeds; None if no seed has both.

    It takes the differences as normally distributed, and covers what another seed's training may give on these test images;
    other images it does not cover.
    """
    from scipy.stats import t

    pairs = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    if not pairs:
        return None
    middle, number = mean(pairs), len(pairs)
    if number < 2:
        return Difference(middle, None, None, number)
    half = float(t.ppf((1 + CONFIDENCE) / 2, number - 1)) * stdev(pairs) / math.sqrt(number)
    return Difference(middle, middle - half, middle + half, number)


def summary(results: Sequence[Result], variation: str = USUAL) -> list[dict[str, Any]]:
    """A row for each arm that was trained, in the order of the paper's ladder."""
    rows = []
    regular, equal = (_by_seed(results, variation, arm, "AP") for arm in ("regular", "seconds"))
    before = _by_seed(results, variation, BASE, "AP")
    for arm, title in TITLES.items():
        found = [one for one in results if (one["variation"], one["arm"]) == (variation, arm)]
        if not found:
            continue
        values = _by_seed(results, variation, arm, "AP")
        against = {SCRATCH: (before, {}), BASE: ({}, {})}.get(arm, (regular, equal))
        steps, seconds = (
            difference(values, other) if arm != own else None
            for other, own in zip(against, ("regular", "seconds"), strict=True)
        )
        rows.append({
            "arm": arm, "title": title, "seeds": sorted(values),
            **{name: mean(one[name] for one in found) for name in ("AP", "AP50", "AP75", "parameters", "operations")},
            "octaves": {name: _mean(one["octaves"][name] for one in found) for name in octave_names()},
            "deviation": stdev(values.values()) if len(values) > 1 else None,
            "lowest": min(values.values()), "highest": max(values.values()),
            "steps": mean(one["steps"] for one in found), "seconds": mean(one["seconds"] for one in found),
            "milliseconds a step": mean(1000 * one["seconds"] / one["steps"] for one in found),
            "equal steps": None if steps is None else asdict(steps),
            "equal seconds": None if seconds is None else asdict(seconds),
        })  # fmt: skip
    return rows


def _by_seed(results: Sequence[Result], variation: str, arm: str, name: str) -> dict[int, float]:
    return {one["seed"]: one[name] for one in results if (one["variation"], one["arm"]) == (variation, arm)}


def _mean(values: Iterable[float | None]) -> float | None:
    """Of those that there are."""
    known = [value for value in values if value is not None]
    return mean(known) if known else None


def sweep(results: Sequence[Result], variations: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each variation: the regular arm, v2, and what v2 has more."""
    rows = []
    for variation in variations:
        regular, ours = (_by_seed(results, variation, arm, "AP") for arm in SWEPT)
        more = difference(ours, regular)
        if more is not None:
            rows.append({
                "variation": variation, "before": mean(_by_seed(results, variation, BASE, "AP").values()),
                "regular": mean(regular.values()), "v2": mean(ours.values()), "difference": asdict(more),
            })  # fmt: skip
    return rows


def everything(results: Sequence[Result], budget: Budget, variations: Sequence[str]) -> dict[str, Any]:
    """The JSON file: the machine, the settings, the arms' rows, the sweep's, and every training."""
    return {
        "machine": document.machine(), "budget": asdict(budget), "arms": summary(results),
        "sweep": sweep(results, variations) if len(variations) > 1 else [], "results": list(results),
    }  # fmt: skip


def _signed(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    if found["low"] is None:
        return f"{found['mean']:+.1f}"
    return f"{found['mean']:+.1f} ({found['low']:+.1f} to {found['high']:+.1f})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


_HEAD = (
    "arm", "AP", "spread", "AP50", "AP75", "more than regular: equal steps", "equal seconds", "M parameters", "M operations",
    "ms a step", "steps",
)  # fmt: skip


def _line(row: Mapping[str, Any]) -> list[str]:
    spread = f"{row['lowest']:.1f} to {row['highest']:.1f}" if len(row["seeds"]) > 1 else "one seed"
    return [
        row["title"], f"{row['AP']:.1f}", spread, f"{row['AP50']:.1f}", f"{row['AP75']:.1f}",
        _signed(row["equal steps"]), _signed(row["equal seconds"]), f"{row['parameters'] / 1e6:.2f}",
        f"{row['operations'] / 1e6:.0f}", f"{row['milliseconds a step']:.0f}", f"{row['steps']:.0f}",
    ]  # fmt: skip


def print_report(console: Console, found: Mapping[str, Any]) -> None:
    """The tables in a terminal, by the arms' short names."""
    rows, sizes = found["arms"], octave_names()
    lines = [[row["arm"], *_line(row)[1:]] for row in rows]
    _print(console, ("arm", "AP", "spread", "more: equal steps", "equal seconds"), [line[:3] + line[5:7] for line in lines])
    columns = ("arm", "AP50", "AP75", *sizes, "Mparam", "Mop", "ms", "steps")
    octaves = ([_number(row["octaves"][name]) for name in sizes] for row in rows)
    _print(console, columns, [[line[0], *line[3:5], *each, *line[7:]] for line, each in zip(lines, octaves, strict=True)])
    if found["sweep"]:
        swept = [[row["variation"], *_swept(row)] for row in found["sweep"]]
        _print(console, ("variation", "before", "regular", "v2", "more"), swept)
    for line in notes(found):
        console.print(line)


def _print(console: Console, columns: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    table = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for name in columns:
        table.add_column(name, justify="left" if name == columns[0] else "right")
    for line in lines:
        table.add_row(*line)
    console.print(table)


def _swept(row: Mapping[str, Any]) -> list[str]:
    return [*(f"{row[name]:.1f}" for name in ("before", "regular", "v2")), _signed(row["difference"])]


def notes(found: Mapping[str, Any]) -> list[str]:
    """What must be known to read the tables."""
    budget = found["budget"]
    seeds, arms = len({one["seed"] for one in found["results"]}), {row["arm"] for row in found["arms"]}
    means = f"a mean of {seeds} seeds" if seeds > 1 else "of one seed, and no difference of one seed is a finding"
    said = [
        f"AP of {budget['images']} test scenes of {budget['size']} pixels, whose digits and photographs are not in training; "
        f"{means}.",
        f"Every arm is cut out of the same regular detector, trained for {budget['base_steps']} steps (its row is \"regular, "
        f"before\"), and trained for {budget['steps']} more on the same scenes in the same order"
        f"{'; the one from scratch is compared with that row' * (SCRATCH in arms)}.",
        "Milliseconds are processor time of one thread, with the making of scenes. Operations are an image's, forward: "
        "multiplications and additions of convolutions, matrix products and pooling, without the interpolation of deformable "
        "convolutions.",
    ]  # fmt: skip
    if "seconds" in arms:
        said.insert(
            2,
            f'Equal seconds: the regular detector was trained for as long as "{TITLES[CLOCK]}", in processor time of one '
            "thread, and every arm is compared with that. An arm that takes longer is favoured by it, one that takes less is "
            "not.",
        )
    if seeds > 1:
        said.insert(
            1,
            f"In brackets Student's t interval of 95 % of the paired differences over {seeds} seeds, of each difference by "
            "itself. It tells what other seeds may give on these test scenes, and not what other scenes would.",
        )
    return said


def tables(found: Mapping[str, Any]) -> str:
    """The tables as Markdown, with what is to be known beside them."""
    parts = [markdown(_HEAD, [_line(row) for row in found["arms"]])]
    names = octave_names()
    lines = [[row["title"], *(_number(row["octaves"][name]) for name in names)] for row in found["arms"]]
    parts += ["AP by an object's size, the side in pixels of a square of its box's area:", markdown(["arm", *names], lines)]
    if found["sweep"]:
        head = ["variation of scale and form", "regular, before", "regular", "v2: convolution, pooling", "more"]
        body = [[row["variation"], *_swept(row)] for row in found["sweep"]]
        parts += ["By how much scale, rotation and aspect ratio vary:", markdown(head, body)]
    parts += ["\n".join(f"- {line}" for line in notes(found))]
    return "\n\n".join(parts) + "\n"


def published() -> str:
    """What others measured on COCO, as Markdown."""
    lines = [
        [who, arm, f"{value:.1f}", f"{value - values['regular']:+.1f}" if arm != "regular" else "-"]
        for who, values in PUBLISHED.items()
        for arm, value in values.items()
    ]
    return markdown(["measured on COCO by", "arm", "box AP", "more than regular"], lines, 2)


def page(found: Mapping[str, Any]) -> str:
    """All of it as a Markdown file of its own."""
    lines = [
        [TITLES[one["arm"]], one["variation"], str(one["seed"]), f"{one['AP']:.2f}", f"{one['AP50']:.2f}", f"{one['AP75']:.2f}",
         str(one["steps"]), f"{one['seconds']:.0f}"]
        for one in found["results"]
    ]  # fmt: skip
    machine = found["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    parts = [
        "# A detector of deformable parts, trained here",
        "Written by `deformconv experiment detect`; docs/detection.md says what it is.",
        f"{machine['processor']}, {machine['system']}, Python {machine['python']}; {packages}.",
        tables(found).rstrip(),
        "What others measured on COCO, with larger nets and far longer training. The paper's detector (ResNet-50, images of "
        "1000 pixels) has no feature pyramid: it dilates conv5 and pools boxes from there. mmdetection's (ResNet-50) has one:",
        published(),
        "Every training:",
        markdown(["arm", "variation", "seed", "AP", "AP50", "AP75", "steps", "seconds"], lines, 2),
    ]
    return "\n\n".join(parts) + "\n"
