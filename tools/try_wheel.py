"""Check a built wheel and sdist, then install the wheel into clean environments and run the tests against what is installed.

    python tools/try_wheel.py dist                                      what is inside of both
    python tools/try_wheel.py dist --python python3.10 --python python3.13 --tests tests/ops tests/test_package.py

Tests come from the unpacked sdist, whose src folder is removed first: no test can reach the source tree. For each Python it
prints what an import takes and what the first call takes, with no machine code on disk and with it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from email.parser import Parser
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parents[1]
TESTED_WITH = ("pytest", "hypothesis", "packaging", "pyyaml")
NEEDED = (
    "LICENSE",
    "README.md",
    "CHANGELOG.md",
    "CITATION.cff",
    "pyproject.toml",
    "Makefile",
    "constraints.txt",
    "tests/conftest.py",
)
TIMED = """
import time
import numpy as np
start = time.perf_counter()
import deformconv
{call}
print(time.perf_counter() - start)
"""
CALL = "deformconv.deform_conv(np.ones((1, 8, 16, 16), 'f4'), np.zeros((1, 18, 14, 14), 'f4'), np.ones((8, 8, 3, 3), 'f4'))"
WHERE = "import deformconv, json; print(json.dumps([deformconv.__file__, deformconv.__version__]))"


def built(folder: Path) -> tuple[Path, Path]:
    """The wheel and the sdist in a folder, where only one of each lies."""
    wheels, sdists = sorted(folder.glob("*.whl")), sorted(folder.glob("*.tar.gz"))
    if len(wheels) != 1 or len(sdists) != 1:
        names = ", ".join(path.name for path in wheels + sdists) or "nothing"
        raise SystemExit(f"{folder} has to hold one wheel and one sdist, and holds {names}: make wheel")
    return wheels[0], sdists[0]


def faults(wheel: Path, sdist: Path) -> list[str]:
    """What is wrong with what is inside of a wheel and of the sdist beside it."""
    with zipfile.ZipFile(wheel) as archive:
        inside = {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}
    with tarfile.open(sdist) as archive:
        files = {str(PurePosixPath(*PurePosixPath(member.name).parts[1:])) for member in archive if member.isfile()}
    found = [] if wheel.name.endswith("-py3-none-any.whl") else [f"{wheel.name} is for some machines only"]
    packages = {name for name in inside if ".dist-info/" not in name}
    sources = {name.removeprefix("src/") for name in files if name.startswith("src/")}
    found += [f"the wheel lacks the sdist's src/{name}" for name in sorted(sources - packages)]
    found += [f"the wheel has {name}, which is not in the sdist's src" for name in sorted(packages - sources)]
    # No text has a byte 0, and every library, object file and kernel that was kept has some.
    found += [f"{name} in the wheel is not text" for name in sorted(inside) if b"\0" in inside[name]]
    found += [f"the wheel has the test {name}" for name in sorted(inside) if "tests" in PurePosixPath(name).parts]
    if "deformconv/py.typed" not in inside:
        found.append("the wheel lacks deformconv/py.typed")
    if not any(name.endswith(".dist-info/licenses/LICENSE") for name in inside):
        found.append("the wheel lacks its licence")
    record = next(text.decode() for name, text in inside.items() if name.endswith(".dist-info/METADATA"))
    name, version, *_ = wheel.name.split("-")
    said = Parser().parsestr(record)
    if (said["Name"], said["Version"]) != (name, version) or not sdist.name.startswith(f"{name}-{version}.tar"):
        found.append(f"{wheel.name}, {sdist.name} and the record ({said['Name']} {said['Version']}) do not agree")
    return found + [f"the sdist lacks {name}" for name in NEEDED if name not in files]


def run(command: list[str | Path], **options: object) -> str:
    """Run a command outside of the source tree, and return what it printed."""
    done = subprocess.run(list(map(str, command)), text=True, stdout=subprocess.PIPE, check=False, **options)
    if done.returncode:
        raise SystemExit(f"{done.stdout}\n{' '.join(map(str, command))} ended with {done.returncode}")
    return str(done.stdout)


def surroundings() -> dict[str, str]:
    """This process' environment, without what leads an import to a source tree."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def seconds(python: Path, cache: Path, call: str = "") -> float:
    """What an import takes after NumPy's, and a call."""
    environment = surroundings() | {"DEFORMCONV_CACHE_DIR": str(cache)}
    return float(run([python, "-c", TIMED.format(call=call)], cwd=cache.parent, env=environment))


def times(python: Path, cache: Path) -> str:
    cold = seconds(python, cache, CALL)
    warm = statistics.median(seconds(python, cache, CALL) for _ in range(3))
    imports = statistics.median(seconds(python, cache) for _ in range(5))
    return (
        f"import {imports * 1000:.0f} ms after NumPy's; with a first call {cold:.1f} s, with machine code on disk {warm:.2f} s"
    )


def attempt(python: str, wheel: Path, sdist: Path, tests: list[str], constraint: Path) -> bool:
    """Install the wheel for a Python into an environment of its own, and run the tests there; whether they pass."""
    with tempfile.TemporaryDirectory(prefix="deformconv-") as name:
        where = Path(name)
        run([python, "-m", "venv", where / "venv"])
        own = where / "venv" / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
        run([own, "-m", "pip", "install", "--quiet", "--constraint", constraint, wheel, *TESTED_WITH])
        with tarfile.open(sdist) as archive:
            archive.extractall(where, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
        tree = where / sdist.name.removesuffix(".tar.gz")
        shutil.rmtree(tree / "src")
        file, version = json.loads(run([own, "-c", WHERE], cwd=tree, env=surroundings()))
        if where.resolve() / "venv" not in Path(file).resolve().parents or version != wheel.name.split("-")[1]:
            raise SystemExit(f"{python} imports deformconv {version} from {file}, which is not the wheel")
        print(f"{run([own, '--version']).strip()}: {times(own, where / 'cache')}", flush=True)
        return subprocess.run([own, "-m", "pytest", "-q", *tests], cwd=tree, env=surroundings(), check=False).returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where the wheel and the sdist lie")
    parser.add_argument("--python", action="append", default=[], help="an interpreter to try the wheel with")
    parser.add_argument("--constraint", type=Path, default=ROOT / "constraints.txt", help="versions to install")
    parser.add_argument("--tests", nargs="+", default=["tests"], help="folders and files of the sdist")
    asked = parser.parse_args()
    wheel, sdist = built(asked.folder)
    wrong = faults(wheel, sdist)
    if wrong:
        raise SystemExit("\n".join(wrong))
    print(f"{wheel.name}: {wheel.stat().st_size / 1000:.0f} kB; {sdist.name}: {sdist.stat().st_size / 1000:.0f} kB", flush=True)
    paths = wheel.resolve(), sdist.resolve(), asked.tests, asked.constraint.resolve()
    failed = [python for python in asked.python if not attempt(python, *paths)]
    if failed:
        raise SystemExit(f"tests failed against {wheel.name} with {', '.join(failed)}")


if __name__ == "__main__":
    main()
