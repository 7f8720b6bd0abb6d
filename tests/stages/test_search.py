"""Sweeps under a real Ray: what is trained, what is kept, what is not run twice, what comes of failures."""

import contextlib
import csv
import json
import os
import signal
from pathlib import Path

import pytest
from run_processes import descendants, started, titled, wait_until
from tiny_road import TINY

from tmkd_ray.cli import main
from tmkd_ray.config_reading import read_config
from tmkd_ray.search.space import check_space, sweep_folder
from tmkd_ray.trials import load_sweep

pytestmark = pytest.mark.ray

RATE = "training.learning_rate"
BASE = [*(item for item in TINY if not item.startswith(("methods", "seeds"))), "distiller=tmkd"]


@pytest.fixture(scope="module")
def road(tiny_copy, tmp_path_factory):
    """Overrides on the tiny run's teachers and store; the trials' copies lie in a folder of their own."""
    copies = tmp_path_factory.mktemp("copies")
    shorter = ["training.epochs=4", "training.batch_size=10"]
    return [*BASE, *shorter, f"output={tiny_copy}", f"knowledge.node_copies={copies}"]


def section(parameters, **options):
    return f"search={json.dumps({'parameters': parameters, **options})}"


def folder_of(overrides):
    return Path(sweep_folder(check_space(read_config(None, overrides))))


def run(overrides):
    """Run a sweep to its end; return it as it lies in its folder."""
    assert main(["search", *overrides]) == 0
    return load_sweep(str(folder_of(overrides)))


@pytest.fixture(scope="module")
def swept(road):
    """A sweep of three trials of which one diverges, with confirmation."""
    overrides = [
        *road,
        section({RATE: {"grid": [0.02, 1e30, 0.05]}}, confirm={"top": 2, "seeds": 2}, max_concurrent_trials=2),
    ]
    return overrides, run(overrides)


def test_a_trial_that_diverges_is_retried_then_marked_and_the_sweep_goes_on(swept):
    _, sweep = swept
    assert [trial.status for trial in sweep.trials] == ["finished", "failed", "finished"]
    assert [trial.failures for trial in sweep.trials] == [0, 2, 0]
    assert "diverged" in sweep.trials[1].error
    assert [len(trial.history) for trial in sweep.trials if trial.status == "finished"] == [4, 4]


def test_no_teacher_looks_at_anything_and_one_copy_serves_all(swept, road):
    _, sweep = swept
    assert sweep.teacher_passes == 0
    assert len(sweep.trials) + len(sweep.confirmations) == 7
    copies = Path(road[-1].partition("=")[2]) / "knowledge"
    assert len([path for path in copies.iterdir() if path.is_dir()]) == 2, "one of each split"


def test_the_best_are_trained_again_with_fresh_seeds(swept):
    _, sweep = swept
    assert sorted((run.number, run.seed) for run in sweep.confirmations) == [(0, 1), (0, 2), (2, 1), (2, 2)]
    first, second = sweep.confirmed()
    assert first.mean >= second.mean
    assert sweep.best() == first.trial


def test_the_best_config_reproduces_the_trial_to_the_bit(swept, tiny_copy, capsys):
    overrides, sweep = swept
    best = sweep.best()
    assert main(["distill", "--config", str(folder_of(overrides) / "best.yaml")]) == 0
    path = Path(capsys.readouterr().out.splitlines()[0]).parent / "outcome.json"
    outcome = json.loads(path.read_text())
    assert outcome["validation_accuracy"] == best.accuracy
    assert outcome["best_epoch"] == best.best_epoch
    losses = [record["loss"] for record in outcome["history"]]
    assert losses == [record.loss for record in best.history]


def test_the_outcome_lies_in_the_folder(swept, capsys):
    overrides, sweep = swept
    folder = folder_of(overrides)
    with open(folder / "trials.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["finished", "failed", "finished"]
    assert float(rows[2]["validation_accuracy"]) == sweep.trials[2].accuracy
    assert (folder / "trials.parquet").exists()
    assert "<!DOCTYPE html>" in (folder / "search.html").read_text()
    assert not list(folder.glob("trials/*-checkpoints"))
    assert main(["search", "show", *overrides]) == 0
    assert "3 of 3 trials begun: 2 finished, 1 failed" in capsys.readouterr().out


def test_a_finished_sweep_repeats_nothing_and_a_longer_one_goes_on(swept):
    overrides, sweep = swept
    assert run(overrides) == sweep
    shorter = [*overrides, "search.num_trials=2"]
    assert folder_of(shorter) == folder_of(overrides)
    assert run(shorter).trials == sweep.trials


def test_asha_stops_what_is_worse(road):
    """One trial after another: the second is stopped at the first rung where it is below the first."""
    options = {"scheduler": {"name": "asha", "reduction_factor": 2}, "max_concurrent_trials": 1}
    sweep = run([*road, section({RATE: {"grid": [0.05, 1e-9]}}, **options)])
    first, second = ([record.validation_accuracy for record in trial.history] for trial in sweep.trials)
    assert sweep.trials[0].status == "finished"
    ends = next((rung for rung in (1, 2) if second[rung - 1] < first[rung - 1]), 4)
    assert ends < 4, "else the two learning rates tell nothing"
    assert (sweep.trials[1].status, len(second)) == ("stopped", ends)


def test_optuna_weighs_accuracy_against_latency_until_all_was_tried(road, capsys):
    parameters = {"student.model": {"choice": ["resnet8", "resnet20"]}}
    options = {"searcher": "optuna", "objectives": ["validation_accuracy", "latency"], "num_trials": 3}
    options["max_concurrent_trials"] = 1  # in one process
    sweep = run([*road, section(parameters, **options), "training.epochs=1"])
    assert "2 trials instead of 3: there are no more values" in capsys.readouterr().err
    assert not sweep.record.budget_spent
    assert [trial.status for trial in sweep.trials] == ["finished"] * 2
    latency = {trial.parameters["student.model"]: trial.latency_ms for trial in sweep.trials}
    assert sorted(latency) == ["resnet20", "resnet8"]
    assert all(value > 0 for value in latency.values())
    assert sweep.pareto_front()


def test_a_population_changes_its_values_on_the_way(road):
    options = {
        "scheduler": {"name": "pbt", "perturbation_epochs": 1, "quantile": 0.5, "resample_probability": 0},
        "num_trials": 2,
        "max_concurrent_trials": 2,
    }
    sweep = run([*road, section({RATE: {"loguniform": [1e-3, 0.1]}}, **options), "training.epochs=6"])
    assert [trial.status for trial in sweep.trials] == ["finished", "finished"]
    assert all([record.epoch for record in trial.history] == [1, 2, 3, 4, 5, 6] for trial in sweep.trials)
    changed = [trial for trial in sweep.trials if trial.changes]
    assert changed, "the worse of the two takes the other's place at least once"
    for trial in changed:
        assert trial.parameters[RATE] == trial.changes[-1][1][RATE]
        assert 1e-3 <= trial.parameters[RATE] <= 0.1


def test_each_store_that_is_needed_is_built_once(road, tiny_copy, capsys):
    parameters = {"views.edge.strength": {"choice": [0.3, 0.5]}, RATE: {"loguniform": [0.01, 0.1]}}
    overrides = [
        *road,
        section(parameters, num_trials=4, max_concurrent_trials=1),
        "training.epochs=1",
        "teacher.text=null",
        "distiller=kd",
    ]
    overrides += ["distiller.teacher=fused", "distiller.weighting=uniform", "knowledge.num_variants=1"]
    overrides += [f"knowledge.path={tiny_copy / 'searched'}"]
    sweep = run(overrides)
    assert [trial.status for trial in sweep.trials] == ["finished"] * 4
    assert len({trial.store for trial in sweep.trials}) == len(
        {trial.parameters["views.edge.strength"] for trial in sweep.trials}
    )
    assert sweep.teacher_passes == 0
    stores = [path for path in tiny_copy.iterdir() if path.name.startswith("searched")]
    assert len(stores) == 2
    assert capsys.readouterr().err.count("images to compute") == 2


def test_a_trial_of_two_workers_trains_as_ddp(road):
    options = {"resources": {"workers": 2, "cpus": 1}, "max_concurrent_trials": 1}
    sweep = run([*road, section({RATE: {"grid": [0.05]}}, **options), "training.epochs=2"])
    (trial,) = sweep.trials
    assert (trial.status, len(trial.history)) == ("finished", 2)


def test_a_sweep_that_is_killed_goes_on_and_repeats_no_finished_trial(road, tmp_path):
    """A trial's worker is killed on the way, then the driver and all it started."""
    overrides = [*road, section({RATE: {"grid": [0.01, 0.02, 0.03]}}, max_concurrent_trials=1)]
    overrides += ["training.epochs=30", "training.labels_per_class=10"]
    folder = folder_of(overrides)
    with started(["-m", "tmkd_ray", "search", *overrides], tmp_path / "log") as process:

        def epochs():
            with contextlib.suppress(Exception):  # it is not there yet
                return [len(trial.history) for trial in load_sweep(str(folder)).trials]
            return []

        wait_until(lambda: epochs()[:1] > [2], process)
        (worker,) = titled(descendants(process.pid), "ImplicitFunc")
        os.kill(worker.pid, signal.SIGKILL)
        wait_until(lambda: len(epochs()) == 2 and epochs()[1] > 2, process)
    before = load_sweep(str(folder)).trials
    assert [trial.status for trial in before] == ["finished", "running"]
    assert before[0].failures == 1
    assert [record.epoch for record in before[0].history] == list(range(1, 31))
    after = run(overrides).trials
    assert [trial.status for trial in after] == ["finished"] * 3
    assert after[0] == before[0]
    assert after[1].history[: len(before[1].history) - 1] == before[1].history[:-1], "it went on, and not anew"
    losses = [record.loss for record in after[1].history]
    assert len(losses) == 30
