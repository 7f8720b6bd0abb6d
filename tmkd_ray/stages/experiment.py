"""A configuration together with what it refers to: the dataset, its splits, the run's folder."""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tmkd_ray import __version__, storage
from tmkd_ray.config import ExperimentConfig, TrainingConfig
from tmkd_ray.config_reading import dump_config
from tmkd_ray.datasets import build_dataset, decode
from tmkd_ray.datasets.base import ImageDataset, SampleIndex
from tmkd_ray.datasets.splits import split_train
from tmkd_ray.errors import UserError
from tmkd_ray.models import build_model
from tmkd_ray.models.view_batch_norm import use_view_statistics
from tmkd_ray.pretraining.lgd import LGDConfig, read_bank_classes
from tmkd_ray.settings import ImageStatistics
from tmkd_ray.teachers import ClipTeacher, VisualTeacher
from tmkd_ray.teachers.text_features import read_text_features
from tmkd_ray.types import TaskSpec
from tmkd_ray.views import build_view
from tmkd_ray.views.base import View

_ONLY_WHERE_NOT_WHAT = {
    "num_workers",
    "num_cpus_per_worker",
    "use_gpu",
    "max_failures",
    "min_workers",
    "keep_checkpoints",
    "checkpoint_every_steps",
    "loggers",
    "channels_last",
    "compile",
    "checkpoint_every",
    "evaluation_batch_size",
    "max_loss",
}
"""Training settings that say where and how safely to run; global batch and schedule stay the same."""


@dataclass(frozen=True)
class Experiment:
    """An opened experiment; it travels to the workers, so its paths are from the root.

    Attributes:
        train, validation: the two parts of the dataset's train split.
        folder: of the run. store_path: of its knowledge store.
    """

    config: ExperimentConfig
    dataset: ImageDataset
    train: SampleIndex
    validation: SampleIndex
    folder: str
    store_path: str

    @property
    def task(self) -> TaskSpec:
        return TaskSpec(self.dataset.class_names, self.config.dataset.image_size)

    def views(self) -> dict[str, View]:
        return {name: build_view(name, config) for name, config in self.config.views.items()}

    def view_identity(self, names: Iterable[str] | None = None) -> dict[str, Any]:
        """Return what decides the pixels of the views (`names`, or all): options and version, no prompts."""
        views = self.views()
        return {
            name: {
                "version": views[name].version,
                **self.config.views[name].model_dump(mode="json", exclude={"prompts"}),
            }
            for name in (views if names is None else names)
        }

    def prompts(self) -> dict[str, tuple[str, ...]]:
        return {name: config.prompts for name, config in self.config.views.items()}

    def teacher_statistics(self) -> tuple[ImageStatistics, ImageStatistics]:
        """Return mean and std of the visual teacher's normalisation."""
        visual, dataset = self.config.teacher.visual, self.config.dataset
        return visual.mean or dataset.mean, visual.std or dataset.std

    def data_identity(self) -> dict[str, Any]:
        """Return what tells this data from other data, for fingerprints."""
        chosen = hashlib.sha256()
        for index in (self.train, self.validation):
            chosen.update("\n".join(index.ids).encode() + index.labels.tobytes())
        return {
            "name": self.config.dataset.name,
            "decoding": decode.VERSION,
            "content": self.dataset.fingerprint("train"),
            "samples": chosen.hexdigest(),
            "num_train": len(self.train),
            "num_validation": len(self.validation),
            "image_size": self.config.dataset.image_size,
        }

    def save_config(self) -> None:
        """Write the resolved configuration into the run's folder."""
        storage.write_bytes(storage.join(self.folder, "config.yaml"), dump_config(self.config).encode())


def knowledge_path(config: ExperimentConfig) -> str:
    """Return where the knowledge store of a configuration lies.

    Where the teachers run beside the training, the store holds the validation images alone.
    """
    if config.knowledge.path is not None:
        return storage.absolute(config.knowledge.path)
    name = "knowledge" if config.knowledge.mode == "cached" else "knowledge-validation"
    return storage.join(storage.absolute(config.output), config.name, name)


def open_experiment(config: ExperimentConfig) -> Experiment:
    """Find the data and check it, both splits, before anything starts; the networks have their own checks.

    Raises:
        UserError: data or class names do not exist or do not fit.
    """
    dataset = build_dataset(config.dataset)
    index = dataset.index("train")
    dataset.index("test")  # read only at the end, which is too late to learn that its labels are wrong
    train, validation = split_train(index, config.dataset.validation_fraction, config.dataset.split_seed)
    if len(validation) == 0:
        raise UserError(
            f"dataset {config.dataset.name}: no class has two images, so none is left for validation"
        )
    for name, fit in _fits(config).items():
        if len(train) < fit.num_workers:
            raise UserError(
                f"{name}.num_workers is {fit.num_workers}, but there are {len(train)} training images"
            )
    folder = storage.join(storage.absolute(config.output), config.name)
    return Experiment(config, dataset, train, validation, folder, knowledge_path(config))


def check_visual_teacher(experiment: Experiment) -> None:
    """Build the visual teacher here, with its weights if they are given, before a cluster is asked to.

    Raises:
        UserError: its checkpoint is missing or of another model or other classes; or the model cannot be had,
            does not suit the images, or has no linear classifier.
    """
    visual = experiment.config.teacher.visual
    mean, std = experiment.teacher_statistics()
    try:
        teacher = VisualTeacher.load(visual.model, experiment.task, visual.checkpoint, mean, std)
        if visual.has_view_statistics:
            use_view_statistics(teacher.model, len(experiment.config.views))
    except UserError as error:
        raise UserError(f"teacher.visual: {error}") from error


def check_text_teacher(experiment: Experiment) -> None:
    """Load the CLIP that the configuration names, if any, before a cluster is asked to.

    And read the class names of the methods' own text banks.

    Raises:
        UserError: it cannot be found or is not a CLIP; or a file of class names cannot be read or holds none;
            or embeddings that a CLIP is to be locked to do not fit.
    """
    for name, method in experiment.config.named_methods().items():
        if isinstance(method, LGDConfig) and method.bank_classes is not None:
            try:
                read_bank_classes(method.bank_classes)
            except UserError as error:
                where = f"methods.{name}" if experiment.config.methods else "distiller"
                raise UserError(f"{where}.{error}") from error
    locked_text_features(experiment)
    text = experiment.config.teacher.text
    if text is None or text.model is None:
        return
    is_name = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", text.model)
    if not is_name and not storage.is_folder(text.model):
        raise UserError(
            f"teacher.text.model: there is no folder {text.model}, and it is no hub name (OWNER/NAME) either"
        )
    ClipTeacher.load(text.model)


def locked_text_features(experiment: Experiment) -> Tensor | None:
    """Return the embeddings [C, E] that the text side of the CLIP fitted here is locked to; None: it learns.

    Raises:
        UserError: their file is none, lacks a class, or is of another width than the CLIP.
    """
    text = experiment.config.teacher.text
    if text is None or text.text_features is None:
        return None
    locked_CE = read_text_features(text.text_features, experiment.task.class_names)
    if locked_CE.shape[1] != text.architecture.embedding_width:
        raise UserError(
            f"teacher.text.architecture.embedding_width is {text.architecture.embedding_width}, the embeddings "
            f"in teacher.text.text_features have {locked_CE.shape[1]}; set it to that"
        )
    return locked_CE


def check_student(experiment: Experiment) -> None:
    """Build the student here, before a cluster is asked to.

    Raises:
        UserError: the model cannot be had, or does not suit the images.
    """
    try:
        build_model(experiment.config.student.model, experiment.task)
    except UserError as error:
        raise UserError(f"student.model: {error}") from error


def _fits(config: ExperimentConfig) -> dict[str, TrainingConfig]:
    fits = {"training": config.training, "teacher.visual.fit": config.teacher.visual.fit}
    if config.teacher.text is not None:
        fits["teacher.text.fit"] = config.teacher.text.fit
    return fits


def training_identity(training: TrainingConfig) -> dict[str, Any]:
    """Return the settings that decide what is learnt."""
    return training.model_dump(mode="json", exclude=_ONLY_WHERE_NOT_WHAT)


def identity_key(*parts: Any) -> str:
    """Return a short hash of plain values and of this program's version."""
    content = json.dumps([__version__, *parts], sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()[:12]
