"""The compiled kernels: the suite, and what is promised of threads and memory."""

from __future__ import annotations

from tests.ops.attention.suite import BackendSuite

from deformconv.ops.attention import cpu


class TestCpu(BackendSuite):
    backend = cpu
