"""The configuration of an experiment: one typed tree.

YAML file, then dotted overrides (`training.epochs=20`); see `config_reading` for how it is read.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, SerializeAsAny, field_validator, model_validator

from tmkd_ray.augmentation import AugmentationConfig
from tmkd_ray.datasets import DATASETS
from tmkd_ray.datasets.base import DatasetConfig
from tmkd_ray.models import check_model_name
from tmkd_ray.objective import DistillerConfig
from tmkd_ray.settings import ImageStatistics, Precision, SectionError, Settings, resolve_each, resolve_named
from tmkd_ray.views import VIEWS
from tmkd_ray.views.base import ViewConfig

DEFAULT_VIEWS = ("original", "edge", "high_frequency")

Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""What every random generator takes."""


def _folder_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(
            f"{name!r} cannot name a folder; use letters, digits, '.', '_' and '-', a letter or digit first"
        )
    return name


FolderName = Annotated[str, AfterValidator(_folder_name)]


def _distinct(values: tuple[Any, ...]) -> bool:
    return 0 < len(values) == len(set(values))


class TrainingConfig(Settings, allow_inf_nan=False):
    """How one network is trained: the student, the visual teacher, or CLIP.

    `batch_size` is global: it is divided among the workers, so that their number changes neither batch nor
    schedule (batch normalisation, though, sees each worker's part).
    """

    epochs: int = Field(default=20, ge=1)
    batch_size: int = Field(default=64, ge=1)
    labels_per_class: int | None = Field(default=None, ge=1, description="few labels; null: all")
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = Field(default=0.05, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: float = Field(default=5e-4, ge=0)
    schedule: Literal["constant", "cosine", "step"] = "cosine"
    milestones: tuple[float, ...] = Field(
        default=(0.625, 0.75, 0.875),
        description="step schedule: parts of the epochs after which lr is × decay",
    )
    decay: float = Field(default=0.1, gt=0, lt=1)
    warmup_epochs: float = Field(default=0.0, ge=0)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    max_gradient_norm: float | None = Field(default=None, gt=0)
    precision: Precision = "float32"
    num_workers: int = Field(default=2, ge=1)
    num_cpus_per_worker: float = Field(default=1.0, gt=0)
    use_gpu: bool | None = Field(default=None, description="null: use GPUs when the cluster has them")
    max_failures: int = Field(default=3, ge=-1, description="restarts of a failed worker group; -1: no limit")
    checkpoint_every: int = Field(
        default=1, ge=1, description="epochs between checkpoints: what a crash can cost at most"
    )
    evaluation_batch_size: int = Field(default=512, ge=1)
    seed: Seed = 0

    @model_validator(mode="after")
    def _check(self) -> "TrainingConfig":
        problems = []
        if self.batch_size % self.num_workers:
            text = f"{self.batch_size} is not divisible by num_workers {self.num_workers}"
            problems.append((("batch_size",), text))
        if self.warmup_epochs >= self.epochs:
            text = f"{self.warmup_epochs:g} leaves nothing of the {self.epochs} epochs"
            problems.append((("warmup_epochs",), text))
        if self.nesterov and self.momentum == 0:
            problems.append((("nesterov",), "needs a momentum above zero"))
        if any(not 0 < part < 1 for part in self.milestones):
            problems.append((("milestones",), "are parts of the training, between 0 and 1"))
        if problems:
            raise SectionError(problems)
        return self


class ClipTrainingConfig(TrainingConfig):
    """How CLIP is trained: a `TrainingConfig` with the defaults that suit transformers."""

    optimizer: Literal["sgd", "adamw"] = "adamw"
    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.05, ge=0)
    max_gradient_norm: float | None = Field(default=1.0, gt=0)


def _on_all_labels(fit: TrainingConfig) -> TrainingConfig:
    if fit.labels_per_class is not None:
        raise SectionError([(("labels_per_class",), "only students are trained on few labels; leave it null")])
    return fit


class VisualTeacherConfig(Settings, allow_inf_nan=False):
    """The frozen visual teacher: a checkpoint, or one fitted here when `checkpoint` is null."""

    model: str = "resnet56"
    checkpoint: str | None = None
    mean: ImageStatistics | None = Field(default=None, description="null: the dataset's")
    std: ImageStatistics | None = None
    fit: TrainingConfig = Field(default_factory=TrainingConfig)
    fit_views: bool = Field(default=False, description="fit on all views, not on the original alone")

    @field_validator("model")
    @classmethod
    def _known(cls, name: str) -> str:
        check_model_name(name)
        return name

    @field_validator("std")
    @classmethod
    def _positive(cls, std: ImageStatistics | None) -> ImageStatistics | None:
        if std is not None and min(std) <= 0:
            raise ValueError("a standard deviation is above zero")
        return std

    _all_labels = field_validator("fit")(_on_all_labels)


class ClipArchitecture(Settings):
    """A small CLIP to be fitted here (transformers' CLIPModel)."""

    embedding_width: int = Field(default=128, ge=8)
    image_size: int | None = Field(default=None, ge=8, description="null: the dataset's")
    patch_size: int = Field(default=4, ge=1)
    vision_width: int = Field(default=128, ge=8)
    vision_layers: int = Field(default=4, ge=1)
    text_width: int = Field(default=64, ge=8)
    text_layers: int = Field(default=2, ge=1)
    head_width: int = Field(default=32, ge=4)
    vocabulary_size: int = Field(default=1024, ge=514, description="at least every byte's two tokens")

    @model_validator(mode="after")
    def _divisible(self) -> "ClipArchitecture":
        problems = [
            ((name,), f"{getattr(self, name)} is not a multiple of head_width {self.head_width}")
            for name in ("vision_width", "text_width")
            if getattr(self, name) % self.head_width
        ]
        if problems:
            raise SectionError(problems)
        return self


class TextTeacherConfig(Settings):
    """CLIP, the text teacher: `model` is a name or folder for `from_pretrained`; null fits one here."""

    model: str | None = None
    architecture: ClipArchitecture = Field(default_factory=ClipArchitecture)
    fit: ClipTrainingConfig = Field(default_factory=ClipTrainingConfig)

    _all_labels = field_validator("fit")(_on_all_labels)


class TeacherConfig(Settings):
    visual: VisualTeacherConfig = Field(default_factory=VisualTeacherConfig)
    text: TextTeacherConfig | None = Field(
        default_factory=TextTeacherConfig, description="null: no CLIP, for plain distillation only"
    )


class PoolConfig(Settings, allow_inf_nan=False):
    """An actor pool of the knowledge stage. It grows from `min_size` to `max_size` with its queue."""

    min_size: int = Field(default=1, ge=1)
    max_size: int = Field(default=1, ge=1)
    num_cpus: float = Field(default=0.5, ge=0)

    @model_validator(mode="after")
    def _ordered(self) -> "PoolConfig":
        if self.max_size < self.min_size:
            raise SectionError([(("max_size",), f"{self.max_size} is below min_size {self.min_size}")])
        return self


class ViewPoolConfig(PoolConfig):
    """The actor pool that computes the views."""

    max_size: int = Field(default=2, ge=1)


class TeacherPoolConfig(PoolConfig):
    """An actor pool that runs a frozen teacher."""

    num_gpus: float | None = Field(
        default=None, ge=0, description="share of a GPU per actor; null: what the cluster's GPUs allow, up to 1"
    )
    batch_size: int = Field(default=256, ge=1, description="views per forward pass")
    precision: Precision = "float32"


class KnowledgeConfig(Settings):
    """The knowledge store: where it lies, how much of each image it holds, who computes it."""

    path: str | None = Field(default=None, description="null: `knowledge` in the run's folder")
    num_variants: int = Field(default=4, ge=1, description="stored augmentations of each training image")
    dtype: Literal["float16", "float32"] = "float16"
    shard_rows: int = Field(default=1024, ge=1, description="images per shard")
    views: ViewPoolConfig = Field(default_factory=ViewPoolConfig)
    visual: TeacherPoolConfig = Field(default_factory=TeacherPoolConfig)
    text: TeacherPoolConfig = Field(default_factory=TeacherPoolConfig)
    seed: Seed = Field(default=0, description="of the augmentation's draws")


class StudentConfig(Settings):
    model: str = "resnet8"

    @field_validator("model")
    @classmethod
    def _known(cls, name: str) -> str:
        check_model_name(name)
        return name


class ClusterConfig(Settings):
    """Which Ray to use. In a job, or with `address` set, the existing cluster; else a local one."""

    address: str | None = Field(default=None, description="`auto` joins a running cluster; null: a local one")
    num_cpus: int | None = Field(
        default=None, ge=1, description="logical CPUs of a local Ray; null: twice the cores, at least 4"
    )


class ExperimentConfig(Settings):
    """One experiment: everything a run needs, resolved and saved with it."""

    name: FolderName = "experiment"
    output: str = Field(default="runs", description="run folders are made in here")
    dataset: SerializeAsAny[DatasetConfig]
    augmentation: AugmentationConfig = Field(default_factory=AugmentationConfig)
    views: dict[str, SerializeAsAny[ViewConfig]] = Field(
        default_factory=lambda: resolve_each({name: {} for name in DEFAULT_VIEWS}, VIEWS),
        description="the first one is what the plain teacher sees",
    )
    teacher: TeacherConfig = Field(default_factory=TeacherConfig)
    knowledge: KnowledgeConfig = Field(default_factory=KnowledgeConfig)
    student: StudentConfig = Field(default_factory=StudentConfig)
    distiller: DistillerConfig = Field(default_factory=lambda: DistillerConfig.model_validate("tmkd"))
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    methods: dict[FolderName, DistillerConfig] = Field(
        default_factory=dict, description="distillers to compare in one run; empty: `distiller` alone"
    )
    seeds: tuple[Seed, ...] | None = Field(
        default=None, description="of the students, each method once a seed; null: training.seed"
    )
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)

    @field_validator("dataset", mode="before")
    @classmethod
    def _resolve_dataset(cls, value: Any) -> Any:
        return resolve_named(value, DATASETS)

    @field_validator("views", mode="before")
    @classmethod
    def _resolve_views(cls, value: Any) -> Any:
        views = resolve_each(value, VIEWS)
        if not views:
            raise ValueError("at least one view is needed")
        return views

    @field_validator("seeds")
    @classmethod
    def _each_once(cls, seeds: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if seeds is not None and not _distinct(seeds):
            raise ValueError("give at least one seed, each once")
        return seeds

    @model_validator(mode="after")
    def _check(self) -> "ExperimentConfig":
        # Where methods are compared `distiller` is not trained, but a wrong name in it is still a mistake.
        distillers: dict[tuple[str, ...], DistillerConfig] = {("distiller",): self.distiller}
        distillers |= {("methods", name): distiller for name, distiller in self.methods.items()}
        trained = list(distillers)[1:] or list(distillers)
        problems: list[tuple[tuple[str, ...], str]] = []
        for where, distiller in distillers.items():
            unknown = [view for view in distiller.views or () if view not in self.views]
            if unknown:
                text = f"{', '.join(unknown)} not among the views of this config ({', '.join(self.views)})"
                problems.append(((*where, "views"), text))
            if distiller.views is not None and not _distinct(distiller.views):
                problems.append(((*where, "views"), "give at least one view, each once; null for all"))
            if where in trained and not distiller.trains_classifier:
                text = "no term trains the classifier; set ce_weight, text_weight, or a kd strategy on logits"
                problems.append((where, text))
            if self.teacher.text is None and where in trained and distiller.needs_text_teacher:
                text = f"null, but {'.'.join(where)} needs a text teacher; have one, or choose another method"
                problems.append((("teacher", "text"), text))
        if self.teacher.text is not None and self.teacher.text.model is None:
            architecture = self.teacher.text.architecture
            image_size = architecture.image_size or self.dataset.image_size
            if image_size % architecture.patch_size:
                path = ("teacher", "text", "architecture", "patch_size")
                text = f"the image size, {image_size}, is not a multiple of {architecture.patch_size}"
                problems.append((path, text))
        if problems:
            raise SectionError(problems)
        return self

    def named_methods(self) -> dict[str, DistillerConfig]:
        """Return the distillers to compare by name: `methods`, else the one of `distiller`."""
        return self.methods or {self.distiller.name: self.distiller}

    def taught_views(self, distiller: DistillerConfig) -> tuple[str, ...]:
        """Return the views that a distiller's teacher looks at: one for the plain teacher."""
        views = distiller.views or tuple(self.views)
        return views[:1] if distiller.teacher == "plain" else views
