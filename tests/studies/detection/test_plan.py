"""The experiment's jobs: their order, and that a folder has those of one budget."""

import json
import os
from dataclasses import replace

import pytest

from deformconv import __version__
from deformconv.files import InUseError
from deformconv.studies.detection import plan
from deformconv.studies.detection.plan import ARMS

TINY = plan.Budget(base_steps=4)


def test_a_plan_has_every_arm_after_what_it_needs():
    planned = plan.plan(ARMS, [3, 4], ["none", "some", "much"])
    assert len(planned) == len(set(planned)) == 2 * (len(ARMS) + 1 + 2 * 3)
    for number, job in enumerate(planned):
        assert set(job.needs) <= set(planned[:number])
    assert {job.arm for job in planned if job.variation == "none"} == {"base", "regular", "v2"}
    assert planned[0].name == "much-3-base"


def test_a_plan_adds_what_arms_are_compared_with():
    assert [job.arm for job in plan.plan(["v1"], [0])] == ["base", "regular", "v1"]
    assert [job.arm for job in plan.plan(["seconds"], [0])] == ["base", "regular", "v2", "seconds"]
    assert [job.arm for job in plan.plan(["scratch"], [0])] == ["base", "scratch", "regular"]


def test_a_folder_is_of_one_budget_and_version(tmp_path):
    plan.accepted(tmp_path, TINY)
    plan.accepted(tmp_path, TINY)
    with pytest.raises(
        ValueError, match="has results with base steps 4, and this run has 5: choose another folder by --output"
    ):
        plan.accepted(tmp_path, replace(TINY, base_steps=5))
    path = tmp_path / "budget.json"
    kept = json.loads(path.read_text())
    path.write_text(json.dumps({**kept, "deformconv": "0.0.1"}))
    with pytest.raises(ValueError, match=f"has results with deformconv 0.0.1, and this run has {__version__}"):
        plan.accepted(tmp_path, TINY)
    for text in ("{", "[]", "{}"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"budget\.json is not what this version writes: .*, or empty this one"):
            plan.accepted(tmp_path, TINY)  # to delete the file alone would let any result pass


def test_a_folder_is_held_by_one_at_a_time(tmp_path):
    folder = tmp_path / "new" / "folder"
    for _ in range(2):  # and is given back
        with plan.held(folder):
            expected = rf"{folder} is in use by another command, process {os.getpid()}: wait until .* another folder"
            with pytest.raises(plan.FolderError, match=expected), plan.held(folder):
                raise AssertionError
    with pytest.raises(InUseError), plan.held(folder):  # what is raised within is nobody else's folder
        raise InUseError("other")
