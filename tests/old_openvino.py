"""OpenVINO as it was before 2025: its operators lie in `openvino.runtime` and not in `openvino`."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import openvino
import pytest


def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the test ends; the operators are those of the installed version, which may itself be as old."""
    if not hasattr(openvino, "opset8"):
        return
    runtime: Any = ModuleType("openvino.runtime")
    monkeypatch.setitem(sys.modules, "openvino.runtime", runtime)
    for name in ("opset8", "opset9"):
        setattr(runtime, name, getattr(openvino, name))
        monkeypatch.setitem(sys.modules, f"openvino.{name}", None)
        monkeypatch.delattr(openvino, name)
