"""Triton's kernels compiled for cards that are not here: what a launch asks for, and what its machine code has in it.

    with launches_for("sm_90") as asked:
        gpu.forward(spec, *tensors)  # on the CPU: nothing runs, and nobody reads the numbers
    builds = [built(launch) for launch in asked]

Block sizes, types and what Triton knows of an argument are those of the launch itself, as on the card. No driver is needed:
Triton's wheel has NVIDIA's assembler and disassembler, and the compiler for AMD's cards.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Bytes of shared memory that a program may take: CUDA's programming guide, table "Technical Specifications per Compute
# Capability"; AMD's, the local data share of a CDNA 3 compute unit.
SHARED_MEMORY = {
    "sm_75": 64 << 10, "sm_80": 163 << 10, "sm_86": 99 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10,
    "sm_120": 99 << 10, "gfx942": 64 << 10,
}  # fmt: skip
CARDS = tuple(SHARED_MEMORY)
# What changes the code of a kernel, of the options that a launch may give.
OPTIONS = ("num_warps", "num_ctas", "num_stages", "maxnreg", "enable_fp_fusion", "waves_per_eu", "matrix_instr_nonkdim")


def target_of(card: str) -> GPUTarget:
    if card.startswith("sm_"):
        return GPUTarget("cuda", int(card[3:]), 32)
    return GPUTarget("hip", card, 64)


class Absent:
    """A driver, as Triton's launches ask it, of a card that is not here."""

    def __init__(self, card: str) -> None:
        self.target = target_of(card)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> GPUTarget:
        return self.target  # a key under which Triton remembers what it has compiled

    def get_current_stream(self, device: Any) -> int:
        return 0


@dataclass(frozen=True)
class Launch:
    """A kernel with the types, constants and options of a launch."""

    card: str
    key: str  # equal keys are compiled once
    kernel: Any = field(compare=False)
    signature: Any = field(compare=False)
    constants: Any = field(compare=False)
    attributes: Any = field(compare=False)
    options: Any = field(compare=False)

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)

    def constant(self, name: str) -> Any:
        """The value of an argument that is compiled into the kernel."""
        return self.constants[(self.kernel.arg_names.index(name),)]

    def __str__(self) -> str:
        options = " ".join(f"{name}={value}" for name, value in self.options.items())
        constants = {self.kernel.arg_names[path[0]]: value for path, value in self.constants.items()}
        return f"{self.name} for {self.card} with {options} {constants}"


@contextmanager
def launches_for(card: str) -> Iterator[list[Launch]]:
    """Within it a launch is noted and does nothing."""
    asked: dict[Launch, None] = {}
    found: list[Launch] = []

    def note(fn: Any, compile: dict[str, Any], **others: Any) -> bool:
        options = json.loads(compile["specialization_data"])["options"]
        options = {name: options[name] for name in OPTIONS if options.get(name) is not None}
        launch = Launch(
            card, f"{fn.name} {compile['key']}", fn.jit_function, compile["signature"], compile["constants"],
            compile["configs"][0], options,
        )  # fmt: skip
        if launch not in asked:
            asked[launch] = None
            found.append(launch)
        return True  # Triton then leaves the launch

    active, hook = driver._active, knobs.runtime.jit_cache_hook
    driver.set_active(Absent(card))  # type: ignore[arg-type]
    knobs.runtime.jit_cache_hook = note  # type: ignore[assignment]
    try:
        yield found
    finally:
        knobs.runtime.jit_cache_hook = hook
        driver._active = active


@dataclass(frozen=True)
class Build:
    """A compiled kernel and what is in it."""

    launch: Launch
    registers: int  # of a thread
    stack: int  # bytes of a thread in memory, where registers did not suffice
    shared: int  # bytes of a program
    opcodes: Counter[str]  # of the machine code
    texts: dict[str, str]  # Triton's and the assembler's: "ttir", "ptx" or "amdgcn"

    def count(self, pattern: str) -> int:
        """How many instructions begin so."""
        return sum(number for opcode, number in self.opcodes.items() if re.match(pattern, opcode))

    @property
    def tensor_core(self) -> int:
        """Instructions that multiply matrices."""
        return self.count(r"HGMMA|HMMA|DMMA|UTC\w*MMA|v_mfma|v_wmma")

    @property
    def float_atomics(self) -> list[str]:
        """Instructions that add floating-point numbers to memory, in no order."""
        nvidia = re.findall(r"\b(?:atom|red)\.\S*\.(?:b?f16|f32|f64)\S*", self.texts.get("ptx", ""))
        amd = re.findall(r"\b(?:global|buffer|flat)_atomic_(?:pk_)?(?:add|fmin|fmax|cmpswap)\w*", self.texts.get("amdgcn", ""))
        return nvidia + [name for name in amd if not re.search(r"_add(?:_x2)?$", name)]

    @property
    def loads(self) -> Counter[int]:
        """How many instructions load so many bytes of global memory for a thread, with their copies in unrolled loops."""
        text = self.texts.get("ptx") or self.texts["amdgcn"]
        return Counter(size for line in text.splitlines() if (size := _loaded(line)))

    def wide_loads_due(self, argument: str) -> int:
        """How many instructions of 16 bytes the loads of matrices of one tensor take, of which each is written once."""
        threads = self.launch.options["num_warps"] * target_of(self.launch.card).warp_size
        made = _operations(self.texts["ttir"])
        due = 0
        for operation, names, types, _ in made.values():
            shape = re.match(r"tensor<(\d+)x(\d+)x!tt\.ptr<\w+?(\d+)>>", types)
            if operation == "tt.load" and shape is not None and _root(made, names[0]) == f"%{argument}":
                due += int(shape[1]) * int(shape[2]) * int(shape[3]) // 8 // (16 * threads)
        return due

    @property
    def narrow_products(self) -> set[str]:
        """Where a product of 32 bits, of two numbers known only when the kernel runs, becomes a part of an address."""
        return _narrow_products(self.texts["ttir"])


def _loaded(text: str) -> int:
    if match := re.search(r"\bld\.global(?:\.\w+)*?(?:\.v(\d))?\.[busf](\d+)\b", text):
        return int(match[1] or 1) * int(match[2]) // 8
    if match := re.search(r"\bcp\.async\.c[ag]\.shared\.global.*\], (0x\w+),", text):
        return int(match[1], 16)
    if match := re.match(r"\s*(?:global|buffer)_load_(?:dword(?:x(\d))?|b(\d+)|(u?short|u?byte|[us]\d+|d16)\w*)", text):
        return int(match[2]) // 8 if match[2] else 2 if match[3] else 4 * int(match[1] or 1)
    return 0


@cache
def built(launch: Launch) -> Build:
    """Compile what a launch asks for."""
    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    compiled = triton.compile(source, target=target_of(launch.card), options=launch.options)
    texts = {kind: compiled.asm[kind] for kind in ("ttir", "ptx", "amdgcn") if kind in compiled.asm}
    registers, stack, opcodes = _amd(texts["amdgcn"]) if "amdgcn" in texts else _nvidia(compiled.asm["cubin"])
    return Build(launch, registers, stack, compiled.metadata.shared, opcodes, texts)


def _nvidia(cubin: bytes) -> tuple[int, int, Counter[str]]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        usage = _run("cuobjdump", "--dump-resource-usage", file)
        code = _run("nvdisasm", "-c", file)
    (registers, stack, local), *others = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert not others, "one kernel, one function"
    opcodes = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", code, re.M)
    assert opcodes, code[:500]
    return int(registers), int(stack) + int(local), Counter(opcodes)


def _run(tool: str, *arguments: Any) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def _amd(code: str) -> tuple[int, int, Counter[str]]:
    found = {name: int(value) for name, value in re.findall(r"^\s+(?:- )?\.(\w+):\s+(\d+)$", code, re.M)}
    spilled = found["vgpr_spill_count"] + found["sgpr_spill_count"]
    opcodes = re.findall(r"^\t([vs]_\w+|(?:global|buffer|flat|ds|scratch)_\w+)", code, re.M)
    assert opcodes, code[:500]
    return found["vgpr_count"] + found.get("agpr_count", 0), found["private_segment_fixed_size"] + 4 * spilled, Counter(opcodes)


# Operations that hand on what an address is made of.
PASSED = r"arith\.(?:addi|subi|extsi|extui|select|index_cast)|tt\.(?:splat|broadcast|expand_dims|reshape|trans|unsplat)"


def _operations(ttir: str) -> dict[str, tuple[str, list[str], str, str]]:
    """What makes each value: the operation, the values that it takes, its types and its place in the source."""
    made: dict[str, tuple[str, list[str], str, str]] = {}
    for line in ttir.splitlines():
        for inner, outer in re.findall(r"(%\w+) = (%\w+)(?=[,)])", line):  # a loop's own name of what it begins with
            made[inner] = "tt.splat", [outer], "", ""
        match = re.match(r"\s*(%\w+)(?::\d+)? = ([\w.]+) (.*?)(?: loc\((#loc\w*)\))?$", line)
        if match is not None:
            name, operation, rest, location = match.groups()
            operands, _, types = rest.rpartition(" : ")
            made[name] = operation, re.findall(r"%\w+", operands), types, location or ""
    return made


def _root(made: dict[str, tuple[str, list[str], str, str]], name: str) -> str:
    """The argument of the kernel that a pointer comes from."""
    while name in made:
        name = made[name][1][0]
    return name


def _narrow_products(ttir: str) -> set[str]:
    where = dict(re.findall(r"^(#loc\w*) = loc\((.*)\)$", ttir, re.M))
    made = _operations(ttir)
    begins = [names[1] for operation, names, _, _ in made.values() if operation == "tt.addptr"]
    found, seen = set(), set()
    while begins:
        name = begins.pop()
        if name in seen or name not in made:
            continue
        seen.add(name)
        operation, names, types, location = made[name]
        constant = any(made.get(one, ("",))[0] == "arith.constant" for one in names)
        if operation == "arith.muli" and not types.endswith(("i64", "i64>")) and not constant:
            found.add(_line(where, location))
        if operation == "arith.muli" or re.fullmatch(PASSED, operation):
            begins += names
    return found


def _line(where: dict[str, str], location: str) -> str:
    """The line of source of an operation; of a function that was inlined, the innermost."""
    text = where[location]
    while match := re.search(r"#loc\w*", text):
        text = where[match[0]]
    file, number = re.findall(r'"([^"]+)":(\d+)', text)[0]
    return Path(file).read_text(encoding="utf-8").splitlines()[int(number) - 1].strip()


def too_large(builds: Iterable[Build], most: Mapping[str, tuple[int, int]]) -> list[str]:
    """What spills, or takes more than a kernel may: registers of a thread, and bytes of shared memory."""
    wrong = []
    for build in builds:
        registers, shared = most[build.launch.name]
        if not build.launch.card.startswith("sm_"):
            registers *= 2  # a thread of AMD's has 512
        elif "*fp64" in build.launch.signature.values():
            registers = min(255, 2 * registers)
        if build.stack or build.registers > registers or build.shared > min(shared, SHARED_MEMORY[build.launch.card]):
            wrong.append(f"{build.launch}: {build.registers} registers, {build.shared} bytes shared, {build.stack} spilled")
    return wrong


def narrow_in(builds: Iterable[Build], small: Collection[str]) -> dict[str, set[str]]:
    """Lines where addresses are multiplied in 32 bits, but for those that begin as `small` has it, and in which kernels."""
    found: dict[str, set[str]] = {}
    for build in builds:
        assert str(build.launch.constant("INDEX")) == "int64", build.launch
        for line in build.narrow_products:
            if not line.startswith(tuple(small)):
                found.setdefault(line, set()).add(build.launch.name)
    return found
