"""Records of a sweep: ranking, confirmation, tables, and what is read back."""

import csv
import io
import statistics

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tmkd_ray.errors import UserError
from tmkd_ray.results import EpochRecord
from tmkd_ray.trials import (
    Sweep,
    SweepRecord,
    TrialRecord,
    format_sweep,
    load_sweep,
    save_sweep,
    save_trial,
    trials_csv,
    trials_parquet,
)


def epoch(number, accuracy):
    return EpochRecord(
        epoch=number,
        learning_rate=0.1,
        loss=1.0,
        validation_accuracy=accuracy,
        seconds=2.0,
        images_per_second=10.0,
    )


def trial(number, accuracies, status="finished", seed=0, latency=None, **parameters):
    return TrialRecord(
        key=f"key{number}-{seed}",
        number=number,
        parameters={"training.learning_rate": 0.1 * (number + 1), "distiller.strategy": "kd", **parameters},
        seed=seed,
        store="s",
        status=status,
        epochs=3,
        history=[epoch(place, accuracy) for place, accuracy in enumerate(accuracies, start=1)],
        started=100.0 + number,
        ended=110.0 + number,
        latency_ms=latency,
        error="DivergedError: the loss is NaN" if status == "failed" else None,
    )


def sweep(trials, folder="/f", confirmations=(), **changes):
    record = SweepRecord(
        name="a",
        key="k",
        folder=str(folder),
        created="2026-01-01T00:00:00+00:00",
        dataset="digits",
        student="resnet8",
        epochs=3,
        num_trials=9,
        parameters={
            "training.learning_rate": {"loguniform": [0.01, 1]},
            "distiller.strategy": {"choice": ["kd"]},
        },
        searcher="random",
        scheduler="none",
        objectives=("validation_accuracy",),
        config={},
    ).model_copy(update=changes)
    return Sweep(record=record, trials=list(trials), confirmations=list(confirmations))


def test_the_best_epoch_is_the_trials_figure():
    found = trial(0, [0.5, 0.75, 0.75])
    assert (found.accuracy, found.best_epoch, found.seconds) == (0.75, 2, 6.0)
    assert trial(0, []).accuracy is None


def test_an_epoch_that_is_trained_again_replaces_what_followed_it():
    found = trial(0, [0.5, 0.6, 0.7]).with_epoch(epoch(2, 0.9))
    assert [(record.epoch, record.validation_accuracy) for record in found.history] == [(1, 0.5), (2, 0.9)]


def test_trials_that_were_trained_to_the_end_rank_first():
    found = sweep(
        [
            trial(0, [0.5, 0.6, 0.7]),
            trial(1, [0.9], "stopped"),
            trial(2, [0.99], "running"),
            trial(3, [0.8, 0.8, 0.8]),
            trial(4, [1.0], "failed"),
            trial(5, [], "failed"),
        ]
    )
    assert [each.number for each in found.ranked()] == [3, 0, 1, 2, 4]
    assert found.best().number == 3
    assert sweep([trial(1, [0.9], "stopped"), trial(2, [1.0], "failed")]).best().number == 1
    assert sweep([trial(2, [1.0], "running")]).best() is None


def test_the_front_holds_what_no_other_beats_in_both():
    found = sweep(
        [
            trial(0, [0.9], latency=5.0),
            trial(1, [0.8], latency=2.0),
            trial(2, [0.7], latency=3.0),
            trial(3, [0.9], latency=6.0),
            trial(4, [0.95], "stopped", latency=1.0),
            trial(5, [0.9], latency=5.0),
        ],
        objectives=("validation_accuracy", "latency"),
    )
    assert [each.number for each in found.pareto_front()] == [0, 5, 1]


def test_confirmed_trials_are_ranked_by_the_mean_over_fresh_seeds():
    trials = [trial(0, [0.9, 0.9, 0.9]), trial(1, [0.8, 0.8, 0.8]), trial(2, [0.7, 0.7, 0.7])]
    runs = [trial(0, [value] * 3, seed=seed) for seed, value in ((1, 0.5), (2, 0.6))]
    runs += [trial(1, [value] * 3, seed=seed) for seed, value in ((1, 0.7), (2, 0.8))]
    runs += [trial(2, [1.0] * 3, seed=1)]  # beyond the two that were to be confirmed
    found = sweep(trials, confirmations=runs, confirm=(2, 2))
    first, second = found.confirmed()
    assert (first.trial.number, first.accuracies, first.seeds) == (1, [0.7, 0.8], [1, 2])
    assert first.mean == pytest.approx(0.75)
    assert first.std == pytest.approx(statistics.stdev([0.7, 0.8]))
    assert second.trial.number == 0
    assert found.best().number == 1
    missing = sweep(trials, confirmations=runs[:3], confirm=(2, 2))
    assert [each.trial.number for each in missing.confirmed()] == [0]


def test_what_is_written_is_read_back(tmp_path):
    made = sweep([trial(0, [0.5]), trial(1, [], "failed")], tmp_path, [trial(0, [0.5], seed=4)])
    save_sweep(made.record)
    for each in reversed(made.trials):
        save_trial(str(tmp_path), each)
    save_trial(str(tmp_path), made.confirmations[0], "confirm")
    assert load_sweep(str(tmp_path)) == made


def test_no_sweep_and_a_damaged_record_are_clear_errors(tmp_path):
    with pytest.raises(UserError, match="there is no sweep in"):
        load_sweep(str(tmp_path))
    made = sweep([trial(0, [0.5])], tmp_path)
    save_sweep(made.record)
    save_trial(str(tmp_path), made.trials[0])
    (path,) = (tmp_path / "trials").iterdir()
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError, match=r"key0-0\.json is damaged"):
        load_sweep(str(tmp_path))


def test_tables_hold_every_trial_with_all_digits():
    accuracy = 1 / 3
    found = sweep(
        [
            trial(0, [accuracy, 0.1]),
            trial(1, [], "failed", **{"distiller.strategy": {"name": "dkd", "beta": 8}}),
        ]
    )
    rows = list(csv.DictReader(io.StringIO(trials_csv(found))))
    assert [row["status"] for row in rows] == ["finished", "failed"]
    assert float(rows[0]["validation_accuracy"]) == accuracy
    assert rows[0]["best_epoch"] == "1"
    assert float(rows[1]["training.learning_rate"]) == 0.2
    assert rows[1]["distiller.strategy"] == '{"name": "dkd", "beta": 8}'
    assert "NaN" in rows[1]["error"]
    table = pq.read_table(pa.BufferReader(trials_parquet(found)))
    assert table.column("validation_accuracy").to_pylist() == [accuracy, None]
    assert table.column("training.learning_rate").to_pylist() == [0.1, 0.2]
    assert table.column("distiller.strategy").to_pylist() == ["kd", '{"name": "dkd", "beta": 8}']
    assert table.column("rank").to_pylist() == [1, None]


def test_the_text_says_how_far_a_running_sweep_is():
    trials = [trial(0, [0.5, 0.25, 0.5]), trial(1, [0.625], "running"), trial(2, [], "failed")]
    lines = format_sweep(sweep(trials)).splitlines()
    assert "3 of 9 trials begun: 1 finished, 1 running, 1 failed" in lines[1]
    assert lines[1].endswith("teacher forward passes: 0")
    assert lines[4].split() == ["0", "finished", "3/3", "50.00", "0.1", "kd"]
    assert lines[5].split() == ["1", "running", "1/3", "62.50", "0.2", "kd"]
    assert lines[6] == "trial 2 failed: DivergedError: the loss is NaN"
