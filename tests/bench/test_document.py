"""The results' file, and the README and the chart that are made from it."""

from __future__ import annotations

import copy
import json
import re
import struct
from itertools import combinations
from pathlib import Path

import pytest
from tests.bench import made_up

from deformconv.bench import chart, document, readme
from deformconv.bench.cases import CASES, named
from deformconv.bench.figures import digits
from deformconv.bench.peers import DIRECTIONS

ROOT = Path(__file__).parents[2]


def test_the_machine_is_described():
    found = document.machine()
    assert found["processor"] and found["python"].startswith("3.")
    assert 1 <= found["cores"] <= found["cores present"]
    assert {"deformconv", "numpy", "numba"} <= set(found["packages"])
    assert json.loads(json.dumps(found)) == found  # it is compared with what a file has


def test_sections_join():
    first = document.join(None, made_up.MACHINE, "speed", {"rows": [1]})
    second = document.join(first, made_up.MACHINE, "memory", {"rows": [2]})
    assert second == {"machine": made_up.MACHINE, "speed": {"rows": [1]}, "memory": {"rows": [2]}}
    assert document.join(second, made_up.MACHINE, "speed", {"rows": [3]})["speed"] == {"rows": [3]}
    assert first == {"machine": made_up.MACHINE, "speed": {"rows": [1]}}


def test_figures_of_two_machines_are_not_mixed():
    other = made_up.MACHINE | {"processor": "Another", "cores": 4}
    with pytest.raises(ValueError, match="measured elsewhere, with another cores, processor: choose a new file"):
        document.join({"machine": other}, made_up.MACHINE, "speed", {})


@pytest.mark.parametrize(
    ("text", "message"), [("{", "it is not JSON"), ("[]", "no benchmark has written it"), ("{}", "no benchmark has")]
)
def test_what_is_no_benchmark_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        document.read(text)


class TestReadme:
    def test_the_committed_one_is_made_from_the_committed_results(self):
        text = (ROOT / "README.md").read_text(encoding="utf-8")
        file = ROOT / readme.RESULTS
        if not file.exists():
            assert readme.CHART not in text
            return
        found = document.read(file.read_text(encoding="utf-8"))
        assert readme.replaced(text, readme.section(found)) == text
        assert readme.everything(found) == (ROOT / readme.TABLES).read_text(encoding="utf-8")
        assert (ROOT / readme.CHART).exists()
        # Of everything, and not of what was in a hurry.
        assert {"speed", "net", "offsets", "small", "scaling", "memory", "startup"} <= set(found)
        assert {row["layer"]["name"] for row in found["speed"]["rows"]} == {case.name for case in CASES}

    def test_its_line_has_the_means_that_matter(self):
        found = made_up.document()
        text = readme.section(found)
        assert len(text.splitlines()) == 3
        assert (
            "**forward 2.00 times as fast as the faster of ONNX Runtime and OpenVINO and 16.0 times as fast as torchvision; "
            "forward and backward 32.0 times as fast as torchvision** (float32, 2 threads of A Processor)"
        ) in text
        found["net"] = made_up.section(made_up.net_rows())
        said = "; a whole net takes 4.00 times forward the time of the same net of plain convolutions ("
        assert said in readme.section(found)

    def test_the_table_says_what_was_measured(self):
        text = readme.everything(made_up.document())
        text = text[: text.index("## Speed")]
        assert "- forward: **2.00 times** faster than the faster of ONNX Runtime and OpenVINO; 19 cases" in text
        assert "- forward+backward: **0.500** times a plain convolution" in text
        lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in re.findall(r"^\|.*", text, re.M)]
        cells = {line[0]: line[1:] for line in lines}
        assert len(cells) == 2 + len(CASES)
        assert cells["2x64x56x56 -> 64"] == ["4.00", "8.00", "32.0", "64.0", "2.00", "10.0", "320", "20.0"]
        assert cells["4x64x4096 -> 64, kernel 9"][1] == "128*" and r"\* as 2-D of height 1" in text
        assert cells["1x32x16x28x28 -> 32, kernel 3x3x3"][1:3] == ["-", "-"]
        assert "ncnn (weights packed at load) computes the images of a batch one after the other" in text

    def test_what_was_measured_without_ncnn_has_no_column_for_it(self):
        found = made_up.document()
        for row in found["speed"]["rows"]:
            del row["results"]["ncnn"]
        assert "ncnn" not in readme.everything(found)

    def test_what_a_net_costs_comes_first(self):
        found = made_up.document()
        assert "A whole net" not in readme.everything(found)  # it is not said where it was not measured
        found["net"] = made_up.section(made_up.net_rows())
        text = readme.everything(found)
        said = text.index("takes **4.00 times** forward (at most 8.00, small) the time of the same net of plain convolutions")
        assert said < text.index("faster than the faster of ONNX Runtime")
        assert "over 2 nets" in text
        assert "## Whole nets, milliseconds" in readme.everything(found)

    def test_only_its_section_is_replaced(self):
        text = f"before\n{readme.BEGIN}old\n{readme.END}after\n"
        assert readme.replaced(text, "new\n") == f"before\n{readme.BEGIN}new\n{readme.END}after\n"
        for wrong in ("no marks", readme.BEGIN):
            with pytest.raises(ValueError, match="the document has no <!-- benchmark:"):
                readme.replaced(wrong, "new\n")

    def test_everything_is_written(self, tmp_path):
        pytest.importorskip("matplotlib")
        found = made_up.document()
        found["memory"] = made_up.section([])
        (tmp_path / "benchmarks").mkdir()
        (tmp_path / readme.RESULTS).write_text(json.dumps(found))
        (tmp_path / "README.md").write_text(f"# Title\n{readme.BEGIN}{readme.END}")
        readme.main(tmp_path)
        assert (tmp_path / "README.md").read_text() == f"# Title\n{readme.BEGIN}{readme.section(found)}{readme.END}"
        tables = (tmp_path / readme.TABLES).read_text()
        assert "## Speed, forward+backward" in tables and "## Memory" in tables and "## Scaling" not in tables
        assert "| c64-56        | forward          | 0.90 to 1.20 |" in tables
        assert (tmp_path / readme.CHART).stat().st_size < 300_000


class TestChart:
    def figure(self, rows):
        pytest.importorskip("matplotlib")
        from matplotlib.figure import Figure

        figure = Figure(layout="constrained")
        chart.draw(figure, rows, "a caption")
        return figure

    def test_times_are_relative_to_ours(self):
        rows = [
            made_up.row(named("primes"), deformconv=2.0, onnxruntime=3.0, dense=1.0),
            made_up.row(named("dbnet"), torchvision=3.0),
        ]
        assert chart.relative(rows) == [("onnxruntime", 1.5), ("dense", 0.5)]

    def test_numbers_of_close_means_do_not_overlap(self):
        times = {"deformconv": 1.0, "onnxruntime": 1.43, "ncnn": 1.58, "openvino": 2.14, "torchvision": 100.0, "dense": 0.25}
        figure = self.figure([made_up.row(case, direction, **times) for case in CASES for direction in DIRECTIONS])
        figure.set_size_inches(13, 10)
        figure.canvas.draw()
        numbers = {digits(time) for name, time in times.items() if name != "deformconv"}
        for axes in figure.axes:
            boxes = [text.get_window_extent() for text in axes.texts if text.get_text() in numbers]
            assert len(boxes) == len(numbers)
            assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))

    def test_every_case_and_library_is_named(self):
        figure = self.figure(made_up.rows())
        forward, training = figure.axes
        labels = [label.get_text().strip() for label in forward.get_yticklabels()]
        assert labels == [*(case.name for case in CASES), "geometric mean"]
        shown = [text.get_text() for text in figure.legends[0].get_texts()]
        assert shown == [
            "deformconv",
            "ONNX Runtime",
            "OpenVINO",
            "ncnn (weights packed at load)",
            "torchvision",
            "kornia",
            "plain convolution",
        ]
        assert forward.get_xscale() == "log"
        low, high = forward.get_xlim()
        assert low < 0.5 and high > 32
        assert "32.0" in [text.get_text() for text in training.texts]  # torchvision's mean

    def test_a_missing_direction_takes_no_room(self):
        rows = [row for row in made_up.rows() if row["direction"] == "forward"]
        assert len(self.figure(rows).axes) == 1

    def test_a_case_that_only_one_direction_has(self):
        rows = copy.deepcopy(made_up.rows())[:3]
        assert len(self.figure(rows).axes) == 2

    @pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
    def test_files(self, suffix, tmp_path):
        pytest.importorskip("matplotlib")
        found = made_up.document()
        found["speed"]["rows"] = found["speed"]["rows"][:4]
        file = tmp_path / f"chart{suffix}"
        chart.save(file, found)
        written = file.read_bytes()
        if suffix == ".png":
            width, height = struct.unpack(">II", written[16:24])
            assert width > height > 200
        else:
            assert len(written) > 5000
