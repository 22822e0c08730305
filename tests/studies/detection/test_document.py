"""What the repository's texts say of the experiment is what was measured."""

import json
import re
from pathlib import Path

import pytest

for needed in ("torch", "torchvision", "rich", "scipy"):
    pytest.importorskip(needed, reason="the report needs it")

from tests.studies.detection.test_report import RESULTS  # noqa: E402

from deformconv.bench.readme import BEGIN, END, replaced  # noqa: E402
from deformconv.studies.detection import document, report  # noqa: E402
from deformconv.studies.detection.plan import DEFAULT, FAST  # noqa: E402

ROOT = Path(__file__).parents[3]


def test_the_guide_has_what_the_results_say():
    """And nothing where there are none."""
    guide, results = (ROOT / document.GUIDE).read_text(encoding="utf-8"), ROOT / document.RESULTS
    if not results.exists():
        assert guide.partition(BEGIN)[2].partition(END)[0] == ""
        return
    found = json.loads(results.read_text(encoding="utf-8"))
    assert replaced(guide, document.section(found)) == guide
    assert (ROOT / document.TABLES).read_text(encoding="utf-8") == report.page(found)
    again = report.everything(found["results"], report.Budget(**found["budget"]), ["none", "some", "much"])
    for name in ("arms", "sweep"):
        assert json.loads(json.dumps(again[name])) == found[name]


def test_everything_is_written(tmp_path):
    source, repository = tmp_path / "run", tmp_path / "repository"
    for folder in (source, repository / "docs" / "images", repository / "benchmarks"):
        folder.mkdir(parents=True)
    found = report.everything(RESULTS, FAST, ["none", "some", "much"])
    (source / "detection.json").write_text(json.dumps(found))
    (source / "detections.png").write_bytes(b"picture")
    guide = repository / document.GUIDE
    guide.write_text(f"before\n{BEGIN}old\n{END}after\n")
    document.main(source, repository)
    text = guide.read_text()
    assert text.startswith(f"before\n{BEGIN}") and text.endswith(f"{END}after\n") and "old" not in text
    assert "| v2: convolution, pooling " in text and "+4.0 (+1.5 to +6.5)" in text
    assert json.loads((repository / document.RESULTS).read_text()) == json.loads(json.dumps(found))
    page = (repository / document.TABLES).read_text()
    assert page.count("\n| regular ") == 2 + 3 and "41.4" in page  # two tables, three trainings
    assert (repository / "docs" / "images" / "detections.png").read_bytes() == b"picture"
    assert not list(repository.rglob(".*"))


def test_the_guide_names_the_steps_that_make_takes():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    base, steps = (int(re.search(rf"{name} (\d+)", makefile)[1]) for name in ("--base-steps", "--steps"))
    text = f"({base:,} and {steps} for {DEFAULT.base_steps:,} and {DEFAULT.steps})"
    assert text in (ROOT / document.GUIDE).read_text(encoding="utf-8")
