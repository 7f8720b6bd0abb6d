"""The training loop: one for students, visual teachers and CLIP.

It trains a `TrainTask` in a `WorkerContext`. Everything random is a function of (seed, epoch, rank), so that a
run that was interrupted after an epoch goes on exactly as one that was not.
"""

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tmkd_ray import storage
from tmkd_ray.config import TrainingConfig
from tmkd_ray.errors import UserError
from tmkd_ray.precision import autocast
from tmkd_ray.results import EpochRecord
from tmkd_ray.training.checkpoint import TrainingState, read_checkpoint, written_checkpoint
from tmkd_ray.training.context import WorkerContext
from tmkd_ray.training.optimization import build_optimizer, learning_rate
from tmkd_ray.types import LossOutput

_SAY_EVERY_S = 2.0
"""Short epochs are not all said, only the first, the last, and one every so many seconds."""


@dataclass
class StepOutput:
    """What the trained module returns for a batch.

    Attributes:
        loss: weighted, with its terms.
        correct: number of right predictions in the batch; None where that means nothing.
    """

    loss: LossOutput
    correct: Tensor | None = None


class TrainTask(ABC):
    """What is trained, on which batches, and how it is judged.

    Attributes:
        module: everything with trainable parameters; `module(batch)` returns a StepOutput. DDP wraps it.
        num_samples: of the training set.
        notes: lines for the user, said when the training starts.
    """

    module: nn.Module
    num_samples: int
    notes: tuple[str, ...] = ()

    @abstractmethod
    def batches(self, epoch: int, context: WorkerContext) -> Iterator[Any]:
        """Yield this worker's batches of an epoch (from 0); the same number on every worker."""

    def after_step(self, batch: Any) -> None:  # noqa: B027 (most tasks have nothing to do)
        """Update what no gradient trains, after the optimiser's step on this batch."""

    @abstractmethod
    def validate(self, context: WorkerContext) -> dict[str, float]:
        """Return metrics over all workers; `accuracy` picks the epoch to keep."""

    @property
    @abstractmethod
    def kept(self) -> nn.Module:
        """The network that is the result: the module without the distiller's heads."""

    def save(self, folder: str, weights: Mapping[str, Tensor]) -> None:
        """Write the result's weights into a folder or URI."""
        content = safetensors.torch.save({name: value.contiguous() for name, value in weights.items()})
        storage.write_bytes(storage.join(folder, "model.safetensors"), content)

    def num_parameters(self) -> int:
        """Return the number of trained values of the result."""
        return sum(p.numel() for p in self.kept.parameters())


@dataclass(frozen=True)
class TrainingOutcome:
    """What a training left.

    Attributes:
        weights: of the best epoch.
        accuracy: on validation, 0 to 1.
        seconds: of training and validation, over all restarts.
    """

    weights: Mapping[str, Tensor]
    best_epoch: int
    accuracy: float
    history: list[EpochRecord]
    seconds: float


class DivergedError(UserError):
    """The loss became NaN or infinite; the message names the terms and the epoch."""


def train(
    task: TrainTask, config: TrainingConfig, context: WorkerContext, key: str, label: str
) -> TrainingOutcome:
    """Train until `config.epochs` are done, resuming from the context's newest checkpoint.

    Args:
        key: identifies the run: its checkpoints are resumed, others are not.
        label: what to call it in progress lines.

    Raises:
        DivergedError: the loss is not finite.
    """
    for note in task.notes:
        context.say(note)
    module = task.module.to(context.device)
    optimizer = build_optimizer(config, module)
    scaler = torch.amp.GradScaler(context.device.type, enabled=config.precision == "float16")
    state = TrainingState(key)
    with context.latest_checkpoint() as folder:
        found = None if folder is None else read_checkpoint(folder, key)
    if found is not None:
        state, tensors = found
        module.load_state_dict(tensors["module"])
        optimizer.load_state_dict(tensors["optimizer"])
        scaler.load_state_dict(tensors["scaler"])
        context.say(f"{label}: resuming after epoch {state.epoch}")
    wrapped: nn.Module = module
    if context.world_size > 1:
        # The buffers are constants and batch-norm statistics; the latter are averaged once an epoch.
        wrapped = DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True)

    said = time.perf_counter()
    for epoch in range(state.epoch, config.epochs):
        torch.manual_seed((config.seed * 1_000_003 + epoch) * 4096 + context.rank)
        started = time.perf_counter()
        module.train()
        sums = _train_epoch(task, wrapped, optimizer, scaler, config, context, epoch)
        _average_batch_statistics(module, context)
        train_seconds = time.perf_counter() - started
        module.eval()
        accuracy = task.validate(context)["accuracy"]

        count = sums.pop("samples")
        correct = sums.pop("correct")
        record = EpochRecord(
            epoch=epoch + 1,
            learning_rate=optimizer.param_groups[0]["lr"],
            loss=sums.pop("loss") / count,
            terms={name: value / count for name, value in sums.items()},
            train_accuracy=None if correct < 0 else correct / count,
            validation_accuracy=accuracy,
            seconds=time.perf_counter() - started,
            images_per_second=count / train_seconds,
        )
        state.epoch = epoch + 1
        state.history.append(record)
        state.seconds += record.seconds
        if accuracy > state.best_accuracy:
            state.best_accuracy, state.best_epoch = accuracy, state.epoch
            state.best = {k: v.detach().cpu().clone() for k, v in task.kept.state_dict().items()}
        if time.perf_counter() - said >= _SAY_EVERY_S or state.epoch in (1, config.epochs):
            said = time.perf_counter()
            context.say(_epoch_line(label, record, config.epochs))
        if state.epoch % config.checkpoint_every == 0 or state.epoch == config.epochs:
            with contextlib.ExitStack() as stack:
                checkpoint = None
                if context.rank == 0:
                    parts = (module.state_dict(), optimizer.state_dict(), scaler.state_dict())
                    checkpoint = stack.enter_context(written_checkpoint(state, *parts))
                context.report({"epoch": state.epoch, "validation_accuracy": accuracy}, checkpoint)

    return TrainingOutcome(state.best, state.best_epoch, state.best_accuracy, state.history, state.seconds)


def _train_epoch(
    task: TrainTask,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    config: TrainingConfig,
    context: WorkerContext,
    epoch: int,
) -> dict[str, float]:
    """Train one epoch; return sums over samples and workers: loss, terms, `correct` (< 0: none), `samples`."""
    size = min(config.batch_size, task.num_samples)
    steps = max(1, task.num_samples // size)
    names: list[str] | None = None
    sums: Tensor | None = None
    for step, batch in enumerate(task.batches(epoch, context)):
        rate = learning_rate(config, epoch + step / steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with autocast(context.device, config.precision):
            output: StepOutput = module(batch)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(output.loss.loss).backward()  # type: ignore[no-untyped-call]
        if config.max_gradient_norm is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(module.parameters(), config.max_gradient_norm)
        scaler.step(optimizer)
        scaler.update()
        task.after_step(batch)

        count = len(batch.labels)
        correct = torch.tensor(-1.0) if output.correct is None else output.correct
        names = list(output.loss.terms)
        values = [output.loss.loss, *output.loss.terms.values()]
        row = torch.stack([value.detach().double() * count for value in values])
        row = torch.cat([row, correct.to(row)[None], row.new_tensor([float(count)])])
        sums = row if sums is None else sums + row
    assert sums is not None, "an epoch without batches"
    assert names is not None
    total = context.reduce_sum(sums)
    _check_finite(total, names, epoch)  # of the sum over workers, so that all of them stop together
    return dict(zip(["loss", *names, "correct", "samples"], total.tolist(), strict=True))


def _average_batch_statistics(module: nn.Module, context: WorkerContext) -> None:
    """Give all workers the same running statistics: the mean of what each saw of its part of the batches."""
    if context.world_size == 1:
        return
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is not None:
            assert layer.running_var is not None
            for statistic in (layer.running_mean, layer.running_var):
                statistic.copy_(context.reduce_sum(statistic) / context.world_size)


def _check_finite(sums: Tensor, names: list[str], epoch: int) -> None:
    bad = [
        name
        for name, value in zip(["loss", *names], sums.tolist(), strict=False)
        if not abs(value) < float("inf")
    ]
    if bad:
        raise DivergedError(
            f"training diverged in epoch {epoch + 1}: {', '.join(bad)} is not finite; "
            "lower training.learning_rate, set training.max_gradient_norm, or lower that term's weight"
        )


def _epoch_line(label: str, record: EpochRecord, epochs: int) -> str:
    terms = "  ".join(f"{name} {value:.3f}" for name, value in record.terms.items())
    return (
        f"{label}: epoch {record.epoch}/{epochs}  loss {record.loss:.3f}  {terms}  "
        f"validation {100 * (record.validation_accuracy or 0):.1f} %  {record.images_per_second:,.0f} images/s"
    )
