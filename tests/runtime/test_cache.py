"""Machine code on disk: a new process hits, an edited kernel misses, damage or a folder that is not writable harms nothing."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import deformconv
from deformconv.runtime import cache
from deformconv.runtime.threads import BEGUN, ENDED

PACKAGE = Path(deformconv.__file__).parent

# A call of the operator whose kernel is compiled most quickly.
CALL = """
import json
import numpy as np
import deformconv
from deformconv.runtime import cache
compiled = []
save = cache.DiskCache.save_overload
def count(self, sig, data):
    compiled.append(self._function.__name__)
    save(self, sig, data)
cache.DiskCache.save_overload = count
value, weights = np.ones((1, 12, 1, 4), np.float32), np.ones((1, 9, 1, 1, 1), np.float32)
y = deformconv.deform_attention(value, [(3, 4)], np.full((1, 9, 1, 1, 1, 2), 0.5, np.float32), weights)
folder = cache.cache_folder()
print(json.dumps({
    "compiled": compiled, "sum": float(y.sum()), "package": deformconv.__file__,
    "folder": None if folder is None else str(folder), "files": [str(file) for file in cache.cached_files()],
}))
"""
KERNELS = {"forward"}
# A folder that whoever runs the tests has chosen is not the one that they are about.
SURROUNDINGS = {name: value for name, value in os.environ.items() if name != "DEFORMCONV_CACHE_DIR"}


def call(root: Path | None = None, prefix: list[str] | None = None, **environment: str) -> dict[str, Any]:
    """Run CALL in a new process, with the copy of the package in `root` if one is given."""
    path = {"PYTHONPATH": str(root)} if root else {}
    command = [*(prefix or []), sys.executable, "-c", CALL]
    environment = SURROUNDINGS | path | environment
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert ran.returncode == 0, ran.stderr
    found: dict[str, Any] = json.loads(ran.stdout)
    assert found["sum"] == pytest.approx(36)
    return found


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the package, without machine code, to be edited."""
    root = tmp_path / "copy"
    shutil.copytree(PACKAGE, root / "deformconv", ignore=shutil.ignore_patterns("__pycache__"))
    return root


BITS = """
import hashlib
import numpy as np
import deformconv
random = np.random.default_rng(0)
shapes = [(3, 37, 41, 29), (3, 30, 20, 29), (53, 37, 5, 3), (53,)]
x, offset, weight, bias = (random.standard_normal(shape, np.float32) for shape in shapes)
window = {"stride": (2, 1), "padding": 1}
y = deformconv.deform_conv(x, offset, weight, bias, **window)
gradients = deformconv.deform_conv_backward(y, x, offset, weight, bias, **window)
for result in (y, *gradients[:4]):
    print(hashlib.sha256(result.tobytes()).hexdigest())
"""


@pytest.mark.slow
def test_who_compiles_and_who_loads_compute_the_same_bits(tmp_path: Path) -> None:
    environment = SURROUNDINGS | {"DEFORMCONV_CACHE_DIR": str(tmp_path)}
    first, second = (
        subprocess.run([sys.executable, "-c", BITS], env=environment, capture_output=True, text=True, timeout=600, check=True)
        for _ in range(2)
    )
    assert len(first.stdout.split()) == 5
    assert first.stdout == second.stdout


@pytest.mark.slow
def test_a_new_process_hits_and_an_edited_kernel_misses(copy: Path) -> None:
    first = call(copy)
    assert set(first["compiled"]) == KERNELS
    assert Path(str(first["folder"])).is_relative_to(copy / "deformconv" / "__pycache__")
    assert len(first["files"]) == 1
    assert call(copy)["compiled"] == []

    # Neither compiled nor imported by what is.
    with (copy / "deformconv" / "ops" / "attention" / "cpu.py").open("a") as file:
        file.write("EDITED = True\n")
    assert call(copy) == first | {"compiled": []}

    # The function that changes is in another file than the kernel that has it inlined.
    blocks = copy / "deformconv" / "runtime" / "blocks.py"
    text = blocks.read_text()
    assert "RUN = 64  #" in text
    blocks.write_text(text.replace("RUN = 64  #", "RUN = 32  #"))
    edited = call(copy)
    assert set(edited["compiled"]) == KERNELS
    assert len(edited["files"]) == 1 and edited["files"] != first["files"]


@pytest.mark.slow
def test_the_chosen_folder(tmp_path: Path) -> None:
    found = call(DEFORMCONV_CACHE_DIR=str(tmp_path / "chosen"))
    assert Path(str(found["folder"])) == tmp_path / "chosen"
    assert call(DEFORMCONV_CACHE_DIR=str(tmp_path / "chosen"))["compiled"] == []


@pytest.mark.slow
def test_the_user_s_folder_where_the_package_s_cannot_be_written(copy: Path, tmp_path: Path) -> None:
    # A file where the folder would be: that holds for root too, whom permissions do not stop.
    (copy / "deformconv" / "__pycache__").write_text("")
    home = {"XDG_CACHE_HOME": str(tmp_path / "home"), "PYTHONDONTWRITEBYTECODE": "1"}
    found = call(copy, **home)
    if sys.platform == "linux":
        assert Path(str(found["folder"])).is_relative_to(tmp_path / "home" / "deformconv")
    assert call(copy, **home)["compiled"] == []


@pytest.mark.slow
def test_nowhere_to_write(copy: Path, tmp_path: Path) -> None:
    (copy / "deformconv" / "__pycache__").write_text("")
    (tmp_path / "home").write_text("")
    found = call(copy, XDG_CACHE_HOME=str(tmp_path / "home"), PYTHONDONTWRITEBYTECODE="1")
    assert found["folder"] is None
    assert set(found["compiled"]) == KERNELS


@pytest.mark.slow
def test_two_processes_starting_cold_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: call(DEFORMCONV_CACHE_DIR=str(tmp_path)), range(2)))
    assert call(DEFORMCONV_CACHE_DIR=str(tmp_path))["compiled"] == []
    assert not list(tmp_path.rglob("part-*"))


@pytest.mark.slow
def test_a_filled_folder_is_read_beside_one_that_can_be_written(copy: Path, tmp_path: Path) -> None:
    """A container's image: one user filled the package's folder, another, with a home of its own, runs."""
    found = call(copy)
    folder = Path(str(found["folder"]))
    if os.name == "posix":
        assert all(Path(file).stat().st_mode & stat.S_IROTH for file in found["files"])
    assert [str(entry) for entry in folder.rglob("*") if entry.is_file()] == found["files"]  # nothing else is left behind
    ran = CALL.replace("compiled = []", "compiled = []\nwrite = cache._can_write\ncache._can_write = "
                       "lambda folder: 'copy' not in str(folder) and write(folder)")  # fmt: skip
    environment = SURROUNDINGS | {"PYTHONPATH": str(copy), "XDG_CACHE_HOME": str(tmp_path / "home")}
    output = subprocess.run([sys.executable, "-c", ran], env=environment, capture_output=True, text=True, check=True).stdout
    other = json.loads(output)
    assert other["compiled"] == []
    if sys.platform == "linux":
        assert Path(other["folder"]).is_relative_to(tmp_path / "home")


# What a kernel's file depends on


FOLDERS = """
from deformconv.ops.conv import cpu_kernels
from deformconv.runtime import launch
print(*(kernel._cache._folder for kernel in (cpu_kernels.forward, cpu_kernels.backward, cpu_kernels.collect, launch._launch)))
"""


def folders(root: Path) -> list[str]:
    """The folder of each kernel of the copy in `root`: forward, backward, collect, and what runs them on a team."""
    environment = SURROUNDINGS | {"PYTHONPATH": str(root)}
    output = subprocess.run([sys.executable, "-c", FOLDERS], env=environment, capture_output=True, text=True, check=True).stdout
    return output.split()


def test_a_file_depends_on_what_is_compiled_and_on_nothing_else(copy: Path) -> None:
    def edit(name: str, old: str = "", new: str = "\nEDITED = True\n") -> list[bool]:
        """Whether each kernel's folder is another one after the edit."""
        path = copy / "deformconv" / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1) if old else text + new)
        edited = folders(copy)
        path.write_text(text)
        return [one != other for one, other in zip(edited, first, strict=True)]

    first = folders(copy)
    assert first[0] == first[1] == first[2]
    # Constants from another module are compiled in: which counter says that a call's copies have begun, which that they ended.
    assert edit("runtime/threads.py", "BEGUN, ENDED, LEFT, YIELD = range", "ENDED, BEGUN, LEFT, YIELD = range") == [True] * 4
    assert edit("ops/conv/cpu_kernels.py") == [True, True, True, False]
    for name in (
        "ops/conv/cpu.py",
        "ops/conv/spec.py",
        "runtime/memory.py",
        "runtime/openmp.py",
        "__init__.py",
        "cli/doctor.py",
        "torch/registry.py",
    ):
        assert edit(name) == [False] * 4, name


GRAPH = """
import ast, json, sys, types
import deformconv
before = set(sys.modules)
from deformconv.ops.conv import cpu_kernels
imported = {name for name in set(sys.modules) - before if name.startswith("deformconv.")}
imported = {name for name in imported if not hasattr(sys.modules[name], "__path__")}  # a package's own file is empty
from deformconv.runtime import cache, launch

def assigned(module):
    assignments = [node for node in ast.parse(open(module.__file__).read()).body if isinstance(node, ast.Assign)]
    names = [name for node in assignments for name in ast.walk(node) if isinstance(name, ast.Name)]
    return {name.id for name in names if isinstance(name.ctx, ast.Store)}

ours = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "deformconv"}
constants = {name: assigned(module) for name, module in ours.items()}

def codes(code):
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from codes(constant)

def compiled_into(kernel):
    # Every module that a function of the kernel, or one that emits its machine code, takes a function or a constant from.
    found, seen, waiting = set(), set(), [kernel]
    while waiting:
        value = waiting.pop()
        value = getattr(value, "py_func", getattr(value, "_defn", getattr(value, "__func__", value)))
        if getattr(value, "__module__", None) not in ours or id(value) in seen:
            continue
        seen.add(id(value))
        found.add(value.__module__)
        if isinstance(value, type):
            waiting += vars(value).values()
        if not isinstance(value, types.FunctionType):
            continue
        waiting += [cell.cell_contents for cell in value.__closure__ or ()]
        for name in {name for code in codes(value.__code__) for name in code.co_names} & value.__globals__.keys():
            used = value.__globals__[name]
            waiting.append(used)
            if isinstance(used, types.ModuleType):
                found.add(used.__name__)
            found |= {other for other in ours if name in constants[other] and vars(ours[other]).get(name) is used}
    return sorted(name for name in found if name in ours)

kernels = {"forward": cpu_kernels.forward, "backward": cpu_kernels.backward, "collect": cpu_kernels.collect,
           "_launch": launch._launch}
needed = {name: compiled_into(kernel) for name, kernel in kernels.items()}
from pathlib import Path
digested = {
    name: sorted(cache.sources(kernel.py_func.__module__, Path(kernel.py_func.__code__.co_filename)))
    for name, kernel in kernels.items()
}
print(json.dumps({"imported": sorted(imported), "needed": needed, "digested": digested}))
"""


def test_all_that_is_compiled_and_all_that_is_imported_for_it_is_in_the_name() -> None:
    ran = subprocess.run([sys.executable, "-c", GRAPH], env=SURROUNDINGS, capture_output=True, text=True, check=True)
    found = json.loads(ran.stdout)
    for name, needed in found["needed"].items():
        assert set(needed) <= set(found["digested"][name]), name
    for name in ("forward", "backward", "collect"):
        assert set(found["imported"]) <= set(found["digested"][name]), name
    # The search itself finds constants, functions of other modules, and intrinsics.
    assert {"deformconv.runtime.threads", "deformconv.ops.conv.cpu_kernels"} < set(found["needed"]["forward"])
    assert len(found["needed"]["forward"]) >= 5
    assert {"deformconv.runtime.threads", "deformconv.runtime.launch"} < set(found["needed"]["_launch"])


IMPORTS = {
    "from deformconv.runtime.threads import NEXT": {"deformconv.runtime.threads"},
    "from deformconv.runtime.threads import (\n    NEXT,  # the (first)\n    STOP,\n)": {"deformconv.runtime.threads"},
    "from deformconv.runtime import threads, memory": {"deformconv.runtime.threads", "deformconv.runtime.memory"},
    "from deformconv import explain": {"deformconv"},
    "from deformconv.errors import *": {"deformconv.errors"},
    "import os, deformconv.errors as e; from deformconv.ops import window": {"deformconv.errors", "deformconv.ops.window"},
    "from deformconv.runtime.threads \\\n    import NEXT": {"deformconv.runtime.threads"},
    "from . import threads\nfrom ..errors import ShapeError": {"deformconv.runtime.threads", "deformconv.errors"},
    "try:\n    from deformconv.runtime import memory\nexcept ImportError:\n    import deformconv.errors": {
        "deformconv.runtime.memory",
        "deformconv.errors",
    },
    "if os.name: from . import memory": {"deformconv.runtime.memory"},
    "class Holder:\n    from deformconv.runtime.memory import arena": {"deformconv.runtime.memory"},
    "if TYPE_CHECKING:\n    from deformconv.errors import ShapeError\nelse:\n    from . import memory": {
        "deformconv.runtime.memory"
    },
    "if typing.TYPE_CHECKING:\n    import deformconv.errors": set(),
    "def late():\n    from deformconv.runtime import memory": set(),
    '"""\nfrom deformconv and elsewhere\n"""\nimport numpy\nfrom deformconv.errors import ShapeError': {"deformconv.errors"},
    "import numpy\nfrom numpy import linalg": set(),
}


@pytest.mark.parametrize("text", IMPORTS, ids=lambda text: text.splitlines()[0][:40])
def test_imports_are_found_in_the_text(text: str, tmp_path: Path) -> None:
    file = tmp_path / "made_up.py"
    file.write_text(f"{text}\n")
    ast.parse(text)
    assert cache._source("deformconv.runtime.made_up", file)[1] == IMPORTS[text]


def test_parsing_imports_alone_finds_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts): file for file in PACKAGE.rglob("*.py")}
    modules = {name: file for name, file in modules.items() if file.name != "__init__.py"}
    read = cache._source.__wrapped__
    quick = {name: read(name, file)[1] for name, file in modules.items()}
    monkeypatch.setattr(cache, "_ELSEWHERE", re.compile(""))  # each line asks for the whole text to be parsed
    whole = {name: read(name, file)[1] for name, file in modules.items()}
    assert sum(map(len, whole.values())) > 100
    # A program that is text in another one counts as well.
    assert {name for name in modules if quick[name] != whole[name]} <= {"deformconv.bench.startup"}
    assert all(quick[name] >= whole[name] for name in modules)


# Kernels elsewhere, and damaged files


KERNEL = """
import sys
from deformconv.runtime.cache import DiskCache, kernel
from deformconv.runtime.threads import ENDED
load, loaded = DiskCache.load_overload, []
def note(self, *arguments):
    loaded.append(load(self, *arguments) is not None)
    return load(self, *arguments) if loaded[-1] else None
DiskCache.load_overload = note
FACTOR = 7
@kernel
def scaled(x):
    return x * FACTOR + ENDED
def made(offset):
    @kernel
    def shifted(x):
        return x + offset
    return shifted
if __name__ == "__main__":
    found = scaled(6), made(int(sys.argv[1]))(1)
    print(*found, *loaded)
"""


class OwnKernel:
    """A program with a kernel of its own, and the folder that it is kept in."""

    def __init__(self, folder: Path) -> None:
        self.script, self.folder = folder / "own.py", folder / "kernels"
        self.script.write_text(KERNEL)
        self.warnings = ""

    def run(self, offset: int = 1, path: Path | None = None) -> str:
        environment = SURROUNDINGS | {"DEFORMCONV_CACHE_DIR": str(self.folder)}
        environment |= {"PYTHONPATH": str(path)} if path else {}
        ran = subprocess.run(
            [sys.executable, self.script, str(offset)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert ran.returncode == 0, (ran.returncode, ran.stderr)
        self.warnings = ran.stderr
        return ran.stdout.strip()

    @property
    def files(self) -> list[Path]:
        return sorted(file for file in self.folder.rglob("*") if file.is_file())


@pytest.fixture
def own(tmp_path: Path) -> OwnKernel:
    return OwnKernel(tmp_path)


def test_a_kernel_outside_the_package(own: OwnKernel, copy: Path) -> None:
    assert own.run(path=copy) == f"{42 + ENDED} 2 False False"
    assert own.run(path=copy) == f"{42 + ENDED} 2 True False"
    assert own.run(2, path=copy) == f"{42 + ENDED} 3 True False"  # its function caught a number that no file tells: not kept
    (kept,) = own.files
    assert kept.name.startswith("scaled-")
    own.script.write_text(KERNEL.replace("FACTOR = 7", "FACTOR = 8"))
    assert own.run(path=copy) == f"{48 + ENDED} 2 False False"
    counters = copy / "deformconv" / "runtime" / "threads.py"
    counters.write_text(counters.read_text().replace("BEGUN, ENDED, LEFT, YIELD = range", "ENDED, BEGUN, LEFT, YIELD = range"))
    assert own.run(path=copy) == f"{48 + BEGUN} 2 False False"
    assert len(own.files) == 3


def flipped(place: float) -> Callable[[bytes], bytes]:
    """A bit of another value, at a place from 0 to 1."""

    def damage(content: bytes) -> bytes:
        position = int(place * (len(content) - 1))
        return content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :]

    return damage


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "a bit of the checksum": flipped(0),
    "a bit near the beginning": lambda content: content[:34] + flipped(0)(content[34:]),
    "a bit in a quarter": flipped(0.25),
    "a bit in the middle": flipped(0.5),
    "the last bit": flipped(1),
    "cut short": lambda content: content[:1000],
    "cut short within the checksum": lambda content: content[:20],
    "one byte short": lambda content: content[:-1],
    "one byte more": lambda content: content + b"\0",
    "empty": lambda content: b"",
    "zeros": lambda content: bytes(len(content)),
    "another program's": lambda content: b"\x7fELF" + bytes(range(256)) * 9,
    "without a checksum": lambda content: content[32:],
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> OwnKernel:
    """A program whose kernel is compiled and kept."""
    made = OwnKernel(tmp_path_factory.mktemp("sound"))
    assert made.run() == f"{42 + ENDED} 2 False False" and made.warnings == ""
    return made


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_compiled_again(sound: OwnKernel, damage: Callable[[bytes], bytes]) -> None:
    (file,) = sound.files
    content = file.read_bytes()
    file.write_bytes(damage(content))
    assert file.read_bytes() != content
    assert sound.run() == f"{42 + ENDED} 2 False False"
    assert sound.warnings == f"{file} is damaged: the kernel is compiled again\n"
    assert sound.files == [file]
    assert cache._is_sound(file)


def test_what_was_compiled_again_is_loaded(sound: OwnKernel) -> None:
    (file,) = sound.files
    file.write_bytes(b"")
    sound.run()
    assert sound.run() == f"{42 + ENDED} 2 True False" and sound.warnings == ""


def test_another_kernel_s_file_is_no_kernel_s(own: OwnKernel) -> None:
    own.run()
    own.script.write_text(KERNEL.replace("FACTOR = 7", "FACTOR = 8"))
    own.run()
    one, other = own.files
    content = one.read_bytes()
    assert len({one.parent, other.parent}) == 2
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    assert own.run() == f"{48 + ENDED} 2 False False"
    assert "is damaged" in own.warnings


def test_any_flipped_bit_is_noticed(own: OwnKernel) -> None:
    own.run()
    (file,) = own.files
    sound = bytearray(file.read_bytes())
    assert cache._is_sound(file)
    for position in [*range(64), *range(64, len(sound), 101), len(sound) - 1]:
        sound[position] ^= 1 << position % 8
        file.write_bytes(sound)
        assert cache._is_sound(file) is False
        sound[position] ^= 1 << position % 8
    file.write_bytes(sound)
    assert cache._is_sound(file)
    file.unlink()
    assert cache._is_sound(file) is None


def test_damaged_machine_code_of_an_operator(copy: Path) -> None:
    found = call(copy)
    (file,) = map(Path, found["files"])
    file.write_bytes(flipped(0.5)(file.read_bytes()))
    assert call(copy)["compiled"] == ["forward"]
    assert call(copy) == found | {"compiled": []}
