"""The parts of a sweep's stage that can be seen without a running Ray."""

import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from tmkd_ray.config_reading import read_config
from tmkd_ray.errors import UserError
from tmkd_ray.results import EpochRecord
from tmkd_ray.search.space import check_space, store_key, trial_config
from tmkd_ray.stages.search import concurrent_trials
from tmkd_ray.stages.sweep_records import Recorder, student_key
from tmkd_ray.stages.sweep_searchers import METRIC, NamedSearcher, OptunaSearcher, build_asha, check_searcher
from tmkd_ray.stages.trials import TRIAL, Assignment, TrialContext, TrialPlan, assignment_of, trial_key
from tmkd_ray.trials import load_trials

RATE = "training.learning_rate"


def epoch(number, accuracy=0.5):
    return EpochRecord(
        epoch=number,
        learning_rate=0.1,
        loss=1.0,
        validation_accuracy=accuracy,
        seconds=1.0,
        images_per_second=1.0,
    )


@pytest.fixture
def make(tmp_path):
    """A checked sweep, its plan and its recorder."""

    def make(parameters=None, *overrides, **options):
        parameters = parameters or {RATE: {"loguniform": [0.01, 0.1]}}
        search = repr({"parameters": parameters, **options}).replace("'", '"')
        space = check_space(
            read_config(None, ["dataset=digits", "training.epochs=3", f"search={search}", *overrides])
        )
        key = store_key(trial_config(space.config, {}))
        evolves = space.search.scheduler.name == "pbt"
        plan = TrialPlan(
            space.config, "k", {key: None}, str(tmp_path), "trials", tuple(parameters), evolves, 0.0
        )
        return space, plan, Recorder(space, plan, {key: "store"}, 4)

    return make


class Trial(SimpleNamespace):
    """What Tune calls a trial, as far as we look at it."""


def trial_of(number, rate=0.05, **fields):
    return Trial(config={TRIAL: {"number": number, "parameters": {RATE: rate}, "seed": 0}}, **fields)


def result(*epochs, passes=0):
    return {"epochs": [record.model_dump(mode="json") for record in epochs], "teacher_passes": passes}


def run_trial(recorder, trial, *epochs):
    recorder.on_trial_start(0, [], trial)
    for record in epochs:
        recorder.on_trial_result(0, [], trial, result(record))


# -- records -------------------------------------------------------------------------------------------------


def test_a_trial_is_finished_stopped_or_interrupted(make):
    _, plan, recorder = make()
    finished, stopped, interrupted = (trial_of(number, 0.01 * (number + 1)) for number in range(3))
    run_trial(recorder, finished, epoch(1), epoch(2), epoch(3))
    run_trial(recorder, stopped, epoch(1))
    run_trial(recorder, interrupted, epoch(1))
    recorder.on_trial_complete(0, [], finished)
    recorder.on_trial_complete(0, [], stopped)
    recorder.ends = time.time() - 1
    recorder.on_trial_complete(0, [], interrupted)
    assert [record.status for record in load_trials(plan.folder)] == ["finished", "stopped", "running"]


def test_it_is_said_how_far_the_sweep_is(make, monkeypatch, capsys):
    _, _, recorder = make()
    now = [recorder.started]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    trials = [trial_of(number, 0.01 * (number + 1)) for number in range(3)]
    for trial in trials:
        now[0] += 30
        run_trial(recorder, trial, epoch(1), epoch(2), epoch(3))
        recorder.on_trial_complete(0, [], trial)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith("(1/4 trials over, 120.0 an hour, about 1 min 30 s left)")
    assert lines[-1].endswith("(3/4 trials over, 120.0 an hour, about 30 s left)")
    now[0] += 90  # the last one takes long
    run_trial(recorder, trial_of(3, 0.09), epoch(1))
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "search: 3/4 trials over, 60.0 an hour, about 1 min 00 s left; running: trial 3 epoch 1/3"


def test_a_failure_is_counted_then_marked_with_its_reason(make, tmp_path):
    _, plan, recorder = make()
    (tmp_path / "error").write_text("Failure # 1\nTraceback …\ntmkd_ray.x.DivergedError: the loss is NaN\n\n")
    trial = trial_of(0, error_file=str(tmp_path / "error"))
    run_trial(recorder, trial, epoch(1))
    recorder.on_trial_recover(0, [], trial)
    (record,) = load_trials(plan.folder)
    assert (record.status, record.failures) == ("running", 1)
    recorder.on_trial_error(0, [], trial)
    recorder.on_trial_complete(0, [], trial)
    (record,) = load_trials(plan.folder)
    assert (record.status, record.failures) == ("failed", 2)
    assert record.error == "tmkd_ray.x.DivergedError: the loss is NaN"
    assert [each.epoch for each in record.history] == [1]


def test_what_is_over_is_known_to_the_next_run(make):
    space, plan, recorder = make()
    run_trial(recorder, trial_of(0), epoch(1), epoch(2), epoch(3))  # killed before it was said to be complete
    run_trial(recorder, trial_of(1, 0.02), epoch(1))
    again = Recorder(space, plan, recorder.fingerprints, 2)
    assert again.is_over(Assignment(0, {RATE: 0.05}, 0))
    assert not again.is_over(Assignment(1, {RATE: 0.02}, 0))
    assert not again.is_over(Assignment(0, {RATE: 0.05}, 1)), "another seed"
    run_trial(again, trial_of(1, 0.02), epoch(2), epoch(3))
    assert [record.epoch for record in load_trials(plan.folder)[1].history] == [1, 2, 3]
    rebuilt = Recorder(space, plan, dict.fromkeys(recorder.fingerprints, "another store"), 2)
    assert rebuilt.records == {}


def test_a_teachers_passes_are_counted(make):
    _, plan, recorder = make()
    trial = trial_of(0)
    recorder.on_trial_start(0, [], trial)
    recorder.on_trial_result(0, [], trial, result(epoch(1), passes=7))
    recorder.on_trial_result(0, [], trial, result(epoch(2), passes=14))
    assert load_trials(plan.folder)[0].teacher_passes == 14


def test_a_member_of_a_population_keeps_its_name_and_its_changes(make):
    _, plan, recorder = make(None, scheduler="pbt", num_trials=2)
    trial = Trial(config={TRIAL: {"number": 0, "seed": 0}, RATE: 0.05})
    run_trial(recorder, trial, epoch(1))
    trial.config[RATE] = 0.06
    run_trial(recorder, trial, epoch(2))
    (record,) = load_trials(plan.folder)
    assert record.parameters == {RATE: 0.06}
    assert record.changes == [(1, {RATE: 0.06})]
    assert assignment_of(plan, trial.config).parameters == {RATE: 0.06}


# -- searchers and schedulers --------------------------------------------------------------------------------


def test_asha_has_heard_of_earlier_trials(make):
    space, _, recorder = make(None, "training.epochs=9", scheduler={"name": "asha", "reduction_factor": 2})
    newcomer = SimpleNamespace(trial_id="new")
    bad = {"epoch": 1, METRIC: 0.1}
    fresh = build_asha(space, [])
    fresh.on_trial_add(None, newcomer)
    assert fresh.on_trial_result(None, newcomer, bad) == TrialScheduler.CONTINUE
    for number in range(3):
        run_trial(recorder, trial_of(number, 0.02 + 0.01 * number), *(epoch(e, 0.8) for e in range(1, 10)))
        recorder.on_trial_complete(0, [], trial_of(number, 0.02 + 0.01 * number))
    warm = build_asha(space, recorder.records.values())
    warm.on_trial_add(None, newcomer)
    assert warm.on_trial_result(None, newcomer, bad) == TrialScheduler.STOP


def test_optuna_runs_what_is_left_first_then_suggests(make):
    parameters = {"student.model": {"choice": ["resnet8", "resnet20"]}, RATE: {"loguniform": [0.01, 0.1]}}
    space, _, recorder = make(
        parameters, searcher="optuna", objectives=["validation_accuracy", "latency"], num_trials=5
    )
    students = [trial_config(space.config, {"student.model": name}) for name in ("resnet8", "resnet20")]
    recorder.latencies = {student_key(config): 1.0 + place for place, config in enumerate(students)}
    left = Assignment(3, {"student.model": "resnet20", RATE: 0.05}, 0)
    searcher = OptunaSearcher(space, recorder, [], [left], iter(range(4, 9)))
    first = searcher.suggest("a")[TRIAL]
    assert first == {"number": 3, "parameters": left.parameters, "seed": 0}
    second = searcher.suggest("b")[TRIAL]
    assert second["number"] == 4
    searcher.on_trial_complete("a", {"best_accuracy": 0.75})
    searcher.on_trial_complete("b", None, error=True)
    told = searcher.suggestions.study.get_trials()
    assert [trial.state.name for trial in told] == ["COMPLETE", "FAIL"]
    assert told[0].values == [0.75, 2.0]


def test_a_searcher_by_name_runs_what_is_left_first():
    class Inner:
        told = ()

        def suggest(self, trial_id):
            self.asked = (*getattr(self, "asked", ()), trial_id)
            return {RATE: (0.01, 0.03)[len(self.asked) > 1]}

        def on_trial_complete(self, *arguments):
            self.told += (arguments,)

    inner = Inner()
    searcher = NamedSearcher(inner, 0, [Assignment(0, {RATE: 0.01}, 0)], iter([1]))
    assert searcher.suggest("a")[TRIAL]["parameters"] == {RATE: 0.01}
    assert searcher.suggest("b")[TRIAL] == {"number": 1, "parameters": {RATE: 0.03}, "seed": 0}
    searcher.on_trial_complete("a", {})
    searcher.on_trial_complete("b", {"x": 1})
    assert inner.asked == ("b", "b-1"), "asked again: the first answer is what is left of an earlier run"
    assert inner.told == (("b", None, True), ("b-1", {"x": 1}, False))
    assert searcher.suggest("c") == Searcher.FINISHED, "0.03 again and again"


def test_an_unknown_searcher_is_a_clear_error():
    check_searcher("hyperopt")
    with pytest.raises(UserError, match=r"unknown 'optunna'\. Choices: random, grid, optuna, "):
        check_searcher("optunna")


@pytest.mark.parametrize(
    ("resources", "gpus", "expected"),
    [
        ({}, 0.0, 8),
        ({"cpus": 3}, 0.0, 2),
        ({"cpus": 0.5}, 0.0, 16),
        ({"workers": 2}, 0.0, 4),
        ({"cpus": 0.5}, 0.25, 8),
        ({"workers": 2, "cpus": 0.1}, 1.0, 1),
        ({"cpus": 100}, 0.0, 1),
    ],
)
def test_as_many_trials_at_once_as_find_room_also_on_parts_of_a_gpu(
    make, monkeypatch, resources, gpus, expected
):
    space, plan, _ = make(None, resources=resources)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 8.0, "GPU": 2.0})
    monkeypatch.setattr("ray.nodes", lambda: ["one", "another"])
    assert concurrent_trials(space, replace(plan, gpus=gpus)) == expected
    space, plan, _ = make(None, resources=resources, max_concurrent_trials=5)
    assert concurrent_trials(space, replace(plan, gpus=gpus)) == 5


# -- contexts ------------------------------------------------------------------------------------------------


def test_each_epoch_is_told_once_and_after_a_restart_all_of_them(tmp_path):
    sent = []
    context = TrialContext(str(tmp_path), torch.device("cpu"), sent.append)
    history = [epoch(1, 0.25), epoch(2, 0.75), epoch(3, 0.5)]
    for count in (1, 2, 3):
        context.epoch_finished(history[:count])
    context.tell(history)
    assert [[record["epoch"] for record in metrics["epochs"]] for metrics in sent] == [[1], [2], [3]]
    assert [(metrics["validation_accuracy"], metrics["best_accuracy"]) for metrics in sent] == [
        (0.25, 0.25),
        (0.75, 0.75),
        (0.5, 0.75),
    ]
    assert {metrics["teacher_passes"] for metrics in sent} == {0}
    sent.clear()
    TrialContext(str(tmp_path), torch.device("cpu"), sent.append).tell(history)
    assert [record["epoch"] for record in sent[0]["epochs"]] == [1, 2, 3]


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_checkpoints_lie_in_the_sweeps_folder_newest_first(tmp_path, scheme):
    context = TrialContext(f"{scheme}{tmp_path / 'kept'}", torch.device("cpu"), print)
    assert list(context.checkpoints()) == []
    for number in range(4):
        made = tmp_path / f"made{number}"
        made.mkdir()
        (made / "tensors.pt").write_bytes(bytes([number]))
        (made / "state.json").write_text(str(number))
        context.report({}, made)
    found = [
        ((folder / "state.json").read_text(), (folder / "tensors.pt").read_bytes())
        for folder in TrialContext(context.place, torch.device("cpu"), print).checkpoints()
        if (folder / "state.json").exists()
    ]
    assert found == [("3", b"\x03"), ("2", b"\x02")]


def test_a_trials_name_hangs_on_its_values_and_seed_but_a_members_on_its_number(make):
    _, plan, _ = make()
    names = {
        trial_key(plan, Assignment(number, {RATE: rate}, seed))
        for number, rate, seed in ((0, 0.1, 0), (0, 0.2, 0), (0, 0.1, 1))
    }
    assert len(names) == 3
    assert trial_key(plan, Assignment(5, {RATE: 0.1}, 0)) in names
    evolving = replace(plan, evolves=True)
    assert trial_key(evolving, Assignment(0, {RATE: 0.1}, 0)) == trial_key(
        evolving, Assignment(0, {RATE: 0.2}, 0)
    )
    assert trial_key(evolving, Assignment(0, {RATE: 0.1}, 0)) != trial_key(
        evolving, Assignment(1, {RATE: 0.1}, 0)
    )
