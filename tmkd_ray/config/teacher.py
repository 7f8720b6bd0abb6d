"""The frozen teachers: a visual one, and CLIP."""

from pydantic import Field, field_validator, model_validator

from tmkd_ray.config.training import ClipTrainingConfig, TrainingConfig
from tmkd_ray.models import check_model_name
from tmkd_ray.settings import ImageStatistics, Location, SectionError, Settings


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
