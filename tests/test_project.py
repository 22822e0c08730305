"""What stands around the package: versions agree, forms and workflows are in order, and what is built is what it should be."""

from __future__ import annotations

import ast
import datetime
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import deformconv

ROOT = Path(__file__).parents[1]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([a-z][\w-]*):", MAKEFILE, re.M))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted(path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")


def parsed(path: Path) -> Any:
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def pyproject() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib", reason="pyproject.toml is read with Python 3.11's library")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_version_is_the_same_everywhere():
    """In the package, the newest release of the CHANGELOG, and the citation, which has its date as well."""
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert headings[0] == "Unreleased"
    version, date = re.fullmatch(r"(\S+) \((\d{4}-\d\d-\d\d)\)", headings[1]).groups()
    assert version == deformconv.__version__ and str(Version(version)) == version
    citation = parsed(ROOT / "CITATION.cff")
    assert str(citation["version"]) == version
    assert citation["date-released"] == datetime.date.fromisoformat(date)


def test_the_citation_has_what_its_format_asks_for():
    """The Citation File Format 1.2.0's required keys, and its forms of a person, an entity and a reference."""
    citation = parsed(ROOT / "CITATION.cff")
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert {"message", "title", "authors"} <= set(citation)
    assert citation["license"] == "Apache-2.0"
    for work in (citation, *citation["references"]):
        assert work["title"] and work["authors"]
        for author in work["authors"]:
            assert set(author) in ({"name"}, {"family-names", "given-names"}), author
    for reference in citation["references"]:
        assert reference["type"] == "conference-paper" and isinstance(reference["year"], int)
        assert all(re.fullmatch(r"arXiv:\d{4}\.\d{5}", one["value"]) for one in reference["identifiers"])


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_call_targets_that_make_has(path):
    """And nothing but make, so that a failure can be had on any machine by the same command."""
    workflow = parsed(path)
    assert workflow["permissions"] == {"contents": "read"}
    called = []
    for name, job in workflow["jobs"].items():
        matrix = job.get("strategy", {}).get("matrix", {})
        commands = [step["run"] for step in job["steps"] if "run" in step]
        assert commands, f"the job {name} runs nothing"
        for command in commands:
            words = re.sub(r"\$\{\{ (.*?) \}\}", lambda match: match[1].replace(" ", ""), command).split()
            assert words[0] == "make", f"{name} runs {command!r}"
            targets = [word for word in words[1:] if "=" not in word]
            assert len(targets) == 1, f"{name} runs {command!r}"
            (target,) = targets
            called += matrix[target.removeprefix("matrix.")] if target.startswith("matrix.") else [target]
    assert called
    missing = sorted(set(called) - TARGETS)
    assert not missing, f"{path.name} calls make {', '.join(missing)}"


def test_workflows_try_every_python_and_system():
    """Every Python that pyproject.toml lists, from the oldest one that it allows; the oldest with the oldest versions."""
    project = pyproject()
    listed = {name.rpartition(" ")[2] for name in project["classifiers"] if re.search(r"Python :: 3\.\d+$", name)}
    oldest = project["requires-python"].removeprefix(">=")
    assert oldest == min(listed, key=Version)
    jobs = parsed(ROOT / ".github" / "workflows" / "test.yml")["jobs"]
    systems = {"ubuntu-latest", "macos-latest", "windows-latest"}
    matrix = jobs["newest"]["strategy"]["matrix"]
    tried = {(system, python) for system in matrix["system"] for python in matrix["python"]}
    tried |= {(one["system"], one["python"]) for one in matrix["include"]}
    tried |= {("ubuntu-latest", python) for python in jobs["everything"]["strategy"]["matrix"]["python"]}
    assert tried == {(system, python) for system in systems for python in listed}
    assert set(jobs["oldest"]["strategy"]["matrix"]["system"]) == systems
    (python,) = (step["with"]["python-version"] for step in jobs["oldest"]["steps"] if "with" in step)
    assert python == oldest


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_forms_have_what_a_host_asks_for(path):
    """A name, a description, and fields with labels, of which some must be filled in; ids are not used twice."""
    form = parsed(path)
    assert {"name", "description", "labels", "body"} <= set(form)
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert {field["type"] for field in fields} <= {"textarea", "input", "dropdown", "checkboxes"}
    assert all(field["attributes"]["label"] for field in fields)
    assert len({field["id"] for field in fields}) == len(fields)
    assert any(field.get("validations", {}).get("required") for field in fields)
    for command in re.findall(r"`deformconv (\w+)`", path.read_text(encoding="utf-8")):
        from deformconv.cli.main import deformconv as program

        assert command in program.commands


def test_there_are_forms_and_workflows():
    assert {path.stem for path in WORKFLOWS} == {"test", "wheel", "docs"}
    assert len(FORMS) == 3
    assert parsed(ROOT / ".github" / "ISSUE_TEMPLATE" / "config.yml") == {"blank_issues_enabled": True}


@pytest.mark.parametrize("name", ["CODE_OF_CONDUCT.md", "CONTRIBUTING.md", "SECURITY.md", "VERSIONING.md", "CHANGELOG.md"])
def test_what_the_projects_documents_link_to_exists(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, anchor = target.partition("#")
        if target.startswith("https://"):
            continue
        linked = (ROOT / file) if file else ROOT / name
        assert linked.is_file(), f"{name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.M)
            anchors = {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{name} links to {target}"


def test_the_oldest_versions_are_those_that_are_declared():
    """`make test-oldest` tries the lowest version of each: not one that is a little newer and works."""
    project = pyproject()
    extras = project["optional-dependencies"]
    declared = map(Requirement, (*project["dependencies"], *extras["torch"], *extras["bench"], *extras["dev"]))
    lowest = {
        canonicalize_name(one.name): next(part.version for part in one.specifier if part.operator == ">=")
        for one in declared
        if one.name != "deformconv"
    }
    lines = (ROOT / "constraints-oldest.txt").read_text(encoding="utf-8").splitlines()
    pins = {canonicalize_name(pin.name): pin for pin in map(Requirement, (line for line in lines if not line.startswith("#")))}
    for name, pin in pins.items():
        assert str(pin.specifier) == f"=={lowest[name]}", f"{pin} is not the oldest that pyproject.toml allows"
    needed = [canonicalize_name(Requirement(one).name) for one in (*project["dependencies"], *extras["torch"])]
    assert set(needed) <= set(pins)


def test_tests_that_the_oldest_versions_run_import_nothing_else():
    """A file that imports what these environments lack, and does not skip itself, ends the run before any test."""
    lines = (ROOT / "constraints-oldest.txt").read_text(encoding="utf-8").splitlines()
    pinned = {Requirement(line).name.replace("-", "_") for line in lines if not line.startswith("#")}
    # Numba brings llvmlite; the targets install packaging without a pin, and PyYAML's module has another name.
    there = {*sys.stdlib_module_names, *pinned, "deformconv", "tests", "llvmlite", "packaging", "yaml"}
    folders = re.search(r"^INSTALLED_TESTS := ((?:.*\\\n)*.*)", MAKEFILE, re.M)[1].replace("\\\n", " ").split()
    assert "tests/convert" in folders
    wrong = []
    for folder in map(ROOT.joinpath, (*folders, "tests/torch")):
        for file in sorted(folder.rglob("test_*.py")) if folder.is_dir() else [folder]:
            tree = ast.parse(file.read_text(encoding="utf-8"))
            skipped = {
                node.args[0].value.partition(".")[0]
                for statement in tree.body
                for node in ast.walk(statement)
                if isinstance(statement, (ast.Assign, ast.Expr)) and isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute) and node.func.attr == "importorskip"
            }  # fmt: skip
            for node in tree.body:
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) else []
                missing = {name.partition(".")[0] for name in names} - there - skipped
                wrong += [f"{file.relative_to(ROOT)}:{node.lineno} imports {name}" for name in sorted(missing)]
    assert not wrong


@pytest.mark.skipif(os.name == "nt" or shutil.which("make") is None, reason="needs make and a POSIX shell")
@pytest.mark.parametrize("found", [["python3.10"], ["python3.11", "python3.13"], ["python3.14"], []])
def test_the_wheel_is_tried_with_the_pythons_that_are_there(found, tmp_path):
    """Also where the newest is missing: make drops what a shell printed whose last command was not found."""
    for name in found:
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "said.mk").write_text("$(info $(WHEEL_PYTHONS))\nsaid: ; @:\n")
    command = [
        shutil.which("make"),
        "--no-print-directory",
        "-f",
        str(ROOT / "Makefile"),
        "-f",
        str(tmp_path / "said.mk"),
        "said",
    ]
    # Without the variables of a make that runs the tests, and with no other Python on the path.
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "WHEEL_PYTHONS")}
    said = subprocess.run(command, env=environment | {"PATH": str(tmp_path)}, text=True, capture_output=True, check=True).stdout
    assert said.split() == found


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("try_wheel", ROOT / "tools" / "try_wheel.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NAME = "deformconv-0.1.0"
GOOD = {
    "deformconv/__init__.py": b"",
    "deformconv/py.typed": b"",
    f"{NAME}.dist-info/METADATA": b"Name: deformconv\nVersion: 0.1.0\n",
    f"{NAME}.dist-info/licenses/LICENSE": b"Apache",
}


def distribution(folder: Path, inside: dict[str, bytes], sources: list[str], tag: str = "py3-none-any") -> tuple[Path, Path]:
    """A wheel with these files, and an sdist with these in src and with all that it needs beside."""
    wheel, sdist = folder / f"{NAME}-{tag}.whl", folder / f"{NAME}.tar.gz"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in inside.items():
            archive.writestr(name, content)
    with tarfile.open(sdist, "w:gz") as archive:
        for name in (*(f"src/{name}" for name in sources), *script().NEEDED):
            archive.addfile(tarfile.TarInfo(f"{NAME}/{name}"), io.BytesIO())
    return wheel, sdist


SOURCES = ["deformconv/__init__.py", "deformconv/py.typed"]


def test_a_good_wheel_has_no_faults(tmp_path):
    assert script().faults(*distribution(tmp_path, GOOD, SOURCES)) == []
    assert script().built(tmp_path) == (tmp_path / f"{NAME}-py3-none-any.whl", tmp_path / f"{NAME}.tar.gz")


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"deformconv/__pycache__/kernels/a.bin": b"\x7fELF\0"}, "a.bin in the wheel is not text"),
        ({"deformconv/__init__.pyc": b"a"}, "the wheel has deformconv/__init__.pyc, which is not in the sdist's src"),
        ({"tests/test_a.py": b""}, "the wheel has the test tests/test_a.py"),
        ({"deformconv/py.typed": None}, "the wheel lacks deformconv/py.typed"),
        ({"deformconv/__init__.py": None}, "the wheel lacks the sdist's src/deformconv/__init__.py"),
        ({f"{NAME}.dist-info/licenses/LICENSE": None}, "the wheel lacks its licence"),
        ({f"{NAME}.dist-info/METADATA": b"Name: deformconv\nVersion: 0.2.0\n"}, "do not agree"),
    ],
)
def test_faults_of_a_wheel_are_named(tmp_path, changes, fault):
    inside = {name: content for name, content in (GOOD | changes).items() if content is not None}
    assert any(fault in line for line in script().faults(*distribution(tmp_path, inside, SOURCES)))


def test_a_wheel_for_some_machines_is_a_fault(tmp_path):
    wheel, sdist = distribution(tmp_path, GOOD, SOURCES, tag="cp311-cp311-linux_x86_64")
    assert script().faults(wheel, sdist) == [f"{wheel.name} is for some machines only"]


def test_what_the_sdist_lacks_is_named(tmp_path, monkeypatch):
    tool = script()
    wheel, sdist = distribution(tmp_path, GOOD, SOURCES)
    monkeypatch.setattr(tool, "NEEDED", (*tool.NEEDED, "docs/design.md"))
    assert tool.faults(wheel, sdist) == ["the sdist lacks docs/design.md"]


def test_a_folder_with_nothing_built_says_what_to_do(tmp_path):
    with pytest.raises(SystemExit, match="has to hold one wheel and one sdist, and holds nothing: make wheel"):
        script().built(tmp_path)
