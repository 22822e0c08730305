"""What tests of convolution share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.pair_products import pair_products


@pytest.fixture
def products_of_pairs() -> Iterator[None]:
    """bfloat16 is multiplied in pairs, also where the processor has no instruction for it."""
    with pair_products(True):
        yield
