"""One step of the optimiser on one batch."""

import dataclasses
import itertools
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tmkd_ray.config import TrainingConfig
from tmkd_ray.errors import UserError
from tmkd_ray.precision import autocast
from tmkd_ray.training.averaging import WeightAverage
from tmkd_ray.training.context import WorkerContext
from tmkd_ray.training.dot import DOT
from tmkd_ray.training.optimization import build_optimizer, set_rates
from tmkd_ray.training.task import StepOutput, TrainTask


class TrainStep:
    """Forward, backward and update; on the device alone: nothing in it waits for a GPU.

    Attributes:
        average: of the weights of `task.kept`; None without `ema_decay`.
        terms: names of the loss terms, known after the first step.
    """

    def __init__(self, task: TrainTask, config: TrainingConfig, context: WorkerContext) -> None:
        self.task, self.config, self.context = task, config, context
        self.terms: list[str] = []
        self.module = task.module.to(context.device)
        if uses_channels_last(config, context.device):
            self.module = self.module.to(memory_format=torch.channels_last)
        self.optimizer = build_optimizer(config, self.module)
        self.scaler = torch.amp.GradScaler(context.device.type, enabled=config.precision == "float16")
        for part in task.compiled if config.compile else ():
            part.compile(dynamic=False)
        self.wrapped = self.module
        if context.world_size > 1:
            # The buffers are constants and batch-norm statistics; the latter are averaged once an epoch.
            self.wrapped = DistributedDataParallel(
                self.module, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        # Now that DDP has handed out the weights of rank 0.
        self.average = None if config.ema_decay is None else WeightAverage(task.kept, config.ema_decay)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds: tensors only, within dicts."""
        return {
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": {} if self.average is None else self.average.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        # Fused optimisers take it that a parameter and its momentum lie alike in memory.
        for parameter, values in self.optimizer.state.items():
            for name, value in values.items():
                if value is not None and value.shape == parameter.shape:
                    values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])

    def __call__(self, batch: Any, progress: float) -> Tensor:
        """Train on a batch.

        Args:
            progress: epochs done before it, with the part of this one.

        Returns:
            float64 [1 + terms + 2], sums over the batch: loss, terms, right predictions (< 0: none), samples.
        """
        set_rates(self.config, self.optimizer, progress)
        parts = micro_batches(batch, self.config.gradient_accumulation)
        count = len(batch.labels)
        row: Tensor | None = None
        for number, part in enumerate(parts, start=1):
            output = self._backward(part, len(part.labels) / count, last=number == len(parts))
            if number == len(parts):
                self._update()
            self.task.after_step(part)
            sums = self._sums(output, len(part.labels))
            row = sums if row is None else row + sums
        self.task.after_update()
        assert row is not None
        return row

    def _backward(self, part: Any, weight: float, last: bool) -> StepOutput:
        with ExitStack() as stack:
            parts_gradients = isinstance(self.optimizer, DOT)  # and averages over the workers by itself
            if isinstance(self.wrapped, DistributedDataParallel) and (parts_gradients or not last):
                stack.enter_context(self.wrapped.no_sync())
            try:
                with autocast(self.context.device, self.config.precision):
                    output: StepOutput = self.wrapped(part)
                if isinstance(self.optimizer, DOT):
                    self.optimizer.backward(output.loss)
                    return output
                loss = output.loss.loss if weight == 1.0 else output.loss.loss * weight
                self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            except RuntimeError as error:
                if not (self.config.compile and _is_compilers(error)):
                    raise
                raise UserError(
                    "training.compile: torch.compile cannot compile this network here; set "
                    f"training.compile=false (on a CPU it needs a C++ compiler, on a GPU Triton).\n{error}"
                ) from error
        return output

    def _update(self) -> None:
        if self.config.max_gradient_norm is not None and isinstance(self.optimizer, DOT):
            self.optimizer.clip_gradients(self.config.max_gradient_norm)
        elif self.config.max_gradient_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.module.parameters(), self.config.max_gradient_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update()

    def _sums(self, output: StepOutput, count: int) -> Tensor:
        self.terms = list(output.loss.terms)
        values = [output.loss.loss, *output.loss.terms.values()]
        row = torch.stack([value.detach().double() for value in values]) * count
        correct = row.new_full((), -1.0) if output.correct is None else output.correct.to(row)
        return torch.cat([row, correct[None], row.new_full((1,), count)])


def uses_channels_last(config: TrainingConfig, device: torch.device) -> bool:
    """Return whether the network's weights lie channels last.

    Unless it is set: on CPUs, where a training step of CIFAR networks was 1.2 to 1.4 times as fast (1 core,
    resnet8, resnet20, resnet8x4, wrn_16_2), and on GPUs for the tensor cores that reduced precision uses.
    """
    if config.channels_last is not None:
        return config.channels_last
    return device.type == "cpu" or config.precision != "float32"


def _is_compilers(error: RuntimeError) -> bool:
    import torch._dynamo.exc as dynamo  # seconds to import; the compiler has done so
    import torch._inductor.exc as inductor

    kinds = (dynamo.TorchDynamoException, inductor.InvalidCxxCompiler, inductor.CppCompileError)
    return isinstance(error, kinds)


def micro_batches(batch: Any, parts: int) -> list[Any]:
    """Divide a batch (see `TrainTask`) into parts, in its order, of sizes that differ by at most one."""
    count = len(batch.labels)
    parts = min(parts, count)
    if parts == 1:
        return [batch]
    bounds = [count * number // parts for number in range(parts + 1)]
    return [_rows(batch, slice(*pair), count) for pair in itertools.pairwise(bounds)]


def _rows(value: Any, rows: slice, count: int) -> Any:
    if isinstance(value, Tensor):
        assert len(value) == count, value.shape
        return value[rows]
    if isinstance(value, tuple):
        return tuple(_rows(item, rows, count) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **{name: _rows(item, rows, count) for name, item in _fields(value)})
    return value


def _fields(value: Any) -> Iterator[tuple[str, Any]]:
    return ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
