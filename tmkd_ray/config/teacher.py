"""The frozen teachers: a visual one, and CLIP."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from tmkd_ray.config.training import ClipTrainingConfig, TrainingConfig
from tmkd_ray.models import check_model_name
from tmkd_ray.settings import ImageStatistics, Location, SectionError, Settings


def _on_all_labels(fit: TrainingConfig) -> TrainingConfig:
    if fit.labels_per_class is not None:
        raise SectionError([(("labels_per_class",), "only students are trained on few labels; leave it null")])
    return fit


class VisualTeacherConfig(Settings, allow_inf_nan=False):
    """The frozen visual teacher: a checkpoint, or one fitted here when `checkpoint` is null.

    `model` names a network of `tmkd_ray.models`; or one that has its weights, and is not fitted here:
        python:package.module:function   what the function returns; see `models/python_models.py`
        program:PATH.pt2                 of torch.export.save; see `models/program_models.py`

    A teacher that never saw a prior handles its view badly. `fit_views` fits one on all views from the start;
    `adapt` makes a given one ready for them:
        statistics: batch-norm statistics of each view, no weight is changed (AdaBN, arXiv 1603.04779). The view
            `original` keeps those of the checkpoint, so that the plain teacher is the given one;
        fit: goes on training, as `fit` says, on batches that mix all views.
    """

    model: str = "resnet56"
    checkpoint: Location | None = None
    mean: ImageStatistics | None = Field(default=None, description="null: the dataset's")
    std: ImageStatistics | None = None
    fit: TrainingConfig = Field(default_factory=TrainingConfig)
    fit_views: bool = Field(default=False, description="fit on all views, not on the original alone")
    adapt: Literal["none", "statistics", "fit"] = Field(
        default="none", description="what makes a given teacher ready for the views"
    )
    view_batch_norm: Literal["shared", "per_view"] = Field(
        default="shared",
        description="where views are mixed (fit_views, or adapt: fit): per_view keeps batch-norm statistics of "
        "each; adapt: statistics always does",
    )
    adapt_images: int = Field(
        default=10_000, ge=1, description="adapt: statistics looks at so many training images, in each view"
    )

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

    @model_validator(mode="after")
    def _check(self) -> "VisualTeacherConfig":
        problems: list[tuple[tuple[str, ...], str]] = []
        is_program = self.model.startswith("program:")
        if is_program and self.checkpoint is not None:
            problems.append((("checkpoint",), "an exported program has its weights; set it to null"))
        if self.adapt != "none" and is_program:
            problems.append((("adapt",), "an exported program cannot be changed; set it to none"))
        elif self.adapt != "none" and not self.is_given:
            text = "adapts a given teacher; give a checkpoint, or set fit_views to fit one on all views"
            problems.append((("adapt",), text))
        mixes = self.adapt == "fit" or (self.fit_views and not self.is_given)
        if self.view_batch_norm == "per_view" and not mixes and self.adapt != "statistics":
            text = "per_view is for a teacher fitted on all views; set fit_views, or adapt to fit"
            problems.append((("view_batch_norm",), text))
        if self.has_view_statistics and self.fit.compile and mixes:
            problems.append((("fit", "compile"), "not with view_batch_norm per_view; set it to false"))
        if problems:
            raise SectionError(problems)
        return self

    @property
    def is_given(self) -> bool:
        """Whether there are weights to begin with, so that none are fitted from scratch."""
        return self.checkpoint is not None or self.model.startswith(("python:", "program:"))

    @property
    def is_fitted(self) -> bool:
        """Whether `fit-teacher` has something to do: fit a teacher, or adapt the given one."""
        return not self.is_given or self.adapt != "none"

    @property
    def has_view_statistics(self) -> bool:
        """Whether the teacher has batch-norm statistics for each view."""
        return self.adapt == "statistics" or self.view_batch_norm == "per_view"


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
    text_features: Location | None = Field(
        default=None,
        description="npz of `features` and `names`: lock the text side of the CLIP fitted here to these "
        "embeddings of the class names; architecture.embedding_width must be theirs",
    )
    architecture: ClipArchitecture = Field(default_factory=ClipArchitecture)
    fit: ClipTrainingConfig = Field(default_factory=ClipTrainingConfig)

    _all_labels = field_validator("fit")(_on_all_labels)

    @model_validator(mode="after")
    def _fitted_here(self) -> "TextTeacherConfig":
        if self.model is not None and self.text_features is not None:
            text = "locks the text side of a CLIP that is fitted here; set it to null, or model"
            raise SectionError([(("text_features",), text)])
        return self


class TeacherConfig(Settings):
    visual: VisualTeacherConfig = Field(default_factory=VisualTeacherConfig)
    text: TextTeacherConfig | None = Field(
        default_factory=TextTeacherConfig, description="null: no CLIP, for plain distillation only"
    )
