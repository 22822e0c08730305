"""What kernels call is linked into them, and optimised there and nowhere else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numba.core import codegen
from numba.core.compiler import Compiler

from deformconv.runtime.cache import device, in_order, kernel
from deformconv.runtime.linking import LinkedCompiler, compiler


@device
def twice(x):
    return x + x


@in_order
def sum_of(numbers):
    total = numbers.dtype.type(0)
    for number in numbers:
        total += twice(number)
    return total


def _kernel() -> Any:
    """Compiled anew, since it has caught something: what comes from disk has no code to look at."""
    caught = 1

    @kernel
    def both(numbers):
        return sum_of(numbers) + twice(caught)

    return both


def test_a_kernel_has_what_it_calls_inlined() -> None:
    both = _kernel()
    assert both(np.arange(5.0)) == 22
    (compiled,) = both.overloads.values()
    functions = [function.name for function in compiled.library.get_defined_functions()]
    assert any("both" in name for name in functions)
    assert not [name for name in functions if "twice" in name or "sum_of" in name]


@pytest.mark.parametrize("function", [twice, sum_of])
def test_what_it_calls_is_neither_optimised_nor_made_machine_code_of(function: Any) -> None:
    _kernel()(np.arange(5.0))
    for compiled in function.overloads.values():
        library, name = compiled.library, compiled.fndesc.llvm_func_name
        assert not any("Module passes" in timing.name for timing in library.recorded_timings)
        assert name in [defined.name for defined in library.get_defined_functions()]
        assert not library.codegen._engine.is_symbol_defined(name)
        assert library.get_pointer_to_function(name) == 0
    if function is sum_of:  # what it calls is still there beside it
        assert any("twice" in defined.name for defined in library.get_defined_functions())


NAMES = ("_library_class", "_add_module", "create_library", "set_env")


def test_a_numba_that_names_things_otherwise_compiles_in_its_own_way() -> None:
    assert compiler(codegen.AOTCodeLibrary, codegen.JITCPUCodegen) is LinkedCompiler
    assert compiler(object, codegen.JITCPUCodegen) is Compiler
    assert compiler(codegen.AOTCodeLibrary, type("Whole", (), dict.fromkeys(NAMES))) is LinkedCompiler
    for missing in NAMES:
        part = type("Part", (), dict.fromkeys(set(NAMES) - {missing}))
        assert compiler(codegen.AOTCodeLibrary, part) is Compiler, missing
