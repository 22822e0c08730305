"""docs/serving.md: every program prints what stands below it. The Dockerfile's steps run, and what it serves answers."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from tests.dockerfile import PROJECT, SHAPE_BYTES, Image, steps
from tests.documents import check, programs

PAGE = (PROJECT / "docs" / "serving.md").read_text(encoding="utf-8")
PROGRAMS = programs("docs/serving.md")


def test_programs_are_found():
    assert len(PROGRAMS) == PAGE.count("```text") >= 4


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: f"line {program.line}")
def test_program(program, tmp_path):
    if program.imports("torch") and find_spec("torch") is None:
        pytest.skip("needs PyTorch")
    if "os.fork" in program.source and not hasattr(os, "fork"):
        pytest.skip("needs fork")
    check(program, tmp_path)


def test_what_is_named_exists():
    from deformconv.cli.main import deformconv

    assert set(re.findall(r"`deformconv (\w+)", PAGE)) <= set(deformconv.commands)
    options = {option for command in deformconv.commands.values() for parameter in command.params for option in parameter.opts}
    assert set(re.findall(r"`deformconv warmup[^`]*?(--\w+)", PAGE)) <= options
    sources = "".join(path.read_text(encoding="utf-8") for path in (PROJECT / "src").rglob("*.py"))
    for variable in set(re.findall(r"DEFORMCONV_\w+", PAGE)):
        assert variable in sources
    for link in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert (PROJECT / "docs" / link).exists(), link


def test_every_level_is_in_the_table(monkeypatch):
    from deformconv.runtime import target

    for machine in ("x86_64", "aarch64"):
        monkeypatch.setattr(platform, "machine", lambda machine=machine: machine)
        for name in target.levels():
            assert f"`{name}`" in PAGE


def test_the_dockerfile_s_instructions_are_read():
    text = "# a comment\nFROM here\n\nRUN one \\\n    two\nENV NAME=value\n"
    assert [*steps(text)] == [("FROM", "here"), ("RUN", "one      two"), ("ENV", "NAME=value")]


SERVE = """
import io, json, os, sys
from app import application
bodies, heads = [bytes({size}), b"short"], []
for body in bodies:
    environ = {{"wsgi.input": io.BytesIO(body), "CONTENT_LENGTH": str(len(body))}}
    answer = b"".join(application(environ, lambda *head: heads.append(head[0])))
    print(heads[-1], len(json.loads(answer)) if heads[-1].startswith("200") else answer.decode())
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="the steps are for a shell")
@pytest.mark.skipif(find_spec("torch") is None, reason="needs PyTorch")
def test_the_image_is_warm_and_its_application_answers(tmp_path: Path):
    """All steps but pip's, with this environment's packages, for a level that any processor has."""
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "deformconv"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m deformconv.cli "$@"\n')
    command.chmod(0o755)
    level = "x86-64-v2" if platform.machine() in ("x86_64", "AMD64") else "native"
    environment = os.environ | {"PATH": f"{command.parent}:{os.environ['PATH']}"}
    image = Image(tmp_path / "root", environment, {"CPU": level})
    image.build(without="pip ")
    compiled, examined = image.outputs.values()
    assert "kernels compiled" in compiled and "All in order." in examined
    assert image.command == ["gunicorn", "app:application"] and (image.folder / "gunicorn.conf.py").is_file()
    served = subprocess.run(
        [sys.executable, "-c", SERVE.format(size=SHAPE_BYTES)],
        cwd=image.folder, env=image.environment, capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    assert served.stdout.splitlines()[:2] == [
        "200 OK 10",
        "400 Bad Request 5 bytes; expected 49152, the float32 numbers of 3x64x64",
    ]
    assert served.stderr == ""
