"""The commands in error messages install what they promise, in the way in which deformconv was installed."""

from __future__ import annotations

import json
import re
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from deformconv import installation
from deformconv.installation import command

ROOT = Path(__file__).parents[1]
WHEEL = "deformconv-0.1.0-py3-none-any.whl"


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Make this deformconv look installed: `installed(direct_url, at)`, with pip's record and the folder of its packages."""

    def install(direct_url, at=Path(installation.__file__).parents[1]):
        record = tmp_path / "site-packages" / "deformconv-0.1.0.dist-info"
        record.mkdir(parents=True)
        (record / "METADATA").write_text("Name: deformconv\nVersion: 0.1.0\n")
        if direct_url is not None:
            (record / "direct_url.json").write_text(json.dumps(direct_url))
        found = metadata.PathDistribution(record)
        monkeypatch.setattr(found, "locate_file", lambda path: at / path)
        monkeypatch.setattr(metadata, "distribution", lambda name: found)

    return install


def test_from_an_index(installed):
    installed(None)
    assert command("torch", "torch") == "pip install 'deformconv[torch]'"


def test_from_a_folder(installed):
    installed({"url": ROOT.as_uri(), "dir_info": {}})
    assert command("torch", "torch") == f"pip install '{ROOT}[torch]'"


def test_from_a_folder_editable(installed, tmp_path):
    source = Path(installation.__file__).parents[2]
    installed({"url": source.as_uri(), "dir_info": {"editable": True}}, at=tmp_path)
    assert command("demo", "rich", "mlxtend") == f"pip install --editable '{source}[demo]'"


def test_from_a_wheel(installed, tmp_path):
    (tmp_path / "a folder").mkdir()
    wheel = tmp_path / "a folder" / WHEEL
    wheel.touch()
    installed({"url": wheel.as_uri(), "archive_info": {}})
    assert command("torch", "torch") == f"pip install '{wheel}[torch]'"


def test_from_a_wheel_that_is_gone(installed, tmp_path):
    installed({"url": (tmp_path / WHEEL).as_uri(), "archive_info": {}})
    assert command("torch", "torch") == "pip install torch"
    assert command("gluon", "mxnet==1.9.1", "numpy<1.24") == "pip install 'mxnet==1.9.1' 'numpy<1.24'"


@pytest.mark.parametrize(
    ("record", "requirement"),
    [
        ({"url": f"https://a.example/{WHEEL}", "archive_info": {}}, f"deformconv[torch] @ https://a.example/{WHEEL}"),
        (
            {"url": "https://a.example/x.git", "vcs_info": {"vcs": "git", "commit_id": "0a1b"}},
            "deformconv[torch] @ git+https://a.example/x.git@0a1b",
        ),
    ],
)
def test_from_an_address(installed, record, requirement):
    installed(record)
    assert command("torch", "torch") == f"pip install '{requirement}'"
    assert Requirement(requirement).extras == {"torch"}


@pytest.mark.parametrize("record", [None, {"url": "file:///elsewhere", "dir_info": {"editable": True}}])
def test_another_copy_is_installed(installed, record, tmp_path):
    """And this one is a folder on the path: to install what is not running would not help."""
    installed(record, at=tmp_path)
    assert command("torch", "torch") == "pip install torch"


def test_nothing_is_installed(monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", absent)
    assert command("torch", "torch") == "pip install torch"


def test_every_command_names_an_extra_and_its_packages():
    """Those that pyproject.toml has."""
    tomllib = pytest.importorskip("tomllib", reason="pyproject.toml is read with Python 3.11's library")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]

    def brought(extra):
        for requirement in map(Requirement, extras[extra]):
            yield from (requirement.name,) if requirement.name != "deformconv" else ()
            for other in requirement.extras if requirement.name == "deformconv" else ():
                yield from brought(other)

    source = Path(installation.__file__).parent
    calls = [
        (file, *call)
        for file in source.rglob("*.py")
        for call in re.findall(r"\b_?command\((['\"])([\w-]+)\1((?:, ['\"][\w=<.-]+['\"])*)", file.read_text())
    ]
    assert len(calls) >= 6
    for file, _, extra, packages in calls:
        assert extra in extras, file
        for package in re.findall(r"['\"]([\w-]+)", packages):
            assert package in set(brought(extra)), (file, package)
