"""Sweeps on Ray Tune: the trials share one copy of the knowledge a machine, and none is run twice."""

import functools
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from tmkd_ray import storage
from tmkd_ray.config import ExperimentConfig
from tmkd_ray.config_reading import dump_config
from tmkd_ray.errors import UserError
from tmkd_ray.report.search import write_search_report
from tmkd_ray.search.space import Parameters, Space, store_key, sweep_folder, sweep_key, trial_config
from tmkd_ray.search.suggest import planned_trials, total_trials
from tmkd_ray.stages.experiment import (
    Experiment,
    check_student,
    check_text_teacher,
    check_visual_teacher,
    identity_key,
    open_experiment,
)
from tmkd_ray.stages.fitting import fit_clip, fit_teacher
from tmkd_ray.stages.knowledge import check_store, compute_knowledge
from tmkd_ray.stages.progress import say
from tmkd_ray.stages.room import node_mark
from tmkd_ray.stages.run import versions
from tmkd_ray.stages.session import num_gpus
from tmkd_ray.stages.sweep_records import Recorder, student_key
from tmkd_ray.stages.sweep_searchers import (
    OptunaSearcher,
    build_asha,
    build_named_searcher,
    build_population,
    plain_assignment,
)
from tmkd_ray.stages.trials import (
    TRIAL,
    Assignment,
    PreparedStore,
    TrialPlan,
    measure_latency,
    run_trial,
    trial_key,
)
from tmkd_ray.trials import (
    Sweep,
    SweepRecord,
    TrialRecord,
    load_sweep,
    save_sweep,
    trials_csv,
    trials_parquet,
)

_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the records are ours
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # of Tune's own state, which we do without
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}


def open_stores(space: Space) -> dict[str, Experiment]:
    """Open and check the experiment of each store that the trials need; return them by `store_key`.

    Raises:
        UserError: data, a network, or an earlier store is missing or does not fit.
    """
    config = space.config
    plain = store_key(trial_config(config, {}))
    models = space.search.parameters.get("student.model")
    experiments = {}
    for key, parameters in space.stores.items():
        at_home = trial_config(config, parameters)
        experiment = open_experiment(at_home)
        if key != plain:
            path = f"{experiment.store_path}-{key}"
            knowledge = at_home.knowledge.model_copy(update={"path": path})
            moved = at_home.model_copy(update={"knowledge": knowledge})
            experiment = replace(experiment, config=moved, store_path=path)
        check_store(experiment)
        check_visual_teacher(experiment)
        check_text_teacher(experiment)
        for model in [config.student.model] if models is None else models.values:
            student = config.student.model_copy(update={"model": model})
            check_student(replace(experiment, config=at_home.model_copy(update={"student": student})))
        experiments[key] = experiment
    return experiments


def search(space: Space, experiments: Mapping[str, Experiment]) -> Sweep:
    """Run a sweep, or what is missing of it, and write its outcome into its folder.

    `best.yaml`, `trials.csv`, `trials.parquet`, `search.html`; `sweep.json` and `trials/` are there from the
    start.

    Args:
        experiments: of `open_stores`.

    Raises:
        UserError: a store cannot be built, or nothing was trained to an end.
    """
    folder = sweep_folder(space)
    storage.write_bytes(storage.join(folder, "config.yaml"), dump_config(space.config).encode())
    with _tunes_environment():
        plan, fingerprints = _prepared_plan(space, experiments, folder)
        sweep = _Sweeping(space, plan, fingerprints)
        sweep.run()
        _write_outcome(space, experiments, folder)
        if space.search.confirm is not None:
            _confirm(space, plan, fingerprints, load_sweep(folder))
            _write_outcome(space, experiments, folder)
    for scratch in ("tune", "workers"):  # what Tune and Train keep for themselves
        _delete_folder(storage.join(folder, scratch))
    found = load_sweep(folder)
    if found.best() is None and not found.record.budget_spent:
        failed = found.with_status("failed")
        reason = f"; the first: {failed[0].error}" if failed else ""
        raise UserError(f"search: no trial was trained to an end, {len(failed)} failed{reason}")
    return found


def _delete_folder(path: str) -> None:
    if storage.is_folder(path):
        filesystem, inner = storage.open_filesystem(path)
        filesystem.delete_dir(inner)


@contextmanager
def _tunes_environment() -> Iterator[None]:
    before = {name: os.environ.get(name) for name in _ENVIRONMENT}
    os.environ.update(_ENVIRONMENT)
    logger = logging.getLogger("ray.tune")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _prepared_plan(
    space: Space, experiments: Mapping[str, Experiment], folder: str
) -> tuple[TrialPlan, dict[str, str]]:
    """Build the stores that are missing; return the trials' plan and the stores' fingerprints."""
    stores, fingerprints = {}, {}
    for number, (key, experiment) in enumerate(experiments.items(), start=1):
        if len(experiments) > 1:
            say(f"── knowledge store {number} of {len(experiments)}: {space.stores[key]}")
        result = compute_knowledge(experiment, fit_teacher(experiment), fit_clip(experiment))
        fingerprints[key] = identity_key(result.manifest.fingerprint)
        # In the object store: an index of a million images would else go to every trial anew.
        stores[key] = ray.put(PreparedStore(experiment, result.text_bank, fingerprints[key]))
    resources = space.search.resources
    gpus = resources.gpus
    if gpus is None:
        gpus = 1.0 if num_gpus() > 0 and space.config.training.use_gpu is not False else 0.0
    plan = TrialPlan(
        config=space.config,
        key=sweep_key(space),
        stores=stores,
        folder=folder,
        part="trials",
        paths=tuple(space.search.parameters),
        evolves=space.search.scheduler.name == "pbt",
        gpus=gpus,
    )
    return plan, fingerprints


class _Sweeping:
    """A sweep in progress: what is known of each trial, and how Tune is asked to run the rest."""

    def __init__(self, space: Space, plan: TrialPlan, fingerprints: Mapping[str, str]) -> None:
        self.space, self.plan, self.fingerprints = space, plan, fingerprints
        search = space.search
        self.total = total_trials(search)
        if search.num_trials is not None and self.total < search.num_trials:
            say(f"search: {self.total} trials instead of {search.num_trials}: there are no more values")
        self.record = _sweep_record(space, plan.folder, self.total)
        if storage.exists(storage.join(plan.folder, "sweep.json")):
            begun = load_sweep(plan.folder).record.created
            self.record = self.record.model_copy(update={"created": begun})
        save_sweep(self.record)
        self.recorder = Recorder(space, plan, fingerprints, self.total)
        self.recorder.latencies = measure_latencies(space, plan) if "latency" in search.objectives else {}

    def run(self) -> None:
        search = self.space.search
        known = self.recorder.records
        if search.scheduler.name == "pbt":
            self._fit_population()
        elif search.searcher in ("random", "grid"):
            waiting = [
                trial for trial in self.assignments(planned_trials(search)) if not self.recorder.is_over(trial)
            ]
            self._say(len(known), len(waiting))
            if waiting:
                self._fit({TRIAL: tune.grid_search([plain_assignment(trial) for trial in waiting])}, None)
        else:
            self._fit_suggested()
        left = self.total - sum(record.status != "running" for record in known.values())
        spent = left > 0 and time.time() >= self.recorder.ends
        save_sweep(self.record.model_copy(update={"budget_spent": spent}))
        if spent:
            say(f"search: the time is over, {left} trials are left; give the same command to go on")
        elif left > 0:
            say(f"search: {left} trials fewer: {search.searcher} has no values that were not tried")

    def assignments(self, trials: Sequence[Parameters]) -> list[Assignment]:
        seed = self.space.config.training.seed
        return [Assignment(number, parameters, seed) for number, parameters in enumerate(trials)]

    def _say(self, known: int, waiting: int) -> None:
        at_once = concurrent_trials(self.space, self.plan)
        say(f"search: {waiting} trials to run, {known} known; {at_once} at once → {self.plan.folder}")

    def _fit_suggested(self) -> None:
        search = self.space.search
        seed = self.space.config.training.seed
        records = sorted(self.recorder.records.values(), key=lambda record: record.number)
        done = [record for record in records if record.status != "running"]
        again = [Assignment(r.number, r.parameters, seed) for r in records if r.status == "running"]
        left = self.total - len(done)
        self._say(len(records), left)
        if left <= 0:
            return
        numbers = iter(range(max((r.number for r in records), default=-1) + 1, 10**9))
        searcher: Searcher
        if search.searcher == "optuna":
            searcher = OptunaSearcher(self.space, self.recorder, done, again, numbers)
        else:
            searcher = build_named_searcher(self.space, done, again, numbers)
        self._fit({}, searcher, left)

    def _fit(self, param_space: dict[str, Any], searcher: Searcher | None, num_samples: int = 1) -> None:
        search = self.space.search
        scheduler: TrialScheduler | None = None
        if search.scheduler.name == "asha":
            scheduler = build_asha(self.space, self.recorder.records.values())
        fit_trials(self.space, self.plan, self.recorder, param_space, searcher, scheduler, num_samples)

    def _fit_population(self) -> None:
        search = self.space.search
        seed = self.space.config.training.seed
        members = []
        for trial in self.assignments(planned_trials(search)):
            record = self.recorder.records.get(trial_key(self.plan, trial))
            if record is None:
                members.append(trial)
            elif record.status == "running":  # goes on with the values that it has come to
                members.append(Assignment(trial.number, record.parameters, seed))
        self._say(len(self.recorder.records), len(members))
        if not members:
            return
        by_number = {member.number: member for member in members}
        starts = {
            path: tune.sample_from(
                functools.partial(
                    lambda path, spec: by_number[spec.config[TRIAL]["number"]].parameters[path], path
                )
            )
            for path in search.parameters
        }
        trials = [{"number": member.number, "seed": member.seed} for member in members]
        scheduler = build_population(search.parameters, self.space)
        param_space = {TRIAL: tune.grid_search(trials), **starts}
        fit_trials(self.space, self.plan, self.recorder, param_space, None, scheduler, 1)


def concurrent_trials(space: Space, plan: TrialPlan) -> int:
    """Return how many trials run at once: what was asked for, as far as there is room."""
    resources = space.search.resources
    there = ray.cluster_resources()
    cpus = there.get("CPU", 1.0)
    if len(ray.nodes()) == 1:  # a local Ray counts more CPUs than there are, for Ray Data's sake
        cpus = min(cpus, float(len(os.sched_getaffinity(0))))
    room = [cpus / (resources.workers * resources.cpus)]
    if plan.gpus > 0:
        room.append(there.get("GPU", 0.0) / (resources.workers * plan.gpus))
    most = max(1, int(min(room) + 1e-9))
    return space.search.max_concurrent_trials or most


def fit_trials(
    space: Space,
    plan: TrialPlan,
    recorder: "Recorder",
    param_space: dict[str, Any],
    searcher: Searcher | None,
    scheduler: TrialScheduler | None,
    num_samples: int,
) -> None:
    """Let Tune run trials until none is left, or the time budget is spent; failed ones are retried."""
    config = space.search
    resources = config.resources
    if resources.workers > 1:  # the workers ask for themselves; their driver must not take a CPU from them
        asked: dict[str, float] = {"cpu": 0, "memory": 1024**2}
    else:
        asked = {"cpu": resources.cpus, **({"gpu": plan.gpus} if plan.gpus > 0 else {}), **node_mark("train")}
    filesystem, root = storage.open_filesystem(storage.join(plan.folder, "tune"))
    tuner = tune.Tuner(
        tune.with_resources(functools.partial(run_trial, plan=plan), asked),
        param_space=param_space,
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=scheduler,
            num_samples=num_samples,
            max_concurrent_trials=concurrent_trials(space, plan),
            time_budget_s=config.time_budget_s,
            reuse_actors=resources.workers == 1,
            trial_dirname_creator=lambda trial: f"{trial.trial_id}",
        ),
        run_config=tune.RunConfig(
            name=f"{plan.part}-{time.time_ns()}",
            storage_path=root,
            storage_filesystem=filesystem if "://" in plan.folder else None,
            callbacks=[recorder],
            failure_config=tune.FailureConfig(max_failures=config.retries),
            verbose=0,
        ),
    )
    tuner.fit()


def measure_latencies(space: Space, plan: TrialPlan) -> dict[str, float]:
    """Measure every student that may be searched, one after another, before the trials use the machine."""
    parameters = space.search.parameters
    students: list[Parameters] = [{}]
    for path in ("student.model", "dataset.image_size"):
        if path in parameters:
            values = parameters[path].all_values(64)
            if values is None:
                raise UserError(f"search.parameters.{path}: with objective latency give `choice` or `grid`")
            students = [{**student, path: value} for student in students for value in values]
    resources = space.search.resources
    remote = ray.remote(num_cpus=resources.cpus, num_gpus=plan.gpus, resources=node_mark("train"))(_measure)
    found = {}
    for student in students:
        config = trial_config(space.config, student)
        found[student_key(config)] = ray.get(remote.remote(plan.stores[store_key(config)], config, plan.gpus))
    for name, milliseconds in found.items():
        say(f"search: latency of {name} px: {milliseconds:.3f} ms an image")
    return found


def _measure(store: PreparedStore, config: ExperimentConfig, gpus: float) -> float:
    return measure_latency(replace(store.experiment, config=config), gpus)


def _confirm(space: Space, plan: TrialPlan, fingerprints: Mapping[str, str], sweep: Sweep) -> None:
    """Train the best few again with fresh seeds."""
    confirm = space.search.confirm
    assert confirm is not None
    if sweep.record.budget_spent:
        return
    first = space.config.training.seed
    seeds = [(first + 1 + number) % 2**32 for number in range(confirm.seeds)]
    plan = replace(plan, part="confirm", evolves=False)
    calm = space.search.model_copy(update={"scheduler": type(space.search.scheduler)(), "time_budget_s": None})
    space = replace(space, config=space.config.model_copy(update={"search": calm}))
    recorder = Recorder(space, plan, fingerprints, len(sweep.to_confirm(confirm.top)) * confirm.seeds)
    waiting = [
        trial
        for best in sweep.to_confirm(confirm.top)
        for seed in seeds
        if not recorder.is_over(trial := Assignment(best.number, dict(best.parameters), seed))
    ]
    if waiting:
        say(f"── confirm: the best {confirm.top} with {confirm.seeds} fresh seeds, {len(waiting)} trainings")
        param_space = {TRIAL: tune.grid_search([plain_assignment(trial) for trial in waiting])}
        fit_trials(space, plan, recorder, param_space, None, None, 1)


def best_config(space: Space, experiments: Mapping[str, Experiment], trial: TrialRecord) -> ExperimentConfig:
    """Return the configuration that `tmkd distill` takes to train a trial's student again."""
    config = trial_config(space.config, trial.parameters)
    store = experiments[store_key(config)]
    training = config.training.model_copy(update={"seed": trial.seed})
    knowledge = config.knowledge.model_copy(update={"path": store.store_path})
    output = storage.absolute(config.output)
    return config.model_copy(update={"training": training, "knowledge": knowledge, "output": output})


def _write_outcome(space: Space, experiments: Mapping[str, Experiment], folder: str) -> None:
    sweep = load_sweep(folder)
    best = sweep.best()
    if best is not None:
        head = (
            f"# The best of {len(sweep.trials)} trials: trial {best.number}, validation accuracy "
            f"{best.accuracy!r} (epoch {best.best_epoch}).\n"
        )
        if best.changes:
            head += "# Its values changed on the way (PBT); these are the last, and do not repeat its figure.\n"
        elif best.status == "stopped":
            head += "# It was stopped early, so that the whole training may reach more.\n"
        text = head + dump_config(best_config(space, experiments, best))
        storage.write_bytes(storage.join(folder, "best.yaml"), text.encode())
    storage.write_bytes(storage.join(folder, "trials.csv"), trials_csv(sweep).encode())
    storage.write_bytes(storage.join(folder, "trials.parquet"), trials_parquet(sweep))
    write_search_report(storage.join(folder, "search.html"), sweep)


def _sweep_record(space: Space, folder: str, total: int) -> SweepRecord:
    config, search = space.config, space.search
    return SweepRecord(
        name=config.name,
        key=sweep_key(space),
        folder=folder,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        dataset=config.dataset.name,
        student=config.student.model,
        epochs=config.training.epochs,
        num_trials=total,
        parameters=search.model_dump(mode="json")["parameters"],
        searcher=search.searcher,
        scheduler=search.scheduler.name,
        objectives=search.objectives,
        confirm=None if search.confirm is None else (search.confirm.top, search.confirm.seeds),
        config=config.model_dump(mode="json"),
        versions=versions(),
    )
