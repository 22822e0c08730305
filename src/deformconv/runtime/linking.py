"""How Numba compiles a function that only kernels call: to code that is linked into theirs, and not to code that is run.

Numba optimises each function together with all that it calls, and makes machine code of it, before it compiles the caller: what
lies seven calls deep in a kernel is optimised eight times. Here that is left to the kernel, whose own compilation optimises and
inlines all that was linked into it. What is overridden are names of Numba's own: where one of them is not there, functions are
compiled as Numba compiles them.
"""

from __future__ import annotations

from typing import Any

from numba.core import codegen
from numba.core.compiler import Compiler

__all__ = ["COMPILER", "LinkedCompiler", "compiler"]

_Codegen: Any = getattr(codegen, "JITCPUCodegen", object)
_Library: Any = getattr(codegen, "AOTCodeLibrary", object)


class _LinkedLibrary(_Library):
    """A function's code, and that of the functions it calls. It has no address."""

    def _optimize_final_module(self) -> None:
        """Leave it to the kernel."""

    def get_pointer_to_function(self, name: str) -> int:
        return 0


class _LinkedCodegen(_Codegen):
    """The process' own code generator, except that its libraries do not become machine code."""

    _library_class = _LinkedLibrary

    def __init__(self, shared: Any) -> None:
        self.__dict__.update(vars(shared))

    def _add_module(self, module: Any) -> None:
        """Keep it from the execution engine."""

    def set_env(self, env_name: str, env: Any) -> None:
        """Write it nowhere: the variable for it has no address either, and kernels do not use Python's objects."""


class LinkedCompiler(Compiler):
    """Numba's compiler, except for the library that a function's code goes to."""

    def define_pipelines(self) -> Any:
        shared = self.state.targetctx.codegen()
        self.state.library = _LinkedCodegen(shared).create_library(self.state.func_id.func_qualname)
        return super().define_pipelines()


def compiler(of_library: Any, of_codegen: Any) -> type[Compiler]:
    """`LinkedCompiler` if Numba's classes for a library and for a code generator have all that it overrides."""
    names = [(of_library, "_optimize_final_module"), (of_codegen, "_library_class")]
    names += [(of_codegen, name) for name in ("_add_module", "create_library", "set_env")]
    return LinkedCompiler if all(hasattr(owner, name) for owner, name in names) else Compiler


COMPILER = compiler(_Library, _Codegen)
