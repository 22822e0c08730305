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
import os
import pickle
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from importlib.util import find_spec, resolve_name
from pathlib import Path
from typing import Any

import llvmlite
import numba
import numpy
from numba.core.caching import _Cache
from numba.core.compiler import CompileResult
from numba.core.registry import cpu_target
from numba.core.serialize import dumps

from deformconv.runtime import target
from deformconv.runtime.linking import COMPILER
from deformconv.runtime.notices import Kind, kind_of, log, must_not_compile, notice, tell, warn_that_nothing_is_kept


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
# Before a kernel's module asks how wide vectors are, or Numba for its code generator.
# The level that kernels are compiled for; None for this processor.
LEVEL = target.use(target.chosen())

_PACKAGE = Path(__file__).resolve().parent.parent
# Not "nnan" or "ninf": a kernel must see NaN and infinity. Not "arcp" or "afn": results would depend on the host.
FAST_MATH = {"contract", "reassoc", "nsz"}

# Options of `deformconv warmup`, by the folders of their kernels.
_OPTIONS = {"roi_pool": "rois", "attention": "attention", "aggregate": "aggregate"}

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


def _processor(codegen: Any) -> str:
    """What machine code is made for, as a part of a file's name: LLVM's name of a processor, and a digest of what it has."""
    _, name, features = codegen.magic_tuple()
    return f"{re.sub(r'[^A-Za-z0-9_+-]', '_', name)}.{hashlib.sha256(features.encode()).hexdigest()[:6]}"


def processors() -> Counter[str]:
    """How many kernels of this version there are on disk, by processor, as `own_processor` names it."""
    return Counter(file.name.partition("-")[2].rpartition("-")[0] for file in cached_files())


def own_processor() -> str:
    """What this process makes machine code for."""
    return _processor(cpu_target.target_context.codegen())


def _not_in_cache(kernel: Kind, codegen: Any) -> Exception:
    from deformconv.errors import BackendError  # here, so that no kernel depends on that file

    options = [f" --dtype {kernel.dtype}"] * (kernel.dtype is not None) + [f" --rank {kernel.rank}"] * (kernel.rank is not None)
    options += [f" --{option}" for folder, option in _OPTIONS.items() if kernel.name.startswith(f"{folder}.")]
    options += [f" --cpu {LEVEL}"] * (LEVEL is not None)
    others = [tag.rpartition(".")[0] for tag in processors()]
    others = [name for name in others if name != LEVEL and name in target.levels() and not target.lacks(name)]
    also = [
        f" Or set {target.VARIABLE}={name}: there are kernels for that level, and this processor can run it." for name in others
    ]
    return BackendError(
        f"{kernel} for the processor {codegen.magic_tuple()[1]} is not on disk, and DEFORMCONV_REQUIRE_CACHE forbids to compile"
        f" it. Looked in {', '.join(map(str, _roots()))}. Run `deformconv warmup{''.join(options)}` with the same"
        f" DEFORMCONV_CACHE_DIR, Python, NumPy and Numba.{''.join(also[:1])}"
    )


class DiskCache(_Cache):
    """One file per kernel, signature and processor."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._enabled = True
        self._began = 0.0
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
        digest = hashlib.sha256(key.encode()).hexdigest()[:20]
        return root / str(self._folder) / f"{function.__name__}-{_processor(codegen)}-{digest}.bin"

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
                result = CompileResult._rebuild(target_context, *pickle.loads(content))
                tell("loaded", kind_of(self._function, sig))
                return result
            log.warning("%s is damaged: the kernel is compiled again", file)
        self._begin(sig, target_context.codegen())
        return None

    def _begin(self, signature: Any, codegen: Any) -> None:
        """Say that a kernel is compiled now, or that it must not be."""
        kernel = kind_of(self._function, signature)
        if must_not_compile():
            raise _not_in_cache(kernel, codegen)
        notice()
        log.info("compiling %s for %s ...", kernel, codegen.magic_tuple()[1])
        tell("compiling", kernel)
        self._began = time.perf_counter()

    def save_overload(self, sig: Any, data: Any) -> None:
        kernel, seconds = kind_of(self._function, sig), time.perf_counter() - self._began
        root = cache_folder() if self._enabled and self._folder else None
        if root is None and self._folder:
            warn_that_nothing_is_kept("no folder can be written", _roots())
        kept = root is not None and self._keep(root, sig, data)
        log.info("compiled %s in %.1f s, %s", kernel, seconds, f"kept in {root}" if kept else "not kept on disk")
        tell("compiled", kernel)

    def _keep(self, root: Path, signature: Any, data: Any) -> bool:
        """Write a kernel to disk; whether that succeeded."""
        file, content = self._file(root, signature, data.codegen), dumps(data._reduce())
        try:
            file.parent.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory(dir=file.parent, prefix="part-") as own:
                part = Path(own) / file.name
                part.write_bytes(_checksum(file, content) + content)
                os.replace(part, file)
        except OSError as error:
            # The disk is full by now, or read-only: the kernel still runs, and is compiled again next time.
            warn_that_nothing_is_kept(f"{file.parent}: {error.strerror}", _roots())
            return False
        return True

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
