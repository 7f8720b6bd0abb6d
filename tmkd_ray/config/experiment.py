"""The whole tree: one experiment."""

import re
from typing import Annotated, Any

from pydantic import AfterValidator, Field, SerializeAsAny, field_validator, model_validator

from tmkd_ray.augmentation import AugmentationConfig
from tmkd_ray.config.knowledge import KnowledgeConfig
from tmkd_ray.config.objective import AnyObjective, ObjectiveConfig, resolve_objective
from tmkd_ray.config.report import ReportConfig
from tmkd_ray.config.search import SearchConfig
from tmkd_ray.config.teacher import TeacherConfig
from tmkd_ray.config.training import Seed, TrainingConfig, distinct
from tmkd_ray.datasets import DATASETS
from tmkd_ray.datasets.base import DatasetConfig
from tmkd_ray.models import check_model_name
from tmkd_ray.objective import DistillerConfig
from tmkd_ray.settings import Location, SectionError, Settings, resolve_each, resolve_named
from tmkd_ray.views import VIEWS
from tmkd_ray.views.base import ViewConfig

DEFAULT_VIEWS = ("original", "edge", "high_frequency")


def _folder_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(
            f"{name!r} cannot name a folder; use letters, digits, '.', '_' and '-', a letter or digit first"
        )
    return name


FolderName = Annotated[str, AfterValidator(_folder_name)]


class StudentConfig(Settings):
    model: str = "resnet8"

    @field_validator("model")
    @classmethod
    def _known(cls, name: str) -> str:
        check_model_name(name)
        if name.startswith("program:"):
            raise ValueError("an exported program cannot be trained; it can be a visual teacher")
        return name


class ClusterConfig(Settings):
    """Which Ray to use. In a job, or with `address` set, the existing cluster; else a local one."""

    address: str | None = Field(default=None, description="`auto` joins a running cluster; null: a local one")
    num_cpus: int | None = Field(
        default=None, ge=1, description="logical CPUs of a local Ray; null: twice the cores, at least 4"
    )
    autoscaling: bool = Field(
        default=False,
        description="the cluster starts nodes when asked: pools ask for all their actors at once, and the GPUs "
        "of max_gpus are counted on, those there now or not",
    )
    max_gpus: int | None = Field(
        default=None, ge=0, description="with autoscaling: GPUs that the cluster can grow to; 0: none"
    )
    node_marks: bool = Field(
        default=False,
        description="each stage asks for its own kind of node, by the marks of cluster.yaml: tmkd_views, "
        "tmkd_teacher, tmkd_train",
    )
    wait_s: float = Field(
        default=1800,
        gt=0,
        allow_inf_nan=False,
        description="how long a stage waits for room on the cluster, new nodes included, before it fails",
    )

    @model_validator(mode="after")
    def _check(self) -> "ClusterConfig":
        if self.autoscaling and self.max_gpus is None:
            text = "required with cluster.autoscaling: GPUs that the cluster can grow to; 0 if it has none"
            raise SectionError([(("max_gpus",), text)])
        if self.max_gpus is not None and not self.autoscaling:
            raise SectionError([(("max_gpus",), "goes with cluster.autoscaling=true; else leave it null")])
        return self


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
    distiller: AnyObjective = Field(default_factory=lambda: resolve_objective("tmkd"))
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    methods: dict[FolderName, AnyObjective] = Field(
        default_factory=dict, description="distillers to compare in one run; empty: `distiller` alone"
    )
    seeds: tuple[Seed, ...] | None = Field(
        default=None, description="of the students, each method once a seed; null: training.seed"
    )
    search: SearchConfig | None = Field(default=None, description="what `tmkd search` sweeps")
    report: ReportConfig = Field(default_factory=ReportConfig)
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
        if seeds is not None and not distinct(seeds):
            raise ValueError("give at least one seed, each once")
        return seeds

    @model_validator(mode="after")
    def _check(self) -> "ExperimentConfig":
        # Where methods are compared `distiller` is not trained, but a wrong name in it is still a mistake.
        distillers: dict[tuple[str, ...], ObjectiveConfig] = {("distiller",): self.distiller}
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
            if distiller.views is not None and not distinct(distiller.views):
                problems.append(((*where, "views"), "give at least one view, each once; null for all"))
            is_supervised = isinstance(distiller, DistillerConfig)
            if where in trained and is_supervised and not distiller.trains_classifier:
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

    def named_methods(self) -> dict[str, ObjectiveConfig]:
        """Return the distillers to compare by name: `methods`, else the one of `distiller`."""
        return self.methods or {self.distiller.name: self.distiller}

    def taught_views(self, distiller: ObjectiveConfig) -> tuple[str, ...]:
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
