"""One trial of a sweep, on the machine that trains it: the project's own loop, which tells Tune every epoch."""

import functools
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from tmkd_ray import storage
from tmkd_ray.config import ExperimentConfig
from tmkd_ray.models import build_model
from tmkd_ray.results import EpochRecord
from tmkd_ray.search.space import Parameters, store_key, trial_config
from tmkd_ray.stages.distillation import student_task
from tmkd_ray.stages.experiment import Experiment, identity_key
from tmkd_ray.stages.room import bundle
from tmkd_ray.stages.session import use_cluster_settings
from tmkd_ray.teachers.passes import teacher_passes
from tmkd_ray.training.context import PlainContext
from tmkd_ray.training.loop import train

TRIAL = "trial"
"""The key of Tune's configuration that holds an `Assignment` as plain values."""


@dataclass(frozen=True)
class PreparedStore:
    """A knowledge store that is whole, and the experiment it belongs to.

    Attributes:
        bank: key of the text bank.
        fingerprint: of its content.
    """

    experiment: Experiment
    bank: str | None
    fingerprint: str


@dataclass(frozen=True)
class TrialPlan:
    """What all trials of a sweep have in common; it travels to the workers.

    Attributes:
        stores: references to PreparedStore in the object store, by `store_key`.
        folder: of the sweep.
        part: of the folder, for the records: `trials` or `confirm`.
        paths: of the parameters.
        evolves: whether the parameters change on the way (PBT).
    """

    config: ExperimentConfig
    key: str
    stores: dict[str, Any]
    folder: str
    part: str
    paths: tuple[str, ...]
    evolves: bool
    gpus: float


@dataclass(frozen=True)
class Assignment:
    """Which trial: its number, values and seed."""

    number: int
    parameters: Parameters
    seed: int


def assignment_of(plan: TrialPlan, config: Mapping[str, Any]) -> Assignment:
    """Return the trial that Tune's configuration means."""
    trial = config[TRIAL]
    parameters = trial.get("parameters")
    if parameters is None:  # PBT changes values at the top alone
        parameters = {path: config[path] for path in plan.paths}
    return Assignment(trial["number"], dict(parameters), trial["seed"])


def trial_key(plan: TrialPlan, assignment: Assignment) -> str:
    """Return what names the trial in every run of the sweep."""
    values = None if plan.evolves else assignment.parameters
    number = assignment.number if plan.evolves else None
    return identity_key("trial", plan.key, values, number, assignment.seed)


def checkpoint_folder(plan: TrialPlan, key: str) -> str:
    return storage.join(plan.folder, plan.part, f"{key}-checkpoints")


def run_trial(config: dict[str, Any], plan: TrialPlan) -> None:
    """What Tune runs: train one student and report every epoch, going on from the trial's own checkpoint."""
    use_cluster_settings(plan.config.cluster)
    assignment = assignment_of(plan, config)
    if plan.config.search is not None and plan.config.search.resources.workers > 1:
        _run_distributed(plan, assignment)
        return
    device = torch.device("cuda" if plan.gpus > 0 and torch.cuda.is_available() else "cpu")
    context = TrialContext(checkpoint_folder(plan, trial_key(plan, assignment)), device, tune.report)
    if plan.evolves:
        context = EvolvingContext(checkpoint_folder(plan, trial_key(plan, assignment)), device, tune.report)
    _train(plan, assignment, context)


def _train(plan: TrialPlan, assignment: Assignment, context: "TrialContext") -> None:
    config = trial_config(plan.config, assignment.parameters)
    store: PreparedStore = _prepared(plan.stores[store_key(config)])
    experiment = replace(store.experiment, config=_shared(config, store))
    changes: dict[str, Any] = {"seed": assignment.seed}
    if plan.evolves:
        changes["checkpoint_every"] = 1  # what the others may go on from
    training = config.training.model_copy(update=changes)
    torch.manual_seed(training.seed)
    task = student_task(experiment, training, store.bank, context.device)
    name = plan.key if plan.evolves else trial_key(plan, assignment)
    outcome = train(
        task, training, context, identity_key(name, store.fingerprint), f"trial {assignment.number}"
    )
    context.tell(outcome.history)


@functools.lru_cache(maxsize=1)
def _held(reference_hex: str) -> list[Any]:
    return []


def _prepared(reference: Any) -> PreparedStore:
    """Return a store's facts; the trials of one process, one after another, unpack them once."""
    held = _held(reference.hex())
    if not held:
        held.append(ray.get(reference))
    store: PreparedStore = held[0]
    return store


def _shared(config: ExperimentConfig, store: PreparedStore) -> ExperimentConfig:
    """Return the configuration with the loader whose arrays all trials of a machine share."""
    if config.knowledge.mode != "cached":
        return config
    return config.model_copy(update={"knowledge": config.knowledge.model_copy(update={"loader": "mapped"})})


class TrialContext(PlainContext):
    """A worker of a trial: checkpoints lie in the sweep's folder, epochs are told to Tune.

    Args:
        folder: of the checkpoints, or URI.
        send: takes metrics.
    """

    def __init__(self, folder: str, device: torch.device, send: Any) -> None:
        self.place = folder
        self.is_remote = "://" in folder
        local = tempfile.mkdtemp(prefix="tmkd-trial-") if self.is_remote else folder
        super().__init__(Path(local), device, quiet=True)
        if not self.is_remote and self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
        self.send = send
        self.told = 0
        self.passes_before = teacher_passes()

    def epoch_finished(self, history: Sequence[EpochRecord]) -> None:
        self.tell(history)

    def tell(self, history: Sequence[EpochRecord]) -> None:
        """Report the epochs that were not reported by this process; all ranks call it."""
        if len(history) > self.told:
            self.send(self.metrics(history))
            self.told = len(history)

    def metrics(self, history: Sequence[EpochRecord]) -> dict[str, Any]:
        """Return what Tune is told: the last epoch's figures, and the records of the epochs not yet told."""
        accuracies = [record.validation_accuracy or 0.0 for record in history]
        passes = torch.tensor([float(teacher_passes() - self.passes_before)], device=self.device)
        return {
            "epoch": history[-1].epoch,
            "validation_accuracy": accuracies[-1],
            "best_accuracy": max(accuracies),
            "epochs": [record.model_dump(mode="json") for record in history[self.told :]],
            "teacher_passes": int(self.reduce_sum(passes).item()),
        }

    def report(self, metrics: dict[str, Any], checkpoint: Path | None) -> None:
        if self.is_remote:
            if checkpoint is not None:
                self._upload(checkpoint)
            self.barrier()
            return
        super().report(metrics, checkpoint)

    def checkpoints(self) -> Iterator[Path]:
        if not self.is_remote:
            yield from super().checkpoints()
            return
        for name in self._remote():
            with storage.local_copy(storage.join(self.place, name)) as folder:
                yield Path(folder)

    def _remote(self) -> list[str]:
        return [name for name in reversed(storage.list_names(self.place)) if name.startswith("checkpoint-")]

    def _upload(self, checkpoint: Path) -> None:
        kept = self._remote()
        number = int(kept[0].removeprefix("checkpoint-")) + 1 if kept else 0
        place = storage.join(self.place, f"checkpoint-{number:08}")
        for name in ("tensors.pt", "state.json"):
            storage.write_bytes(storage.join(place, name), (checkpoint / name).read_bytes())
        for old in kept[self.keep - 1 :]:
            for name in ("state.json", "tensors.pt"):
                storage.delete(storage.join(self.place, old, name))

    def warned(self) -> bool:
        return False

    def give_way(self) -> None:
        """Nobody is warned."""


class EvolvingContext(TrialContext):
    """A trial of a population: each epoch goes to Tune with its checkpoint, for others to go on from."""

    history: Sequence[EpochRecord] = ()

    def epoch_finished(self, history: Sequence[EpochRecord]) -> None:
        self.history = list(history)

    def report(self, metrics: dict[str, Any], checkpoint: Path | None) -> None:
        super().report(metrics, checkpoint)
        if checkpoint is not None and len(self.history) > self.told:
            values = self.metrics(self.history)
            self.told = len(self.history)
            tune.report(values, checkpoint=tune.Checkpoint.from_directory(str(checkpoint)))

    def checkpoints(self) -> Iterator[Path]:
        given = tune.get_checkpoint()
        if given is not None:
            with given.as_directory() as folder:
                yield Path(folder)
        yield from super().checkpoints()


def _run_distributed(plan: TrialPlan, assignment: Assignment) -> None:
    """Train with DDP over the trial's workers, under Ray Train, whose reports go on to Tune."""
    assert plan.config.search is not None
    resources = plan.config.search.resources
    key = trial_key(plan, assignment)
    filesystem, root = storage.open_filesystem(storage.join(plan.folder, "workers"))
    trainer = ray.train.torch.TorchTrainer(
        _worker,
        train_loop_config={"plan": plan, "assignment": assignment},
        scaling_config=ray.train.ScalingConfig(
            num_workers=resources.workers,
            use_gpu=plan.gpus > 0,
            resources_per_worker=bundle("train", resources.cpus, plan.gpus),
        ),
        run_config=ray.train.RunConfig(
            # A finished name would be taken for a run to go on with; the checkpoints are the trial's own.
            name=f"{key}-{time.time_ns()}",
            storage_path=root,
            storage_filesystem=filesystem if "://" in plan.folder else None,
            callbacks=[TuneReportCallback()],
            failure_config=ray.train.FailureConfig(max_failures=0, controller_failure_limit=3),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )
    trainer.fit()


def _worker(loop_config: dict[str, Any]) -> None:
    plan, assignment = loop_config["plan"], loop_config["assignment"]
    use_cluster_settings(plan.config.cluster)
    folder = checkpoint_folder(plan, trial_key(plan, assignment))
    _train(plan, assignment, TrialContext(folder, ray.train.torch.get_device(), ray.train.report))


def drop_checkpoints(plan: TrialPlan, key: str) -> None:
    """Delete the checkpoints of a trial that is over."""
    folder = checkpoint_folder(plan, key)
    if "://" not in folder:
        shutil.rmtree(folder, ignore_errors=True)
        return
    for name in storage.list_names(folder):
        for file in ("state.json", "tensors.pt"):
            storage.delete(storage.join(folder, name, file))


@torch.inference_mode()
def measure_latency(experiment: Experiment, gpus: float, repeats: int = 50) -> float:
    """Return the milliseconds that the student takes for one image: the median of so many passes."""
    config = experiment.config
    device = torch.device("cuda" if gpus > 0 and torch.cuda.is_available() else "cpu")
    model = build_model(config.student.model, experiment.task).eval().to(device)
    size = config.dataset.image_size
    image = torch.zeros(1, 3, size, size, device=device)
    seconds = []
    for number in range(repeats + 10):
        started = time.perf_counter()
        model(image)
        if device.type == "cuda":
            torch.cuda.synchronize()
        if number >= 10:  # the first ones choose kernels and fill caches
            seconds.append(time.perf_counter() - started)
    return 1000 * float(np.median(seconds))
