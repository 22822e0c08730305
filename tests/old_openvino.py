"""OpenVINO as it was before 2025: its operators lie in `openvino.runtime` and not in `openvino`."""

from __future__ import annotations

import sys
from types import ModuleType

import openvino
import pytest


def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the test ends; the operators are those of the installed version, which may itself be as old."""
    if not hasattr(openvino, "opset8"):
        return
    runtime = ModuleType("openvino.runtime")
    runtime.opset8 = openvino.opset8
    monkeypatch.setitem(sys.modules, "openvino.runtime", runtime)
    monkeypatch.setitem(sys.modules, "openvino.opset8", None)
    monkeypatch.delattr(openvino, "opset8")
