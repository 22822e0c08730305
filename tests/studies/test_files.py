"""A file is written whole or not at all, whatever interrupts the writing."""

import os

import pytest

from deformconv.studies.files import whole_file


def test_a_file_appears_at_the_end_of_the_block(tmp_path):
    path = tmp_path / "new" / "name.txt"
    with whole_file(path) as part:
        assert part.suffix == ".txt" and not path.exists()
        part.write_text("first")
    assert path.read_text() == "first"
    with whole_file(path) as part:
        part.write_text("second")
        assert path.read_text() == "first"
    assert path.read_text() == "second"
    assert os.listdir(path.parent) == ["name.txt"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, OSError])
def test_an_interrupted_file_leaves_the_old_one_and_no_rest(tmp_path, error):
    path = tmp_path / "name.txt"
    path.write_text("old")
    with pytest.raises(error), whole_file(path) as part:
        part.write_text("ha")
        raise error
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["name.txt"]
