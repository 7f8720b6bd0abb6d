"""The driver's side of a sweep: what Tune says of the trials becomes their records."""

import math
import time
from collections.abc import Mapping
from typing import Any

from ray import tune

from tmkd_ray.config import ExperimentConfig
from tmkd_ray.progress import time_left
from tmkd_ray.results import EpochRecord
from tmkd_ray.search.space import Parameters, Space, store_key, trial_config
from tmkd_ray.stages.progress import say
from tmkd_ray.stages.trials import Assignment, TrialPlan, assignment_of, drop_checkpoints, trial_key
from tmkd_ray.trials import TrialRecord, load_trials, save_trial

_SAY_EVERY_S = 60.0


class Recorder(tune.Callback):  # type: ignore[misc]
    """Writes each trial's record as Tune hears of it; the only one who does.

    Attributes:
        records: by trial key; those of an earlier run of the command are read at the start.
        latencies: milliseconds by `student_key`.
        total: number of trials, those of an earlier run of the command too.
    """

    def __init__(self, space: Space, plan: TrialPlan, fingerprints: Mapping[str, str], total: int) -> None:
        self.space, self.plan, self.fingerprints = space, plan, fingerprints
        self.latencies: dict[str, float] = {}
        self.ends = math.inf
        if space.search.time_budget_s is not None:
            self.ends = time.time() + space.search.time_budget_s
        self.records: dict[str, TrialRecord] = {}
        for record in load_trials(plan.folder, plan.part):
            if record.store != fingerprints.get(self._store_key(record.parameters)):
                continue  # of a store that was built anew since
            if record.status == "running" and len(record.history) == record.epochs:
                record = self._save(record.model_copy(update={"status": "finished"}))
            self.records[record.key] = record
        self.total = total
        self.over_before = sum(record.status != "running" for record in self.records.values())
        self.started = self.said = time.monotonic()

    def is_over(self, trial: Assignment) -> bool:
        record = self.records.get(trial_key(self.plan, trial))
        return record is not None and record.status != "running"

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        assignment = assignment_of(self.plan, trial.config)
        key = trial_key(self.plan, assignment)
        record = self.records.get(key)
        if record is None:
            config = trial_config(self.space.config, assignment.parameters)
            now = time.time()
            record = TrialRecord(
                key=key,
                number=assignment.number,
                parameters=assignment.parameters,
                seed=assignment.seed,
                store=self.fingerprints[store_key(config)],
                epochs=config.training.epochs,
                started=now,
                ended=now,
                latency_ms=self.latencies.get(student_key(config)),
            )
        record = self._with_values(record, assignment.parameters)
        self._save(record.model_copy(update={"status": "running"}))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        record = self._with_values(self._record(trial), assignment_of(self.plan, trial.config).parameters)
        for epoch in result.get("epochs", ()):
            record = record.with_epoch(EpochRecord.model_validate(epoch))
        passes = result.get("teacher_passes", record.teacher_passes)
        update = {"ended": time.time(), "teacher_passes": max(passes, record.teacher_passes)}
        self._save(record.model_copy(update=update))
        self._say_running()

    @staticmethod
    def _with_values(record: TrialRecord, parameters: Parameters) -> TrialRecord:
        """Return the record with the values that the trial has now, which PBT changes."""
        if record.parameters == parameters:
            return record
        changes = [*record.changes, (len(record.history), dict(parameters))]
        return record.model_copy(update={"parameters": parameters, "changes": changes})

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        record = self._failed(trial)
        say(f"trial {record.number} failed, tried again: {record.error}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        record = self._save(self._failed(trial).model_copy(update={"status": "failed"}))
        drop_checkpoints(self.plan, record.key)
        say(f"trial {record.number} failed, given up: {record.error}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        record = self.records.get(trial_key(self.plan, assignment_of(self.plan, trial.config)))
        if record is None or record.status == "failed":
            return  # ended before it began, as the budget was spent
        if len(record.history) == record.epochs:
            status = "finished"
        elif time.time() >= self.ends:
            return  # goes on when the sweep does
        else:
            status = "stopped"
        record = self._save(record.model_copy(update={"status": status}))
        drop_checkpoints(self.plan, record.key)
        over = sum(other.status != "running" for other in self.records.values())
        accuracy = 100 * (record.accuracy or 0.0)
        self.said = time.monotonic()
        say(
            f"trial {record.number} {status} after {len(record.history)} epochs, validation {accuracy:.2f} %  "
            f"({self._position(over)})"
        )

    def _position(self, over: int) -> str:
        """Return how many trials are over, how fast that goes, and how long the others will take."""
        new = over - self.over_before
        text = f"{over}/{self.total} trials over"
        if new < 1 or over >= self.total:
            return text
        seconds = (time.monotonic() - self.started) / new
        return f"{text}, {3600 / seconds:,.1f} an hour, about {time_left(seconds * (self.total - over))} left"

    def _say_running(self) -> None:
        """Say now and then how far the running trials are: each may take hours."""
        if time.monotonic() - self.said < _SAY_EVERY_S:
            return
        self.said = time.monotonic()
        running = [r for r in self.records.values() if r.status == "running" and r.history]
        over = sum(record.status != "running" for record in self.records.values())
        each = ", ".join(f"trial {r.number} epoch {len(r.history)}/{r.epochs}" for r in running)
        say(f"search: {self._position(over)}; running: {each}")

    def _record(self, trial: Any) -> TrialRecord:
        return self.records[trial_key(self.plan, assignment_of(self.plan, trial.config))]

    def _failed(self, trial: Any) -> TrialRecord:
        record = self._record(trial)
        update = {"failures": record.failures + 1, "error": _reason(trial), "ended": time.time()}
        return self._save(record.model_copy(update=update))

    def _save(self, record: TrialRecord) -> TrialRecord:
        self.records[record.key] = record
        save_trial(self.plan.folder, record, self.plan.part)
        return record

    def _store_key(self, parameters: Parameters) -> str:
        return store_key(trial_config(self.space.config, parameters))


def _reason(trial: Any) -> str:
    """Return in one line why a trial failed."""
    with open(trial.error_file) as file:
        lines = [line.strip() for line in file if line.strip()]
    died = [line for line in lines if "died" in line or "killed" in line.lower()]
    return (died[-1] if died and "Error:" not in lines[-1] else lines[-1])[:500]


def student_key(config: ExperimentConfig) -> str:
    """Return what the latency of a student depends on."""
    return f"{config.student.model} at {config.dataset.image_size}"
