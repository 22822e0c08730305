"""Processes that run jobs: their order, their threads, and what is said of one that fails or dies."""

import os

import pytest

for needed in ("torch", "torchvision", "lightning_fabric", "mlxtend", "skimage", "pycocotools"):
    pytest.importorskip(needed, reason="the experiment needs it")

from tests.studies.detection import duties  # noqa: E402

from deformconv.studies.detection.plan import FAST, Job, plan  # noqa: E402
from deformconv.studies.detection.workers import WorkerError, run_jobs  # noqa: E402

pytestmark = pytest.mark.slow


def ignore(*_):
    pass


def test_jobs_run_two_at_a_time_after_those_that_they_need(tmp_path):
    jobs = plan(["regular", "seconds", "v2"], [0])
    seen = []
    environment = dict(os.environ)
    run_jobs(tmp_path, FAST, jobs[1:], jobs[:1], workers=2, watch=lambda *event: seen.append(event), duty=duties.note)
    assert dict(os.environ) == environment
    lines = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert [line[1] for line in lines if line[0] == "end"][-1] == "seconds"
    begun = {line[1]: line[2:] for line in lines if line[0] == "begin"}
    assert begun.keys() == {"regular", "v2", "seconds"}
    processes = {begun[arm][0] for arm in begun}
    assert begun["regular"][0] != begun["v2"][0] and len(processes) == 2 and str(os.getpid()) not in processes
    assert all(threads == ["1", "1"] for _, *threads in begun.values())
    for job in jobs[1:]:
        assert [event[1:] for event in seen if event[0] == job] == [(0.0, "begins"), (0.5, "half"), (2.0, "AP 12.3")]


def test_a_job_that_raises_ends_all_with_its_traceback(tmp_path):
    with pytest.raises(WorkerError, match=r"(?s)much-0-base failed:.*ValueError: no such thing"):
        run_jobs(tmp_path, FAST, [Job("much", 0, "base")], [], workers=2, watch=ignore, duty=duties.fail)


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_process_that_dies_ends_all_with_its_signal(tmp_path):
    with pytest.raises(WorkerError, match=r"the process of much-0-base ended with -9; a negative number is the signal"):
        run_jobs(tmp_path, FAST, [Job("much", 0, "base")], [], workers=1, watch=ignore, duty=duties.die)


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_process_that_dies_while_it_has_nothing_to_do(tmp_path):
    """The regular arm's, while v2 is trained on the other one; equal seconds need both."""
    base, *others = plan(["seconds"], [0])
    with pytest.raises(WorkerError, match=r"the process of much-0-seconds ended with -9"):
        run_jobs(tmp_path, FAST, others, [base], workers=2, watch=ignore, duty=duties.die_afterwards)


def test_a_job_that_can_never_begin(tmp_path):
    with pytest.raises(ValueError, match="much-0-v2 needs a job that is neither done nor among those to do; expected it"):
        run_jobs(tmp_path, FAST, [Job("much", 0, "v2")], [], workers=1, watch=ignore, duty=duties.note)
