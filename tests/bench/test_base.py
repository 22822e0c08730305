"""Another commit's files, found in git, beside those that lie here."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tests.bench import made_up
from tests.bench.made_up import RIGHT, Fake

import deformconv
from deformconv.bench import base
from deformconv.bench.base import REPORTS, Tree, Trees, trees_of
from deformconv.bench.cases import named
from deformconv.bench.measure import Failure, Pace
from deformconv.bench.peers import DIRECTIONS, RECORDED
from deformconv.bench.reports import Plan
from deformconv.bench.startup import Start
from deformconv.cli import bench
from deformconv.cli.main import main

PRIMES = named("primes")
PLAN = Plan([PRIMES], ["deformconv"], DIRECTIONS, 1, Pace(3, 1e-2), quick=True)
PACKAGE = Path(deformconv.__file__).parent
COMMITS = {"commits": {"base": "1234567", "here": "89abcde with changes"}}
needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    ran = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return ran.stdout.strip()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A repository of two commits: an empty one, and one of the files that are tested here."""
    root = tmp_path_factory.mktemp("checkout").resolve()
    git(root, "init", "--quiet")
    git(root, "commit", "--quiet", "--allow-empty", "--message", "empty")
    shutil.copytree(PACKAGE, root / "src/deformconv", ignore=shutil.ignore_patterns("__pycache__"))
    (root / ".gitignore").write_text("__pycache__/\n")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "--message", "the package")
    return root


@pytest.fixture
def runs_from(monkeypatch, tmp_path):
    """Makes a folder's package the one that runs, as far as it is asked where it lies; temporary folders go into another."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))

    def run_from(root: Path) -> Path:
        monkeypatch.setattr(deformconv, "__file__", str(root / "src/deformconv/__init__.py"))
        return tmp_path / "temporary"

    return run_from


@needs_git
class TestTrees:
    def test_a_commit_s_files_are_there_for_as_long_as_they_are_used(self, checkout, runs_from):
        temporary, commit = runs_from(checkout), git(checkout, "rev-parse", "--short", "HEAD")
        with pytest.raises(KeyboardInterrupt), trees_of("HEAD") as trees:
            assert (trees.base.commit, trees.here.commit) == (commit, commit)
            assert trees.here.folder == checkout and trees.base.folder.parent == temporary.resolve()
            names = [sorted(path.relative_to(tree.folder) for path in tree.folder.rglob("*.py")) for tree in trees]
            assert names[0] == names[1] and Path("src/deformconv/bench/worker.py") in names[0]
            assert Path(trees.base.variables["DEFORMCONV_CACHE_DIR"]).is_relative_to(trees.base.folder)
            assert "DEFORMCONV_CACHE_DIR" not in trees.here.variables
            raise KeyboardInterrupt
        assert not list(temporary.iterdir())
        assert git(checkout, "status", "--porcelain") == "" and len(git(checkout, "worktree", "list").splitlines()) == 1

    def test_changes_here_are_said_and_are_not_in_the_base(self, checkout, runs_from, tmp_path):
        git(tmp_path, "clone", "--quiet", str(checkout), "changed")
        runs_from(tmp_path / "changed")
        errors = tmp_path / "changed/src/deformconv/errors.py"
        errors.write_text(errors.read_text() + "CHANGED = True\n")
        with trees_of("HEAD") as trees:
            assert trees.here.commit == f"{trees.base.commit} with changes"
            assert "CHANGED" not in (trees.base.folder / "src/deformconv/errors.py").read_text()

    def test_a_revision_that_is_not_there(self, checkout, runs_from):
        runs_from(checkout)
        with pytest.raises(Failure) as caught, trees_of("nonsense"):
            pass
        assert str(caught.value) == f"there is no commit 'nonsense' in {checkout}"

    def test_a_commit_that_cannot_measure(self, checkout, runs_from):
        runs_from(checkout)
        empty = git(checkout, "rev-parse", "--short", "HEAD~1")
        with pytest.raises(Failure) as caught, trees_of("HEAD~1"):
            pass
        assert str(caught.value) == f"the commit {empty} cannot be measured: it has no src/deformconv/bench/worker.py"

    def test_a_commit_that_cannot_be_imported(self, checkout, runs_from, tmp_path):
        git(tmp_path, "clone", "--quiet", str(checkout), "broken")
        broken = tmp_path / "broken"
        (broken / "src/deformconv/__init__.py").write_text("raise SystemError('no luck')\n")
        git(broken, "commit", "--quiet", "--all", "--message", "broken")
        temporary = runs_from(broken)
        with pytest.raises(Failure, match=r"^the commit \w+ cannot be imported: SystemError: no luck$"), trees_of("HEAD"):
            pass
        assert not list(temporary.iterdir())

    def test_a_commit_that_python_does_not_import(self, checkout, runs_from, monkeypatch):
        """As where an editable install is found by a hook and not by a path."""
        runs_from(checkout)
        monkeypatch.setattr(base, "_importing", lambda folder: {"PYTHONPATH": str(PACKAGE.parent)})
        with pytest.raises(Failure) as caught, trees_of("HEAD"):
            pass
        imported = f"Python imports {PACKAGE.resolve()} in the place of its files"
        assert str(caught.value) == f"the commit {git(checkout, 'rev-parse', '--short', 'HEAD')} cannot be measured: {imported}"

    def test_an_installed_package_is_no_checkout(self, runs_from, tmp_path):
        package = tmp_path / "src/deformconv"
        package.mkdir(parents=True)
        runs_from(tmp_path)
        with pytest.raises(Failure) as caught, trees_of("HEAD"):
            pass
        assert str(caught.value).startswith(f"{package.resolve()} is not in a git checkout: fatal: not a git repository")
        other = tmp_path / "other"
        (other / "site-packages/src/deformconv").mkdir(parents=True)
        git(other, "init", "--quiet")
        runs_from(other / "site-packages")
        with pytest.raises(Failure) as caught, trees_of("HEAD"):
            pass
        where = f"{other.resolve()}/site-packages/src/deformconv is not in a git checkout of deformconv"
        assert str(caught.value) == f"{where}, where it would be {other.resolve()}/src/deformconv"


def test_without_git(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(Failure, match=r"^another commit's files come from git, which is not installed here$"), trees_of("HEAD"):
        pass


def measured(theirs, ours, direction="forward", ratio=1.0):
    fakes = Fake("deformconv", theirs, 2e-3), Fake("deformconv", ours, ratio * 2e-3)
    return COMMITS | base._layer_row(PRIMES, direction, Fake("truth", RIGHT), *fakes, PLAN)


def cells(text, line):
    return [cell.strip() for cell in text.splitlines()[line].split("|")[1:-1]]


class TestLayers:
    def test_equal_results(self):
        row = measured(RIGHT, RIGHT, ratio=1.5)
        assert row["differences"] == {} and not base.differing([row]) and not bench._is_wrong([row])
        text = REPORTS["speed"].write([row])
        assert text.startswith("base is 1234567, here is 89abcde with changes\n\nforward\n\n")
        assert cells(text, 6) == ["primes", PRIMES.shape + ", " + PRIMES.details, "2.00", "3.00", "1.500", "0 %", "equal"]

    @pytest.mark.parametrize(
        ("changed", "said"),
        [
            ({"weight": np.array([1.0, 2.0, 4.0 + 1e-6])}, "differ by 2.5e-07 in weight"),
            ({"output": RIGHT["output"] * (1 + 1e-7), "weight": RIGHT["weight"] * (1 + 3e-7)}, "differ by 3.0e-07 in weight"),
        ],
    )
    def test_a_result_that_is_right_and_not_the_same_is_said(self, changed, said):
        row = measured(RIGHT, RIGHT | changed)
        assert base.differing([row]) and not bench._is_wrong([row])
        assert cells(REPORTS["speed"].write([row]), 6)[-3:] == ["1.000", "0 %", said]

    def test_bits_are_compared(self):
        """Numbers would find two zeros equal."""
        here = RIGHT | {"weight": np.array([0.0, 2.0, 4.0])}
        there = RIGHT | {"weight": np.array([-0.0, 2.0, 4.0])}
        row = base._layer_row(
            PRIMES, "forward", Fake("truth", here), Fake("deformconv", there), Fake("deformconv", here), PLAN
        )  # fmt: skip
        assert row["differences"] == {"weight": 0.0} and base.differing([row])

    @pytest.mark.parametrize("wrong", ["base", "here"])
    def test_a_wrong_result_is_refused_and_has_no_time(self, wrong):
        sides = {"base": RIGHT, "here": RIGHT, wrong: RIGHT | {"output": np.full(3, 1.5)}}
        row = measured(sides["base"], sides["here"])
        assert bench._is_wrong([row])
        text = REPORTS["speed"].write([row])
        assert f"| refused: {wrong} differs by 5.0e-01 in output |" in text and "geometric mean" not in text

    def test_the_mean_and_the_largest(self):
        rows = [measured(RIGHT, RIGHT, direction, ratio) for direction in DIRECTIONS for ratio in (0.5, 2.0, 8.0)]
        rows[2]["layer"]["name"] = "slowest"
        text = REPORTS["speed"].write(rows)
        assert text.count("here / base: geometric mean 2.000 of 3, 8.000 at the most") == 2
        assert "8.000 at the most (slowest)" in text and text.index("forward\n") < text.index("forward+backward\n")

    def test_the_spread_is_that_of_the_less_steady_side(self):
        row = measured(RIGHT, RIGHT)
        row["results"] = {"base": made_up.result(2.0), "here": made_up.result(2.0) | {"quartiles": [1.0, 3.0]}}
        assert cells(REPORTS["speed"].write([row]), 6)[-2] == "100 %"
        assert "a ratio that is no further from 1 says nothing" in REPORTS["speed"].write([row])

    def test_the_smallest_call_in_microseconds(self):
        rows = [measured(RIGHT, RIGHT, direction) for direction in ("forward", RECORDED)]
        text = REPORTS["small"].write(rows)
        assert cells(text, 4)[2:4] == ["base, µs", "here, µs"] and cells(text, 6)[2:4] == ["2000", "2000"]
        assert f"\n\n{RECORDED}\n\n" in text


def starts(load, first, results="same"):
    return {"import": 1.0, "load": load, "first": first, "results": results}


class TestStartup:
    def runs(self, **changed):
        return {
            "warm": {"base": [starts(0.1, 0.3)] * 3, "here": [starts(0.2, 0.7, **changed)] * 3},
            "cold": {"base": [starts(0.1, 10.1)], "here": [starts(0.2, 5.2)]},
        }

    def test_written(self):
        rows = [row | COMMITS for row in base._startup_rows(self.runs())]
        text = REPORTS["startup"].write(rows)
        assert not base.differing(rows) and "Results are equal bit for bit." in text
        assert [cells(text, line)[-2:] for line in (4, 5, 6)] == [["2.000", "3"], ["2.500", "3"], ["0.500", "1"]]
        assert cells(text, 6)[1] == "10.0 (10.0 to 10.0)"

    def test_results_that_differ(self):
        rows = [row | COMMITS for row in base._startup_rows(self.runs(results="other"))]
        assert base.differing(rows) and "Results DIFFER." in REPORTS["startup"].write(rows)

    def test_a_process_says_what_its_import_and_its_first_call_took(self):
        pytest.importorskip("torch")
        found = Start().end()
        assert 0 < found["load"] < found["first"]

    def test_every_cold_process_has_an_empty_folder_and_the_warm_ones_a_full_one(self, monkeypatch):
        asked = []

        class Starting:
            def __init__(self, folder, **variables):
                asked.append((folder, variables["PYTHONPATH"], variables["DEFORMCONV_CACHE_DIR"]))

            def end(self):
                return starts(0.1, 0.3)

        monkeypatch.setattr(base, "Start", Starting)
        trees = Trees(*(Tree(name, Path(name), {"PYTHONPATH": name, "DEFORMCONV_CACHE_DIR": "-"}) for name in ("one", "two")))
        for quick, cold, warm in ((True, 1, 3), (False, 3, 7)):
            asked.clear()
            progress = made_up.Counting()
            REPORTS["startup"].measure(trees, PLAN._replace(quick=quick), progress)
            assert len(progress.steps) == progress.expected == cold + warm
            assert [(str(folder), path) for folder, path, _ in asked] == [("one", "one"), ("two", "two")] * (cold + warm)
            caches = [cache for _, _, cache in asked]
            assert len(set(caches[: 2 * cold])) == 2 * cold and caches[2 * cold :] == caches[2 * cold - 2 : 2 * cold] * warm


class TestCommand:
    @pytest.fixture
    def rows(self, monkeypatch):
        """A benchmark at no cost: what is reported are these rows."""
        found = [measured(RIGHT, RIGHT)]
        trees = Trees(*(Tree(name, Path(name), {}) for name in ("one", "two")))

        class Opened:
            def __init__(self, revision):
                if revision == "nonsense":
                    raise Failure("there is no commit 'nonsense' in the checkout")

            def __enter__(self):
                return trees

            def __exit__(self, *error):
                pass

        monkeypatch.setattr(base, "trees_of", Opened)
        report = REPORTS["speed"]._replace(measure=lambda given, plan, progress: found if given is trees else [])
        monkeypatch.setitem(REPORTS, "speed", report)
        return found

    def test_it_prints_writes_and_reads(self, rows, capsys, tmp_path):
        file = tmp_path / "results.json"
        assert main(["bench", "--quick", "--base", "HEAD~1", "--json", str(file)]) == 0
        printed = capsys.readouterr().out
        assert "Speed beside another commit" in printed and " equal |" in printed and "Not installed" not in printed
        assert set(json.loads(file.read_text())) == {"machine", "base speed"}
        for reports in ([], ["speed"]):
            assert main(["bench", *reports, "--from", str(file)]) == 0
            assert printed.startswith(capsys.readouterr().out)
        assert main(["bench", "small", "--from", str(file)]) == 1
        assert f"{file} has no small" in capsys.readouterr().err

    def test_results_that_differ_end_with_1(self, rows, capsys):
        rows[0] = measured(RIGHT, RIGHT | {"weight": np.array([1.0, 2.0, 4.0 + 1e-6])})
        assert main(["bench", "--quick", "--base", "HEAD"]) == 1
        error = "Error: the results of here are not those of the base, bit for bit: see above\n"
        assert (captured := capsys.readouterr()).err.endswith(error)
        assert "| differ by 2.5e-07 in weight |" in captured.out

    def test_wrong_results_end_with_1(self, rows, capsys):
        rows[0] = measured(RIGHT, RIGHT | {"output": np.zeros(3)})
        assert main(["bench", "--quick", "--base", "HEAD"]) == 1
        assert capsys.readouterr().err.endswith("Error: deformconv failed, or its results are wrong: see above\n")

    def test_a_base_that_is_not_there_is_said(self, rows, capsys):
        assert main(["bench", "--base", "nonsense"]) == 1
        assert capsys.readouterr().err == "Error: --base: there is no commit 'nonsense' in the checkout\n"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["net"], "there is no report with --base 'net'; there are speed, small, startup, all"),
            (["--library", "dense"], "--base measures deformconv alone, at two commits: --library has no place beside it"),
            (["--plot", "chart.png"], "--base measures deformconv alone, at two commits: --plot has no place beside it"),
            (["--from", __file__], "--base measures deformconv alone, at two commits: --from has no place beside it"),
        ],
    )
    def test_a_wrong_call_is_explained_and_ends_with_2(self, arguments, message, rows, capsys):
        assert main(["bench", "--base", "HEAD", *arguments]) == 2
        assert message in " ".join(capsys.readouterr().err.split())


@needs_git
@pytest.mark.slow
class TestWhole:
    """The command, from a checkout, in processes of its own. The base compiles a kernel; the files here are known already."""

    def start(self, checkout, tmp_path, *arguments):
        (tmp_path / "temporary").mkdir()
        kernels = os.environ.get("DEFORMCONV_CACHE_DIR", str(PACKAGE / "__pycache__/kernels"))
        variables = {
            "PYTHONPATH": str(checkout / "src"),
            "TMPDIR": str(tmp_path / "temporary"),
            "DEFORMCONV_CACHE_DIR": kernels,
        }
        options = ("--quick", "--case", "primes", "--direction", "forward", "--blocks", "1", "--seconds", "0.001")
        return subprocess.Popen(
            [sys.executable, "-m", "deformconv.cli", "bench", "--base", "HEAD", "--threads", "1", *options, *arguments],
            cwd=tmp_path, env={**os.environ, **variables}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def left(self, tmp_path):
        """What is left of temporary files; PyTorch leaves an empty folder for its compiler."""
        return [path for path in (tmp_path / "temporary").iterdir() if not path.name.startswith("torchinductor_")]

    def test_a_commit_beside_itself(self, checkout, tmp_path):
        pytest.importorskip("torch")
        process = self.start(checkout, tmp_path, "speed", "small", "--json", "results.json")
        printed, complaint = process.communicate(timeout=600)
        assert process.returncode == 0, printed + complaint
        found = json.loads((tmp_path / "results.json").read_text())
        assert set(found) == {"machine", "base speed", "base small"}
        for section, directions in (("base speed", ["forward"]), ("base small", ["forward", RECORDED])):
            rows = found[section]["rows"]
            assert [row["direction"] for row in rows] == directions
            for row in rows:
                assert row["differences"] == {} and set(row["results"]) == {"base", "here"}
                assert all(result["milliseconds"] > 0 and result["error"] < 1e-5 for result in row["results"].values())
        assert self.left(tmp_path) == []

    @pytest.mark.skipif(sys.platform == "win32", reason="sends the signal of Ctrl-C")
    def test_an_interrupt_leaves_nothing(self, checkout, tmp_path):
        pytest.importorskip("torch")
        process = self.start(checkout, tmp_path)
        kernels = "deformconv-base-*/kernels/*"
        ends = time.monotonic() + 300
        while not list((tmp_path / "temporary").glob(kernels)) and process.poll() is None and time.monotonic() < ends:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)  # while the base compiles
        _, complaint = process.communicate(timeout=300)
        assert process.returncode == 130 and "Interrupted" in complaint
        assert self.left(tmp_path) == []
