"""The benchmark of attention and aggregation on a GPU, in a smoke run on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from deformconv.bench import aggregate, attention, gpu_attention  # noqa: E402


def test_a_smoke_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Where there is no GPU ours has a reason in the place of a time, and the others have times; a budget ends it."""
    monkeypatch.setattr(gpu_attention, "CASES", (attention.TINY, aggregate.TINY._replace(batch=3)))
    file = tmp_path / "attention.json"
    assert gpu_attention.main(["--device", "cpu", "--dtypes", "fp32,bf16", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == len(capsys.readouterr().out.splitlines()) == 2 * 2 * 2 * len(gpu_attention.LIBRARIES)
    for row in rows:
        if row["library"] == "deformconv":
            assert "BackendError" in row["reason"]
        elif "not installed" not in row.get("reason", ""):
            assert row["milliseconds"] > 0 and row["same bits"], row
            assert row["library"] != "portable" or row["error"] < (1e-4 if row["dtype"] == "fp32" else 2e-2), row
    assert gpu_attention.main(["--device", "cpu", "--budget", "0"]) == 0
    assert capsys.readouterr().out == "0 seconds are over\n"
