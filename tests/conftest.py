"""What all tests share."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

# pytest's importlib mode leaves sys.path alone, and tests import the suites and tables that they share.
sys.path.insert(0, str(Path(__file__).parents[1]))
from tests import signal_stack as signal_stacks

pytest.register_assert_rewrite(
    "tests.tolerances", "tests.ops.rules", "tests.ops.conv.suite", "tests.ops.aggregate.suite", "tests.frontends.suite"
)

# The same examples in every run, on machines of any speed; a suite's tests are inherited by several backends.
settings.register_profile(
    "tests",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.differing_executors, HealthCheck.too_slow],
)
settings.load_profile("tests")


# Folders of tests that need a package which no other test needs, and which is installed in an environment of their own.
ALONE = {
    "gluon": "mxnet",
    "mmdet": "mmdet",
    "jax": "jax",
    "flax": "flax",
    "equinox": "equinox",
    "keras": "keras",
}


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out tests whose package is not installed, unless they were asked for by name: then they fail."""
    package = ALONE.get(collection_path.name) if collection_path.parent == Path(__file__).parent else None
    if package is None or find_spec(package) is not None:
        return None
    named = [(config.invocation_params.dir / argument.partition("::")[0]).resolve() for argument in config.args]
    return None if any(path.is_relative_to(collection_path) for path in named) else True


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what cannot run here: kernels are interpreted in a process of their own; a GPU or a browser may be missing."""
    if item.get_closest_marker("interpreter") is not None:
        if not INTERPRETED:
            pytest.skip("`make run-interpreter` runs them, with TRITON_INTERPRET=1")
    elif INTERPRETED:
        pytest.skip("TRITON_INTERPRET=1 is set, and these are not about interpreted kernels")
    for mark, why_not in (("cuda", _without_gpu), ("browser", _without_browser)):
        if item.get_closest_marker(mark) is not None and (reason := why_not()):
            pytest.skip(reason)


@pytest.fixture
def float32_products() -> Iterator[None]:
    """CPU kernels multiply bfloat16 in float32, also where the processor has an instruction for pairs of it."""
    from tests.pair_products import products_in

    with products_in(None):
        yield


@pytest.fixture
def products_of_pairs() -> Iterator[None]:
    """CPU kernels of convolution multiply pairs of bfloat16, also where the processor has no instruction for them."""
    from tests.pair_products import products_in

    with products_in("uint32"):
        yield


@pytest.fixture
def products_of_tiles() -> Iterator[None]:
    """CPU kernels of convolution multiply pairs of bfloat16 by tiles, emulated where the processor has none."""
    from tests.pair_products import products_in

    with products_in("int32"):
        yield


@pytest.fixture
def in_order(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """PyTorch is told to be deterministic: where offset groups have few channels, a GPU adds up nothing by atomics then."""
    import torch

    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # PyTorch asks for it before it multiplies on a GPU
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@cache
def _without_browser() -> str:
    """Why no browser can be driven here; nothing if one can."""
    from tests.browser import executable

    if find_spec("playwright") is None:
        return "Playwright is not installed: pip install playwright"
    return "" if executable() else "there is no chromium or Chrome on the path: apt-get install chromium"


@cache
def _without_gpu() -> str:
    """Why no GPU can be used here; nothing if one can."""
    if find_spec("torch") is None or find_spec("triton") is None:
        return "PyTorch and Triton are not both installed"
    import torch

    return "" if torch.cuda.is_available() else "PyTorch finds no GPU"


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say how many tests wait for a GPU, and how many for a browser: nothing else has tried what they try."""
    reports = terminalreporter.stats.get("skipped", [])
    skipped = {mark: sum(mark in getattr(report, "keywords", ()) for report in reports) for mark in ("cuda", "browser")}
    if skipped["cuda"]:
        terminalreporter.write_line(
            f"{skipped['cuda']} GPU tests were skipped. Where there is a GPU, `make test-gpu` runs them."
        )
    if skipped["browser"]:
        terminalreporter.write_line(f"{skipped['browser']} tests in a browser were skipped: {_without_browser()}.")


@pytest.fixture(scope="session", autouse=True)
def interpreter() -> Iterator[None]:
    """Where kernels are interpreted, what the interpreter does otherwise than a GPU is an error, or put right."""
    with ExitStack() as stack:
        if INTERPRETED and find_spec("triton") is not None:
            from tests.interpreted import honest

            stack.enter_context(honest())
        yield


@pytest.fixture(autouse=True)
def signal_stack() -> Iterator[None]:
    """A test that lets go of OpenVINO leaves signals a stack to be handled on."""
    with signal_stacks.kept():
        yield


@pytest.fixture(autouse=True)
def untold() -> None:
    """What is warned of once in a process is warned of in each test, whichever came before."""
    loading: Any = sys.modules.get("deformconv.torch.loading")
    if loading is not None:
        loading._has_warned = False


@pytest.fixture(scope="session", autouse=True)
def poisoned_memory() -> Iterator[None]:
    """A kernel that reads what it has not written gives itself away: results, copies and scratch memory begin as NaN.

    Integers begin as a number that is no pixel's, position's or channel's; to read there ends the process.
    """
    from deformconv.runtime import memory

    empty = memory.Arena.empty

    def poisoned(arena: memory.Arena, shape: int | tuple[int, int], dtype: Any) -> np.ndarray:
        array = empty(arena, shape, dtype)
        array.fill(np.nan if array.dtype.kind == "f" else np.iinfo(array.dtype).max // 2)
        return array

    def fresh(size: int, dtype: Any) -> np.ndarray:
        return np.full(size, 255, dtype)  # NaN, whatever these bytes are seen as

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory.Arena, "empty", poisoned)
        patch.setattr(memory, "np", SimpleNamespace(**{**vars(np), "empty": fresh}))
        yield
