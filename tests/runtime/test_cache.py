"""Machine code on disk: a new process hits, an edited kernel misses, a folder that cannot be written harms nothing."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import deformconv

PACKAGE = Path(deformconv.__file__).parent

CALL = """
import json
import numpy as np
import deformconv
from deformconv.ops.conv import cpu_kernels
from deformconv.runtime import cache
compiled = []
save = cache.DiskCache.save_overload
def count(self, sig, data):
    compiled.append(self._function.__name__)
    save(self, sig, data)
cache.DiskCache.save_overload = count
x, offset = np.ones((1, 2, 9), np.float32), np.full((1, 3, 9), 0.5, np.float32)
y = deformconv.deform_conv(x, offset, np.ones((3, 2, 3), np.float32), padding=1)
folder = cache.cache_folder()
print(json.dumps({
    "compiled": compiled, "sum": float(y.sum()), "package": deformconv.__file__,
    "folder": None if folder is None else str(folder), "files": len(cache.cached_files()),
}))
"""
KERNELS = {"forward"}
# A folder that whoever runs the tests has chosen is not the one that they are about.
SURROUNDINGS = {name: value for name, value in os.environ.items() if name != "DEFORMCONV_CACHE_DIR"}


def call(root: Path | None = None, prefix: list[str] | None = None, **environment: str) -> dict[str, object]:
    """Run CALL in a new process, with the copy of the package in `root` if one is given."""
    path = {"PYTHONPATH": str(root)} if root else {}
    command = [*(prefix or []), sys.executable, "-c", CALL]
    environment = SURROUNDINGS | path | environment
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert ran.returncode == 0, ran.stderr
    found: dict[str, object] = json.loads(ran.stdout)
    assert found["sum"] == pytest.approx(147)
    return found


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the package, without machine code, to be edited."""
    root = tmp_path / "copy"
    shutil.copytree(PACKAGE, root / "deformconv", ignore=shutil.ignore_patterns("__pycache__"))
    return root


def test_a_new_process_hits_and_an_edited_kernel_misses(copy: Path) -> None:
    first = call(copy)
    assert set(first["compiled"]) == KERNELS
    assert Path(str(first["folder"])).is_relative_to(copy / "deformconv" / "__pycache__")
    assert first["files"] == 1
    assert call(copy)["compiled"] == []

    # The function that changes is in another file than the kernel that has it inlined.
    rule = copy / "deformconv" / "sampling" / "corners.py"
    text = rule.read_text()
    assert "REACH = 2.0**30" in text
    rule.write_text(text.replace("REACH = 2.0**30", "REACH = 2.0**29"))
    edited = call(copy)
    assert set(edited["compiled"]) == KERNELS
    assert edited["folder"] != first["folder"]


def test_the_chosen_folder(tmp_path: Path) -> None:
    found = call(DEFORMCONV_CACHE_DIR=str(tmp_path / "chosen"))
    assert Path(str(found["folder"])).parent == tmp_path / "chosen"
    assert call(DEFORMCONV_CACHE_DIR=str(tmp_path / "chosen"))["compiled"] == []


def test_the_user_s_folder_where_the_package_s_cannot_be_written(copy: Path, tmp_path: Path) -> None:
    # A file where the folder would be: that holds for root too, whom permissions do not stop.
    (copy / "deformconv" / "__pycache__").write_text("")
    home = {"XDG_CACHE_HOME": str(tmp_path / "home"), "PYTHONDONTWRITEBYTECODE": "1"}
    found = call(copy, **home)
    if sys.platform == "linux":
        assert Path(str(found["folder"])).is_relative_to(tmp_path / "home" / "deformconv")
    assert call(copy, **home)["compiled"] == []


def test_nowhere_to_write(copy: Path, tmp_path: Path) -> None:
    (copy / "deformconv" / "__pycache__").write_text("")
    (tmp_path / "home").write_text("")
    found = call(copy, XDG_CACHE_HOME=str(tmp_path / "home"), PYTHONDONTWRITEBYTECODE="1")
    assert found["folder"] is None
    assert set(found["compiled"]) == KERNELS


def test_a_damaged_file_is_compiled_again(tmp_path: Path) -> None:
    found = call(DEFORMCONV_CACHE_DIR=str(tmp_path))
    for file in Path(str(found["folder"])).glob("forward-*.bin"):
        file.write_bytes(file.read_bytes()[:1000])
    assert call(DEFORMCONV_CACHE_DIR=str(tmp_path))["compiled"] == ["forward"]
    assert call(DEFORMCONV_CACHE_DIR=str(tmp_path))["compiled"] == []


def test_two_processes_starting_cold_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: call(DEFORMCONV_CACHE_DIR=str(tmp_path)), range(2)))
    assert call(DEFORMCONV_CACHE_DIR=str(tmp_path))["compiled"] == []
    assert not list(tmp_path.rglob("part-*"))


def test_a_filled_folder_is_read_beside_one_that_can_be_written(copy: Path, tmp_path: Path) -> None:
    """A container's image: one user filled the package's folder, another, with a home of its own, runs."""
    found = call(copy)
    folder = Path(str(found["folder"]))
    if os.name == "posix":
        assert all(file.stat().st_mode & stat.S_IROTH for file in folder.glob("*.bin"))
    for entry in folder.parent.iterdir():
        assert entry == folder  # nothing else is left behind
    ran = CALL.replace("compiled = []", "compiled = []\nwrite = cache._can_write\ncache._can_write = "
                       "lambda folder: 'copy' not in str(folder) and write(folder)")  # fmt: skip
    environment = SURROUNDINGS | {"PYTHONPATH": str(copy), "XDG_CACHE_HOME": str(tmp_path / "home")}
    output = subprocess.run([sys.executable, "-c", ran], env=environment, capture_output=True, text=True, check=True).stdout
    other = json.loads(output)
    assert other["compiled"] == []
    if sys.platform == "linux":
        assert Path(other["folder"]).is_relative_to(tmp_path / "home")


def test_the_notice_is_for_terminals_and_said_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from deformconv.runtime import cache

    notice = cache._Notice()
    notice()
    assert capsys.readouterr().err == ""  # captured output is no terminal
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    notice = cache._Notice()
    notice()
    notice()
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert message.startswith("deformconv: compiling kernels for this machine, once")
