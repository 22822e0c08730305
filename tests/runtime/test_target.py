"""Machine code for a named level of processors: found again on another one, and refused where it could not run."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from deformconv.errors import BackendError
from deformconv.runtime import target

on_x86_64 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="levels of x86-64")
LEVEL = "x86-64-v2"  # every x86 processor of the last fifteen years runs it

# In front of a program: the processor that it runs on says that it is another one.
ELSEWHERE = """
import llvmlite.binding as llvm
has = llvm.get_host_cpu_features()
class Features(dict):
    flatten = type(has).flatten
llvm.get_host_cpu_name = lambda: "ivybridge"
llvm.get_host_cpu_features = lambda: Features({name: on and name != "avx2" for name, on in has.items()})
"""
CALL = """
import numpy as np
import deformconv
from deformconv.runtime import cache, simd
x, offset = np.ones((1, 2, 9), np.float32), np.full((1, 3, 9), 0.5, np.float32)
y = deformconv.deform_conv(x, offset, np.ones((3, 2, 3), np.float32), padding=1)
print(y.sum(), simd.VECTOR_BYTES, sorted(cache.processors().values()))
"""
OWN = """
import sys
from deformconv.runtime.cache import kernel
@kernel
def doubled(x):
    return 2 * x
if __name__ == "__main__":
    print(doubled(21))
"""


def run(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "DEFORMCONV_CACHE_DIR": str(folder), **environment}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def missing(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Have the processor lack some features."""
    present = target._present()
    monkeypatch.setattr(target, "_present", lambda: present - set(names))


@on_x86_64
@pytest.mark.slow
@pytest.mark.parametrize("level", ["x86-64-v2", "x86-64-v3", "x86-64-v4"])
def test_what_is_compiled_for_a_level_is_loaded_on_another_processor(level: str, tmp_path: Path) -> None:
    if target.lacks(level):
        pytest.skip(f"this processor lacks {target.lacks(level)}")
    width = {"x86-64-v2": 16, "x86-64-v3": 32, "x86-64-v4": 64}[level]
    first = run(CALL, tmp_path, DEFORMCONV_CPU=level)
    assert first.stdout == f"147.0 {width} [1]\n", first.stderr
    # Its name and the rest of what it has are different ones there.
    other = ELSEWHERE.replace("ivybridge", "znver9").replace('name != "avx2"', 'name not in ("gfni", "vaes", "adx")')
    second = run(other + CALL, tmp_path, DEFORMCONV_CPU=level, DEFORMCONV_REQUIRE_CACHE="1")
    assert second.stdout == first.stdout, second.stderr


@on_x86_64
def test_a_level_that_a_processor_lacks_is_refused_before_anything_runs(tmp_path: Path) -> None:
    refused = run(ELSEWHERE + CALL, tmp_path, DEFORMCONV_CPU="x86-64-v3")
    assert refused.returncode == 1 and refused.stdout == ""
    message = refused.stderr.splitlines()[-1]
    assert message.startswith("deformconv.errors.BackendError: DEFORMCONV_CPU is 'x86-64-v3', and this processor, ")
    assert message.endswith(
        "lacks avx2, which that code may use: choose x86-64-v2, the highest level that it can run, or native"
    )


@on_x86_64
def test_levels_and_their_features(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(target.levels()) == ["x86-64-v2", "x86-64-v3", "x86-64-v4"]
    everything = frozenset(need for level in target.levels().values() for need in level.needs)
    monkeypatch.setattr(target, "_present", lambda: everything)  # whatever this processor has
    missing(monkeypatch, "avx512vl", "avx512f")
    assert target.lacks("x86-64-v4") == ["avx512f", "avx512vl"]
    assert target.highest() != "x86-64-v4"
    missing(monkeypatch, "sse4.2")
    assert target.highest() is None
    monkeypatch.setenv("DEFORMCONV_CPU", "x86-64-v2")
    with pytest.raises(BackendError, match=r"lacks sse4\.2, which that code may use: choose native$"):
        target.chosen()


# What LLVM itself knows of a level, by which functions it may inline into another one: those that need nothing that it lacks.
@on_x86_64
@pytest.mark.parametrize("level", ["x86-64-v2", "x86-64-v3", "x86-64-v4"])
def test_a_level_has_what_llvm_uses_for_it_and_no_more(level: str) -> None:
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(cpu="x86-64")
    if not hasattr(llvm, "create_pass_builder"):
        pytest.skip("an llvmlite without LLVM's new passes")

    def has(feature: str) -> bool:
        module = llvm.parse_assembly(f"""
            target triple = "{llvm.get_default_triple()}"
            define internal i32 @callee(i32 %x) "target-cpu"="x86-64" "target-features"="+{feature}" {{
                %y = mul i32 %x, 3
                ret i32 %y
            }}
            define i32 @caller(i32 %x) "target-cpu"="{level}" {{
                %y = call i32 @callee(i32 %x)
                ret i32 %y
            }}""")
        passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=2))
        passes.getModulePassManager().run(module, passes)
        return re.search(r"\bcall\b", str(module)) is None

    known = {name for name in llvm.get_host_cpu_features() if not name.startswith(("64bit", "prefer"))}
    found = {name for name in known if has(name)}
    every_x86_64 = {"cmov", "cx8", "fxsr", "mmx", "sse", "sse2"}
    assert found - every_x86_64 - {"crc32"} == set(target.levels()[level].features)  # crc32 goes with sse4.2


def test_native_and_nothing_are_this_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("", "native"):
        monkeypatch.setenv("DEFORMCONV_CPU", name)
        assert target.chosen() is None
    monkeypatch.delenv("DEFORMCONV_CPU")
    assert target.chosen() is None and target.use(None) is None


def test_an_unknown_name_is_answered_with_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEFORMCONV_CPU", "pentium")
    expected = f"DEFORMCONV_CPU is 'pentium'; expected a name for processors like this one ({platform.machine()}): "
    with pytest.raises(BackendError, match=re.escape(expected) + ".*native$"):
        target.chosen()


@on_x86_64
def test_a_level_that_comes_too_late_is_a_warning(tmp_path: Path) -> None:
    early = 'import numba\n@numba.njit("f8(f8)")\ndef before(x): return x\n'
    (tmp_path / "own.py").write_text(early + OWN)

    def script(**environment: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "DEFORMCONV_CACHE_DIR": str(tmp_path), "DEFORMCONV_CPU": LEVEL, **environment}
        program = [sys.executable, tmp_path / "own.py"]
        return subprocess.run(program, env=environment, capture_output=True, text=True, timeout=300, check=False)

    late = script()
    assert (late.returncode, late.stdout) == (0, "42\n"), late.stderr
    assert late.stderr.startswith(f"DEFORMCONV_CPU={LEVEL} comes too late: ") and late.stderr.count("\n") == 1
    (kept,) = tmp_path.rglob("*.bin")
    assert LEVEL not in kept.name
    # What the warning advises helps.
    advised = dict(re.findall(r"(NUMBA_CPU_\w+)=(\S+)", late.stderr))
    assert set(advised) == {"NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES"}
    heeded = script(**advised)
    assert (heeded.stdout, heeded.stderr) == ("42\n", "")
    assert any(LEVEL in file.name for file in tmp_path.rglob("*.bin"))


GRAVITON_2 = (
    "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp ssbs"  # a Neoverse N1
)


def test_levels_of_aarch64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(target, "arm_features", lambda: frozenset(GRAVITON_2.split()))
    assert target.lacks("neoverse-n1") == target.lacks("cortex-a76") == target.lacks("generic") == []
    assert "sve" in target.lacks("neoverse-v1")
    assert target.highest() == "neoverse-n1"


def test_other_machines_have_no_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert target.levels() == {}
    assert target.highest() is None
