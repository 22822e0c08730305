"""The examples in docstrings that need MXNet, beside those of the operator and the blocks."""

from __future__ import annotations

import doctest

from deformconv.gluon import contrib


def test_examples():
    result = doctest.testmod(contrib)
    assert result.failed == 0 and result.attempted >= 5
