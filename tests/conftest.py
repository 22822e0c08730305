"""What all tests share."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# pytest's importlib mode leaves sys.path alone, and tests import the suites and tables that they share.
sys.path.insert(0, str(Path(__file__).parents[1]))
pytest.register_assert_rewrite("tests.tolerances", "tests.ops.conv.suite", "tests.frontends.suite")

# The same examples in every run, on machines of any speed; a suite's tests are inherited by several backends.
settings.register_profile(
    "tests",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.differing_executors, HealthCheck.too_slow],
)
settings.load_profile("tests")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out MXNet's tests where it is not installed, unless they were asked for by name: then they fail."""
    if collection_path != Path(__file__).parent / "gluon" or find_spec("mxnet") is not None:
        return None
    named = [(config.invocation_params.dir / argument.partition("::")[0]).resolve() for argument in config.args]
    return None if any(path.is_relative_to(collection_path) for path in named) else True
