"""The examples in docstrings that need MXNet."""

from __future__ import annotations

import doctest

import pytest

from deformconv.gluon import blocks, contrib, functional


@pytest.mark.parametrize("module", [functional, blocks, contrib], ids=lambda module: module.__name__)
def test_examples(module):
    result = doctest.testmod(module)
    assert result.failed == 0 and result.attempted >= 5
