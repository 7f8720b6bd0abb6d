"""What a run measured: the models here are the schema of results.json.

Accuracies are fractions in 0..1, times are seconds, sizes are bytes. NaN and infinity are never stored: a
loss that was not finite becomes null, anywhere else a number must be finite.
"""

import json
import math
import statistics
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NoReturn

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    JsonValue,
    ValidationError,
    field_validator,
    model_validator,
)

from tmkd_ray import storage
from tmkd_ray.errors import UserError
from tmkd_ray.settings import Settings

SCHEMA_VERSION: Final = 1

Split = Literal["test", "validation"]


def _none_unless_finite(value: float | None) -> float | None:
    return value if value is None or math.isfinite(value) else None


def _without_lone_surrogates(value: Any) -> Any:
    # A file name that is not UTF-8 reaches us with lone surrogates, which neither JSON nor HTML can hold.
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def _nonfinite_as_text(value: Any) -> Any:
    # Infinity is a legal setting (a fusion temperature, say), but JSON has no number for it.
    if isinstance(value, dict):
        return {key: _nonfinite_as_text(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_nonfinite_as_text(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


Accuracy = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]
Loss = Annotated[float | None, AfterValidator(_none_unless_finite)]
"""None where the loss was not finite, as in a run that diverged."""
Text = Annotated[str, BeforeValidator(_without_lone_surrogates)]
"""Text from a user's file: class names, image ids."""
ResolvedConfig = Annotated[dict[str, JsonValue], AfterValidator(_nonfinite_as_text)]


class EpochRecord(Settings):
    """One epoch of one training.

    Attributes:
        epoch: counted from 1.
        learning_rate: at the end of the epoch.
        loss: the weighted sum, mean over the epoch.
        terms: the unweighted terms by name (ce, kd, feature, text, contrastive …), means over the epoch.
        train_accuracy: None where it was not measured.
        validation_accuracy: None where it was not measured.
        seconds: wall-clock time of the epoch.
        images_per_second: trained images, all workers together.
        data_seconds: of the training, spent waiting for batches, on the first worker; None in older results.
        data_share: that as a part of the time spent training, without validation.
    """

    epoch: Annotated[int, Field(ge=1)]
    learning_rate: Annotated[float, Field(allow_inf_nan=False)]
    loss: Loss
    terms: dict[str, Loss] = Field(default_factory=dict)
    train_accuracy: Accuracy | None = None
    validation_accuracy: Accuracy | None = None
    seconds: Seconds
    images_per_second: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    data_seconds: Seconds | None = None
    data_share: Accuracy | None = None


class CostRecord(Settings):
    """What a prediction costs.

    Attributes:
        flops: floating-point operations for one image; a multiplication and an addition are two.
        latency_seconds: of one image by itself, median over many.
        device: that it was measured on, such as "cpu" or the name of the GPU.
        threads: of the CPU that took part.
    """

    flops: Count
    latency_seconds: Seconds
    device: str
    threads: Annotated[int, Field(ge=1)]


class TrainingRecord(Settings):
    """One seed of one method.

    Attributes:
        seed: of this training.
        parameters: number of the student's trained values, without the distiller's heads.
        best_epoch: the epoch whose weights were kept, chosen on the validation images.
        validation_accuracy: of the kept weights.
        test_accuracy: of the kept weights; None when the test images were not read.
        test_top5_accuracy: the label is among the five largest logits.
        test_ece: expected calibration error on the test images, 0..1.
        teacher_agreement: how often the visual teacher's first class is the student's, on the test images.
        teacher_kl: mean KL(visual teacher ‖ student) on the test images at temperature 1, nats.
        per_class_accuracy: on the test images; None for a class without any.
        seconds: wall-clock time of the training.
        num_workers: training processes.
        device: such as "cpu" or the name of the GPU.
        history: the epochs in order.
    """

    seed: int
    parameters: Count
    best_epoch: Annotated[int, Field(ge=1)]
    validation_accuracy: Accuracy
    test_accuracy: Accuracy | None = None
    test_top5_accuracy: Accuracy | None = None
    test_ece: Accuracy | None = None
    teacher_agreement: Accuracy | None = None
    teacher_kl: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    per_class_accuracy: list[Accuracy | None] | None = None
    seconds: Seconds
    num_workers: Annotated[int, Field(ge=1)]
    device: str
    history: list[EpochRecord] = Field(default_factory=list)


class MethodRecord(Settings):
    """One method: a student trained in one way, once a seed.

    Attributes:
        name: short and unique in the run, such as "tmkd".
        label: for people, such as "TMKD (text-guided fused teacher)".
        student: name of the student model.
        measured_by: its trained `classifier`; or `zero-shot`, the similarity of its embedding with the class
            names' text embeddings: no label taught it the classes.
        runs: one a seed.
        cost: of the student's predictions; None where it was not measured.
    """

    name: str
    label: Text
    student: str
    measured_by: Literal["classifier", "zero-shot"] = "classifier"
    runs: Annotated[list[TrainingRecord], Field(min_length=1)]
    cost: CostRecord | None = None

    @field_validator("runs")
    @classmethod
    def _seeds_differ(cls, runs: list[TrainingRecord]) -> list[TrainingRecord]:
        if len({run.seed for run in runs}) < len(runs):
            raise ValueError("two runs have the same seed")
        return runs

    @property
    def split(self) -> Split:
        """`test` when every run read the test images, else `validation`."""
        return "validation" if any(run.test_accuracy is None for run in self.runs) else "test"

    def accuracies(self, split: Split) -> list[float]:
        """The accuracy of each run on `split`, 0..1; `test` only where every run has read it."""
        values = [run.test_accuracy if split == "test" else run.validation_accuracy for run in self.runs]
        known = [value for value in values if value is not None]
        assert len(known) == len(values), f"{self.name}: not every run has read the test images"
        return known

    @property
    def mean(self) -> float:
        """Mean accuracy over the runs on `self.split`, 0..1."""
        return statistics.fmean(self.accuracies(self.split))

    @property
    def std(self) -> float | None:
        """Sample standard deviation (n - 1) of the accuracy on `self.split`; None for a single run."""
        return sample_std(self.accuracies(self.split))

    @property
    def mean_seconds(self) -> float:
        """Mean wall-clock time of one training."""
        return statistics.fmean(run.seconds for run in self.runs)


def sample_std(values: list[float]) -> float | None:
    """The sample standard deviation (n - 1), None for a single value."""
    return statistics.stdev(values) if len(values) > 1 else None


class TeacherRecord(Settings):
    """The visual teacher.

    Attributes:
        model: name of the model.
        parameters: number of its values.
        source: "fitted here" or the checkpoint's file name.
        validation_accuracy: on the plain images.
        test_accuracy: on the plain images; None when the test images were not read.
        test_ece: expected calibration error on them, 0..1.
        per_class_accuracy: on them; None for a class without any.
        view_validation_accuracy: on each view alone, by the view's name.
        fused_validation_accuracy: `uniform` and `semantic` weights, and `oracle`: right on any view.
        history: of the fitting; empty for a checkpoint.
        seconds: of the fitting.
        cost: of its predictions on the plain images; None where it was not measured.
    """

    model: str
    parameters: Count
    source: Text
    validation_accuracy: Accuracy
    test_accuracy: Accuracy | None = None
    test_ece: Accuracy | None = None
    per_class_accuracy: list[Accuracy | None] | None = None
    view_validation_accuracy: dict[str, Accuracy] = Field(default_factory=dict)
    fused_validation_accuracy: dict[Literal["uniform", "semantic", "oracle"], Accuracy] = Field(
        default_factory=dict
    )
    history: list[EpochRecord] = Field(default_factory=list)
    seconds: Seconds | None = None
    cost: CostRecord | None = None


class ClipRecord(Settings):
    """The text teacher.

    Attributes:
        source: "fitted here" or the checkpoint's name.
        embedding_width: width of the shared embedding.
        parameters: number of its values, both encoders.
        zero_shot_validation_accuracy: by the view's name, and `fused`.
        history: of the fitting; empty for a checkpoint.
        seconds: of the fitting.
    """

    source: Text
    embedding_width: Annotated[int, Field(ge=1)]
    parameters: Count
    zero_shot_validation_accuracy: dict[str, Accuracy] = Field(default_factory=dict)
    history: list[EpochRecord] = Field(default_factory=list)
    seconds: Seconds | None = None


class SetAsideImage(Settings):
    """An image that could not be used, and why."""

    id: Text
    reason: Text


class DatasetRecord(Settings):
    """The images.

    Attributes:
        name: of the dataset.
        class_names: label i means `class_names[i]`.
        num_train: training images, after those set aside.
        num_labelled_for_students: how many of them the students see with their labels; None means all.
        num_validation: images that choose the epoch.
        num_test: images that only the last evaluation reads.
        image_size: height = width of the models' input, in pixels.
        set_aside: images that could not be read.
    """

    name: Text
    class_names: Annotated[list[Text], Field(min_length=1)]
    num_train: Count
    num_labelled_for_students: Count | None = None
    num_validation: Count
    num_test: Count
    image_size: Annotated[int, Field(ge=1)]
    set_aside: list[SetAsideImage] = Field(default_factory=list)


class KnowledgeRecord(Settings):
    """The knowledge store.

    Attributes:
        num_images: images in it.
        num_variants: stored augmentations of each image.
        views: names in the order of the V axis.
        bytes_per_image_and_variant: on disk, mean.
        total_bytes: on disk.
        seconds: wall-clock time of the computation.
        images_per_second: image variants a second, all actors together.
        reused: the store was there already and nothing was computed.
        stage_seconds: time in each step, summed over the actors, where it was measured.
        fingerprint: what the content depends on: data, augmentation, views, weights of the teachers.
    """

    num_images: Count
    num_variants: Count
    views: Annotated[tuple[str, ...], Field(min_length=1)]
    bytes_per_image_and_variant: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    total_bytes: Count
    seconds: Seconds
    images_per_second: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    reused: bool = False
    stage_seconds: dict[str, Seconds] = Field(default_factory=dict)
    fingerprint: dict[str, JsonValue] = Field(default_factory=dict)


class RunResults(Settings):
    """Everything a run measured: the content of results.json.

    Attributes:
        schema_version: of this file format.
        name: of the run.
        created: ISO 8601 in UTC, such as 2026-01-31T12:00:00Z.
        dataset: the images.
        teacher: the visual teacher, None without one.
        clip: the text teacher, None without one.
        knowledge: the knowledge store, None where the teachers ran online.
        methods: what was compared; the first is the reference of every difference.
        semantic_weights: [C][V], mean semantic weight of each view over the images of a class.
        stage_seconds: wall-clock time by stage.
        config: the resolved configuration; infinities as text.
        versions: of Python and the libraries.
        hardware: such as the CPU, the number of cores, the GPU.
        notes: what a reader should know, a sentence each.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    name: Text
    created: str
    dataset: DatasetRecord
    teacher: TeacherRecord | None = None
    clip: ClipRecord | None = None
    knowledge: KnowledgeRecord | None = None
    methods: list[MethodRecord] = Field(default_factory=list)
    semantic_weights: list[list[Accuracy]] | None = None
    stage_seconds: dict[str, Seconds] = Field(default_factory=dict)
    config: ResolvedConfig = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    hardware: dict[str, str | int] = Field(default_factory=dict)
    notes: list[Text] = Field(default_factory=list)

    @field_validator("created")
    @classmethod
    def _is_utc(cls, value: str) -> str:
        if datetime.fromisoformat(value).utcoffset() != timedelta(0):
            raise ValueError(f"expected a time in UTC such as 2026-01-31T12:00:00Z, not {value!r}")
        return value

    @model_validator(mode="after")
    def _parts_agree(self) -> "RunResults":
        names = [method.name for method in self.methods]
        if len(set(names)) < len(names):
            raise ValueError(f"methods: the names must differ, not {names}")
        if self.semantic_weights is not None:
            num_classes = len(self.dataset.class_names)
            widths = {len(row) for row in self.semantic_weights}
            if len(self.semantic_weights) != num_classes or len(widths) != 1 or 0 in widths:
                raise ValueError(f"semantic_weights: expected {num_classes} rows, one a class, of equal length")
            if self.knowledge is not None and widths != {len(self.knowledge.views)}:
                raise ValueError(f"semantic_weights: expected one column a view: {self.knowledge.views}")
        return self

    @property
    def split(self) -> Split:
        """What the methods are compared on: `test` when every run of every method has read it."""
        return "validation" if any(method.split == "validation" for method in self.methods) else "test"

    def save(self, path: str | Path) -> None:
        """Write results.json: sorted, indented, whole or not at all."""
        # allow_nan=False: the validators above keep NaN out, this makes a hole in them loud.
        content = json.dumps(
            self.model_dump(mode="json"), sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False
        )
        storage.write_bytes(str(path), f"{content}\n".encode(errors="backslashreplace"))

    @classmethod
    def load(cls, path: str | Path) -> "RunResults":
        """Read results.json.

        Raises:
            UserError: the file is missing, not JSON, of another version, or does not fit the schema.
        """
        advice = "Give the results.json that a run wrote, or run it again."
        try:
            content = json.loads(storage.read_bytes(str(path)), parse_constant=_refuse_constant)
        except ValueError as error:
            if isinstance(error, UserError):
                raise UserError(f"Cannot read the results {path}: {error}. {advice}") from error
            raise UserError(f"The results {path} are not valid JSON: {error}. {advice}") from error
        if not isinstance(content, dict) or "schema_version" not in content:
            raise UserError(f"{path} holds no results: schema_version is missing. {advice}")
        if content["schema_version"] != SCHEMA_VERSION:
            raise UserError(
                f"The results {path} have schema_version {content['schema_version']!r}; this version of "
                f"tmkd-ray reads {SCHEMA_VERSION}. Read them with the version that wrote them, or run again."
            )
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            problems = [
                f"  {'.'.join(map(str, problem['loc'])) or 'results'}: {problem['msg']}"
                for problem in error.errors()
            ]
            if len(problems) > 10:
                problems[10:] = [f"  … and {len(problems) - 10} more"]
            lines = [f"The results {path} do not fit the schema:", *problems, advice]
            raise UserError("\n".join(lines)) from error


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON number")
