"""The training loop: one for students, visual teachers and CLIP.

It trains a `TrainTask` in a `WorkerContext`. Everything random is a function of (seed, epoch, step, rank), so
that a run that was interrupted after any step goes on exactly as one that was not.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tmkd_ray.config import TrainingConfig
from tmkd_ray.progress import Rate, time_left
from tmkd_ray.results import EpochRecord
from tmkd_ray.training.averaging import batch_statistics, mean_over_workers
from tmkd_ray.training.checkpoint import PartialEpoch, TrainingState, newest_checkpoint, written_checkpoint
from tmkd_ray.training.context import WorkerContext
from tmkd_ray.training.divergence import DivergedError as DivergedError
from tmkd_ray.training.divergence import LossWatch
from tmkd_ray.training.step import TrainStep
from tmkd_ray.training.task import StepOutput as StepOutput
from tmkd_ray.training.task import TrainTask as TrainTask
from tmkd_ray.training.tracking import RunLogger, open_loggers

_SAY_EVERY_S = 2.0
"""Short epochs are not all said, only the first, the last, and one every so many seconds."""

_STEPS_EVERY_S = 15.0
"""When a long epoch first says how far it is."""

_LOOK_EVERY_S = 5.0
"""About how often the loop looks whether the loss is finite and whether it was warned; that waits for a GPU."""

_MAX_STEPS_UNSEEN = 1000


@dataclass(frozen=True)
class TrainingOutcome:
    """What a training left.

    Attributes:
        weights: of the best epoch; their moving average with `ema_decay`.
        accuracy: on validation, 0 to 1.
        seconds: of training and validation, over all restarts.
    """

    weights: Mapping[str, Tensor]
    best_epoch: int
    accuracy: float
    history: list[EpochRecord]
    seconds: float


def train(
    task: TrainTask,
    config: TrainingConfig,
    context: WorkerContext,
    key: str,
    label: str,
    folder: str | None = None,
) -> TrainingOutcome:
    """Train until `config.epochs` are done, resuming from the context's newest checkpoint.

    Args:
        key: identifies the run: its checkpoints are resumed, others are not.
        label: what to call it in progress lines.
        folder: for `tensorboard/` and `diverged.json`, or URI; None: neither is written, no logger is used.

    Raises:
        DivergedError: the loss is not finite, or above `config.max_loss`.
        UserError: a logger's package is not installed, or the network cannot be compiled.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(context.listening())
        return _Training(task, config, context, key, label, folder, stack).run()


class _Training:
    """A training in progress."""

    def __init__(
        self,
        task: TrainTask,
        config: TrainingConfig,
        context: WorkerContext,
        key: str,
        label: str,
        folder: str | None,
        stack: contextlib.ExitStack,
    ) -> None:
        self.task, self.config, self.context, self.label = task, config, context, label
        for note in task.notes:
            context.say(note)
        self.step = TrainStep(task, config, context)
        self.watch = LossWatch(task.sample_ids, folder, config.max_loss)
        self.next_look = 1
        self.steps_unheard = 0
        self.state = TrainingState(key)
        found = newest_checkpoint(context, key)
        context.resumable = found is not None
        if found is not None:
            self.state, tensors = found
            self.step.load_state_dict(tensors)
            self.step.terms = self.state.partial.terms
            context.say(f"{label}: resuming after {_position(self.state)}")
        self.loggers: list[RunLogger] = []
        if context.rank == 0 and folder is not None and self.state.epoch < config.epochs:
            self.loggers = open_loggers(config, folder, key, label, self.state.epoch)
            for logger in self.loggers:
                stack.callback(logger.close)

    def run(self) -> TrainingOutcome:
        config, state = self.config, self.state
        said = time.perf_counter()
        while state.epoch < config.epochs:
            self.step.module.train()
            self._train_epoch()
            record = self._finish_epoch()
            self.context.epoch_finished(state.history)
            if time.perf_counter() - said >= _SAY_EVERY_S or state.epoch in (1, config.epochs):
                said = time.perf_counter()
                left = state.seconds / state.epoch * (config.epochs - state.epoch)
                self.context.say(_epoch_line(self.label, record, config.epochs, left))
            if state.epoch % config.checkpoint_every == 0 or state.epoch == config.epochs:
                self._checkpoint()
        return TrainingOutcome(state.best, state.best_epoch, state.best_accuracy, state.history, state.seconds)

    def _train_epoch(self) -> None:
        """Train what is left of the epoch; its sums are in the state then."""
        config, context, partial = self.config, self.context, self.state.partial
        epoch = self.state.epoch
        num_steps = max(1, self.task.num_samples // config.batch_size)
        sums = self._earlier_sums() if partial.sums else None
        clock = _Clock()
        looked = partial.steps
        what = f"{self.label}: epoch {epoch + 1}/{config.epochs}"
        batch_size = min(config.batch_size, self.task.num_samples)

        def detail() -> str:
            assert sums is not None
            means = _means(self.step.terms, sums.tolist())
            return f"{_figures(*means)}  {100 * clock.waiting():.0f} % waiting for data"

        left = (num_steps - partial.steps) * batch_size
        progress = Rate(what, left, "images", _STEPS_EVERY_S, context.say, says_end=False, detail=detail)
        for batch in clock.timed(self.task.batches(epoch, context, partial.steps)):
            _seed(config.seed, epoch, partial.steps, context.rank)
            row = self.step(batch, epoch + partial.steps / num_steps)
            self.watch.note(partial.steps, row, batch)
            sums = row if sums is None else sums + row
            partial.steps += 1
            progress.advance(batch_size)
            every = config.checkpoint_every_steps
            due = every is not None and partial.steps % every == 0 and partial.steps < num_steps
            if due or partial.steps - looked >= self.next_look:
                warned = self._look(clock, partial.steps - looked)
                looked = partial.steps
                if due or warned:
                    self._pause(sums, clock)
                    self._checkpoint(warned)
                    sums = self._earlier_sums()
        assert sums is not None, "an epoch without batches"
        warned = partial.steps > looked and self._look(clock, partial.steps - looked)
        self._pause(sums, clock)
        if warned:
            self._checkpoint(warned)

    def _look(self, clock: "_Clock", steps: int) -> bool:
        """Raise if the loss has diverged; return whether a worker was warned. Settles when to look again."""
        first = float(self.context.rank == 0)
        self.steps_unheard += steps
        warned = False
        if self.steps_unheard >= self.next_look:  # not after every short epoch: under Ray it takes milliseconds
            self.steps_unheard = 0
            warned = self.context.warned()
        facts = torch.tensor([clock.lap() * first, float(warned)], dtype=torch.float64)
        facts = torch.cat([self.watch.num_bad()[None], facts.to(self.context.device)])
        num_bad, seconds, num_warned = self.context.reduce_sum(facts).tolist()
        if num_bad > 0:
            raise self.watch.diverged(self.state.epoch, self.step.terms, self.context)
        self.watch.clear()
        # Of the sums, so that all workers look after the same steps.
        self.next_look = int(min(max(_LOOK_EVERY_S * steps / max(seconds, 1e-9), 1), _MAX_STEPS_UNSEEN))
        return bool(num_warned > 0)

    def _earlier_sums(self) -> Tensor:
        """Return the sums in the state, which are of all workers, for one of them to bring in again."""
        sums = torch.tensor(self.state.partial.sums, dtype=torch.float64, device=self.context.device)
        return sums * float(self.context.rank == 0)

    def _pause(self, sums: Tensor, clock: "_Clock") -> None:
        """Note in the state what was trained of the epoch, and give all workers the same running statistics.

        These are the mean of what each worker saw of its part of the batches.
        """
        partial = self.state.partial
        partial.terms = self.step.terms
        partial.sums = self.context.reduce_sum(sums.clone()).tolist()
        seconds, data_seconds = clock.take()
        partial.seconds += seconds
        partial.data_seconds += data_seconds
        values = batch_statistics(self.step.module)
        if self.step.average is not None:
            values += self.step.average.statistics()
        mean_over_workers(values, self.context)

    def _finish_epoch(self) -> EpochRecord:
        """Validate, and note the epoch in the history."""
        state, partial = self.state, self.state.partial
        started = time.perf_counter()
        self.step.module.eval()
        with contextlib.ExitStack() as stack:
            if self.step.average is not None:
                stack.enter_context(self.step.average.applied())
            if self.config.compile:  # for the training's batches; others would be compiled anew
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            accuracy = self.task.validate(self.context)["accuracy"]
            if accuracy > state.best_accuracy:
                state.best_accuracy, state.best_epoch = accuracy, state.epoch + 1
                kept = self.task.kept.state_dict()
                state.best = {name: value.detach().cpu().clone() for name, value in kept.items()}
        loss, terms, train_accuracy = _means(partial.terms, partial.sums)
        record = EpochRecord(
            epoch=state.epoch + 1,
            learning_rate=self.step.optimizer.param_groups[0]["lr"],
            loss=loss,
            terms=terms,
            train_accuracy=train_accuracy,
            validation_accuracy=accuracy,
            seconds=partial.seconds + time.perf_counter() - started,
            images_per_second=partial.sums[-1] / partial.seconds,
            data_seconds=partial.data_seconds,
            data_share=min(partial.data_seconds / partial.seconds, 1.0),
        )
        state.epoch += 1
        state.partial = PartialEpoch()
        state.history.append(record)
        state.seconds += record.seconds
        for logger in self.loggers:
            logger.log(record)
        return record

    def _checkpoint(self, warned: bool = False) -> None:
        """Write a checkpoint; if this worker is to be ended soon, give way after it."""
        state = self.state
        if warned:
            self.context.say(f"{self.label}: warned of an end; checkpoint after {_position(state)}")
        with contextlib.ExitStack() as stack:
            checkpoint = None
            if self.context.rank == 0:
                checkpoint = stack.enter_context(written_checkpoint(state, self.step.state_dict()))
            metrics = {
                "epoch": state.epoch,
                "step": state.partial.steps,
                "validation_accuracy": state.history[-1].validation_accuracy if state.history else None,
            }
            self.context.report(metrics, checkpoint)
        self.context.resumable = True
        for logger in self.loggers:
            logger.save()
        if warned:
            self.context.give_way()


class _Clock:
    """Time spent, and the part of it spent waiting for batches."""

    def __init__(self) -> None:
        self._taken = self._lapped = time.perf_counter()
        self._waited = 0.0

    def timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            self._waited += time.perf_counter() - started
            if batch is None:
                return
            yield batch

    def waiting(self) -> float:
        """Return the part of the seconds since they were last taken that was waited."""
        return self._waited / max(time.perf_counter() - self._taken, 1e-9)

    def lap(self) -> float:
        """Return the seconds since the last lap."""
        now = time.perf_counter()
        seconds, self._lapped = now - self._lapped, now
        return seconds

    def take(self) -> tuple[float, float]:
        """Return the seconds since they were last taken, and how many of them were waited."""
        now = time.perf_counter()
        seconds, self._taken = now - self._taken, now
        waited, self._waited = self._waited, 0.0
        return seconds, waited


def _seed(*numbers: int) -> None:
    """Seed torch's generators by (seed, epoch, step, rank)."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]))


def _position(state: TrainingState) -> str:
    within = f", step {state.partial.steps} of the next" if state.partial.steps else ""
    return f"epoch {state.epoch}{within}"


def _means(terms: Sequence[str], sums: Sequence[float]) -> tuple[float, dict[str, float | None], float | None]:
    """Return loss, its terms and the accuracy on the training images, of the sums of steps."""
    loss, *values, correct, count = sums
    means: dict[str, float | None] = {name: value / count for name, value in zip(terms, values, strict=True)}
    return loss / count, means, None if correct < 0 else correct / count


def _figures(loss: float | None, terms: Mapping[str, float | None], train_accuracy: float | None) -> str:
    values = {"loss": loss, **terms}
    text = "  ".join(f"{name} {value:.3f}" for name, value in values.items())
    return text if train_accuracy is None else f"{text}  training {100 * train_accuracy:.1f} %"


def _epoch_line(label: str, record: EpochRecord, epochs: int, seconds_left: float) -> str:
    figures = _figures(record.loss, record.terms, record.train_accuracy)
    accuracy, waiting = 100 * (record.validation_accuracy or 0), 100 * (record.data_share or 0)
    return (
        f"{label}: epoch {record.epoch}/{epochs}  {figures}  "
        f"validation {accuracy:.1f} %  {record.images_per_second:,.0f} images/s, "
        f"{waiting:.0f} % waiting for data, {time_left(seconds_left)} left"
    )
