"""What detection and segmentation share: a network on a student's feature maps is trained, then measured."""

import operator
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, Generic, Protocol, Self, TypeVar

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from tmkd_ray.config.transfer import DenseConfig
from tmkd_ray.downstream.annotated import validation_part
from tmkd_ray.models import ImageClassifier
from tmkd_ray.settings import ImageStatistics
from tmkd_ray.training.context import WorkerContext
from tmkd_ray.training.loader import epoch_order, worker_batches
from tmkd_ray.training.prefetch import prefetched
from tmkd_ray.training.task import TrainTask


class AnnotatedData(Protocol):
    """Images with annotations; it pickles, without pixels."""

    @property
    def class_names(self) -> tuple[str, ...]: ...

    @property
    def fingerprint(self) -> str:
        """Changes with the content."""

    @property
    def paths(self) -> tuple[str, ...]:
        """Of the images."""

    def __len__(self) -> int: ...

    def take(self, positions: np.ndarray) -> Self:
        """Return the images at these positions."""


class DenseBatch(Protocol):
    """A batch of training; a dataclass of tensors that all begin with B."""

    def to(self, device: torch.device) -> "DenseBatch": ...


Data = TypeVar("Data", bound=AnnotatedData)
Config = TypeVar("Config", bound=DenseConfig)


@dataclass(frozen=True)
class DenseData(Generic[Data]):
    """The parts of a dataset: to train on, to choose the epoch on, to be read once at the end."""

    train: Data
    validation: Data
    test: Data


@dataclass(frozen=True)
class DenseMetrics:
    """What a network is worth on some images.

    Attributes:
        score: picks the epoch to keep, 0 to 1.
        figures: by their names, all 0 to 1; None: there is no such figure.
        details: more of them, plain values.
    """

    score: float
    figures: dict[str, float | None]
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DenseKind(ABC, Generic[Config, Data]):
    """Detection or segmentation, as it is configured; it pickles.

    Attributes:
        mean, std: how the student sees images.
    """

    config: Config
    mean: ImageStatistics
    std: ImageStatistics

    @property
    @abstractmethod
    def head(self) -> str:
        """What stands on the student, by its configured name."""

    @abstractmethod
    def read(self) -> DenseData[Data]:
        """Find the data and check it, see `set_apart`.

        Raises:
            UserError: it is missing, damaged, or not of one piece.
        """

    @abstractmethod
    def build(self, model: ImageClassifier, num_classes: int) -> nn.Module:
        """Return the network on a student's feature maps.

        Raises:
            UserError: the student has none, or cannot take images of every size.
        """

    @abstractmethod
    def module(self, network: nn.Module) -> nn.Module:
        """Return the network with its loss: batch to StepOutput."""

    @abstractmethod
    def batch(self, data: Data, positions: Sequence[int], epoch: int) -> DenseBatch:
        """Return a batch of training, augmented by (epoch, image) alone."""

    @abstractmethod
    def nothing(self, data: Data) -> Any:
        """Return what is found on no image: `+` adds what is found on others."""

    @abstractmethod
    def look(
        self, networks: dict[str, nn.Module], data: Data, positions: Sequence[int], device: torch.device
    ) -> dict[str, Any]:
        """Return what each network finds on a batch of images."""

    @abstractmethod
    def metrics(self, data: Data, found: Any) -> DenseMetrics:
        """Return the metrics of what was found on all images of the data."""


def set_apart(train: Data, config: DenseConfig) -> tuple[Data, Data]:
    """Return the training and the validation part of data that has no validation part.

    Raises:
        UserError: there are fewer than two images.
    """
    rows, validation_rows = validation_part(train.paths, config.validation_fraction, config.split_seed)
    return train.take(rows), train.take(validation_rows)


class Meter(Generic[Config, Data]):
    """What networks find on images; it pickles, to be sent to workers.

    Args:
        networks: by name.
    """

    def __init__(self, kind: DenseKind[Config, Data], networks: dict[str, nn.Module], data: Data) -> None:
        self.kind, self.networks, self.data = kind, networks, data
        self.device = torch.device("cpu")

    def __len__(self) -> int:
        return len(self.data)

    def to(self, device: str | torch.device) -> "Meter[Config, Data]":
        """Move the networks; called once, by the worker that runs them."""
        self.device = torch.device(device)
        for network in self.networks.values():
            network.to(self.device).eval()
        cv2.setNumThreads(1)  # the workers are the parallelism
        return self

    @torch.no_grad()
    def __call__(self, positions: np.ndarray) -> dict[str, Any]:
        """Return what each network finds on the images at these positions."""
        found = dict.fromkeys(self.networks, self.kind.nothing(self.data))
        step = self.kind.config.training.evaluation_batch_size
        for start in range(0, len(positions), step):
            chosen: list[int] = positions[start : start + step].tolist()
            for name, part in self.kind.look(self.networks, self.data, chosen, self.device).items():
                found[name] = found[name] + part
        return found


def total(found: Sequence[Any]) -> Any:
    """Return what was found on all the parts of the data."""
    return reduce(operator.add, found)


class DenseTask(TrainTask, Generic[Config, Data]):
    """A network in training. The epoch to keep has the best score on the validation images."""

    def __init__(
        self, kind: DenseKind[Config, Data], network: nn.Module, train: Data, validation: Data
    ) -> None:
        self.kind, self.network = kind, network
        self.module = kind.module(network)
        self.train, self.validation = train, validation
        self.num_samples = len(train)
        cv2.setNumThreads(1)  # the workers are the parallelism

    def batches(self, epoch: int, context: WorkerContext, first_step: int = 0) -> Iterator[DenseBatch]:
        training = self.kind.config.training
        order_N = epoch_order(self.num_samples, training.seed, epoch)
        chosen = worker_batches(order_N, training.batch_size, context.rank, context.world_size, first_step)
        for batch in prefetched(self.kind.batch(self.train, chosen_B.tolist(), epoch) for chosen_B in chosen):
            yield batch.to(context.device)

    def sample_ids(self, indices_B: Tensor) -> list[str]:
        return [self.train.paths[index] for index in indices_B.tolist()]

    def validate(self, context: WorkerContext) -> dict[str, float]:
        meter = Meter(self.kind, {"": self.network}, self.validation)
        meter.device = context.device
        mine = np.arange(context.rank, len(self.validation), context.world_size)
        metrics = self.kind.metrics(self.validation, total(context.gather(meter(mine)[""])))
        return {"accuracy": metrics.score}

    @property
    def kept(self) -> nn.Module:
        return self.network
