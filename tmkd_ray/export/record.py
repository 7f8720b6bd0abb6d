"""What every exported file says of the student in it."""

import json
from collections.abc import Mapping
from typing import Any, Final, Literal

from pydantic import Field, ValidationError

from tmkd_ray.datasets import decode
from tmkd_ray.errors import UserError
from tmkd_ray.results import Accuracy, Count, Text
from tmkd_ray.settings import ImageStatistics, Settings
from tmkd_ray.types import TaskSpec

FORMAT_VERSION: Final = 1

PREPROCESSING = (
    "decode to RGB, 8 bits a channel (EXIF orientation applied, transparency laid over white); cut out the "
    "centred square; scale it to image_size × image_size pixels, by means over areas when shrinking, bicubic "
    "when growing; divide by 255; subtract mean; divide by std; channels first: float32 [batch, 3, height, "
    "width]"
)

_TEXTS = ("model", "kind", "precision", "preprocessing", "dataset", "run", "method")
"""Fields whose values are text: in flat metadata they stand as they are, all others as JSON."""


class ExportRecord(Settings):
    """The metadata of an exported student; accuracies are fractions in 0..1.

    Attributes:
        model: name for `build_model`.
        kind: a classifier puts out logits [B, C]; an encoder, which was trained without labels, its feature
            [B, S].
        class_names: label `i` means `class_names[i]`; of an encoder none.
        feature_width: S.
        image_size: height = width of the input in pixels.
        mean, std: per channel of RGB in [0, 1].
        preprocessing: from an image file to the input, in words.
        decoding_version: of the code that does it, `datasets.decode.VERSION`.
        parameters: number of the student's values, without an encoder's untrained classifier.
        precision: of the numbers in the file.
        dataset, run, method, seed, best_epoch: where the student comes from.
        figures: measured accuracies: `validation_accuracy`, `test_accuracy`, `test_top5_accuracy`, `test_ece`;
            of an encoder `zero_shot_validation_accuracy`, by its projector and CLIP's texts. Of an int8 file
            `int8_validation_accuracy` is its own; the others, of the student before, begin with `float32_`.
        versions: of the programs that wrote the file.
    """

    format_version: Literal[1] = FORMAT_VERSION
    model: str
    kind: Literal["classifier", "encoder"] = "classifier"
    class_names: tuple[Text, ...]
    feature_width: Count
    image_size: int = Field(ge=1)
    mean: ImageStatistics
    std: ImageStatistics
    preprocessing: str = PREPROCESSING
    decoding_version: int = decode.VERSION
    parameters: Count
    precision: Literal["float32", "int8"] = "float32"
    dataset: Text | None = None
    run: Text | None = None
    method: Text | None = None
    seed: int | None = None
    best_epoch: int | None = None
    figures: dict[str, Accuracy] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)

    def accuracy(self) -> tuple[float, str] | None:
        """Return the accuracy of what is in the file, and the split: test, else validation; None if unknown."""
        prefix = "int8_" if self.precision == "int8" else ""
        for split in ("test", "validation"):
            value = self.figures.get(f"{prefix}{split}_accuracy")
            if value is not None:
                return value, split
        return None

    @property
    def output_name(self) -> str:
        """What the network puts out."""
        return "logits" if self.kind == "classifier" else "feature"

    @property
    def output_width(self) -> int:
        """C of a classifier, S of an encoder."""
        return len(self.class_names) if self.kind == "classifier" else self.feature_width

    def task(self) -> TaskSpec:
        """Return what `build_model` needs; an encoder's classifier, which nobody reads, has two classes."""
        return TaskSpec(self.class_names or ("a", "b"), self.image_size)

    def to_metadata(self) -> dict[str, str]:
        """Return the record as flat text, for formats whose metadata is text by name."""
        fields = self.model_dump(mode="json", exclude_none=True)
        return {
            name: value if name in _TEXTS else json.dumps(value, ensure_ascii=False)
            for name, value in fields.items()
        }

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], path: str) -> "ExportRecord":
        """Read what `to_metadata` wrote, among metadata of others.

        Raises:
            UserError: it is not there or does not fit; names the file `path`.
        """
        if "format_version" not in metadata:
            raise not_ours(path)
        try:
            fields = {
                name: metadata[name] if name in _TEXTS else json.loads(metadata[name])
                for name in cls.model_fields
                if name in metadata
            }
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: its metadata is damaged ({error}); export it again") from error
        return cls.from_fields(fields, path)

    @classmethod
    def from_json(cls, content: str | bytes, path: str) -> "ExportRecord":
        """Read the JSON text of a record; raises as `from_metadata`."""
        try:
            fields = json.loads(content)
        except ValueError as error:
            raise not_ours(path) from error
        if not isinstance(fields, dict):
            raise not_ours(path)
        return cls.from_fields(fields, path)

    @classmethod
    def from_fields(cls, fields: dict[str, Any], path: str) -> "ExportRecord":
        """Check the plain values of a record; raises as `from_metadata`."""
        version = fields.get("format_version")
        if version is None:
            raise not_ours(path)
        if version != FORMAT_VERSION:
            raise UserError(
                f"{path} has format_version {version!r}; this tmkd-ray reads {FORMAT_VERSION}. Export it "
                "again, or read it with the version that wrote it"
            )
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            problem = error.errors()[0]
            raise UserError(
                f"{path}: its metadata does not fit ({'.'.join(map(str, problem['loc']))}: {problem['msg']}); "
                "export it again"
            ) from error


def not_ours(path: str) -> UserError:
    """Return the error for a file without a record."""
    return UserError(
        f"{path} does not say which classes, image size and normalisation belong to it: it was not written by "
        "`tmkd export`. Export the student again"
    )
