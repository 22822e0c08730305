"""What the kernels for the CPU are meant to reach, beside what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

from deformconv.bench.cases import Case, case_of
from deformconv.bench.figures import INFERENCE, OURS, Goal, Row, digits, markdown, mean_of, milliseconds, ratio
from deformconv.bench.peers import DIRECTIONS, RECORDED

__all__ = ["AIMS", "Aim", "table"]

Document = Mapping[str, Any]
FORWARD, TRAINING = DIRECTIONS


class Aim(NamedTuple):
    """A figure, and what it is to be at the most or at the least."""

    what: str
    measured: Callable[[Document], float | None]  # None where nothing says it
    most: float | None = None
    least: float | None = None


def _rows(found: Document, report: str) -> list[Row]:
    return list(found[report]["rows"]) if report in found else []


def _of_goal(which: str, goal: Goal, found: Document) -> float | None:
    """The mean of a goal of the report `speed`, or the least or the greatest of its ratios."""
    mean = mean_of(goal, _rows(found, "speed"))
    if mean is None:
        return None
    return {"mean": mean.mean, "least": mean.least[0], "most": mean.most[0]}[which]


def _halves(found: Document, over: str, under: str, counts: Callable[[Case], bool]) -> Iterator[float]:
    """The ratios of two of the times of the report `half`."""
    for row in _rows(found, "half"):
        value = ratio(row, (over,), (under,))
        if counts(case_of(row["layer"])) and value is not None:
            yield value


def _slowest_half(found: Document) -> float | None:
    names = ("deformconv-bfloat16", "deformconv-float16")
    return max((value for name in names for value in _halves(found, name, "deformconv-float32", _any)), default=None)


def _in_pairs(found: Document) -> bool:
    """Whether bfloat16 was multiplied as it is, and not in float32."""
    return any(row.get("pairs") for row in _rows(found, "half"))


def _pairs(found: Document) -> float | None:
    """By how much bfloat16 is faster at the least, where the processor multiplies it."""
    ratios = _halves(found, "deformconv-float32", "deformconv-bfloat16", _wide)
    return min(ratios, default=None) if _in_pairs(found) else None


def _plain_pairs(found: Document) -> float | None:
    """How many times as long as a plain convolution bfloat16 takes at the most, where the processor multiplies it."""
    ratios = _halves(found, "deformconv-bfloat16", "dense-bfloat16", _wide)
    return max(ratios, default=None) if _in_pairs(found) else None


def _memory(found: Document) -> float | None:
    for row in _rows(found, "memory"):
        ours, theirs = (row["results"].get(name, {}).get("bytes") for name in ("deformconv", "torchvision"))
        if case_of(row["layer"]).name == "c256-100" and ours and theirs:
            return float(ours / theirs)
    return None


def _small(direction: str, found: Document) -> float | None:
    """Microseconds of the smallest call."""
    for row in _rows(found, "small"):
        time = milliseconds(row, *OURS)
        if (case_of(row["layer"]).name, row["direction"]) == ("1x8x8x8", direction) and time is not None:
            return 1000 * time
    return None


def _any(case: Case) -> bool:
    return True


def _wide(case: Case) -> bool:
    return case.in_channels >= 128 and case.groups == 1


def _planar(case: Case) -> bool:
    return case.rank == 2 and case.groups == 1


def _in_one_group(case: Case) -> bool:
    return _planar(case) and case.offset_groups == 1


def _in_offset_groups(case: Case) -> bool:
    return case.name == "edvr"


def _plain(which: str, direction: str, counts: Callable[[Case], bool]) -> Callable[[Document], float | None]:
    return partial(_of_goal, which, Goal("", direction, OURS, ("dense",), counts))


def _peers(ours: str) -> Callable[[Document], float | None]:
    return partial(_of_goal, "least", Goal("", FORWARD, INFERENCE, (ours,), _any))


AIMS = (
    Aim("training / plain convolution, 2-D, groups = 1, geometric mean", _plain("mean", TRAINING, _planar), most=1.1),
    Aim(
        "training / plain convolution, 2-D, groups = 1, the most but for edvr",
        _plain("most", TRAINING, _in_one_group),
        most=1.5,
    ),
    Aim("training / plain convolution, edvr", _plain("most", TRAINING, _in_offset_groups), most=2.2),
    Aim("forward / plain convolution, C >= 128, groups = 1, geometric mean", _plain("mean", FORWARD, _wide), most=1.1),
    Aim("forward / plain convolution, edvr", _plain("most", FORWARD, _in_offset_groups), most=2.2),
    Aim("the faster of ONNX Runtime and OpenVINO / ours, forward, the least", _peers("deformconv"), least=1.0),
    Aim("the same, with our weight packed beforehand", _peers("prepacked"), least=1.0),
    Aim("half precision / float32, the most", _slowest_half, most=1.0),
    Aim("float32 / bfloat16 where the processor multiplies it, C >= 128, the least", _pairs, least=1.6),
    Aim("bfloat16 / plain convolution in bfloat16, likewise, the most", _plain_pairs, most=1.3),
    Aim("memory of training / torchvision's, c256-100", _memory, most=0.25),
    Aim("1x8x8x8, forward, microseconds", partial(_small, FORWARD), most=30.0),
    Aim("1x8x8x8, forward with a gradient recorded, microseconds", partial(_small, RECORDED), most=38.0),
)


def table(found: Document) -> str:
    """The aims, what was measured, and whether that reaches them; a dash where nothing says it."""
    lines = []
    for aim in AIMS:
        value = aim.measured(found)
        asked = f"at most {aim.most:g}" if aim.most is not None else f"at least {aim.least:g}"
        if value is None:
            lines.append([aim.what, asked, "-", "-"])
            continue
        reached = (aim.most is None or value <= aim.most) and (aim.least is None or value >= aim.least)
        lines.append([aim.what, asked, digits(value), "yes" if reached else "no"])
    return markdown(["figure", "aim", "measured", "reached"], lines)
