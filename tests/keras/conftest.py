"""What Keras and its backends warn of themselves is no error here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Before JAX and TensorFlow are imported: else JAX has no float64, for Keras' NumPy backend either.
os.environ.setdefault("JAX_ENABLE_X64", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Programs that run once are compiled quickly.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

THEIRS = (
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning",  # JAX's arrays, in Keras' NumPy backend
    "ignore::DeprecationWarning:tensorflow",
    "ignore::DeprecationWarning:keras",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == Path(__file__).parent:
            for text in THEIRS:
                item.add_marker(pytest.mark.filterwarnings(text))
