"""Compile kernels with Numba and keep the machine code on disk.

Numba's own cache does not notice that a function *called by* a kernel changed, numbers its files in a way that two processes
starting cold can confuse, and refuses to import where no folder can be written. This one names every file after all that the
machine code depends on and puts a checksum before its content, so a file is right, absent or known to be damaged, and a folder
that cannot be written only costs a compilation.

Machine code depends on the source of the kernel's module, of the modules of this package that it imports, and of those that
they import in turn: the functions and constants that are compiled into a kernel come from there. A kernel may be defined in a
test's file too: then that file counts, with what it imports of this package. Not seen are imports within functions, constants
that a program replaces after the import, and other packages, but for the versions of Numba, llvmlite and NumPy.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import logging
import os
import pickle
import re
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator
from importlib.util import find_spec, resolve_name
from pathlib import Path
from typing import Any

import llvmlite
import numba
import numpy
from numba.core.caching import _Cache
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps

from deformconv.runtime.linking import COMPILER


def _load_numba_without_scipy() -> None:
    """Import Numba's array functions, but not SciPy's linear algebra, which takes longer than all the rest.

    Numba imports it only to know whether it is there, and again where a function needs it.
    """
    if "numba.np.arraymath" in sys.modules or find_spec("scipy") is None:
        return
    from numba.np import linalg

    look_for_it = linalg.ensure_blas
    linalg.ensure_blas = lambda: None
    try:
        from numba.np import arraymath
    finally:
        linalg.ensure_blas = look_for_it
    arraymath.ensure_blas = look_for_it


_load_numba_without_scipy()

_PACKAGE = Path(__file__).resolve().parent.parent
# Not "nnan" or "ninf": a kernel must see NaN and infinity. Not "arcp" or "afn": results would depend on the host.
FAST_MATH = {"contract", "reassoc", "nsz"}

_log = logging.getLogger("deformconv")

_AT_MARGIN = re.compile(r"^(?:from|import)\b[^\n(]*(?:\([^)]*\))?", re.MULTILINE)
_ELSEWHERE = re.compile(r"(?:^[ \t]+|[:;][ \t]*)(?:from|import)[ \t]")


def _body(text: str) -> list[ast.stmt]:
    """A module's statements, or only its imports if all stand at the margin, since those are parsed in a tenth of the time."""
    ours = (line for line in text.splitlines() if "deformconv" in line or "from ." in line)
    if not any(map(_ELSEWHERE.search, ours)):
        with contextlib.suppress(SyntaxError):  # a line of a docstring begins like an import
            return ast.parse("\n".join(_AT_MARGIN.findall(text))).body
    return ast.parse(text).body


def _statements(text: str) -> Iterator[ast.AST]:
    """What runs when a module is imported: no function's statements, nor what only type checkers read."""
    waiting: list[ast.AST] = list(_body(text))
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            waiting += node.orelse
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            waiting += ast.iter_child_nodes(node)


@functools.cache
def _file_of(module: str) -> Path | None:
    """The source file of a module of this package; None if it has none."""
    package, *parts = module.split(".")
    if package != __name__.partition(".")[0]:
        return None
    path = _PACKAGE.joinpath(*parts)
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


@functools.cache
def _source(module: str, file: Path) -> tuple[bytes, frozenset[str]]:
    """A module's source, and the modules of this package that it imports."""
    source = file.read_bytes()
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    imported: set[str] = set()
    for node in _statements(source.decode()):
        if isinstance(node, ast.Import):
            imported.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            name = resolve_name("." * node.level + (node.module or ""), package)
            submodules = (f"{name}.{alias.name}" for alias in node.names)
            imported.update(submodule if _file_of(submodule) else name for submodule in submodules)
    return source, frozenset(filter(_file_of, imported))


def sources(module: str, file: Path) -> dict[str, bytes]:
    """The source of a module in `file` and of all modules of this package that it imports, directly or not, by name."""
    found: dict[str, bytes] = {}
    waiting = {module: file, __name__: Path(__file__)}
    while waiting:
        name, path = waiting.popitem()
        found[name], imported = _source(name, path)
        waiting |= {other: source for other in imported - found.keys() if (source := _file_of(other))}
    return found


@functools.cache
def _folder_of(module: str, file: Path) -> str:
    """The folder for a module's kernels, named after all that they depend on apart from their signature and the host."""
    seen = hashlib.sha256()
    for version in (sys.version, numba.__version__, llvmlite.__version__, numpy.__version__):
        seen.update(version.encode() + b"\0")
    for name, source in sorted(sources(module, file).items()):
        seen.update(f"{name} {len(source)}\0".encode() + source)
    return f"{module}-{seen.hexdigest()[:16]}"


def _user_cache() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def _can_write(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


@functools.cache
def _roots() -> tuple[Path, ...]:
    """Where machine code may lie: `DEFORMCONV_CACHE_DIR`, or the package's own folder and the user's."""
    chosen = os.environ.get("DEFORMCONV_CACHE_DIR")
    if chosen:
        return (Path(chosen),)
    # Never a shared temporary folder: what is loaded from here is executed.
    roots = [_PACKAGE / "__pycache__" / "kernels"]
    with contextlib.suppress(RuntimeError):  # no home folder
        roots.append(_user_cache() / "deformconv")
    return tuple(roots)


@functools.cache
def cache_folder() -> Path | None:
    """The first of the folders that can be written, to which new machine code goes; None if there is none."""
    return next((root for root in _roots() if _can_write(root)), None)


def _checksum(file: Path, content: bytes) -> bytes:
    """Of a file's content and of its name: a copy of another kernel's file is not sound either."""
    return hashlib.sha256(f"{file.parent.name}/{file.name}\0".encode() + content).digest()


def _content(file: Path) -> bytes | None:
    """What follows a file's checksum; None if that is not the content's. A file that cannot be read raises OSError."""
    whole = file.read_bytes()
    checksum, content = whole[:32], whole[32:]
    return content if checksum == _checksum(file, content) else None


def _announce() -> None:
    if sys.stderr is not None and sys.stderr.isatty():
        print(
            "deformconv: compiling kernels for this machine, once (about half a minute) ...",
            file=sys.stderr,
            flush=True,
        )


class _Notice:
    """Says once per process that a compilation has begun; `warmup` replaces it with its own."""

    def __init__(self) -> None:
        self.announce: Callable[[], None] | None = _announce

    def __call__(self) -> None:
        announce, self.announce = self.announce, None
        if announce is not None:
            announce()


notice = _Notice()


class DiskCache(_Cache):
    """One file per kernel, signature and host."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._enabled = True
        file = Path(function.__code__.co_filename)
        # No file says what a function has caught from another one, or what was typed at a prompt.
        is_kept = function.__closure__ is None and file.is_file()
        self._folder = _folder_of(function.__module__, file) if is_kept else None

    @property
    def cache_path(self) -> str:
        return str(cache_folder())

    def _file(self, root: Path, signature: Any, codegen: Any) -> Path:
        function = self._function
        line = function.__code__.co_firstlineno  # for two functions of one name
        key = repr((function.__qualname__, line, signature, codegen.magic_tuple()))
        return root / str(self._folder) / f"{function.__name__}-{hashlib.sha256(key.encode()).hexdigest()[:20]}.bin"

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        target_context.refresh()
        # All of them: a container's image has the package's folder filled, and another user may not write there.
        for root in _roots() if self._enabled and self._folder else ():
            file = self._file(root, sig, target_context.codegen())
            try:
                content = _content(file)
            except OSError:
                continue  # absent
            if content is not None:
                return CompileResult._rebuild(target_context, *pickle.loads(content))
            _log.warning("%s is damaged: the kernel is compiled again", file)
        notice()
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        root = cache_folder() if self._enabled and self._folder else None
        if root is None:
            return
        file, content = self._file(root, sig, data.codegen), dumps(data._reduce())
        # The disk may be full by now, or read-only: the kernel still runs, and is compiled again next time.
        with contextlib.suppress(OSError):
            file.parent.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory(dir=file.parent, prefix="part-") as own:
                part = Path(own) / file.name
                part.write_bytes(_checksum(file, content) + content)
                os.replace(part, file)

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def flush(self) -> None:
        """Nothing to forget: a file's name says all that it depends on."""


# How every kernel is compiled. It allocates nothing, and its caller holds the arrays: so references to them are not counted.
OPTIONS = {"nogil": True, "error_model": "numpy", "fastmath": FAST_MATH, "no_cfunc_wrapper": True, "_nrt": False}


def device(function: Callable[..., Any]) -> Any:
    """Compile a function that kernels call."""
    return _compiled(function, FAST_MATH)


def in_order(function: Callable[..., Any]) -> Any:
    """Compile a function that kernels call, and whose sums are added in the order in which they are written.

    Elsewhere the compiler may change the order, and the process that compiles a kernel took another one here than those that
    loaded it.
    """
    return _compiled(function, FAST_MATH - {"reassoc"})


def as_written(function: Callable[..., Any]) -> Any:
    """Compile a function that kernels call, and whose operations are rounded one by one.

    Elsewhere the compiler may fuse a product with a sum, and does it for vectors and for the numbers after the last vector in
    different ways: a number's result would depend on how many there are beside it.
    """
    return _compiled(function, False)


def _compiled(function: Callable[..., Any], fast_math: set[str] | bool) -> Any:
    options = OPTIONS | {"fastmath": fast_math}
    return numba.njit(no_cpython_wrapper=True, pipeline_class=COMPILER, **options)(function)


def kernel(function: Callable[..., Any]) -> Any:
    """Compile a function that Python calls, once per machine; it runs without the GIL."""
    dispatcher = numba.njit(**OPTIONS)(function)
    dispatcher._cache = DiskCache(function)
    return dispatcher


def _files() -> Iterator[Path]:
    """The files that hold machine code of this version, or should."""
    for folder in (folder for root in _roots() for folder in root.glob("*-*")):
        module = folder.name.rpartition("-")[0]
        file = _file_of(module)
        if file is not None and folder.name == _folder_of(module, file):
            yield from folder.glob("*.bin")


def _is_sound(file: Path) -> bool | None:
    """Whether a file's content is as it was written; None if nobody can tell."""
    try:
        return _content(file) is not None
    except OSError:
        return None


def cached_files() -> Collection[Path]:
    """The files of machine code that this version has on disk, without the damaged ones."""
    return sorted(filter(_is_sound, _files()))


def damaged_files() -> Collection[Path]:
    """The files of this version whose content has changed since it was written."""
    return sorted(file for file in _files() if _is_sound(file) is False)
