"""What takes a process of its own: how it ends, what it may load, and the machine that it finds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

ARRAYS = """
import sys, threading, time
import jax, jax.numpy as jnp, numpy as np
import deformconv
from deformconv.jax import deform_conv

def numbers(*shape, seed):
    return np.random.default_rng(seed).standard_normal(shape).astype("f4")

x, offset = numbers(2, 16, 40, 40, seed=0), numbers(2, 18, 40, 40, seed=1)
weight, bias, mask = numbers(16, 16, 3, 3, seed=2) / 12, numbers(16, seed=3), numbers(2, 9, 40, 40, seed=4)
arguments = x, offset, weight, bias, mask
expected = deformconv.deform_conv(x, offset, weight, bias, padding=1, mask=mask)

def conv(x, offset, weight, bias, mask):
    return deform_conv(x, offset, weight, bias, padding=1, mask=mask)

def loss(*arguments):
    return (conv(*arguments) ** 2).sum()

def gradients(*arguments):
    return jax.grad(loss, argnums=range(5))(*arguments)
"""


def python(script, *arguments, arrays=True, **environment):
    """What a process of its own writes."""
    found = subprocess.run(
        [sys.executable, "-c", ARRAYS + script if arrays else script, *map(str, arguments)],
        capture_output=True, text=True, timeout=240, cwd=ROOT, env=os.environ | {"PYTHONUNBUFFERED": "1"} | environment,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-3000:]
    return found.stdout


# A process that ends


QUEUED = """
on_one_processor = sys.argv[1] == "1"
if on_one_processor:
    import os
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
dense = jnp.ones((600, 600)) / 600

@jax.jit
def step(x):
    # Between two calls XLA has work of its own, so that for a while it is in neither.
    between = dense
    for _ in range(40):
        between = between @ dense
    y = conv(x, offset, weight, bias, mask) + between[0, 0]
    return conv(y, offset, weight, bias, mask) / 100

step(x).block_until_ready()

def queue(number=6):
    y = jnp.asarray(x)
    for _ in range(number):
        y = step(y)
        conv(y, offset, weight, bias, mask)
    return y
"""
ENDINGS = {
    "result dropped": "queue()",
    "result kept": "kept = queue()",
    "from another thread": "thread = threading.Thread(target=queue); thread.start(); thread.join()",
    "after an exception": "queue()\nraise SystemExit(0)",
    "while a gradient is computed": "kept = jax.jit(gradients)(*arguments); jax.jit(gradients)(*arguments)",
    "within a function that another ending calls": "import atexit\natexit.register(lambda: queue())",
}


@pytest.mark.parametrize("name", ENDINGS)
def test_a_process_ends_though_work_is_queued(name):
    assert "queues" in python(f"{QUEUED}\nprint('queues')\n{ENDINGS[name]}", "all")


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not say where a process runs")
@pytest.mark.parametrize("name", ["result dropped", "result kept"])
def test_a_process_on_one_processor_ends(name):
    assert "queues" in python(f"{QUEUED}\nprint('queues')\n{ENDINGS[name]}", 1)


def test_a_process_ends_whose_daemon_thread_goes_on():
    """Within JAX, Python may end such a thread, and so the process, by an abort, with or without calls of ours."""
    goes_on = "threading.Thread(target=lambda: [queue() for _ in range(10**6)], daemon=True).start()\ntime.sleep(0.3)"
    script = f"{ARRAYS}{QUEUED}\n{goes_on}\nprint('ends', flush=True)"
    found = subprocess.run([sys.executable, "-c", script, "all"], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert found.stdout == "ends\n"
    assert found.returncode in (0, -getattr(signal, "SIGABRT", 0)), found.stderr[-3000:]


def test_an_exception_s_traceback_is_what_a_process_ends_with():
    found = subprocess.run(
        [sys.executable, "-c", ARRAYS + QUEUED + "queue()\nraise ZeroDivisionError('a program of its own')", "all"],
        capture_output=True, text=True, timeout=240, cwd=ROOT,
    )  # fmt: skip
    assert found.returncode == 1
    assert found.stderr.rstrip().endswith("ZeroDivisionError: a program of its own")


def test_results_that_somebody_waits_for_at_the_end_are_computed():
    """By a function that was registered first, and so is called last."""
    script = """
import atexit, numpy as np
kept = []
atexit.register(lambda: print("right" if np.isfinite(np.asarray(kept[0])).all() else "wrong"))
"""
    assert "right" in python(script + ARRAYS + QUEUED + "kept.append(queue())", "all", arrays=False)


def test_importing_starts_nothing():
    """No backend of JAX, which may take a GPU's memory, and no Numba; nor at the process' end."""
    script = """
import sys
import deformconv.jax
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
import atexit
assert "numba" not in sys.modules, "Numba"
deformconv.jax.ffi._settle()
assert not xla_bridge.backends_are_initialized()
"""
    python(script, arrays=False)


# Ctrl-C


INTERRUPTED = """
from deformconv.ops.conv import cpu

plan, function = cpu._forward_plan, jax.jit(conv)
function(*arguments).block_until_ready()

def interrupted(*arguments):  # as a signal's handler is called in a kernel's pauses
    raise KeyboardInterrupt

seen = []
for call in (function, conv):
    cpu._forward_plan = interrupted
    try:
        try:
            call(*arguments).block_until_ready()
        except Exception as error:  # by which a program goes on, that knows nothing of JAX's errors
            seen.append("KeyboardInterrupt" in str(error))
        for _ in range(500):
            time.sleep(0.01)
    except KeyboardInterrupt:
        seen.append("interrupted")
    cpu._forward_plan = plan
    np.testing.assert_array_equal(call(*arguments), expected)
print(seen)
"""


def test_ctrl_c_in_a_kernel_is_ctrl_c_to_the_program():
    assert python(INTERRUPTED) == f"{[True, 'interrupted'] * 2}\n"


@pytest.mark.skipif(sys.platform == "win32", reason="a process is interrupted by a signal")
@pytest.mark.parametrize("call", ["jax.jit(conv)", "jax.jit(gradients)", "conv"])
def test_ctrl_c_ends_a_program(call):
    script = ARRAYS + f"call = {call}\nwhile True:\n    jax.block_until_ready(call(*arguments))\n    print('.', flush=True)\n"
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        assert process.stdout.readline() == ".\n"
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode in (-signal.SIGINT, 128 + signal.SIGINT, 1)
    assert "KeyboardInterrupt" in errors


# What another process has compiled


def test_an_exported_program_runs_in_another_process(tmp_path):
    pytest.importorskip("flatbuffers")
    export = """
from jax import export
checks = [export.DisabledSafetyCheck.custom_call(name) for name in ("deformconv_forward", "deformconv_backward")]
for name, function in {"conv": conv, "gradients": gradients}.items():
    exported = export.export(jax.jit(function), disabled_checks=checks)(*arguments)
    open(f"{sys.argv[1]}/{name}", "wb").write(exported.serialize())
np.savez(f"{sys.argv[1]}/arrays", *arguments)
np.savez(f"{sys.argv[1]}/results", conv(*arguments), *gradients(*arguments))
"""
    python(export, tmp_path)
    load = """
import sys
import jax, numpy as np
from jax import export
import deformconv.jax

arguments, expected = (list(np.load(f"{sys.argv[1]}/{name}.npz").values()) for name in ("arrays", "results"))
loaded = [export.deserialize(bytearray(open(f"{sys.argv[1]}/{name}", "rb").read())) for name in ("conv", "gradients")]
output, gradients = (exported.call(*arguments) for exported in loaded)
for found, right in zip([output, *gradients], expected):
    np.testing.assert_array_equal(found, right)
print("equal")
"""
    assert python(load, tmp_path, arrays=False) == "equal\n"
    without = load.replace("import deformconv.jax\n", "")
    found = subprocess.run(
        [sys.executable, "-c", without, str(tmp_path)], capture_output=True, text=True, timeout=240, cwd=ROOT
    )  # fmt: skip
    assert found.returncode == 1
    assert "deformconv_forward" in found.stderr


def test_the_compile_cache_serves_another_process(tmp_path):
    script = """
found = jax.jit(conv)(*arguments), jax.jit(gradients)(*arguments)
np.testing.assert_array_equal(found[0], expected)
print(float(sum(abs(g).sum() for g in found[1])))
"""
    environment = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    first = python(script, **environment)
    kept = sorted(path.name for path in tmp_path.rglob("*-cache"))
    assert any("conv" in name for name in kept)
    assert python(script, **environment) == first
    assert sorted(path.name for path in tmp_path.rglob("*-cache")) == kept  # nothing was compiled anew


def test_a_compiled_program_that_was_saved_runs_in_another_process(tmp_path):
    """It is not lowered there, so nothing but the import can have registered what it calls."""
    save = """
import pickle
from jax.experimental import serialize_executable
compiled = jax.jit(conv).lower(*arguments).compile()
pickle.dump((serialize_executable.serialize(compiled), arguments, expected), open(sys.argv[1], "wb"))
"""
    load = """
import pickle, sys
import numpy as np
import deformconv.jax
from jax.experimental import serialize_executable
saved, arguments, expected = pickle.load(open(sys.argv[1], "rb"))
np.testing.assert_array_equal(serialize_executable.deserialize_and_load(*saved)(*arguments), expected)
print("equal")
"""
    python(save, tmp_path / "saved")
    assert python(load, tmp_path / "saved", arrays=False) == "equal\n"
