"""The experiment's trainings: that they are kept, and that they go on to the same numbers."""

import json

import pytest

for needed in ("torch", "torchvision", "lightning_fabric", "mlxtend", "skimage", "pycocotools"):
    pytest.importorskip(needed, reason="the experiment needs it")

import torch  # noqa: E402

from deformconv.studies.detection import jobs  # noqa: E402
from deformconv.studies.detection.detector import ARMS, cut, fresh, inner  # noqa: E402
from deformconv.studies.detection.evaluation import Scores  # noqa: E402
from deformconv.studies.detection.plan import Budget, Job, result  # noqa: E402
from deformconv.studies.detection.scenes import Scenes  # noqa: E402
from deformconv.studies.detection.training import History  # noqa: E402

TINY = Budget(base_steps=4, steps=3, batch=2, size=64, images=3)


def ignore(*_):
    pass


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A folder with three finished trainings."""
    folder = tmp_path_factory.mktemp("done")
    for arm in ("base", "regular", "v2"):
        jobs.run_job(folder, TINY, Job("much", 0, arm), ignore)
    return folder


def test_what_a_job_keeps(done):
    assert {path.name for path in done.iterdir()} == {
        f"much-0-{arm}.{end}" for arm in ("base", "regular", "v2") for end in ("json", "pt")
    }
    found = result(done, Job("much", 0, "v2"))
    assert (found["arm"], found["seed"], found["variation"], found["steps"]) == ("v2", 0, "much", 3)
    assert found["seconds"] > 0 and found["parameters"] > result(done, Job("much", 0, "regular"))["parameters"]
    assert 0 <= found["AP"] <= found["AP50"] <= 100
    assert all(map(torch.isfinite, map(torch.tensor, found["losses"].values())))
    assert result(done, Job("much", 0, "v1")) is None
    model = jobs.load(done, Job("much", 0, "v2"), TINY)
    kept = torch.load(done / "much-0-v2.pt", weights_only=True)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())
    assert len(kept) > len(torch.load(done / "much-0-regular.pt", weights_only=True))


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["regular", "v2-mimic"])
def test_an_interrupted_job_goes_on_to_the_same_numbers(arm, done, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "_EVERY", 1)
    job, base = Job("much", 0, arm), done / "much-0-base.pt"
    folders = [tmp_path / "whole", tmp_path / "interrupted"]
    for folder in folders:
        folder.mkdir()
        (folder / base.name).write_bytes(base.read_bytes())
    whole = jobs.run_job(folders[0], TINY, job, ignore)
    steps = []

    def interrupt(share, doing):
        if share == pytest.approx(2 / 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        jobs.run_job(folders[1], TINY, job, interrupt)
    assert {path.name for path in folders[1].iterdir()} == {base.name, f"{job.name}.checkpoint.pt"}
    again = jobs.run_job(folders[1], TINY, job, lambda share, doing: steps.append(share))
    assert len(steps) == 2 + 1  # the second step again, whose checkpoint was not yet written, the third, and the test
    assert {**whole, "seconds": 0} == {**again, "seconds": 0}
    states = [torch.load(folder / f"{job.name}.pt", weights_only=True) for folder in folders]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_arms_are_trained_on_the_same_scenes_and_tested_on_others(done, tmp_path, monkeypatch):
    """That is what makes their differences paired; only their nets and numbers of steps differ."""
    (tmp_path / "much-0-base.pt").write_bytes((done / "much-0-base.pt").read_bytes())
    for arm in ("regular", "v2"):
        (tmp_path / f"much-0-{arm}.json").write_text(json.dumps({"seconds": 6.0, "steps": 3}))
    trained, tested = {}, {}

    def train(model, scenes, **settings):
        settings = {name: value for name, value in settings.items() if name not in ("checkpoint", "progress", "steps")}
        trained[job.arm] = scenes.part, scenes.seed, scenes.size, scenes.variation, settings
        return History([{"loss": 1.0}], 1.0)

    def detections(model, scenes, count):
        tested[job.arm] = scenes.part, scenes.seed, scenes.size, scenes.variation, count
        return []

    monkeypatch.setattr(jobs, "train", train)
    monkeypatch.setattr(jobs, "detections", detections)
    monkeypatch.setattr(jobs, "scores", lambda pairs: Scores(1.0, 2.0, 3.0, {}))
    monkeypatch.setattr(jobs, "operations", lambda *_: 1.0)
    for arm in ["scratch", *ARMS]:
        job = Job("much", 0, arm)
        jobs.run_job(tmp_path, TINY, job, ignore)
    scratch = trained.pop("scratch")
    assert trained.keys() == ARMS.keys() and all(one == trained["regular"] for one in trained.values())
    assert trained["regular"][:4] == ("training", 0, 64, "much")
    assert scratch[4]["seed"] != trained["regular"][4]["seed"]  # what comes after the cut is new to all
    job = Job("much", 0, "base")
    jobs.run_job(tmp_path, TINY, job, ignore)
    assert trained["base"] == scratch
    assert set(tested.values()) == {("test", 2, 64, "much", 3)}
    job = Job("none", 1, "base")
    jobs.run_job(tmp_path, TINY, job, ignore)
    assert trained["base"][:4] == ("training", 1, 64, "none") and tested["base"] == ("test", 2, 64, "none", 3)
    assert trained["base"][4]["seed"] not in (scratch[4]["seed"], trained["regular"][4]["seed"])


def test_equal_seconds_follow_from_what_was_measured(done, tmp_path):
    job = Job("much", 0, "seconds")
    for arm, seconds, steps in (("regular", 6.0, 3), ("v2", 9.0, 3)):
        (tmp_path / f"much-0-{arm}.json").write_text(json.dumps({"seconds": seconds, "steps": steps}))
    assert jobs._steps(tmp_path, TINY, job) == round(9.0 / (6.0 / 3))
    assert jobs._steps(tmp_path, TINY, Job("much", 0, "v1")) == 3
    assert jobs._steps(tmp_path, TINY, Job("much", 0, "scratch")) == 4


@pytest.mark.parametrize("arm", ["regular", "v2-conv", "v2"])
def test_operations_by_hand(arm):
    """Convolutions and matrix products by their shapes, pooling by its samples; predictors among them."""
    model, scenes = inner(cut(fresh(0, 64), arm, 0)).eval(), Scenes("test", 0, size=64)
    counts = []

    def count(module, given, output):
        positions = output[0, 0].numel() * len(output) if output.ndim == 4 else len(output)
        counts.append(2 * module.weight.numel() * positions)

    def count_pooling(module, given, output):
        counts.append(output.numel() * 4 * 8 * (2 if arm == "v2" else 1))  # v2 pools once to predict and once more

    for module in model.modules():
        if getattr(module, "weight", None) is not None and module.weight.ndim in (2, 4):
            module.register_forward_hook(count)
    model.roi_heads.box_roi_pool.register_forward_hook(count_pooling)
    found = jobs.operations(model, scenes)
    assert found == pytest.approx(sum(counts) / jobs._COUNTED, rel=1e-9)
    assert 1e8 < found < 1e9
