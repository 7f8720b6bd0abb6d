"""Small things to train, and workers to train them on."""

import contextlib
import datetime
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from torch import Tensor, nn

from tmkd_ray.augmentation import AugmentationConfig, draw_parameters, sample_keys
from tmkd_ray.config import TrainingConfig
from tmkd_ray.datasets import build_dataset
from tmkd_ray.datasets.decode import LoadedImages, load_images
from tmkd_ray.datasets.digits import CLASS_NAMES, DigitsConfig
from tmkd_ray.fusion import TeacherConstants
from tmkd_ray.knowledge.layout import KnowledgeLayout
from tmkd_ray.knowledge.store import KnowledgeArrays
from tmkd_ray.models.base import ImageClassifier
from tmkd_ray.objective import DistillerConfig
from tmkd_ray.results import EpochRecord
from tmkd_ray.teachers import ClipTeacher
from tmkd_ray.training.clip import ClipTask
from tmkd_ray.training.context import PlainContext
from tmkd_ray.training.loop import StepOutput, TrainingOutcome, TrainTask, train
from tmkd_ray.training.student import StudentTask, resident_source
from tmkd_ray.training.teacher import TeacherTask
from tmkd_ray.types import LossOutput, ModelOutput
from tmkd_ray.views import build_view
from tmkd_ray.views.base import View

SIZE, C, D, E = 16, 10, 12, 8
VIEWS = ("original", "edge")
MEAN, STD = (0.309, 0.309, 0.309), (0.349, 0.349, 0.349)
CIFAR = AugmentationConfig(recipe="cifar", padding=2, flip=False)
PROMPTS = (("a photo of a {}.", "the digit {}."), ("an image of a {} with sharp edges.",))


@functools.cache
def digits(first: int, last: int) -> LoadedImages:
    """Return some of scikit-learn's digits; never write to them."""
    dataset = build_dataset(DigitsConfig(image_size=SIZE))
    return load_images(dataset, "train", dataset.index("train").take(np.arange(first, last)), num_threads=1)


def views() -> dict[str, View]:
    return {name: build_view(name, {}) for name in VIEWS}


def unit(values: np.ndarray) -> np.ndarray:
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


@functools.cache
def constants() -> TeacherConstants:
    rng = np.random.default_rng(0)
    return TeacherConstants(
        VIEWS,
        torch.from_numpy(rng.normal(size=(C, D))).float(),
        torch.zeros(C),
        torch.from_numpy(unit(rng.normal(size=(len(VIEWS), C, E)))).float(),
        clip_temperature=0.1,
    )


def knowledge(first: int, last: int, num_variants: int = 2) -> KnowledgeArrays:
    """Return digits with knowledge that speaks of their class, noisily, anew for each variant and view."""
    loaded = digits(first, last)
    rng = np.random.default_rng([first, last])
    shape = (len(loaded.labels), num_variants, len(VIEWS))
    bank = constants().text_bank
    assert bank is not None
    head = constants().head_weight.numpy()
    text = bank.numpy()[:, loaded.labels].transpose(1, 0, 2)
    return KnowledgeArrays(
        KnowledgeLayout(VIEWS, num_variants, SIZE, D, E),
        ids=loaded.ids,
        labels=loaded.labels,
        images=loaded.images,
        augmentation=draw_parameters(CIFAR, sample_keys(loaded.ids, 0), np.arange(num_variants), SIZE),
        feature=(head[loaded.labels][:, None, None] + rng.normal(size=(*shape, D))).astype(np.float16),
        clip_embedding=unit(text[:, None] + 0.5 * rng.normal(size=(*shape, E))).astype(np.float16),
    )


class TinyClassifier(ImageClassifier):
    """One convolution, normalised within each image: the same in batches of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 5, stride=3)
        self.norm = nn.GroupNorm(2, 8)
        self.fc = nn.Linear(8 * 4, C)

    @property
    def head(self) -> nn.Linear:
        return self.fc

    def forward(self, images_BCHW: Tensor) -> ModelOutput:
        x = F.gelu(self.norm(self.conv(images_BCHW)))
        feature = F.adaptive_avg_pool2d(x, 2).flatten(1)
        return ModelOutput(self.fc(feature), feature)


def training(**changes: Any) -> TrainingConfig:
    fields = {"epochs": 4, "batch_size": 16, "learning_rate": 0.05, "num_workers": 1, **changes}
    return TrainingConfig.model_validate(fields)


def scripted(**changes: Any) -> TrainingConfig:
    """For a ScriptedTask: batches of four, plain gradient descent at a constant rate."""
    plain = {"batch_size": 4, "momentum": 0, "weight_decay": 0, "schedule": "constant", "learning_rate": 1.0}
    return training(**{**plain, **changes})


def student_task(
    config: TrainingConfig,
    distiller: str | dict[str, Any] = "tmkd",
    student: Callable[[], ImageClassifier] = TinyClassifier,
    train: KnowledgeArrays | None = None,
    initial_seed: int = 0,
) -> StudentTask:
    section = DistillerConfig.model_validate(distiller)
    torch.manual_seed(initial_seed)
    arrays = knowledge(0, 40) if train is None else train
    validation = knowledge(500, 550, num_variants=1)
    assert validation.images is not None
    return StudentTask(
        student(),
        resident_source(arrays, config, CIFAR, torch.device("cpu"), section.teacher != "none"),
        arrays.layout,
        validation.images,
        validation.labels,
        None if section.teacher == "none" else constants(),
        section,
        VIEWS if section.teacher != "plain" else VIEWS[:1],
        config,
        MEAN,
        STD,
    )


def teacher_task(
    config: TrainingConfig, model: ImageClassifier, num_images: int = 40, initial_seed: int = 0
) -> TeacherTask:
    torch.manual_seed(initial_seed)
    return TeacherTask(model, digits(0, num_images), digits(500, 600), views(), config, CIFAR, MEAN, STD)


def build_clip(initial_seed: int = 0) -> ClipTeacher:
    torch.manual_seed(initial_seed)
    return ClipTeacher.new(
        [template.format(name) for templates in PROMPTS for template in templates for name in CLASS_NAMES],
        image_size=SIZE,
        patch_size=4,
        embedding_width=24,
        vision_width=32,
        vision_layers=2,
        text_width=32,
        text_layers=1,
        head_width=16,
        vocabulary_size=600,
        mean=MEAN,
        std=STD,
    )


def clip_task(
    config: TrainingConfig, num_images: int = 40, initial_seed: int = 0, locked_CE: Tensor | None = None
) -> ClipTask:
    return ClipTask(
        build_clip(initial_seed),
        digits(0, num_images),
        digits(500, 600),
        views(),
        PROMPTS,
        CLASS_NAMES,
        config,
        CIFAR,
        locked_CE,
    )


class InterruptedTrainingError(Exception):
    """What a killed worker leaves behind, as an exception."""


@dataclass
class Numbers:
    """A batch of inputs [B, 1] with the epoch they belong to."""

    inputs: Tensor
    labels: Tensor
    epoch: int


class Slope(nn.Module):
    """`weight · x`, summed to the loss `scale · mean(weight · x)`, whose gradient is `scale · mean(x)`."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.scale = scale

    def forward(self, batch: Numbers) -> StepOutput:
        value = (self.weight * batch.inputs).mean()
        return StepOutput(LossOutput(self.scale * value, {"slope": value, "constant": torch.tensor(2.0)}))


class ScriptedTask(TrainTask):
    """A task of which everything is known: `steps` batches of ones an epoch, validation as told.

    Args:
        accuracies: what `validate` says, by epoch.
        poison: (epoch, rank) whose last batch holds NaN.
        value: of the inputs.
        dies_in: the epoch, from 1, at whose end it is interrupted.
    """

    def __init__(
        self,
        accuracies: list[float],
        scale: float = 1.0,
        steps: int = 3,
        poison: tuple[int, int] | None = None,
        value: float = 1.0,
        dies_in: int | None = None,
    ) -> None:
        self.module = Slope(scale)
        self.accuracies = accuracies
        self.steps = steps
        self.num_samples = 4 * steps
        self.poison = poison
        self.value = value
        self.dies_in = dies_in
        self.seen: list[float] = []
        """The weight at each validation."""

    def batches(  # type: ignore[override]
        self, epoch: int, context: PlainContext, first_step: int = 0
    ) -> Iterator[Numbers]:
        self.epoch = epoch
        for step in range(first_step, self.steps):
            # Only the last, before NaN gradients have spread to the other workers' losses.
            poisoned = self.poison == (epoch, context.rank) and step == self.steps - 1
            inputs = torch.full((4, 1), float("nan") if poisoned else self.value)
            yield Numbers(inputs, torch.zeros(4, dtype=torch.long), epoch)

    def validate(self, context: PlainContext) -> dict[str, float]:  # type: ignore[override]
        self.seen.append(self.module.weight.item())
        if self.epoch + 1 == self.dies_in:
            raise InterruptedTrainingError
        return {"accuracy": self.accuracies[self.epoch]}

    @property
    def kept(self) -> nn.Module:
        return self.module


class InterruptedContext(PlainContext):
    """Dies at the checkpoint after so many epochs and steps, before or after it is stored."""

    def __init__(self, folder: Path, epoch: int, stored: bool = True, step: int = 0) -> None:
        super().__init__(folder, quiet=True)
        self.dies_at, self.stored = (epoch, step), stored

    def report(self, metrics: dict[str, Any], checkpoint: Path | None) -> None:
        dies = (metrics["epoch"], metrics["step"]) == self.dies_at
        if not dies or self.stored:
            super().report(metrics, checkpoint)
        if dies:
            raise InterruptedTrainingError


def run(task: TrainTask, config: TrainingConfig, folder: Path, key: str = "run") -> TrainingOutcome:
    return train(task, config, PlainContext(folder, quiet=True), key, "test")


def interrupt(
    task: TrainTask,
    config: TrainingConfig,
    folder: Path,
    epoch: int,
    stored: bool = True,
    key: str = "run",
    step: int = 0,
) -> None:
    with contextlib.suppress(InterruptedTrainingError):
        train(task, config, InterruptedContext(folder, epoch, stored, step), key, "test")
        raise AssertionError("it was not interrupted")


def timeless(history: list[EpochRecord]) -> list[dict[str, Any]]:
    """Return the records without what depends on the machine's speed."""
    speed = {"seconds", "images_per_second", "data_seconds", "data_share"}
    return [record.model_dump(exclude=speed) for record in history]


def assert_same_weights(found: Any, expected: Any) -> None:
    """Bit by bit."""
    assert list(found) == list(expected)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def spawn(scenario: Callable[..., Any], folder: Path, world_size: int = 2) -> list[Any]:
    """Run `scenario(folder)` on workers joined by gloo; return what each rank returned."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.multiprocessing.spawn(_worker, (world_size, scenario, folder), nprocs=world_size)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def _worker(rank: int, world_size: int, scenario: Callable[..., Any], folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        f"file://{folder}/rendezvous",
        timeout=datetime.timedelta(seconds=60),
        rank=rank,
        world_size=world_size,
    )
    torch.save(scenario(folder), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
