"""Work on a library's OpenMP team: found, bounded, interrupted, forked, and never another result."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from ctypes.util import find_library
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

pytest.importorskip("torch", reason="PyTorch is the library that lends its team")
import torch
from tests.ops.conv.cases import make
from tests.ops.conv.test_cpu import TAILS
from tests.runtime.test_threads import forks, run_python

import deformconv
from deformconv import BackendError
from deformconv.ops.conv import cpu
from deformconv.ops.conv.spec import GRADIENTS
from deformconv.runtime import launch, openmp, processors, work
from deformconv.runtime.atomics import fetch_add, wait_for
from deformconv.runtime.cache import OPTIONS
from deformconv.runtime.launch import run_on_team
from deformconv.runtime.lenders import LENDERS, Lender
from deformconv.runtime.openmp import Runtime, Team, runtime_of, team_for
from deformconv.runtime.threads import BEGUN, NEXT, STOP, counters
from deformconv.torch import deform_conv2d

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not torch.backends.openmp.is_available(), reason="PyTorch has no OpenMP team that is lent"
)
LENDER = LENDERS["torch"]


def choose_anew() -> None:
    """Teams are chosen as if no call had been made yet."""
    for remembered in (openmp._team_of, openmp._own, openmp._kind):
        remembered.cache_clear()


@pytest.fixture(autouse=True)
def afterwards(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Teams are chosen anew in each test, and numbers of threads are put back."""
    chosen, theirs = processors._chosen_threads, torch.get_num_threads()
    monkeypatch.delenv("DEFORMCONV_THREADS", raising=False)
    monkeypatch.setattr(processors, "_chosen_threads", None)
    choose_anew()
    yield
    choose_anew()
    processors._chosen_threads = chosen
    torch.set_num_threads(theirs)


def runtime() -> Runtime:
    found = runtime_of(LENDER)
    assert isinstance(found, Runtime)
    return found


def team_of(started: int) -> Team:
    """A team of so many threads."""
    return Team(started, runtime(), started=started)


# Finding it


def test_the_runtime_is_the_one_that_pytorch_calls() -> None:
    before = torch.get_num_threads()
    found = runtime_of(Lender("PyTorch", torch._C.__file__, torch.get_num_threads))
    assert isinstance(found, Runtime)
    assert torch.get_num_threads() == before  # asking leaves it as it was
    found.set_num_threads(before + 3)
    assert torch.get_num_threads() == before + 3
    assert str(found.file) in Path("/proc/self/maps").read_text()


SHOW = """
import sys, ctypes
{before}
import torch
{between}
import deformconv.torch
from deformconv.runtime.openmp import team_for
team = team_for("torch")
number = torch.get_num_threads() + 1
team.runtime.set_num_threads(number)
print(team.kind, team.runtime.file, torch.get_num_threads() == number)
x, offset, weight = torch.ones(1, 32, 64, 64), torch.zeros(1, 18, 64, 64), torch.ones(32, 32, 3, 3)
print(float(deformconv.torch.deform_conv2d(x, offset, weight, padding=1)[0, 0, 9, 9]))
"""


@pytest.mark.slow
def test_a_preloaded_runtime_is_found_in_the_place_of_pytorch_s() -> None:
    other = find_library("gomp")
    if other is None:
        pytest.skip("there is no other OpenMP runtime here")
    shown = run_python(SHOW.format(before="", between=""), LD_PRELOAD=other).split()
    assert [shown[0], *shown[2:]] == ["openmp", "True", "288.0"]
    assert Path(shown[1]) != runtime().file


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["RTLD_LOCAL", "RTLD_GLOBAL"])
@pytest.mark.parametrize("moment", ["before", "between"])
def test_another_runtime_may_be_loaded_too(moment: str, mode: str) -> None:
    """One that was there first may be PyTorch's then, if it has the same name; one that comes later is not."""
    other = find_library("gomp")
    if other is None:
        pytest.skip("there is no other OpenMP runtime here")
    shown = run_python(SHOW.format(**{"before": "", "between": "", moment: f"ctypes.CDLL({other!r}, ctypes.{mode})"})).split()
    assert [shown[0], *shown[2:]] == ["openmp", "True", "288.0"]
    if moment == "between":
        assert Path(shown[1]) == runtime().file


@pytest.mark.slow
def test_nothing_is_looked_for_before_it_is_needed() -> None:
    code = "import sys, deformconv.torch; print('deformconv.runtime.openmp' in sys.modules)"
    assert run_python(code).strip() == "False"


def test_a_library_without_a_runtime_says_so() -> None:
    lonely = Lender("Lonely", None, lambda: 5)  # no runtime changes this number
    assert runtime_of(lonely) == "Lonely has loaded no OpenMP runtime with GOMP_parallel"


def test_systems_without_the_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "name", "nt")
    found = runtime_of(Lender("PyTorch", torch._C.__file__, torch.get_num_threads))
    assert isinstance(found, str)
    assert "on nt none has" in found


# Whose threads, and how many


def test_a_team_never_has_more_threads_than_the_library() -> None:
    torch.set_num_threads(3)
    monkeypatched = processors.available_processors()
    assert (team_for("torch").kind, team_for("torch").threads) == ("openmp", min(3, monkeypatched))
    deformconv.set_num_threads(3)
    assert (team_for("torch").kind, team_for("torch").threads) == ("openmp", 3)
    deformconv.set_num_threads(2)
    assert (team_for("torch").kind, team_for("torch").threads) == ("openmp", 2)
    deformconv.set_num_threads(4)
    assert team_for("torch")[:2] == (4, None)
    assert str(team_for("torch")) == "4 threads of its own, since PyTorch uses 3"
    torch.set_num_threads(1)
    deformconv.set_num_threads(1)
    assert str(team_for("torch")) == f"1 thread of PyTorch's OpenMP team ({runtime().name})"


def test_pytorch_s_number_is_ours_for_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processors, "available_processors", lambda: 8)
    for variable in ("DEFORMCONV_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(variable, raising=False)
    processors._from_environment.cache_clear()
    torch.set_num_threads(3)
    assert team_for("torch").threads == 3
    assert team_for("numpy").threads == 8
    monkeypatch.setattr(processors, "available_processors", lambda: 2)  # a control group's quota, which PyTorch does not know
    processors._from_environment.cache_clear()
    choose_anew()
    assert team_for("torch").threads == 2
    processors._from_environment.cache_clear()


def test_numpy_has_threads_of_our_own() -> None:
    assert team_for("numpy").kind == "own"
    assert str(team_for("numpy")) == f"{processors.get_num_threads()} threads of its own"


def test_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, kind in {"own": "own", "openmp": "openmp", "auto": "openmp", "": "openmp"}.items():
        monkeypatch.setenv("DEFORMCONV_THREADS", value)
        choose_anew()
        assert team_for("torch").kind == kind
    monkeypatch.setenv("DEFORMCONV_THREADS", "gpu")
    choose_anew()
    for library in ("torch", "numpy"):
        with pytest.raises(ValueError, match="DEFORMCONV_THREADS is 'gpu'; expected one of auto, own, openmp"):
            team_for(library)


def test_openmp_alone_and_no_team_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEFORMCONV_THREADS", "openmp")
    deformconv.set_num_threads(torch.get_num_threads() + 1)
    with pytest.raises(BackendError, match=r"DEFORMCONV_THREADS is 'openmp', but PyTorch uses .* for own threads"):
        team_for("torch")
    assert team_for("numpy").kind == "own"


def test_explain_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(2)
    deformconv.set_num_threads(2)
    x, offset, weight = torch.ones(1, 32, 64, 64), torch.zeros(1, 18, 64, 64), torch.ones(32, 32, 3, 3)
    text = deformconv.explain(x, offset, weight, padding=1)
    assert f"forward: cpu\n  cpu: work is shared out to 2 threads of PyTorch's OpenMP team ({runtime().name})\n" in text
    numbers = [tensor.numpy() for tensor in (x, offset, weight)]
    assert "cpu: work is shared out to 2 threads of its own\n" in deformconv.explain(*numbers, padding=1)
    small = deformconv.explain(x[:, :, :8, :8], offset[:, :, :8, :8], weight, padding=1)
    assert "cpu: the caller's thread computes it alone, since it is small\n" in small


# Running on it


# As `cache.kernel` compiles, but not kept on disk: each edit of a test would leave machine code behind.
kernel = numba.njit(**OPTIONS)


@kernel
def note(counter, limit, thread, items, team, done, by):
    """Note every item and who did it, once all of the team are there and have one each."""
    first = True
    for _ in range(limit):
        item = fetch_add(counter, NEXT)
        if item >= items:
            return
        if first:
            fetch_add(counter, BEGUN)
            wait_for(counter, BEGUN, team)
            first = False
        done[item] += 1
        by[thread] += 1


@kernel
def fail(counter, limit, thread, items, team, guilty):
    """Raise at the first item of one thread, once all of the team have one each."""
    for _ in range(limit):
        item = fetch_add(counter, NEXT)
        if item >= items or counter[STOP]:
            return
        fetch_add(counter, BEGUN)
        wait_for(counter, BEGUN, team)
        if thread == guilty:
            raise ValueError("an item that cannot be done")


@pytest.mark.parametrize("burst", [1, 7, 1000])
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_every_item_is_done_once(threads: int, burst: int) -> None:
    items = 300
    done, by = np.zeros(items, np.int64), np.zeros(8, np.int64)
    run_on_team(note, (items, threads, done, by), (), items, threads=threads, burst=burst, team=team_of(threads))
    assert (done == 1).all()
    assert by.sum() == items
    assert by[:threads].all() and not by[threads:].any()


def threads_of_this_process() -> set[str]:
    return set(os.listdir("/proc/self/task"))


def test_fewer_workers_than_a_team_has_end_none_of_its_threads() -> None:
    """A runtime ends the threads that a smaller team leaves over; to start them anew would be in every small call's time."""
    by = np.zeros(4, np.int64)
    run_on_team(note, (100, 4, np.zeros(100, np.int64), by), (), 100, threads=4, burst=100, team=team_of(4))
    before = threads_of_this_process()
    for threads in (2, 3, 2):
        by[:] = 0
        done = np.zeros(100, np.int64)
        run_on_team(note, (100, threads, done, by), (), 100, threads=threads, burst=100, team=team_of(4))
        assert (done == 1).all()
        assert by[:threads].all() and not by[threads:].any()
    assert threads_of_this_process() == before


@intrinsic
def count_of(typing, array):
    """The address at which an array's references are counted; 0 if they are not."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        found = context.make_array(signature.args[0])(context, builder, arguments[0])
        return builder.ptrtoint(found.meminfo, ir.IntType(64))

    return types.int64(array), emit


@kernel
def count(counter, limit, thread, found, pair):
    if fetch_add(counter, NEXT) < 1:
        found[0] = count_of(found)
        found[1] = count_of(pair[0])
        found[2] = count_of(pair[1][1:])


def test_kernels_count_no_references() -> None:
    """They take arrays out of tuples and slice them within loops, where threads would count in one place of memory."""
    for run in (run_on_team, run_on_own):
        found, array = np.full(3, -1), np.zeros(4, np.float32)
        run(count, (found, (array, array)), (), 1, threads=1, burst=1, team=team_of(1))
        assert found.tolist() == [0, 0, 0]


def run_on_own(kernel: Any, arguments: tuple[Any, ...], *_: Any, **__: Any) -> None:
    kernel(counters(), 1, 0, *arguments)


@pytest.mark.parametrize("guilty", [0, 1, 2])
def test_an_error_of_any_thread_reaches_the_caller(guilty: int) -> None:
    items = 1 << 40  # the others would be at it for hours
    for burst in (100, items):
        with pytest.raises(ValueError, match="an item that cannot be done"):
            run_on_team(fail, (items, 3, guilty), (), items, threads=3, burst=burst, team=team_of(3))
    test_every_item_is_done_once(2, 7)


@pytest.mark.parametrize("case", TAILS, ids=lambda case: case.name)
def test_results_are_the_same_for_any_number_of_threads_of_either_kind(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "SHARED_FROM", 0)
    monkeypatch.setattr(work, "BURST", 30_000)  # several pauses
    call = make(case, "float32")
    c, results = call, []
    torch.set_num_threads(4)
    for library, number in (("numpy", 1), ("torch", 1), ("torch", 2), ("numpy", 2), ("torch", 3), ("torch", 4), ("torch", 2)):
        deformconv.set_num_threads(number)
        choose_anew()
        assert team_for(library).kind == ("openmp" if library == "torch" else "own")
        found = cpu.backward(c.spec, c.grad_output, c.input, c.offset, c.weight, c.mask, GRADIENTS, library=library)
        results.append([cpu.forward(c.spec, *c.arrays, library=library), *found])
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(one, two)


def test_a_team_that_comes_late_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its callers wait for a thread that has no processor; threads of our own do the work for a while."""
    now = [100.0]
    monkeypatch.setattr(openmp.time, "monotonic", lambda: now[0])
    team = Runtime(ctypes.CDLL(torch._C.__file__))
    for _ in range(100):  # an accident now and then is none of it
        team.note(5e-3, 1e-3)
        assert not team.is_resting
        for _ in range(4):
            team.note(1e-4, 1e-3)
    team.note(1.9e-3, 1e-3)  # within an item and what is allowed
    team.note(5e-3, 1e-3)
    assert not team.is_resting
    team.note(5e-3, 1e-3)
    assert team.is_resting
    now[0] += openmp.REST / 2
    assert team.is_resting
    now[0] += openmp.REST
    assert not team.is_resting
    team.note(5e-3, 1e-3)  # it is tried again, and is late again
    assert team.is_resting


def test_while_a_team_rests_own_threads_work(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = tensors()
    torch.set_num_threads(2)
    deformconv.set_num_threads(2)
    on_team, ran = run_on_team, []
    monkeypatch.setattr(launch, "run_on_team", lambda *a, **k: [ran.append(1), on_team(*a, **k)])
    monkeypatch.setattr(runtime(), "_resting_until", 0.0)
    expected = both(*arguments)
    assert ran
    ran.clear()
    monkeypatch.setattr(runtime(), "_resting_until", float("inf"))
    assert all(map(torch.equal, both(*arguments), expected))
    assert not ran


def test_how_long_the_caller_waited_is_measured() -> None:
    heard: list[tuple[float, float]] = []

    class Listening(Runtime):
        def note(self, waited: float, item: float) -> None:
            heard.append((waited, item))

    team = Listening(ctypes.CDLL(torch._C.__file__))
    run_on_team(dawdle, (2, 0.05), (), 2, threads=2, burst=2, team=Team(2, team, started=2))
    ((waited, item),) = heard
    assert 0.04 < waited < 5  # the caller has ended at once, the other thread after 50 ms
    assert 0 <= item < waited


@kernel
def dawdle(counter, limit, thread, team, seconds):
    """One item each; all but the caller compute for about so many seconds."""
    fetch_add(counter, NEXT)
    fetch_add(counter, BEGUN)
    wait_for(counter, BEGUN, team)
    steps = int(seconds * 2e9) if thread else 0
    for _ in range(steps):
        fetch_add(counter, STOP)


def tensors(size: int = 40) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 16, size, size), (2, 18, size, size), (16, 16, 3, 3)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def both(x: torch.Tensor, offset: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in (x, offset, weight)]
    y = deform_conv2d(*leaves, padding=1)
    return [y.detach(), *torch.autograd.grad(y.sum(), leaves)]


def test_eight_python_threads_at_once() -> None:
    arguments = tensors()
    expected, found = both(*arguments), []

    def work() -> None:
        for _ in range(15):
            found.append(all(map(torch.equal, both(*arguments), expected)))

    callers = [threading.Thread(target=work) for _ in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert found == [True] * 120


def test_a_call_within_a_team_s_own_work() -> None:
    """As an operation of PyTorch that calls Python from its threads would do."""
    arguments, found = tensors(), []
    expected = deform_conv2d(*arguments, padding=1)
    member = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(
        lambda _: found.append(torch.equal(deform_conv2d(*arguments, padding=1), expected))
    )
    parallel = runtime()._functions.GOMP_parallel
    parallel(member, None, 2, 0)
    assert found == [True, True]


HANDLER = """
import random, signal, time
import torch
from deformconv.torch import deform_conv2d
from deformconv.runtime import work
from deformconv.runtime.openmp import team_for
work.BURST = 100_000
x, offset, weight = torch.randn(1, 32, 24, 24), torch.randn(1, 18, 24, 24), torch.randn(32, 32, 3, 3)
leaves = [tensor.requires_grad_() for tensor in (x, offset, weight)]
def call():
    output = deform_conv2d(*leaves, padding=1)
    return output.detach(), *torch.autograd.grad(output.sum(), leaves)
expected = call()
assert team_for("torch").kind == "openmp"
began = time.perf_counter()
call()
once = time.perf_counter() - began
right, computing, within = [], False, 0
def again(*_):
    global within
    with torch.enable_grad():  # a Function that it interrupts has turned it off
        right.append(all(map(torch.equal, call(), expected)))
    within += computing
# One signal a call: on a busy machine a handler may take longer than any interval, and would interrupt itself without end.
chance, calls, end = random.Random(0), 0, time.monotonic() + 60
signal.signal(signal.SIGALRM, again)
while calls < 40 or (within < 10 and time.monotonic() < end):
    computing = True
    signal.setitimer(signal.ITIMER_REAL, chance.random() * once + 1e-6)
    found = call()
    computing = False
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert all(map(torch.equal, found, expected))
    calls += 1
signal.setitimer(signal.ITIMER_REAL, 0)
print(within >= 10 and all(right))
"""


@pytest.mark.slow
def test_a_signal_s_handler_may_call_while_its_thread_does() -> None:
    """In a process of its own, which has no more than this to bring down."""
    assert run_python(HANDLER, DEFORMCONV_NUM_THREADS="2", OMP_NUM_THREADS="2").strip() == "True"


INTERRUPTS = """
import random, signal, time
import torch
from deformconv.torch import deform_conv2d
from deformconv.runtime import work
from deformconv.runtime.openmp import team_for
work.BURST = 200_000
x, offset, weight = torch.randn(1, 32, 24, 24), torch.randn(1, 18, 24, 24), torch.randn(32, 32, 3, 3)
leaves = [tensor.requires_grad_() for tensor in (x, offset, weight)]
def call():
    return torch.autograd.grad(deform_conv2d(*leaves, padding=1).sum(), leaves)
expected = call()
assert team_for("torch").kind == "openmp"
began = time.perf_counter()
call()
once = time.perf_counter() - began
signal.signal(signal.SIGALRM, signal.default_int_handler)
chance, interrupted, start = random.Random(0), 0, time.monotonic()
while (seconds := time.monotonic() - start) < 4 or (interrupted <= 20 and seconds < 60):  # a busy machine takes longer
    try:
        signal.setitimer(signal.ITIMER_REAL, chance.random() * 1.2 * once + 1e-6)
        found = call()
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert all(map(torch.equal, found, expected))
    except KeyboardInterrupt:
        interrupted += 1
signal.setitimer(signal.ITIMER_REAL, 0)
assert all(map(torch.equal, call(), expected))
print(interrupted > 20)
"""


@pytest.mark.slow
def test_ctrl_c_at_any_moment() -> None:
    assert run_python(INTERRUPTS, DEFORMCONV_NUM_THREADS="2", OMP_NUM_THREADS="2").strip() == "True"


# Forks


FORKS = """
import os, sys, threading
import torch
import deformconv
from deformconv import BackendError
from deformconv.runtime.openmp import team_for
from deformconv.torch import deform_conv2d
torch.set_num_threads(2)
deformconv.set_num_threads(2)
x, offset, weight, g = (torch.randn(s) for s in ((2, 16, 40, 40), (2, 18, 40, 40), (16, 16, 3, 3), (2, 16, 40, 40)))
leaves = [tensor.requires_grad_() for tensor in (x, offset, weight)]
def call():
    y = deform_conv2d(*leaves, padding=1)
    return [y.detach(), *torch.autograd.grad(y, leaves, g)]
def in_child(expected):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        answer = "failed"
        try:
            # No operation of PyTorch's own: its OpenMP loops hang in such a child.
            same = all((a.numpy() == b.numpy()).all() for a, b in zip(call(), expected))
            answer = f"{same} {team_for('torch').kind}"
        finally:
            os.write(writer, answer.encode())
            os._exit(0)
    os.close(writer)
    answer = os.read(reader, 100).decode()
    os.waitpid(child, 0)
    return answer
"""


@pytest.mark.slow
@forks
def test_a_child_of_a_process_that_had_a_team_has_own_threads() -> None:
    code = FORKS + (
        "expected = call()\n"
        "print([in_child(expected) for _ in range(3)], team_for('torch').kind, all(map(torch.equal, call(), expected)))\n"
        "print(team_for('torch').reason, end='')"
    )
    assert run_python(code).split("\n")[0] == "['True own', 'True own', 'True own'] openmp True"


@pytest.mark.slow
@forks
def test_a_fork_before_the_first_call() -> None:
    code = FORKS + (
        "import subprocess\n"
        "first = in_child([])\n"  # nothing to compare with yet
        "print(first, team_for('torch').kind, len(call()))"
    )
    assert run_python(code).strip() == "True own openmp 4"


@pytest.mark.slow
@forks
def test_a_fork_while_other_threads_compute() -> None:
    code = FORKS + (
        "expected, stop, wrong = call(), threading.Event(), []\n"
        "def compute():\n"
        "    while not stop.is_set():\n"
        "        if not all(map(torch.equal, call(), expected)):\n"
        "            wrong.append(1)\n"
        "others = [threading.Thread(target=compute) for _ in range(2)]\n"
        "for other in others: other.start()\n"
        "answers = {in_child(expected) for _ in range(15)}\n"
        "stop.set()\n"
        "for other in others: other.join()\n"
        "print(answers, wrong)"
    )
    assert run_python(code).strip() == "{'True own'} []"


@pytest.mark.slow
@forks
def test_a_child_where_openmp_alone_is_allowed_says_why_not() -> None:
    code = FORKS + (
        "call()\n"
        "if os.fork() == 0:\n"
        "    try:\n"
        "        call()\n"
        "    except BackendError as error:\n"
        "        print(error, flush=True)\n"
        "    os._exit(0)\n"
        "os.wait()"
    )
    said = run_python(code, DEFORMCONV_THREADS="openmp")
    assert re.search(r"libgomp\S* does not survive a fork, and this process was forked from one that had loaded PyTorch", said)


@pytest.mark.slow
@forks
def test_a_child_of_multiprocessing_that_loads_us_only_then() -> None:
    """PyTorch may have had a team in its parent, and nobody was there to see it."""
    code = (
        "import multiprocessing, sys, torch\n"
        "multiprocessing.set_start_method('fork')\n"
        "torch.set_num_threads(2)\n"
        "tensors = torch.ones(2, 64, 56, 56), torch.zeros(2, 18, 54, 54), torch.ones(64, 64, 3, 3)\n"
        "def child():\n"
        "    from deformconv.torch import deform_conv2d\n"
        "    from deformconv.runtime.openmp import team_for\n"
        "    deform_conv2d(*tensors)\n"
        "    print(multiprocessing.get_start_method(), team_for('torch').kind, flush=True)\n"
        "assert not any(name.startswith('deformconv') for name in sys.modules)\n"
        "for context in (multiprocessing, multiprocessing.get_context('fork')):\n"
        "    process = context.Process(target=child)\n"
        "    process.start()\n"
        "    process.join(60)\n"
        "    print(process.exitcode)\n"
    )
    assert run_python(code).split() == ["fork", "own", "0"] * 2


@pytest.mark.slow
def test_a_binding_of_threads_is_no_bound_of_the_team() -> None:
    """OMP_PROC_BIND keeps the thread that calls us on one processor, and each of the team's others on another."""
    code = (
        "import os, torch\n"
        "torch.ones(1000, 1000).exp()\n"
        "import deformconv.torch\n"
        "from deformconv.runtime.openmp import team_for\n"
        "print(len(os.sched_getaffinity(0)), torch.get_num_threads() == team_for('torch').threads, team_for('numpy').threads)"
    )
    if processors.available_processors() == 1:
        pytest.skip("there is one processor")
    unset = {"DEFORMCONV_NUM_THREADS": "", "OMP_NUM_THREADS": ""}
    assert run_python(code, OMP_PROC_BIND="true", **unset).split() == ["1", "True", "1"]


@pytest.mark.slow
@forks
def test_a_child_that_loads_pytorch_itself_has_its_team() -> None:
    code = (
        "import os, deformconv\n"
        "if os.fork() == 0:\n"
        "    import torch, deformconv.torch\n"
        "    from deformconv.runtime.openmp import team_for\n"
        "    print(team_for('torch').kind, flush=True)\n"
        "    os._exit(0)\n"
        "os.wait()"
    )
    assert run_python(code).strip() == "openmp"


LOADER = """
import torch
from torch.utils.data import DataLoader, Dataset
import deformconv
from deformconv.runtime.openmp import team_for
from deformconv.torch import deform_conv2d
x, offset, weight = torch.ones(1, 16, 40, 40), torch.zeros(1, 18, 40, 40), torch.ones(16, 16, 3, 3)
expected = deform_conv2d(x, offset, weight, padding=1)
class Images(Dataset):
    def __len__(self):
        return 8
    def __getitem__(self, number):
        y = deform_conv2d(x, offset, weight, padding=1)
        return team_for("torch").threads, bool((y.numpy() == expected.numpy()).all())
if __name__ == "__main__":
    print({(int(t), bool(s)) for threads, same in DataLoader(Images(), num_workers=2) for t, s in zip(threads, same)})
"""


@pytest.mark.slow
@forks
def test_a_worker_of_a_data_loader_has_one_thread() -> None:
    assert run_python(LOADER, DEFORMCONV_NUM_THREADS="", OMP_NUM_THREADS="").strip() == "{(1, True)}"


# What is left behind


@pytest.mark.slow
def test_ten_thousand_calls_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "SHARED_FROM", 0)
    torch.set_num_threads(2)
    deformconv.set_num_threads(2)
    arguments = tensors(8)
    begun = len(os.listdir("/proc/self/task"))
    for _ in range(500):
        deform_conv2d(*arguments, padding=1)
    tasks, size = len(os.listdir("/proc/self/task")), _resident()
    for _ in range(10_000):
        deform_conv2d(*arguments, padding=1)
    assert len(os.listdir("/proc/self/task")) == tasks <= begun + 1
    assert len(sys._current_frames()) == threading.active_count()  # a team's threads are none of Python's
    assert _resident() - size < 2 << 20


def _resident() -> int:
    """The bytes of memory that this process has in use."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_python_thread_s_team_ends_with_it() -> None:
    arguments = tensors()
    deform_conv2d(*arguments, padding=1)
    begun = len(os.listdir("/proc/self/task"))
    for _ in range(20):
        caller = threading.Thread(target=deform_conv2d, args=arguments, kwargs={"padding": 1})
        caller.start()
        caller.join()
    assert len(os.listdir("/proc/self/task")) <= begun + 2


EXIT = """
import threading
import torch
from deformconv.torch import deform_conv2d
arguments = torch.ones(2, 16, 40, 40), torch.zeros(2, 18, 40, 40), torch.ones(16, 16, 3, 3)
def some():
    for _ in range(200):
        deform_conv2d(*arguments, padding=1)
deform_conv2d(*arguments, padding=1)
callers = [threading.Thread(target=some) for _ in range(3)]
for caller in callers: caller.start()
for caller in callers: caller.join()
print("end", flush=True)
"""


@pytest.mark.slow
def test_the_interpreter_ends_after_threads_have_computed() -> None:
    """While daemons compute it does not end well: PyTorch's own operations abort the process then."""
    for _ in range(5):
        ran = subprocess.run([sys.executable, "-c", EXIT], capture_output=True, text=True, timeout=60, check=False)
        assert (ran.returncode, ran.stdout, ran.stderr) == (0, "end\n", "")
