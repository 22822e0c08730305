"""The benchmark of RoI pooling on a GPU, in a smoke run on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torchvision")

from deformconv.bench import gpu_rois  # noqa: E402
from deformconv.bench.rois import RoiCase  # noqa: E402


def test_a_smoke_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Where there is no GPU ours has a reason in the place of a time, and the others have times."""
    monkeypatch.setattr(gpu_rois, "ROI_CASES", (RoiCase("tiny", boxes=5, channels=3, size=(9, 11), bins=2),))
    file = tmp_path / "rois.json"
    assert gpu_rois.main(["--device", "cpu", "--dtypes", "fp32", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [(row["direction"], row["library"]) for row in rows] == [
        (direction, library) for direction in ("forward", "forward+backward") for library in gpu_rois.PEERS
    ]
    for row in rows:
        if row["library"] == "deformconv":
            assert "BackendError" in row["reason"]
            continue
        assert row["milliseconds"] > 0 and row["same bits"]
        if row["library"] == "portable":
            names = {"output"} if row["direction"] == "forward" else {"output", "input", "offset", "mask"}
            assert set(row["errors"]) == names and row["error"] < 1e-4
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(rows) and "tiny" in lines[0]
