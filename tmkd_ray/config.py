"""The configuration of an experiment: one typed tree.

YAML file, then dotted overrides (`training.epochs=20`); see `config_reading` for how it is read.
"""

from typing import Any, Literal

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from tmkd_ray.augmentation import AugmentationConfig
from tmkd_ray.datasets import DATASETS
from tmkd_ray.datasets.base import DatasetConfig
from tmkd_ray.models import check_model_name
from tmkd_ray.objective import DistillerConfig
from tmkd_ray.settings import ImageStatistics, Precision, Settings, resolve_each, resolve_named
from tmkd_ray.views import VIEWS
from tmkd_ray.views.base import ViewConfig

DEFAULT_VIEWS = ("original", "edge", "high_frequency")


class TrainingConfig(Settings):
    """How one network is trained: the student, the visual teacher, or CLIP.

    `batch_size` is global: it is divided among the workers, so that their number changes nothing else.
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
    checkpoint_every: int = Field(default=1, ge=1, description="epochs")
    evaluation_batch_size: int = Field(default=512, ge=1)
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _check(self) -> "TrainingConfig":
        if self.batch_size % self.num_workers:
            raise ValueError(f"batch_size {self.batch_size} is not divisible by num_workers {self.num_workers}")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs} leaves nothing of {self.epochs} epochs")
        if any(not 0 < part < 1 for part in self.milestones):
            raise ValueError("milestones are parts of the training, between 0 and 1")
        return self


class VisualTeacherConfig(Settings):
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
    vocabulary_size: int = Field(default=1024, ge=64)

    @model_validator(mode="after")
    def _divisible(self) -> "ClipArchitecture":
        for name in ("vision_width", "text_width"):
            if getattr(self, name) % self.head_width:
                raise ValueError(f"{name} is not a multiple of head_width {self.head_width}")
        if self.image_size is not None and self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        return self


class TextTeacherConfig(Settings):
    """CLIP, the text teacher: `model` is a name or folder for `from_pretrained`; null fits one here."""

    model: str | None = None
    architecture: ClipArchitecture = Field(default_factory=ClipArchitecture)
    fit: TrainingConfig = Field(
        default_factory=lambda: TrainingConfig(
            optimizer="adamw", learning_rate=1e-3, weight_decay=0.05, warmup_epochs=1, max_gradient_norm=1.0
        )
    )


class TeacherConfig(Settings):
    visual: VisualTeacherConfig = Field(default_factory=VisualTeacherConfig)
    text: TextTeacherConfig | None = Field(
        default_factory=TextTeacherConfig, description="null: no CLIP, for plain distillation only"
    )


class PoolConfig(Settings):
    """An actor pool of the knowledge stage. It grows from `min_size` to `max_size` with its queue."""

    min_size: int = Field(default=1, ge=1)
    max_size: int = Field(default=1, ge=1)
    num_cpus: float = Field(default=0.5, ge=0)

    @model_validator(mode="after")
    def _ordered(self) -> "PoolConfig":
        if self.max_size < self.min_size:
            raise ValueError(f"max_size {self.max_size} is below min_size {self.min_size}")
        return self


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
    views: PoolConfig = Field(default_factory=lambda: PoolConfig(max_size=2))
    visual: TeacherPoolConfig = Field(default_factory=TeacherPoolConfig)
    text: TeacherPoolConfig = Field(default_factory=TeacherPoolConfig)
    seed: int = Field(default=0, ge=0, description="of the augmentation's draws")


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

    name: str = Field(default="experiment", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
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
    methods: dict[str, DistillerConfig] = Field(
        default_factory=dict, description="distillers to compare in one run; empty: `distiller` alone"
    )
    seeds: tuple[int, ...] | None = Field(
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
        if isinstance(value, list | tuple):
            value = {name: {} for name in value}
        if not isinstance(value, dict) or not value:
            raise ValueError("expected at least one view: a list of names, or names with options")
        return resolve_each(value, VIEWS)

    @model_validator(mode="after")
    def _check(self) -> "ExperimentConfig":
        problems = []
        for where, distiller in {"distiller": self.distiller, **self.named_methods("methods.")}.items():
            unknown = [view for view in distiller.views or () if view not in self.views]
            if unknown:
                problems.append(
                    f"{where}.views: {', '.join(unknown)} not among the views of this config "
                    f"({', '.join(self.views)})"
                )
            if distiller.needs_text_teacher and self.teacher.text is None:
                problems.append(f"teacher.text is null, but {where} needs a text teacher")
        if self.seeds is not None and (not self.seeds or len(set(self.seeds)) < len(self.seeds)):
            problems.append("seeds: give at least one, each once")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def named_methods(self, prefix: str = "") -> dict[str, DistillerConfig]:
        """Return the distillers to compare by name: `methods`, else the one of `distiller`."""
        methods = self.methods or {self.distiller.name: self.distiller}
        return {prefix + name: distiller for name, distiller in methods.items()}

    def taught_views(self, distiller: DistillerConfig) -> tuple[str, ...]:
        """Return the views that a distiller's teacher looks at: one for the plain teacher."""
        views = distiller.views or tuple(self.views)
        return views[:1] if distiller.teacher == "plain" else views
