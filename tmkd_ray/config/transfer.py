"""What a pre-trained student is carried to: one configuration for each task of `tmkd transfer`."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from tmkd_ray.config.experiment import ClusterConfig, FolderName
from tmkd_ray.config.training import Seed, TrainingConfig, distinct
from tmkd_ray.datasets import DATASETS
from tmkd_ray.datasets.base import DatasetConfig
from tmkd_ray.models import check_model_name
from tmkd_ray.registry import Registry
from tmkd_ray.settings import ImageStatistics, Location, SectionError, Settings, resolve_named

TRANSFERS: "Registry[type[TransferConfig]]" = Registry("downstream task")


class TransferConfig(Settings):
    """What every downstream task needs to know: which student, against what, and where results go."""

    task: ClassVar[str]

    name: FolderName | None = Field(default=None, description="the results' folder; null: transfer-TASK")
    output: Location = Field(default="runs", description="the folder is made in here")
    student: Location = Field(
        description="the student's folder, its checkpoint, or the folder of a run that trained one student"
    )
    model: str | None = Field(
        default=None, description="the student's architecture; null: as its run or its checkpoint says"
    )
    baseline: Location | None = Field(
        default=None, description="other weights of the same model to compare with, ImageNet's, say"
    )
    random_baseline: bool = Field(default=True, description="compare with the same model from random weights")
    mean: ImageStatistics | None = Field(
        default=None, description="the student's normalisation; null: its run's, else the data's"
    )
    std: ImageStatistics | None = None
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)

    @field_validator("model")
    @classmethod
    def _known(cls, name: str | None) -> str | None:
        if name is not None:
            check_model_name(name)
        return name

    @model_validator(mode="after")
    def _both_statistics(self) -> "TransferConfig":
        if (self.mean is None) != (self.std is None):
            raise SectionError([(("std" if self.std is None else "mean",), "give mean and std together")])
        if self.std is not None and min(self.std) <= 0:
            raise SectionError([(("std",), "a standard deviation is above zero")])
        return self

    @property
    def folder_name(self) -> str:
        return self.name or f"transfer-{self.task}"


class ClassificationConfig(TransferConfig):
    """A task on the features of a frozen student, over a labelled dataset.

    Without `dataset.image_size` the images are as large as those that the student's run trained it on.
    """

    dataset: SerializeAsAny[DatasetConfig]
    batch_size: int = Field(default=256, ge=1, description="images in a forward pass")
    num_workers: int = Field(default=2, ge=1)
    num_cpus_per_worker: float = Field(default=1.0, gt=0)
    use_gpu: bool | None = Field(default=None, description="null: use GPUs when the cluster has them")

    @field_validator("dataset", mode="before")
    @classmethod
    def _resolve_dataset(cls, value: Any) -> Any:
        return resolve_named(value, DATASETS)


@TRANSFERS.register("zero-shot")
class ZeroShotConfig(ClassificationConfig):
    """Classification by the text embeddings of class names, without a label."""

    task = "zero-shot"

    projector: Location | None = Field(
        default=None, description="null: projector.safetensors beside the student"
    )
    clip: Location | None = Field(
        default=None, description="folder or name; null: as the projector's file says"
    )
    prompts: tuple[str, ...] = Field(default=("a photo of a {}.",), min_length=1)
    scale: float = Field(default=100.0, gt=0, description="of the similarities, before the softmax")

    @field_validator("prompts", mode="before")
    @classmethod
    def _one_prompt(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("prompts")
    @classmethod
    def _have_a_place(cls, prompts: tuple[str, ...]) -> tuple[str, ...]:
        for prompt in prompts:
            if prompt.count("{}") != 1 or prompt.replace("{}", "").count("{") or prompt.count("}") != 1:
                raise ValueError(f"{prompt!r} must have one {{}}, for the class name")
        return prompts


@TRANSFERS.register("knn")
class KnnConfig(ClassificationConfig):
    """Weighted nearest neighbours among the training images' features (Wu et al. 2018, arXiv 1805.01978)."""

    task = "knn"

    k: int = Field(default=20, ge=1)
    temperature: float = Field(default=0.07, gt=0)


@TRANSFERS.register("linear")
class LinearConfig(ClassificationConfig):
    """A linear classifier on frozen features, for several parts of the labels.

    The learning rate is chosen on the dataset's validation part of train; test is read once.
    """

    task = "linear"

    fractions: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        default=(0.01, 0.1, 1.0), min_length=1, description="parts of each class's labels"
    )
    learning_rates: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        default=(0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0), min_length=1, description="one is chosen on validation"
    )
    epochs: int = Field(default=30, ge=1)
    min_steps: int = Field(default=1000, ge=1, description="steps at least, for few labels")
    probe_batch_size: int = Field(default=256, ge=1)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=1e-4, ge=0)
    seed: Seed = 0

    @model_validator(mode="after")
    def _each_once(self) -> "LinearConfig":
        problems = [
            ((name,), "each value once")
            for name in ("fractions", "learning_rates")
            if not distinct(getattr(self, name))
        ]
        if problems:
            raise SectionError(problems)
        return self


class DenseTrainingConfig(TrainingConfig):
    """How a detector or a segmentation network is trained; what only classifiers have is refused."""

    learning_rate: float = Field(default=0.01, gt=0)
    batch_size: int = Field(default=8, ge=1)
    weight_decay: float = Field(default=1e-4, ge=0)
    warmup_epochs: float = Field(default=0.5, ge=0)
    max_gradient_norm: float | None = Field(default=10.0, gt=0)
    evaluation_batch_size: int = Field(default=8, ge=1)

    @model_validator(mode="after")
    def _check_dense(self) -> "DenseTrainingConfig":
        classifiers_only = {
            "mixup": self.mixup > 0,
            "cutmix": self.cutmix > 0,
            "label_smoothing": self.label_smoothing > 0,
            "labels_per_class": self.labels_per_class is not None,
            "compile": self.compile,
        }
        problems = [
            ((name,), "is for training classifiers; leave it out")
            for name, is_set in classifiers_only.items()
            if is_set
        ]
        if self.optimizer == "dot":
            problems.append((("optimizer",), "dot is for distillation; take another"))
        if problems:
            raise SectionError(problems)
        return self


class DenseConfig(TransferConfig):
    """A task for which the student is trained on, under a new head."""

    data: Location
    training: DenseTrainingConfig = Field(default_factory=DenseTrainingConfig)
    validation_fraction: float = Field(
        default=0.1,
        gt=0,
        lt=1,
        description="of train, to choose the epoch on, where there is no validation part",
    )
    split_seed: int = Field(default=0, ge=0)


@TRANSFERS.register("detect")
class DetectConfig(DenseConfig):
    """Object detection on COCO-format data; paths are relative to `data`."""

    task = "detect"

    train: str = Field(default="instances_train.json", description="annotations in COCO's JSON format")
    validation: str | None = Field(default=None, description="null: a part of train is set apart")
    test: str = Field(default="instances_val.json", description="read once, at the end")
    images: str = Field(default="images", description="folder that file_name is relative to")
    test_images: str | None = Field(default=None, description="null: the same folder")
    validation_images: str | None = Field(default=None, description="null: the same folder")
    bad_boxes: Literal["error", "drop"] = Field(
        default="error",
        description="boxes without area or beyond the image: refuse the file, or leave them out",
    )
    detector: Literal["faster_rcnn", "retinanet", "ssdlite"] = "faster_rcnn"
    image_size: int = Field(default=320, ge=32, description="longer side of what the network sees, in pixels")
    channels: int = Field(default=256, ge=8, multiple_of=8, description="of the feature pyramid")
    head_width: int = Field(default=1024, ge=8, description="faster_rcnn: of its two hidden layers")
    num_proposals: int = Field(default=1000, ge=1, description="faster_rcnn: of the region proposal network")
    flip: float = Field(default=0.5, ge=0, le=1, description="probability of a horizontal flip")


@TRANSFERS.register("segment")
class SegmentConfig(DenseConfig):
    """Semantic segmentation; `data` holds images/SPLIT/NAME.jpg, masks/SPLIT/NAME.png and classes.txt."""

    task = "segment"

    train: str = "train"
    validation: str | None = Field(default="val", description="null: a part of train is set apart")
    test: str = Field(default="test", description="read once, at the end")
    images: str = "images"
    masks: str = "masks"
    classes: str = Field(
        default="classes.txt", description="class names, one a line, in the order of the values"
    )
    head: Literal["fcn", "deeplabv3", "lraspp"] = "fcn"
    output_stride: int | None = Field(
        default=16,
        ge=1,
        description="convolutions that would shrink the maps further are dilated instead; null: none",
    )
    image_size: int = Field(default=180, ge=16, description="shorter side of what the network sees, in pixels")
    crop_size: int | None = Field(default=None, ge=16, description="square for training; null: image_size")
    min_scale: float = Field(default=0.5, gt=0, description="random scale before the crop, from")
    max_scale: float = Field(default=2.0, gt=0, description="… to")
    flip: float = Field(default=0.5, ge=0, le=1, description="probability of a horizontal flip")

    @model_validator(mode="after")
    def _check_segment(self) -> "SegmentConfig":
        problems: list[tuple[tuple[str, ...], str]] = []
        if self.min_scale > self.max_scale:
            problems.append((("min_scale",), f"{self.min_scale:g} is above max_scale {self.max_scale:g}"))
        training = self.training
        smallest = training.batch_size // training.num_workers // training.gradient_accumulation
        if self.head == "deeplabv3" and smallest < 2:
            text = "deeplabv3 normalises over the batch: give each worker's (micro-)batch two images at least"
            problems.append((("training", "batch_size"), text))
        if problems:
            raise SectionError(problems)
        return self
