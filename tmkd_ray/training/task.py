"""What is trained, as the training loop sees it."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from tmkd_ray import storage
from tmkd_ray.training.context import WorkerContext
from tmkd_ray.types import LossOutput


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

    A batch has `labels`, [B], and may have `indices`, int64 [B]: positions in the training set, which are told
    when the training diverges. To be divided into micro-batches it must be a dataclass whose tensors all begin
    with B.

    Attributes:
        module: everything with trainable parameters; `module(batch)` returns a StepOutput. DDP wraps it.
        num_samples: of the training set.
        notes: lines for the user, said when the training starts.
    """

    module: nn.Module
    num_samples: int
    notes: tuple[str, ...] = ()

    @abstractmethod
    def batches(self, epoch: int, context: WorkerContext, first_step: int = 0) -> Iterator[Any]:
        """Yield this worker's batches of an epoch (from 0); the same number on every worker.

        They depend on the epoch and the worker alone; torch's global generator is not drawn from.

        Args:
            first_step: skip so many batches: the epoch was interrupted, and they were trained on.
        """

    def after_step(self, batch: Any) -> None:  # noqa: B027 (most tasks have nothing to do)
        """Update what no gradient trains, after the optimiser's step on this batch.

        With gradient accumulation it is called for each micro-batch: for the last after the optimiser's step,
        for those before it after their backward pass.
        """

    def after_update(self) -> None:  # noqa: B027
        """Update what no gradient trains, once a step: after the optimiser's, and after every `after_step`."""

    @abstractmethod
    def validate(self, context: WorkerContext) -> dict[str, float]:
        """Return metrics over all workers; `accuracy` picks the epoch to keep."""

    @property
    @abstractmethod
    def kept(self) -> nn.Module:
        """The network that is the result: the module without the distiller's heads."""

    @property
    def compiled(self) -> tuple[nn.Module, ...]:
        """The parts of `module` that `training.compile` compiles; each is called as a whole."""
        return (self.kept,)

    def sample_ids(self, indices_B: Tensor) -> list[str]:
        """Return the names, for people, of the samples at these positions in the training set."""
        return [str(index) for index in indices_B.tolist()]

    def save(self, folder: str, weights: Mapping[str, Tensor]) -> None:
        """Write the result's weights into a folder or URI."""
        content = safetensors.torch.save({name: value.contiguous() for name, value in weights.items()})
        storage.write_bytes(storage.join(folder, "model.safetensors"), content)

    def num_parameters(self) -> int:
        """Return the number of trained values of the result."""
        return sum(p.numel() for p in self.kept.parameters())
