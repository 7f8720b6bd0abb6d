"""Run the training loop under Ray Train: DDP over a group of workers that survives failures."""

import json
import re
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from tmkd_ray import storage
from tmkd_ray.config import TrainingConfig
from tmkd_ray.errors import UserError
from tmkd_ray.progress import time_left
from tmkd_ray.results import EpochRecord
from tmkd_ray.settings import Settings
from tmkd_ray.stages.progress import lines_to, progress_channel, say
from tmkd_ray.stages.room import bundle, wait_for_room
from tmkd_ray.stages.session import cluster_settings, interruptible, num_gpus, use_cluster_settings
from tmkd_ray.training.context import WorkerContext
from tmkd_ray.training.loop import TrainTask, train

_CHECKPOINTS = "checkpoints"
"""The folder of Ray Train's run."""

_SNAPSHOT = "checkpoint_manager_snapshot.json"
"""Ray Train's own list of them, in the same folder."""

_NOT_OURS = (OSError, ray.exceptions.RayError, dist.DistError, torch.AcceleratorError)
"""Failures of machines, networks and other workers."""

_LOST_PEER = re.compile(r"gloo|NCCL|Connection (closed|reset|refused)|Broken pipe", re.IGNORECASE)
"""In the RuntimeError of a collective operation, to which another worker's end came."""


class DefectError(RuntimeError):
    """A worker failed before its first checkpoint, by its own fault: another start would fail alike."""


class Outcome(Settings):
    """What a finished training left beside its weights: `outcome.json`.

    Attributes:
        key: what was trained, on what; see `TrainingJob`.
        validation_accuracy: of the epoch kept, 0 to 1.
        parameters: of the network kept.
        seconds: of training and validation, over all restarts.
    """

    key: str
    best_epoch: int
    validation_accuracy: float
    parameters: int
    seconds: float
    num_workers: int
    device: str
    history: list[EpochRecord]


@dataclass(frozen=True)
class TrainingJob:
    """One network to train.

    Attributes:
        key: identifies what is trained on what; a job whose outcome lies in `folder` is not run again.
        label: for progress lines.
        folder: where weights and outcome go.
        build: makes the task on a worker, given its device; sent there by pickling.
        beside_teachers: whether frozen teachers run in the cluster meanwhile, and want GPUs too.
    """

    key: str
    label: str
    folder: str
    training: TrainingConfig
    build: Callable[[torch.device], TrainTask]
    beside_teachers: bool = False

    def outcome(self) -> Outcome | None:
        """Return the outcome of this very job, if it is finished."""
        path = storage.join(self.folder, "outcome.json")
        if not storage.exists(path):
            return None
        outcome = Outcome.model_validate_json(storage.read_bytes(path))
        return outcome if outcome.key == self.key else None


class RayTrainContext(WorkerContext):
    """A Ray Train worker.

    Ray keeps the newest checkpoints; they are looked for in their folder, not in Ray's list, so that neither a
    damaged one nor a list that a killed driver left half-written costs more than the newest.

    Args:
        folder: of the run's checkpoints, or URI.
    """

    def __init__(self, channel: Any, folder: str) -> None:
        context = ray.train.get_context()
        self.rank = context.get_world_rank()
        self.world_size = context.get_world_size()
        self.device = ray.train.torch.get_device()
        self.channel = channel
        self.folder = folder
        self.leaving: set[str] = set()

    def report(self, metrics: dict[str, Any], checkpoint: Path | None) -> None:
        if checkpoint is None:
            ray.train.report(metrics)
            return
        names = self._names()
        number = int(names[0].removeprefix("checkpoint_")) + 1 if names else 0
        kept = ray.train.Checkpoint.from_directory(str(checkpoint))
        ray.train.report(metrics, checkpoint=kept, checkpoint_dir_name=f"checkpoint_{number:08}")

    def checkpoints(self) -> Iterator[Path]:
        for name in self._names():
            with storage.local_copy(storage.join(self.folder, name)) as folder:
                yield Path(folder)

    def _names(self) -> list[str]:
        """Return the checkpoints' names, newest first."""
        return [name for name in reversed(storage.list_names(self.folder)) if name.startswith("checkpoint_0")]

    def warned(self) -> bool:
        """Return whether a node of this run is being drained (a spot instance taken back), once for each."""
        if not hasattr(ray.train, "get_preemption_info"):  # in Ray since mid-2026
            return False
        info = ray.train.get_preemption_info()
        nodes = set() if info is None else set(info.preempted_node_ids)
        is_new = not nodes <= self.leaving
        self.leaving |= nodes
        return is_new

    def give_way(self) -> None:
        """Train on: Ray starts the workers anew, from the checkpoint, when the node is gone."""

    def say(self, line: str) -> None:
        if self.rank == 0:
            self.channel.put.remote(line)


def run_jobs(jobs: Sequence[TrainingJob], folder: str) -> list[Outcome]:
    """Train one job after another on one group of workers, skipping those that are finished.

    Args:
        folder: for the checkpoints of what is not finished.

    Raises:
        UserError: a job cannot be trained as configured (it diverged, its data is damaged).
        DefectError: a worker failed before the first checkpoint, other than by what befell machine or network.
    """
    waiting = [job for job in jobs if job.outcome() is None]
    for job in jobs:
        if job not in waiting:
            say(f"{job.label}: done before, kept ({job.folder})")
    if waiting:
        _fit(waiting, folder)
    outcomes = [job.outcome() for job in jobs]
    assert all(outcome is not None for outcome in outcomes)
    return [outcome for outcome in outcomes if outcome is not None]


def _fit(jobs: Sequence[TrainingJob], folder: str) -> None:
    training = jobs[0].training
    num_workers, use_gpu = _workers(training)
    gpus = _gpu_share(jobs[0], num_workers) if use_gpu else 0.0
    resources = bundle("train", training.num_cpus_per_worker, gpus)
    fewest, most = (num_workers, num_workers) if isinstance(num_workers, int) else num_workers
    worker = (f"a worker of {jobs[0].label}", resources)
    wait_for_room([worker] * fewest, [worker] * (most - fewest))
    checkpoints = storage.join(folder, _CHECKPOINTS)
    _drop_broken_snapshot(checkpoints)
    # Ray by itself knows fewer URIs, and waits for them as long as it takes.
    filesystem, root = storage.open_filesystem(folder)
    with progress_channel() as channel:
        trainer = ray.train.torch.TorchTrainer(
            _worker,
            train_loop_config={
                "jobs": list(jobs),
                "channel": channel,
                "started": time.time(),
                "checkpoints": checkpoints,
                "cluster": cluster_settings(),
            },
            scaling_config=ray.train.ScalingConfig(
                num_workers=num_workers,
                use_gpu=use_gpu,
                resources_per_worker=resources,
            ),
            # The same name and place: started again after a crash, it goes on from the last checkpoint.
            run_config=ray.train.RunConfig(
                name=_CHECKPOINTS,
                storage_path=root,
                storage_filesystem=filesystem if "://" in folder else None,
                failure_config=ray.train.FailureConfig(
                    max_failures=training.max_failures, controller_failure_limit=3
                ),
                checkpoint_config=ray.train.CheckpointConfig(num_to_keep=training.keep_checkpoints),
                logging_config=ray.train.LoggingConfig(log_level="ERROR"),
            ),
        )
        try:
            with interruptible():
                trainer.fit()
        finally:
            refusal = ray.get(channel.refused.remote())
            if refusal is not None:
                is_defect = refusal.startswith("Traceback")
                raise DefectError(refusal) if is_defect else UserError(refusal)


def _drop_broken_snapshot(folder: str) -> None:
    """Delete Ray Train's list of checkpoints if it is half-written or lists one that is gone: Ray would fail.

    Ray overwrites the list in place, so that a killed driver can leave it so; the workers do without it.
    """
    path = storage.join(folder, _SNAPSHOT)
    if not storage.exists(path):
        return
    content = storage.read_bytes(path)
    try:
        listed = {result["checkpoint_dir_name"] for result in json.loads(content)["checkpoint_results"]}
        is_whole = listed <= set(storage.list_names(folder))
    except (ValueError, KeyError, TypeError):
        is_whole = False
    if not is_whole:
        say(f"{path}, Ray Train's list of checkpoints, is damaged; they are found without it")
        storage.delete(path)


def _workers(training: TrainingConfig) -> tuple[int | tuple[int, int], bool]:
    """Return how many workers to start, or the fewest and the most, and whether each has a GPU.

    If nothing is said of GPUs and there are some, but fewer than workers, fewer workers take part: the global
    batch stays the same.
    """
    gpus = int(num_gpus())
    if training.min_workers is not None and training.min_workers < training.num_workers:
        # Ray takes as many as find room, and starts anew from the checkpoint when that number changes.
        use_gpu = gpus >= training.min_workers if training.use_gpu is None else training.use_gpu
        return (training.min_workers, training.num_workers), use_gpu
    if training.use_gpu is not None or gpus == 0:
        return training.num_workers, bool(training.use_gpu)
    workers = max(n for n in range(1, min(gpus, training.num_workers) + 1) if training.batch_size % n == 0)
    if workers < training.num_workers:
        say(f"{workers} workers instead of {training.num_workers}: the cluster has {gpus} GPUs")
    return workers, True


def _gpu_share(job: TrainingJob, num_workers: int | tuple[int, int]) -> float:
    """Return the share of a GPU for each worker: a part of it where teachers beside it have no other.

    More than half, so that no two workers come to lie on one GPU.
    """
    most = num_workers if isinstance(num_workers, int) else num_workers[1]
    return 0.6 if job.beside_teachers and num_gpus() < most + 1 else 1.0


def _worker(loop_config: dict[str, Any]) -> None:
    """What each Ray Train worker runs: the jobs that are not finished, in turn."""
    use_cluster_settings(loop_config["cluster"])
    context = RayTrainContext(loop_config["channel"], loop_config["checkpoints"])
    if ray.get(context.channel.refused.remote()) is not None:
        return  # started again after an error that would come again
    context.say(
        f"{context.world_size} workers ({device_name(context.device)}) "
        f"ready after {time.time() - loop_config['started']:.0f} s"
    )
    jobs: list[TrainingJob] = loop_config["jobs"]
    try:
        with lines_to(context.say):
            _train_jobs(jobs, context)
    except UserError as error:
        # Raised all the same, so that the other workers do not wait for this one.
        ray.get(context.channel.refuse.remote(str(error)))
        raise
    except Exception as error:
        if is_defect(error, context.resumable):
            ray.get(context.channel.refuse.remote(traceback.format_exc()))
        raise


def _train_jobs(jobs: list[TrainingJob], context: WorkerContext) -> None:
    started, num_trained = time.monotonic(), 0
    for number, job in enumerate(jobs, 1):
        if job.outcome() is not None:
            continue
        if len(jobs) > 1:
            left = (time.monotonic() - started) / max(num_trained, 1) * (len(jobs) - number + 1)
            all_left = f"  {time_left(left)} left for all trainings" if num_trained else ""
            context.say(f"training {number} of {len(jobs)}: {job.label}{all_left}")
        _train_job(job, context)
        num_trained += 1


def is_defect(error: Exception, resumable: bool) -> bool:
    """Return whether a worker's error would come again: it came before any checkpoint, and of its own doing.

    Args:
        resumable: whether the training has a checkpoint.
    """
    of_a_peer = isinstance(error, RuntimeError) and _LOST_PEER.search(str(error)) is not None
    return not resumable and not isinstance(error, _NOT_OURS) and not of_a_peer


def _train_job(job: TrainingJob, context: WorkerContext) -> None:
    context.resumable = False
    torch.manual_seed(job.training.seed)
    task = job.build(context.device)
    result = train(task, job.training, context, job.key, job.label, job.folder)
    if context.rank == 0:
        task.save(job.folder, result.weights)
        outcome = Outcome(
            key=job.key,
            best_epoch=result.best_epoch,
            validation_accuracy=result.accuracy,
            parameters=task.num_parameters(),
            seconds=result.seconds,
            num_workers=context.world_size,
            device=device_name(context.device),
            history=result.history,
        )
        content = outcome.model_dump_json(indent=1).encode()
        storage.write_bytes(storage.join(job.folder, "outcome.json"), content)
    # No worker looks for this outcome before it is written.
    context.barrier()


def device_name(device: torch.device) -> str:
    """Return `cpu`, or the GPU's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
