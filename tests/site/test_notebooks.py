"""Every notebook runs, without a word on stderr, and has what a run prints; numbers of a training may differ a little."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?%?")


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


def text_of(notebook: Any) -> str:
    return "".join(output.text for output in outputs(notebook) if "text" in output)


def number_after(text: str, printed: str) -> float:
    found = re.search(re.escape(text) + r"\s*([+-]?[\d.]+)", printed)
    assert found, f"{text!r} is not in:\n{printed}"
    return float(found[1])


@pytest.fixture(scope="module")
def run() -> dict[str, tuple[Any, Any]]:
    """Each notebook as it is stored and as it is after another run."""
    nbformat = pytest.importorskip("nbformat")
    for library in ("nbclient", "ipykernel", "matplotlib", "mlxtend", "torch"):
        pytest.importorskip(library)
    file = importlib.util.spec_from_file_location("run_notebooks", ROOT / "docs" / "site" / "run_notebooks.py")
    assert file is not None and file.loader is not None
    script = importlib.util.module_from_spec(file)
    file.loader.exec_module(script)
    return {path.stem: (nbformat.read(path, as_version=4), script.executed(path)) for path in NOTEBOOKS}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Jupyter's own
class TestNotebooks:
    @pytest.mark.parametrize("name", [path.stem for path in NOTEBOOKS])
    def test_it_prints_and_draws_what_is_stored(self, run, name):
        stored, again = run[name]
        assert NUMBER.sub("#", text_of(again)) == NUMBER.sub("#", text_of(stored)) != ""
        assert "False" not in text_of(again)
        assert not [output for output in outputs(again) if output.get("name") == "stderr"]
        kinds = [[sorted(output.get("data", {"text": 0})) for output in outputs(each)] for each in (again, stored)]
        assert kinds[0] == kinds[1]

    def test_the_first_layer_finds_the_shift(self, run):
        printed = text_of(run["first_layer"][1])
        assert number_after("dy", printed) == pytest.approx(2.5, abs=0.1)
        assert number_after("dx", printed) == pytest.approx(-1.25, abs=0.1)

    def test_the_fine_tuned_net_reads_better(self, run):
        printed = text_of(run["swap_and_fine_tune"][1])
        before = number_after("scattered digits:", printed)
        assert number_after("upright digits:", printed) > 70
        assert number_after("deformable:", printed) > before + 15
        assert number_after("plain, trained on:", printed) > before + 15

    def test_what_is_drawn_has_offsets_and_masks(self, run):
        printed = text_of(run["where_it_looks"][1])
        assert number_after("loss", printed) < 1.8  # of guessing: 2.3
        assert 0.5 < number_after("offsets up to", printed) < 20
        assert number_after("masks", printed) < 1 < number_after("to", printed.partition("masks")[2]) <= 2


def test_there_are_three_and_they_are_small():
    assert len(NOTEBOOKS) == 3
    for path in NOTEBOOKS:
        assert path.stat().st_size < 100_000, path
