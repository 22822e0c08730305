"""What the repository's texts say of the experiment is what was measured."""

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

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


@pytest.fixture
def folders(tmp_path):
    """A run's folder, and that of a repository."""
    source, repository = tmp_path / "run", tmp_path / "repository"
    for folder in (source, repository / "docs" / "images", repository / "benchmarks"):
        folder.mkdir(parents=True)
    found = report.everything(RESULTS, FAST, ["none", "some", "much"])
    (source / "detection.json").write_text(json.dumps(found))
    for name in document.PICTURES:
        (source / name).write_bytes(name.encode())
    (repository / document.GUIDE).write_text(f"before\n{BEGIN}old\n{END}after\n")
    return source, repository


def run(*arguments):
    """What a shell sees: the exit code, and what is on stderr."""
    done = CliRunner().invoke(document.main, [str(argument) for argument in arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit)
    return done.exit_code, done.output


def test_everything_is_written(folders):
    source, repository = folders
    found = json.loads((source / "detection.json").read_text())
    assert run(source, repository) == (0, "")
    text = (repository / document.GUIDE).read_text()
    assert text.startswith(f"before\n{BEGIN}") and text.endswith(f"{END}after\n") and "old" not in text
    assert "| v2: convolution, pooling " in text and "+4.0 (+1.5 to +6.5)" in text
    assert json.loads((repository / document.RESULTS).read_text()) == found
    page = (repository / document.TABLES).read_text()
    assert page.count("\n| regular ") == 2 + 3 and "41.4" in page  # two tables, three trainings
    for name, target in document.PICTURES.items():
        assert (repository / target).read_bytes() == name.encode()
    assert not list(repository.rglob(".*"))


def test_a_call_without_a_folder_or_with_one_that_is_not_there(tmp_path):
    code, text = run()
    assert code == 2 and "Error: Missing argument 'FOLDER'." in text
    code, text = run(tmp_path / "none")
    assert code == 2 and f"Directory '{tmp_path / 'none'}' does not exist." in text


def test_a_folder_without_results(folders, tmp_path):
    """Nothing is written then."""
    source, repository = folders
    empty = tmp_path / "empty"
    empty.mkdir()
    code, said = run(empty, repository)
    assert code == 1 and said.startswith(f"Error: {empty} has no detection.json, which a run writes at its end: ")
    assert said.endswith(f"`deformconv experiment detect --output {empty}`\n")
    for text in ("{", "[]", "{}", '{"machine": {}, "arms": 3}'):
        (source / "detection.json").write_text(text)
        code, said = run(source, repository)
        assert code == 1 and f"{source / 'detection.json'} is not what this version's `deformconv experiment detect`" in said
    assert not list((repository / "benchmarks").iterdir())


def test_a_run_that_drew_no_picture_and_a_folder_that_is_no_repository(folders, tmp_path):
    source, repository = folders
    (source / "where-v2-looks.png").unlink()
    code, text = run(source, repository)
    assert code == 1 and f"Error: {source} has no where-v2-looks.png, which the guide shows" in text
    assert not list((repository / "benchmarks").iterdir())
    (source / "where-v2-looks.png").touch()
    (repository / document.GUIDE).write_text("no marks")
    assert run(source, repository) == (1, f"Error: {repository / document.GUIDE}: the document has no {BEGIN}")
    code, text = run(source, tmp_path)
    assert code == 1 and f"Error: there is no {tmp_path / document.GUIDE}: run this in a clone's folder" in text


def test_the_guide_names_the_steps_that_make_takes():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    base, steps = (int(re.search(rf"{name} (\d+)", makefile)[1]) for name in ("--base-steps", "--steps"))
    text = f"({base:,} and {steps} for {DEFAULT.base_steps:,} and {DEFAULT.steps})"
    assert text in (ROOT / document.GUIDE).read_text(encoding="utf-8")
