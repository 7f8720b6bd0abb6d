"""Run the training loop under Ray Train: DDP over a group of workers that survives failures."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch

from tmkd_ray import storage
from tmkd_ray.config import TrainingConfig
from tmkd_ray.errors import UserError
from tmkd_ray.results import EpochRecord
from tmkd_ray.settings import Settings
from tmkd_ray.stages.progress import progress_channel, say
from tmkd_ray.stages.session import num_gpus
from tmkd_ray.training.context import WorkerContext
from tmkd_ray.training.loop import TrainTask, train


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
    """

    key: str
    label: str
    folder: str
    training: TrainingConfig
    build: Callable[[torch.device], TrainTask]

    def outcome(self) -> Outcome | None:
        """Return the outcome of this very job, if it is finished."""
        path = storage.join(self.folder, "outcome.json")
        if not storage.exists(path):
            return None
        outcome = Outcome.model_validate_json(storage.read_bytes(path))
        return outcome if outcome.key == self.key else None


class RayTrainContext(WorkerContext):
    """A Ray Train worker."""

    def __init__(self, channel: Any) -> None:
        context = ray.train.get_context()
        self.rank = context.get_world_rank()
        self.world_size = context.get_world_size()
        self.device = ray.train.torch.get_device()
        self.channel = channel

    def report(self, metrics: dict[str, Any], checkpoint: Path | None) -> None:
        kept = None if checkpoint is None else ray.train.Checkpoint.from_directory(str(checkpoint))
        ray.train.report(metrics, checkpoint=kept)

    @contextlib.contextmanager
    def latest_checkpoint(self) -> Iterator[Path | None]:
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            yield None
            return
        with checkpoint.as_directory() as folder:
            yield Path(folder)

    def say(self, line: str) -> None:
        if self.rank == 0:
            self.channel.put.remote(line)


def run_jobs(jobs: Sequence[TrainingJob], folder: str) -> list[Outcome]:
    """Train one job after another on one group of workers, skipping those that are finished.

    Args:
        folder: for the checkpoints of what is not finished.

    Raises:
        UserError: a job cannot be trained as configured (it diverged, its data is damaged).
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
    with progress_channel() as channel:
        trainer = ray.train.torch.TorchTrainer(
            _worker,
            train_loop_config={"jobs": list(jobs), "channel": channel, "started": time.time()},
            scaling_config=ray.train.ScalingConfig(
                num_workers=num_workers,
                use_gpu=use_gpu,
                resources_per_worker={"CPU": training.num_cpus_per_worker, **({"GPU": 1} if use_gpu else {})},
            ),
            # The same name and place: started again after a crash, it goes on from the last checkpoint.
            run_config=ray.train.RunConfig(
                name="checkpoints",
                storage_path=folder,
                failure_config=ray.train.FailureConfig(
                    max_failures=training.max_failures, controller_failure_limit=3
                ),
                checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
                logging_config=ray.train.LoggingConfig(log_level="ERROR"),
            ),
        )
        try:
            trainer.fit()
        finally:
            refusal = ray.get(channel.refused.remote())
            if refusal is not None:
                raise UserError(refusal)


def _workers(training: TrainingConfig) -> tuple[int, bool]:
    """Return how many workers to start and whether each has a GPU.

    If nothing is said of GPUs and there are some, but fewer than workers, fewer workers take part: the global
    batch stays the same.
    """
    gpus = int(num_gpus())
    if training.use_gpu is not None or gpus == 0:
        return training.num_workers, bool(training.use_gpu)
    workers = max(n for n in range(1, min(gpus, training.num_workers) + 1) if training.batch_size % n == 0)
    if workers < training.num_workers:
        say(f"{workers} workers instead of {training.num_workers}: the cluster has {gpus} GPUs")
    return workers, True


def _worker(loop_config: dict[str, Any]) -> None:
    """What each Ray Train worker runs: the jobs that are not finished, in turn."""
    context = RayTrainContext(loop_config["channel"])
    if ray.get(context.channel.refused.remote()) is not None:
        return  # started again after a UserError, which would come again
    context.say(
        f"{context.world_size} workers ({device_name(context.device)}) "
        f"ready after {time.time() - loop_config['started']:.0f} s"
    )
    jobs: list[TrainingJob] = loop_config["jobs"]
    try:
        for job in jobs:
            if job.outcome() is None:
                _train_job(job, context)
    except UserError as error:
        # Raised all the same, so that the other workers do not wait for this one.
        ray.get(context.channel.refuse.remote(str(error)))
        raise


def _train_job(job: TrainingJob, context: WorkerContext) -> None:
    torch.manual_seed(job.training.seed)
    task = job.build(context.device)
    result = train(task, job.training, context, job.key, job.label)
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
