"""The worker threads: items done once, errors and signals heard, forks survived."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import deformconv
from deformconv.runtime import processors, threads


@pytest.fixture(autouse=True)
def threads_afterwards() -> Iterator[None]:
    chosen = processors._chosen_threads
    yield
    processors._chosen_threads = chosen


class Counted:
    """Work in Python: every item notes who did it."""

    def __init__(self, items: int, fail_at: int = -1) -> None:
        self.done: list[int] = []
        self.lock = threading.Lock()
        self.items, self.fail_at = items, fail_at
        self.workers: set[int] = set()
        self.numbers: set[tuple[int, int]] = set()

    def __call__(self, counter: np.ndarray, limit: int, thread: int) -> None:
        for _ in range(limit):
            with self.lock:
                item = int(counter[0])
                counter[0] += 1
            if item >= self.items:
                return
            if item == self.fail_at:
                raise RuntimeError(f"item {item}")
            time.sleep(0.0005)
            self.done.append(item)
            self.workers.add(threading.get_ident())
            self.numbers.add((threading.get_ident(), thread))


@pytest.mark.parametrize(("items", "number", "burst"), [(0, 2, 1), (1, 4, 1), (7, 2, 3), (200, 4, 5), (50, 1, 7)])
def test_every_item_is_done_once(items: int, number: int, burst: int) -> None:
    work = Counted(items)
    threads.run(work, items, threads=number, burst=burst)
    assert sorted(work.done) == list(range(items))
    assert len(work.workers) <= number
    # Each thread has a number of its own, for its scratch memory.
    assert len(work.numbers) == len(work.workers) == len({thread for _, thread in work.numbers})
    assert all(0 <= thread < number for _, thread in work.numbers)


def test_workers_take_part() -> None:
    work = Counted(400)
    threads.run(work, 400, threads=3, burst=1)
    assert len(work.workers) == 3


def test_one_thread_hands_nothing_over() -> None:
    work = Counted(20)
    threads.run(work, 20, threads=1, burst=1)
    assert work.workers == {threading.get_ident()}


def test_an_error_ends_the_call_and_the_pool_goes_on() -> None:
    for fail_at in (0, 3, 199):
        work = Counted(200, fail_at)
        with pytest.raises(RuntimeError, match=f"item {fail_at}"):
            threads.run(work, 200, threads=3, burst=1)
        assert fail_at not in work.done
    test_workers_take_part()


def test_many_callers_at_once() -> None:
    works = [Counted(60) for _ in range(8)]
    callers = [threading.Thread(target=threads.run, args=(work, 60), kwargs={"threads": 4, "burst": 2}) for work in works]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    for work in works:
        assert sorted(work.done) == list(range(60))


def test_set_num_threads() -> None:
    deformconv.set_num_threads(3)
    assert deformconv.get_num_threads() == 3
    deformconv.set_num_threads(np.int64(2))
    assert deformconv.get_num_threads() == 2
    with pytest.raises(ValueError, match=r"`n` is 0; .* at least 1"):
        deformconv.set_num_threads(0)
    for wrong in (1.5, "2", True, None):
        with pytest.raises(TypeError, match="an integer of at least 1"):
            deformconv.set_num_threads(wrong)  # type: ignore[arg-type]
    assert deformconv.get_num_threads() == 2


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "150000 100000"}, 1.5),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4.0),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({"cpu.max": "nonsense"}, None),
        ({}, None),
    ],
)
def test_quota_of_the_control_group(tmp_path: Path, files: dict[str, str], quota: float | None) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert processors._quota(tmp_path) == quota


@pytest.mark.parametrize(("quota", "expected"), [(None, 6), (2.0, 2), (1.4, 1), (0.2, 1), (64.0, 6)])
def test_available_processors(monkeypatch: pytest.MonkeyPatch, quota: float | None, expected: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)), raising=False)
    monkeypatch.setattr(processors, "_quota", lambda: quota)
    assert processors.available_processors() == expected


def run_python(code: str, **environment: str) -> str:
    found = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


@pytest.mark.slow
def test_environment_sets_the_default() -> None:
    code = "import deformconv; print(deformconv.get_num_threads())"
    assert run_python(code, DEFORMCONV_NUM_THREADS="5", OMP_NUM_THREADS="3").strip() == "5"
    assert run_python(code, DEFORMCONV_NUM_THREADS="", OMP_NUM_THREADS="3").strip() == "3"


SETUP = """
import os, sys, threading, time
import numpy as np
import deformconv
deformconv.set_num_threads(2)
rng = np.random.default_rng(0)
x, weight = rng.standard_normal((2, 16, 40, 40), np.float32), rng.standard_normal((16, 16, 3, 3), np.float32)
offset = rng.standard_normal((2, 18, 40, 40), np.float32)
call = lambda: deformconv.deform_conv(x, offset, weight, padding=1)
def same_in_child():
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, b"same" if np.array_equal(call(), expected) else b"other")
        finally:
            os._exit(0)
    os.close(writer)
    answer = os.read(reader, 10)
    os.waitpid(child, 0)
    return answer.decode()
"""
needs_torch = pytest.mark.skipif(find_spec("torch") is None, reason="PyTorch is not installed")
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")


@pytest.mark.slow
@forks
def test_a_forked_child_computes_after_its_parent_did() -> None:
    code = SETUP + "expected = call()\nprint([same_in_child() for _ in range(5)], np.array_equal(call(), expected))"
    assert run_python(code).strip() == "['same', 'same', 'same', 'same', 'same'] True"


@pytest.mark.slow
@forks
def test_a_fork_while_another_thread_computes() -> None:
    code = (
        SETUP
        + """
expected = call()
stop, wrong = threading.Event(), []
def compute():
    while not stop.is_set():
        if not np.array_equal(call(), expected):
            wrong.append(1)
others = [threading.Thread(target=compute) for _ in range(2)]
for other in others: other.start()
answers = {same_in_child() for _ in range(20)}
stop.set()
for other in others: other.join()
print(answers, wrong)
"""
    )
    assert run_python(code).strip() == "{'same'} []"


@pytest.mark.slow
@forks
@pytest.mark.parametrize(
    "moment",
    [
        pytest.param("'llvmlite' in sys.modules", id="imports"),
        pytest.param("compiler is not None and held(compiler.global_compiler_lock._lock)", id="compiles"),
    ],
)
def test_a_fork_while_another_thread(moment: str, tmp_path: Path) -> None:
    code = (
        SETUP
        + f"""
from deformconv.runtime import threads
def held(lock):
    free = lock.acquire(blocking=False)
    if free:
        lock.release()
    return not free
other = threading.Thread(target=call, daemon=True)
other.start()
while True:
    compiler = sys.modules.get("numba.core.compiler_lock")
    compiler = compiler if hasattr(compiler, "global_compiler_lock") else None
    if {moment}:
        break
    time.sleep(0.001)
assert other.is_alive()
reader, writer = os.pipe()
child = os.fork()
if child == 0:
    os.write(writer, str(call().shape).encode())
    os._exit(0)
os.close(writer)
print(os.read(reader, 100).decode())
os.waitpid(child, 0)
other.join()
"""
    )
    assert run_python(code, DEFORMCONV_CACHE_DIR=str(tmp_path)).strip() == "(2, 16, 40, 40)"


@pytest.mark.slow
@forks
def test_a_daemonic_child_uses_one_thread_unless_told() -> None:
    code = """
import multiprocessing
import deformconv
def report(queue):
    queue.put(deformconv.get_num_threads())
context = multiprocessing.get_context("fork")
def ask(daemon):
    queue = context.Queue()
    child = context.Process(target=report, args=(queue,), daemon=daemon)
    child.start()
    answer = queue.get()
    child.join()
    return answer
from deformconv.runtime import processors
processors.available_processors = lambda: 4
found = [deformconv.get_num_threads(), ask(True), ask(False)]
deformconv.set_num_threads(3)
print(found, ask(True))
"""
    assert run_python(code, DEFORMCONV_NUM_THREADS="", OMP_NUM_THREADS="").strip() == "[4, 1, 4] 3"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="signals and clocks differ")
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("library", ["numpy", pytest.param("torch", marks=needs_torch)])
def test_ctrl_c_reaches_the_caller_soon(library: str, direction: str, number: int) -> None:
    code = (
        """
import signal
import time
import LIBRARY
import numpy as np
import deformconv
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
deformconv.set_num_threads(NUMBER)
def call(size):
    x, weight = np.ones((1, 64, size, size), np.float32), np.ones((64, 64, 3, 3), np.float32)
    offset = np.zeros((1, 18, size, size), np.float32)
    if "LIBRARY" == "torch":
        x, weight, offset = map(torch.from_numpy, (x, weight, offset))
    if "DIRECTION" == "forward":
        return deformconv.deform_conv(x, offset, weight, padding=1)
    return deformconv.deform_conv_backward(x, x, offset, weight, padding=1).weight
expected = call(32)
began = time.monotonic()
call(500)
print(4 * (time.monotonic() - began), flush=True)  # the seconds of the calls below, which have four times the pixels
try:
    while True:
        call(1000)
except KeyboardInterrupt:
    heard = time.monotonic()
    print(heard, np.array_equal(call(32), expected), flush=True)
""".replace("NUMBER", str(number))
        .replace("DIRECTION", direction)
        .replace("LIBRARY", library)
    )
    # A busy machine may keep any process waiting for a while, but not each of three. Without listening each would be late: it
    # would hear when its call ends, most of a call after the signal.
    tries = []
    while not tries or (len(tries) < 3 and tries[-1][0] >= tries[-1][1]):
        tries.append(until_ctrl_c_is_heard(code))
    assert any(seconds < limit for seconds, limit in tries), tries


def until_ctrl_c_is_heard(code: str) -> tuple[float, float]:
    """The seconds until a process hears Ctrl-C, and how many they may be: 1.5, or a third of a call if that is more."""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    whole = float(child.stdout.readline())  # a call's seconds, while the machine is as busy as it is
    time.sleep(1.0)
    began = time.monotonic()
    child.send_signal(signal.SIGINT)
    try:
        rest, errors = child.communicate(timeout=60)
    finally:
        child.kill()
    heard, right = rest.split() or (None, errors)
    assert right == "True"
    return float(heard) - began, max(1.5, whole / 3)


def test_a_call_of_long_items_is_left_to_workers() -> None:
    work = Counted(40)
    threads.run(work, 40, threads=2, burst=0)
    assert sorted(work.done) == list(range(40))
    assert threading.get_ident() not in work.workers
    failing = Counted(40, fail_at=5)
    with pytest.raises(RuntimeError, match="item 5"):
        threads.run(failing, 40, threads=1, burst=0)


INTERRUPTS = """
import random, signal, sys, threading, time
import numpy as np
import deformconv
from deformconv.runtime import threads
running = 0
class Counted(threads._Job):
    __slots__ = ()
    def run(self):
        global running
        running += 1
        super().run()
        running -= 1
threads._Job = Counted
threads.IDLE = IDLE_SECONDS
deformconv.set_num_threads(4)
rng = np.random.default_rng(0)
x, weight = rng.standard_normal((1, 32, 24, 24), np.float32), rng.standard_normal((32, 32, 3, 3), np.float32)
offset = rng.standard_normal((1, 18, 24, 24), np.float32)
y = deformconv.deform_conv(x, offset, weight, padding=1)
call = lambda: deformconv.deform_conv_backward(y, x, offset, weight, padding=1)
expected = call()
began = time.perf_counter()
call()
once = time.perf_counter() - began
signal.signal(signal.SIGALRM, signal.default_int_handler)
chance, interrupted, start = random.Random(0), 0, time.monotonic()
while (seconds := time.monotonic() - start) < TEST_SECONDS or (interrupted <= 20 and seconds < 60):  # busy machines take longer
    if threads.IDLE < 1:
        deformconv.set_num_threads(chance.choice([1, 2, 4]))
    try:
        signal.setitimer(signal.ITIMER_REAL, chance.random() * 1.2 * once + 1e-6)
        found = call()
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert np.array_equal(found.weight, expected.weight)
    except KeyboardInterrupt:
        interrupted += 1
        assert running == 0, "a worker goes on"
signal.setitimer(signal.ITIMER_REAL, 0)
assert np.array_equal(call().weight, expected.weight)
print(interrupted > 20)
"""


@pytest.mark.slow
@forks
@pytest.mark.parametrize(("idle", "seconds"), [(10.0, 6), (0.001, 4)], ids=["workers stay", "workers come and go"])
def test_ctrl_c_at_any_moment_leaves_no_worker_behind(idle: float, seconds: int) -> None:
    code = INTERRUPTS.replace("IDLE_SECONDS", str(idle)).replace("TEST_SECONDS", str(seconds))
    assert run_python(code).strip() == "True"


@pytest.mark.slow
@forks
def test_a_fork_after_ctrl_c_in_the_start_of_a_worker() -> None:
    code = """
import os, threading
from deformconv.runtime import threads
wait = threading.Event.wait
def interrupted(self, *arguments):
    threading.Event.wait = wait
    wait(self, *arguments)
    raise KeyboardInterrupt
threading.Event.wait = interrupted
work = lambda counter, limit, thread: counter.__setitem__(0, 9)
try:
    threads.run(work, 2, threads=2, burst=1)
except KeyboardInterrupt:
    print("interrupted")
threads.run(work, 2, threads=2, burst=1)
child = os.fork()
if child == 0:
    os._exit(0)
os.waitpid(child, 0)
threads.run(work, 2, threads=2, burst=0)
print("forked")
"""
    assert run_python(code).split() == ["interrupted", "forked"]


@forks
def test_a_fork_that_began_before_the_import() -> None:
    """Another library may fork in a thread of its own, while the kernels are imported: it has taken no lock of ours."""
    code = """
import logging, os, sys  # logging has the same fault, when it is imported there
sys.unraisablehook = lambda raised: print(raised.exc_value, flush=True)
def load():
    from deformconv.runtime import threads
os.register_at_fork(before=load)
for number in range(2):
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
from deformconv.runtime import threads
threads.run(lambda counter, limit, thread: counter.__setitem__(0, 9), 2, threads=2, burst=1)
print("forked")
"""
    assert run_python(code).split("\n") == ["forked", ""]


@pytest.mark.slow
def test_a_handler_that_raises_again_and_again_finds_no_worker_left() -> None:
    code = """
import signal, threading, time
from deformconv.runtime import threads
ended, began = threading.Event(), threading.Event()
def work(counter, limit, thread):
    if threading.current_thread() is threading.main_thread():
        began.wait()
        counter[0] = 9
        return
    began.set()
    time.sleep(0.6)
    ended.set()
class Late(Exception):
    pass
def raise_late(*arguments):
    raise Late
signal.signal(signal.SIGALRM, raise_late)
signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
try:
    threads.run(work, 4, threads=2, burst=1)
except Late:
    signal.setitimer(signal.ITIMER_REAL, 0)
    print(ended.is_set())
"""
    if not hasattr(signal, "setitimer"):
        pytest.skip("no timers that send signals")
    assert run_python(code).strip() == "True"


def test_where_no_thread_can_be_started_the_caller_works_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_workers", threads._Workers())

    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    done = []

    def work(counter: np.ndarray, limit: int, thread: int) -> None:
        for _ in range(limit):
            done.append(counter[0])
            counter[0] += 1

    with monkeypatch.context() as limited:
        limited.setattr(threading.Thread, "start", start)
        threads.run(work, 3, threads=4, burst=1)
        assert len(done) == 3
        with pytest.raises(RuntimeError, match="start new thread"):
            threads.run(work, 3, threads=4, burst=0)


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> threads._Workers:
    """Workers of a test's own, who soon end if they are too many."""
    workers = threads._Workers()
    monkeypatch.setattr(threads, "_workers", workers)
    monkeypatch.setattr(threads, "IDLE", 0.1)
    return workers


def soon(happens: Callable[[], bool]) -> bool:
    end = time.monotonic() + 20
    while not happens() and time.monotonic() < end:
        time.sleep(0.01)
    return happens()


def compute(number: int, items: int = 64, burst: int = 1) -> None:
    work = Counted(items)
    threads.run(work, items, threads=number, burst=burst)
    assert sorted(work.done) == list(range(items))


def test_workers_that_are_too_many_end(pool: threads._Workers) -> None:
    deformconv.set_num_threads(8)
    compute(8)
    all_workers = list(pool.threads)
    assert len(all_workers) == 7
    time.sleep(0.5)
    assert pool.threads == all_workers and all(worker.is_alive() for worker in all_workers)  # as many as are asked for

    deformconv.set_num_threads(3)
    assert soon(lambda: sum(worker.is_alive() for worker in all_workers) == 2)
    time.sleep(0.3)
    assert len(pool.threads) == 2 and all(worker.is_alive() for worker in pool.threads)
    compute(3)
    deformconv.set_num_threads(1)
    assert soon(lambda: not any(worker.is_alive() for worker in all_workers))
    compute(1)
    assert pool.threads == []

    deformconv.set_num_threads(8)
    test_every_item_is_done_once(200, 8, 1)
    assert len(pool.threads) == 7


def test_a_call_that_needs_more_workers_than_are_asked_for_keeps_them(pool: threads._Workers) -> None:
    deformconv.set_num_threads(2)
    compute(4)
    workers = list(pool.threads)
    for _ in range(10):
        compute(4)
        assert pool.threads == workers
    assert soon(lambda: len(pool.threads) == 1)


def test_fewer_and_more_threads_while_calls_are_under_way(pool: threads._Workers) -> None:
    stop, failures = threading.Event(), []

    def call(burst: int) -> None:
        try:
            while not stop.is_set():
                compute(processors.get_num_threads(), burst=burst)
        except BaseException as error:
            failures.append(error)

    deformconv.set_num_threads(32)
    # Beside callers who work there is one who leaves all to workers: it would wait for ever if none came.
    callers = [threading.Thread(target=call, args=(burst,)) for burst in (1, 1, 0)]
    for caller in callers:
        caller.start()
    try:
        for _ in range(3):
            deformconv.set_num_threads(32)
            assert soon(lambda: len(pool.threads) >= 31)
            deformconv.set_num_threads(2)
            assert soon(lambda: sum(worker.is_alive() for worker in pool.threads + pool.leaving) <= 2)  # the third caller's
            assert 1 <= len(pool.threads) <= 2
    finally:
        stop.set()
        for caller in callers:
            caller.join(timeout=60)
    assert not any(caller.is_alive() for caller in callers)
    assert failures == []


def test_a_job_that_comes_as_its_worker_is_about_to_end(pool: threads._Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "IDLE", 0.002)
    deformconv.set_num_threads(1)
    gone, chance = 0, np.random.default_rng(0)

    def call(done: threading.Event) -> None:
        compute(1, items=1, burst=0)
        done.set()

    for _ in range(500):
        done = threading.Event()
        threading.Thread(target=call, args=(done,), daemon=True).start()
        assert done.wait(60)
        time.sleep(chance.uniform(0, 0.004))
        gone += not pool.threads
    assert 0 < gone < 500


COME_AND_GO = """
import os, random, sys, threading, time, warnings
warnings.simplefilter("error")
alive = []
def count():
    alive.append(sum(thread.name == "deformconv" for thread in threading.enumerate()))
os.register_at_fork(before=count)  # runs after those that are registered later
import deformconv
from deformconv.runtime import threads
threads.IDLE = 0.0005
def work(counter, limit, thread):
    counter[0] += limit
def call():
    deformconv.set_num_threads(8)
    threads.run(work, 8, threads=8, burst=1)
    deformconv.set_num_threads(1)
chance, seen = random.Random(SEED), set()
"""


@forks
def test_a_fork_while_workers_end() -> None:
    code = (
        COME_AND_GO
        + """
for _ in range(200):
    call()
    seen.add(len(threads._workers.threads))
    time.sleep(chance.random() * 0.002)
    seen.add(len(threads._workers.threads))
    child = os.fork()
    if child == 0:
        call()
        os._exit(len(threads._workers.leaving) + len(threads._workers.threads) > 7)
    assert os.waitpid(child, 0)[1] == 0
print(set(alive), len(seen) > 2)
"""
    )
    assert run_python(code.replace("SEED", "0")).strip() == "{0} True"


@pytest.mark.parametrize("seed", range(4))
def test_the_interpreter_ends_while_workers_do(seed: int) -> None:
    code = COME_AND_GO + "call()\ntime.sleep(chance.random() * 0.002)\nprint('ended')"
    code = code.replace("os.register_at_fork", "getattr(os, 'register_at_fork', lambda **_: None)")
    assert run_python(code.replace("SEED", str(seed))) == "ended\n"
