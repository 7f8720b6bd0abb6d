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
from tmkd_ray.settings import (
    ImageStatistics,
    Location,
    Precision,
    SectionError,
    Settings,
    resolve_each,
    resolve_named,
)
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
    schedule (batch normalisation, mixup and cutmix, though, see each worker's part).

    `gradient_accumulation` divides each worker's part further, into micro-batches that go through the network
    one after the other; their mean gradient is the same. What looks at the samples together sees a micro-batch:
    batch normalisation, mixup and cutmix, and every loss that is no mean over samples (contrast within the
    batch, relations between its samples, memory banks, which move after each micro-batch).
    """

    epochs: int = Field(default=20, ge=1)
    batch_size: int = Field(default=64, ge=1)
    gradient_accumulation: int = Field(default=1, ge=1, description="micro-batches of a worker's batch")
    labels_per_class: int | None = Field(default=None, ge=1, description="few labels; null: all")
    optimizer: Literal["sgd", "adamw", "dot"] = Field(
        default="sgd", description="dot: SGD with one momentum for the task's gradient, one for the teaching's"
    )
    dot_delta: float = Field(
        default=0.075, ge=0, lt=1, description="dot: the momenta are momentum - delta and momentum + delta"
    )
    learning_rate: float = Field(default=0.05, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: float = Field(default=5e-4, ge=0)
    schedule: Literal["constant", "cosine", "one_cycle", "step"] = "cosine"
    milestones: tuple[float, ...] = Field(
        default=(0.625, 0.75, 0.875),
        description="step schedule: parts of the epochs after which lr is × decay",
    )
    decay: float = Field(default=0.1, gt=0, lt=1)
    warmup_epochs: float = Field(default=0.0, ge=0, description="of one_cycle: its rising part")
    min_learning_rate_ratio: float = Field(
        default=0.0, ge=0, lt=1, description="cosine and one_cycle end at this part of learning_rate"
    )
    one_cycle_momentum: float = Field(
        default=0.85, ge=0, lt=1, description="one_cycle with sgd: momentum where the learning rate is highest"
    )
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    mixup: float = Field(default=0.0, ge=0, description="alpha of the Beta distribution; 0: none")
    cutmix: float = Field(default=0.0, ge=0, description="the same; with mixup, one of both by a coin")
    ema_decay: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="moving average of the weights, which is evaluated and kept; null: none",
    )
    max_gradient_norm: float | None = Field(default=None, gt=0)
    precision: Precision = "float32"
    channels_last: bool | None = Field(
        default=None, description="memory layout of the network; null: where it pays (CPU; GPU below float32)"
    )
    compile: bool = Field(
        default=False, description="the network by torch.compile, for GPUs; on CPUs it was no faster"
    )
    num_workers: int = Field(default=2, ge=1)
    min_workers: int | None = Field(
        default=None, ge=1, description="go on with as few when nodes are lost, up to num_workers; null: fixed"
    )
    num_cpus_per_worker: float = Field(default=1.0, gt=0)
    use_gpu: bool | None = Field(default=None, description="null: use GPUs when the cluster has them")
    max_failures: int = Field(default=3, ge=-1, description="restarts of a failed worker group; -1: no limit")
    checkpoint_every: int = Field(
        default=1, ge=1, description="epochs between checkpoints: what a crash can cost at most"
    )
    checkpoint_every_steps: int | None = Field(
        default=None, ge=1, description="checkpoints within an epoch too, for long ones; null: none"
    )
    keep_checkpoints: int = Field(
        default=2, ge=1, description="newest ones kept; if one is damaged, the one before it serves"
    )
    loggers: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = Field(
        default=("tensorboard",), description="where the epochs' figures go as well; [] or none: nowhere"
    )
    evaluation_batch_size: int = Field(default=512, ge=1)
    seed: Seed = 0

    @field_validator("loggers", mode="before")
    @classmethod
    def _logger_names(cls, value: Any) -> Any:
        if value is None or value == "none":
            return ()
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check(self) -> "TrainingConfig":
        problems = []
        fewest = self.num_workers if self.min_workers is None else self.min_workers
        if fewest > self.num_workers:
            problems.append((("min_workers",), f"{fewest} is above num_workers {self.num_workers}"))
        uneven = [str(n) for n in range(fewest, self.num_workers + 1) if self.batch_size % n]
        if uneven and self.min_workers is None:
            text = f"{self.batch_size} is not divisible by num_workers {self.num_workers}"
            problems.append((("batch_size",), text))
        elif uneven:
            text = (
                f"{self.batch_size} is not divisible by {', '.join(uneven)}, but so many workers can take "
                f"part: from min_workers {fewest} to num_workers {self.num_workers}"
            )
            problems.append((("batch_size",), text))
        local = self.batch_size // self.num_workers
        if self.gradient_accumulation > max(local, 1):
            text = f"{self.gradient_accumulation} is more than the {local} images of a worker's batch"
            problems.append((("gradient_accumulation",), text))
        if self.warmup_epochs >= self.epochs:
            text = f"{self.warmup_epochs:g} leaves nothing of the {self.epochs} epochs"
            problems.append((("warmup_epochs",), text))
        if self.schedule == "one_cycle" and self.warmup_epochs == 0:
            text = f"one_cycle rises for so long, which cannot be 0; {0.3 * self.epochs:g} is usual"
            problems.append((("warmup_epochs",), text))
        if self.nesterov and self.momentum == 0:
            problems.append((("nesterov",), "needs a momentum above zero"))
        if self.optimizer == "dot":
            if not self.dot_delta <= self.momentum < 1 - self.dot_delta:
                text = f"momentum {self.momentum:g} ± {self.dot_delta:g} leaves the range from 0 to 1"
                problems.append((("dot_delta",), text))
            refused = {
                "nesterov": self.nesterov,
                "precision": self.precision == "float16",
                "gradient_accumulation": self.gradient_accumulation > 1,
            }
            problems += [((name,), "not with optimizer dot") for name, is_set in refused.items() if is_set]
        if any(not 0 < part < 1 for part in self.milestones):
            problems.append((("milestones",), "are parts of the training, between 0 and 1"))
        if not _distinct(self.loggers or (None,)):
            problems.append((("loggers",), "each once"))
        if problems:
            raise SectionError(problems)
        return self

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with one another, and so their labels."""
        return self.mixup > 0 or self.cutmix > 0


class ClipTrainingConfig(TrainingConfig):
    """How CLIP is trained: a `TrainingConfig` with the defaults that suit transformers."""

    optimizer: Literal["sgd", "adamw", "dot"] = "adamw"
    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.05, ge=0)
    max_gradient_norm: float | None = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _check_clip(self) -> "ClipTrainingConfig":
        problems = [((name,), _UNMIXED_CLIP) for name in ("mixup", "cutmix") if getattr(self, name) > 0]
        if self.compile:
            problems.append((("compile",), "not offered for CLIP"))
        if problems:
            raise SectionError(problems)
        return self


_UNMIXED_CLIP = "not offered for CLIP: an image has one caption, that of what is on it"


def _on_all_labels(fit: TrainingConfig) -> TrainingConfig:
    if fit.labels_per_class is not None:
        raise SectionError([(("labels_per_class",), "only students are trained on few labels; leave it null")])
    return fit


class VisualTeacherConfig(Settings, allow_inf_nan=False):
    """The frozen visual teacher: a checkpoint, or one fitted here when `checkpoint` is null."""

    model: str = "resnet56"
    checkpoint: Location | None = None
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

    model: Location | None = None
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
    channels_last: bool = Field(default=True, description="memory format; else channels first")
    compile: bool = Field(default=False, description="by torch.compile: the first batch takes a minute more")


class KnowledgeConfig(Settings):
    """What the frozen teachers say of the images: when it is computed, where it lies, how much of it is kept.

    `mode` says when the teachers run:
        cached: once, into a store that every epoch, method and trial reads;
        streaming: for every epoch anew, in the cluster beside the training, on fresh augmentation;
        online: in the training workers, on fresh augmentation; what feature-map strategies need.
    """

    mode: Literal["cached", "streaming", "online"] = "cached"
    path: Location | None = Field(
        default=None,
        description="of the store; null: `knowledge`, or `knowledge-validation`, in the run's folder",
    )
    num_variants: int = Field(default=4, ge=1, description="stored augmentations of each training image")
    dtype: Literal["float16", "float32", "int8"] = Field(
        default="float16", description="of features and embeddings; int8 has a scale for each vector"
    )
    images: Literal["raw", "lossless", "jpeg", "reference"] = Field(
        default="lossless",
        description="how the store keeps the images; jpeg: the teachers see the compressed ones too; "
        "reference: not at all, the training reads them from the dataset",
    )
    loader: Literal["auto", "resident", "mapped", "streaming"] = Field(
        default="auto",
        description="how a cached store reaches the students: resident in each worker's memory; mapped from "
        "one copy on each machine's disk; streaming, read from such copies by actors of the cluster. "
        "auto: resident where it fits, else mapped",
    )
    node_copies: str | None = Field(
        default=None, description="folder of the copies; null: $TMKD_CACHE or the user's cache folder"
    )
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
    output: Location = Field(default="runs", description="run folders are made in here")
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
            if where in trained and distiller.needs_online and self.knowledge.mode != "online":
                name = ".".join(where)
                text = f"{self.knowledge.mode}, but {name}.strategy reads feature maps: set it to online"
                problems.append((("knowledge", "mode"), text))
            if distiller.views is not None and not _distinct(distiller.views):
                problems.append(((*where, "views"), "give at least one view, each once; null for all"))
            if where in trained and not distiller.trains_classifier:
                text = "no term trains the classifier; set ce_weight, text_weight, or a kd strategy on logits"
                problems.append((where, text))
            if self.teacher.text is None and where in trained and distiller.needs_text_teacher:
                text = f"null, but {'.'.join(where)} needs a text teacher; have one, or choose another method"
                problems.append((("teacher", "text"), text))
        if self.knowledge.images == "jpeg" and self.knowledge.mode != "cached":
            text = f"jpeg is for stores; in mode {self.knowledge.mode} the students see images as they are"
            problems.append((("knowledge", "images"), text))
        problems += _mixing_problems(self, trained)
        problems += _optimizer_problems(self, trained)
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


def _optimizer_problems(
    config: ExperimentConfig, trained: list[tuple[str, ...]]
) -> list[tuple[tuple[str, ...], str]]:
    """Return where DOT has no two gradients to keep apart."""
    problems: list[tuple[tuple[str, ...], str]] = []
    if config.training.optimizer == "dot":
        alone = [
            ".".join(where)
            for where, distiller in zip(trained, config.named_methods().values(), strict=True)
            if not distiller.mixes_task_and_distillation
        ]
        if alone:
            text = f"dot needs a cross-entropy and a distillation term, which {', '.join(alone)} has not both"
            problems.append((("training", "optimizer"), text))
    fits = {"visual": config.teacher.visual.fit}
    if config.teacher.text is not None:
        fits["text"] = config.teacher.text.fit
    for name, fit in fits.items():
        if fit.optimizer == "dot":
            problems.append((("teacher", name, "fit", "optimizer"), "dot is for distillation; take another"))
    return problems


def _mixing_problems(
    config: ExperimentConfig, trained: list[tuple[str, ...]]
) -> list[tuple[tuple[str, ...], str]]:
    """Return what is wrong with mixup and cutmix: a teacher has not seen the mixed images.

    Args:
        trained: paths of the distillers that are trained.
    """
    problems: list[tuple[tuple[str, ...], str]] = []
    taught = [
        ".".join(where)
        for where, distiller in zip(trained, config.named_methods().values(), strict=True)
        if distiller.teacher != "none"
    ]
    for name in ("mixup", "cutmix"):
        if getattr(config.training, name) > 0 and taught:
            text = (
                f"mixes the images, but the teacher's outputs are of the unmixed ones ({', '.join(taught)}); "
                "set it to 0, or train without a teacher (distiller: alone)"
            )
            problems.append((("training", name), text))
        if getattr(config.teacher.visual.fit, name) > 0:
            text = "is for students without a teacher; set it to 0"
            problems.append((("teacher", "visual", "fit", name), text))
    return problems
