"""What a sweep leaves: a record of each trial, and what they say together.

In the sweep's folder: `sweep.json`, `trials/KEY.json` and, of the trainings that confirm the best,
`confirm/KEY.json`. A record is written anew after every epoch, whole, so that a sweep that was killed can be
looked at and gone on with.
"""

import csv
import io
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, JsonValue, ValidationError

from tmkd_ray import storage
from tmkd_ray.errors import UserError
from tmkd_ray.results import EpochRecord, sample_std
from tmkd_ray.settings import Settings

Status = Literal["running", "finished", "stopped", "failed"]


class TrialRecord(Settings):
    """One trial.

    Attributes:
        key: of the sweep, its values and its seed. number: from 0, as suggested.
        parameters: values by dotted path; with PBT those of the last epoch.
        status: stopped: by the scheduler. failed: `error` says why.
        epochs: to train.
        history: of the epochs that were reported.
        failures: how often it failed; the last time, if it is marked as failed, for good.
        started, ended: seconds since 1970; of the last start, and the last report.
        teacher_passes: forward passes of a frozen teacher in this trial's processes.
        latency_ms: of the student on one image; None where it was not measured.
        changes: with PBT, what was changed: epoch, then the new values.
    """

    key: str
    number: int
    parameters: dict[str, JsonValue]
    seed: int
    store: str
    status: Status = "running"
    epochs: int
    history: list[EpochRecord] = Field(default_factory=list)
    failures: int = 0
    error: str | None = None
    started: float
    ended: float
    teacher_passes: int = 0
    latency_ms: float | None = None
    changes: list[tuple[int, dict[str, JsonValue]]] = Field(default_factory=list)

    @property
    def accuracy(self) -> float | None:
        """The best validation accuracy of an epoch, 0 to 1; None before the first."""
        return max((record.validation_accuracy or 0.0 for record in self.history), default=None)

    @property
    def best_epoch(self) -> int | None:
        best = self.accuracy
        return next((r.epoch for r in self.history if (r.validation_accuracy or 0.0) == best), None)

    @property
    def seconds(self) -> float:
        """Of training and validation."""
        return sum(record.seconds for record in self.history)

    def with_epoch(self, epoch: EpochRecord) -> "TrialRecord":
        """Return the record with an epoch more; those from it on are forgotten: they were trained again."""
        history = [record for record in self.history if record.epoch < epoch.epoch]
        return self.model_copy(update={"history": [*history, epoch]})


class SweepRecord(Settings):
    """What was searched: `sweep.json`.

    Attributes:
        parameters: path: {distribution: values}.
        folder: of the sweep.
        budget_spent: whether the last run of the command ended by `time_budget_s`.
    """

    name: str
    key: str
    folder: str
    created: str
    dataset: str
    student: str
    epochs: int
    num_trials: int
    parameters: dict[str, dict[str, JsonValue]]
    searcher: str
    scheduler: str
    objectives: tuple[str, ...]
    confirm: tuple[int, int] | None = None
    config: dict[str, JsonValue]
    versions: dict[str, str] = Field(default_factory=dict)
    budget_spent: bool = False


class Confirmed(Settings):
    """A trial's values, trained again with fresh seeds.

    Attributes:
        accuracies: best validation accuracy of each seed, 0 to 1.
    """

    trial: TrialRecord
    seeds: list[int]
    accuracies: list[float]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accuracies)

    @property
    def std(self) -> float | None:
        return sample_std(self.accuracies)


class Sweep(Settings):
    """A sweep as it lies in its folder."""

    record: SweepRecord
    trials: list[TrialRecord]
    confirmations: list[TrialRecord] = Field(default_factory=list)

    def with_status(self, *statuses: Status) -> list[TrialRecord]:
        return [trial for trial in self.trials if trial.status in statuses]

    @property
    def measures_latency(self) -> bool:
        return "latency" in self.record.objectives

    def ranked(self) -> list[TrialRecord]:
        """Return the trials that reported an epoch, best first.

        Those that were trained to the end come first, then those that a scheduler stopped, then the rest: what
        was reached early in a schedule says little of its end.
        """
        order = {"finished": 0, "stopped": 1, "running": 2, "failed": 3}
        known = [trial for trial in self.trials if trial.accuracy is not None]
        return sorted(
            known, key=lambda t: (order[t.status], -(t.accuracy or 0.0), t.latency_ms or 0.0, t.number)
        )

    def best(self) -> TrialRecord | None:
        """Return the best trial: by the confirmations' mean, where there are, else by its own accuracy."""
        confirmed = self.confirmed()
        if confirmed:
            return confirmed[0].trial
        usable = [trial for trial in self.ranked() if trial.status in ("finished", "stopped")]
        return usable[0] if usable else None

    def pareto_front(self) -> list[TrialRecord]:
        """Return the finished trials that no other beats in accuracy and latency both, most accurate first."""
        finished = [trial for trial in self.with_status("finished") if trial.latency_ms is not None]
        front = []
        for trial in finished:
            if not any(_beats(other, trial) for other in finished):
                front.append(trial)
        return sorted(front, key=lambda trial: (-(trial.accuracy or 0.0), trial.latency_ms or 0.0))

    def to_confirm(self, top: int) -> list[TrialRecord]:
        """Return the best few trials that were trained to the end."""
        return [trial for trial in self.ranked() if trial.status == "finished"][:top]

    def confirmed(self) -> list[Confirmed]:
        """Return what was trained again with every seed, by the mean, best first."""
        if self.record.confirm is None:
            return []
        top, num_seeds = self.record.confirm
        found = []
        for trial in self.to_confirm(top):
            runs = [
                run
                for run in self.confirmations
                if run.parameters == trial.parameters and run.status == "finished" and run.accuracy is not None
            ]
            if len(runs) == num_seeds:
                runs.sort(key=lambda run: run.seed)
                accuracies = [run.accuracy for run in runs if run.accuracy is not None]
                found.append(Confirmed(trial=trial, seeds=[run.seed for run in runs], accuracies=accuracies))
        return sorted(found, key=lambda each: (-each.mean, each.trial.number))

    @property
    def teacher_passes(self) -> int:
        return sum(trial.teacher_passes for trial in [*self.trials, *self.confirmations])


def _beats(one: TrialRecord, other: TrialRecord) -> bool:
    mine, theirs = ((-(t.accuracy or 0.0), t.latency_ms or 0.0) for t in (one, other))
    return mine != theirs and mine[0] <= theirs[0] and mine[1] <= theirs[1]


def save_sweep(record: SweepRecord) -> None:
    """Write `sweep.json`."""
    content = record.model_dump_json(indent=1).encode()
    storage.write_bytes(storage.join(record.folder, "sweep.json"), content)


def save_trial(folder: str, trial: TrialRecord, part: str = "trials") -> None:
    """Write a trial's record into the sweep's folder."""
    path = storage.join(folder, part, f"{trial.key}.json")
    storage.write_bytes(path, trial.model_dump_json().encode())


def load_sweep(folder: str) -> Sweep:
    """Read a sweep, running or finished.

    Raises:
        UserError: there is none, or a record is damaged.
    """
    path = storage.join(folder, "sweep.json")
    if not storage.exists(path):
        raise UserError(f"there is no sweep in {folder}; start it by `tmkd search`")
    try:
        record = SweepRecord.model_validate_json(storage.read_bytes(path))
    except ValidationError as error:
        raise UserError(f"{path} is damaged or of another version: {error.errors()[0]['msg']}") from error
    return Sweep(
        record=record,
        trials=load_trials(folder),
        confirmations=load_trials(folder, "confirm"),
    )


def load_trials(folder: str, part: str = "trials") -> list[TrialRecord]:
    """Read the trials' records, by number.

    Raises:
        UserError: one is damaged.
    """
    place = storage.join(folder, part)
    trials = []
    for name in storage.list_names(place):
        if not name.endswith(".json"):
            continue
        path = storage.join(place, name)
        try:
            trials.append(TrialRecord.model_validate_json(storage.read_bytes(path)))
        except ValidationError as error:
            text = error.errors()[0]["msg"]
            raise UserError(f"{path} is damaged ({text}); delete it, and the trial is run again") from error
    return sorted(trials, key=lambda trial: (trial.number, trial.seed))


# -- tables --------------------------------------------------------------------------------------------------


def trial_rows(sweep: Sweep) -> list[dict[str, Any]]:
    """Return a row for each trial, by number; the columns are the same in all."""
    ranks = {trial.key: rank for rank, trial in enumerate(sweep.ranked(), start=1)}
    front = {trial.key for trial in sweep.pareto_front()} if sweep.measures_latency else set()
    confirmed = {each.trial.key: each for each in sweep.confirmed()}
    rows = []
    for trial in sweep.trials:
        row: dict[str, Any] = {
            "trial": trial.number,
            "key": trial.key,
            "status": trial.status,
            "rank": ranks.get(trial.key),
            "validation_accuracy": trial.accuracy,
            "best_epoch": trial.best_epoch,
            "epochs": len(trial.history),
            "seconds": trial.seconds,
        }
        if sweep.measures_latency:
            row |= {"latency_ms": trial.latency_ms, "pareto": trial.key in front}
        if sweep.record.confirm is not None:
            found = confirmed.get(trial.key)
            row |= {
                "confirmed_mean": None if found is None else found.mean,
                "confirmed_std": None if found is None else found.std,
            }
        row |= {path: trial.parameters.get(path) for path in sweep.record.parameters}
        row |= {"failures": trial.failures, "error": trial.error}
        rows.append(row)
    return rows


def trials_csv(sweep: Sweep) -> str:
    """Return the rows as CSV; numbers with all their digits, lists and mappings as JSON."""
    buffer = io.StringIO()
    rows = trial_rows(sweep)
    writer = csv.DictWriter(buffer, list(rows[0]) if rows else ["trial"], lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: plain(value) for name, value in row.items()} for row in rows)
    return buffer.getvalue()


def trials_parquet(sweep: Sweep) -> bytes:
    """Return the rows as a Parquet file; a column of mixed kinds is text."""
    rows = trial_rows(sweep)
    columns = {}
    for name in rows[0] if rows else ():
        values = [row[name] for row in rows]
        kinds = {type(value) for value in values if value is not None}
        if kinds <= {int, float} and len(kinds) == 2:
            values = [None if value is None else float(value) for value in values]
        elif len(kinds) > 1 or kinds & {list, dict}:
            values = [None if value is None else str(plain(value)) for value in values]
        columns[name] = pa.array(values)
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), buffer)
    content: bytes = buffer.getvalue().to_pybytes()
    return content


def plain(value: Any) -> Any:
    """Return a value as it stands in a cell: a number, text, or JSON."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list | tuple) else value


def short(value: Any) -> str:
    """Return a value as a reader wants to see it: numbers with four digits."""
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.4g}"
    return "" if value is None else str(plain(value))


def format_sweep(sweep: Sweep, at_most: int = 20) -> str:
    """Return the sweep as lines of text: how far it is, the best trials, what failed, what is running."""
    record = sweep.record
    counts = ", ".join(
        f"{len(sweep.with_status(status))} {status}"
        for status in ("finished", "stopped", "running", "failed")
        if sweep.with_status(status)
    )
    lines = [
        f"sweep {record.name} in {record.folder}",
        f"{len(sweep.trials)} of {record.num_trials} trials begun: {counts or 'none'}; "
        f"searcher {record.searcher}, scheduler {record.scheduler}, {record.epochs} epochs; "
        f"teacher forward passes: {sweep.teacher_passes}",
    ]
    header = ["trial", "status", "epochs", "val. %"]
    header += ["ms"] if sweep.measures_latency else []
    rows = [
        [
            str(trial.number),
            trial.status,
            f"{len(trial.history)}/{trial.epochs}",
            f"{100 * (trial.accuracy or 0.0):.2f}",
            *([short(trial.latency_ms)] if sweep.measures_latency else []),
            *(short(trial.parameters.get(path)) for path in record.parameters),
        ]
        for trial in sweep.ranked()[:at_most]
    ]
    if rows:
        lines += ["", *_aligned([[*header, *record.parameters], *rows])]
    if len(sweep.ranked()) > at_most:
        lines.append(f"… and {len(sweep.ranked()) - at_most} more")
    confirmed = sweep.confirmed()
    if confirmed:
        lines += ["", "confirmed with fresh seeds, mean ± sample standard deviation:"]
        lines += [
            f"  trial {each.trial.number}: {100 * each.mean:.2f}"
            + (f" ± {100 * each.std:.2f}" if each.std is not None else "")
            + f" % (n = {len(each.accuracies)}; alone {100 * (each.trial.accuracy or 0):.2f} %)"
            for each in confirmed
        ]
    lines += [f"trial {t.number} failed: {t.error}" for t in sweep.with_status("failed")]
    return "\n".join(lines)


def _aligned(rows: Sequence[Sequence[str]]) -> Iterable[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
