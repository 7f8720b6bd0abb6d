"""What every dataset is: an index of samples, a reader of encoded images, and class names."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator

from tmkd_ray.datasets.splits import limit_samples
from tmkd_ray.errors import UnreadableImageError, UserError
from tmkd_ray.settings import ImageStatistics, Location, Settings
from tmkd_ray.storage import read_bytes

Split = Literal["train", "test"]

IMAGENET_MEAN: ImageStatistics = (0.485, 0.456, 0.406)
IMAGENET_STD: ImageStatistics = (0.229, 0.224, 0.225)


class DatasetConfig(Settings):
    """Options of a dataset; each dataset extends it with its own."""

    name: str
    image_size: int = Field(default=32, ge=8, description="height = width of the images, in pixels")
    limit: int | None = Field(
        default=None, ge=1, description="keep this many training images, a random subset; test is never limited"
    )
    validation_fraction: float = Field(default=0.1, gt=0, lt=1, description="of train, set apart for choices")
    split_seed: int = Field(default=0, ge=0, description="of `limit`, the validation part, and the few labels")
    class_names: Location | None = Field(
        default=None, description="file of class names, one a line or a JSON list; null: the dataset's own"
    )
    mean: ImageStatistics = IMAGENET_MEAN
    std: ImageStatistics = IMAGENET_STD

    @field_validator("std")
    @classmethod
    def _positive(cls, std: ImageStatistics) -> ImageStatistics:
        if min(std) <= 0:
            raise ValueError("a standard deviation is above zero")
        return std


@dataclass(frozen=True, eq=False)
class SampleIndex:
    """Which images there are, without the images.

    Attributes:
        ids: unicode [N], unique within the dataset, the same on every machine.
        labels: int64 [N], positions in the dataset's class names.
        part: int32 [N], the number of the file that holds the image.
        row: int64 [N], the image's place in that file.
    """

    ids: np.ndarray
    labels: np.ndarray
    part: np.ndarray
    row: np.ndarray

    def __post_init__(self) -> None:
        assert self.ids.dtype.kind == "U"
        assert self.labels.dtype == np.int64
        assert self.part.dtype == np.int32
        assert self.row.dtype == np.int64
        assert self.ids.shape == self.labels.shape == self.part.shape == self.row.shape == (len(self.ids),)

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, positions: np.ndarray) -> "SampleIndex":
        """Return the rows at these positions, in this order."""
        return SampleIndex(
            self.ids[positions], self.labels[positions], self.part[positions], self.row[positions]
        )


class ImageDataset(ABC):
    """Labelled images in a train and a test split.

    Pickles without pixels, so that it can be sent to other processes; `read` may run in several threads.
    A subclass names its `Config`, and finds what it needs in `__init__` before it calls this one's.

    Attributes:
        class_names: the C class names; label `i` means `class_names[i]`.
    """

    Config: ClassVar[type[DatasetConfig]]
    config: DatasetConfig
    class_names: tuple[str, ...]

    def __init__(self, config: DatasetConfig) -> None:
        """Find the data and the class names.

        Raises:
            UserError: the data is not there; fewer than two classes; a class name is empty or given twice.
        """
        self.config = config
        if config.class_names is None:
            names = self._own_class_names()
        else:
            names = self._apply_class_file(read_class_names(config.class_names))
        self.class_names = _checked_class_names(names, config)

    def index(self, split: Split) -> SampleIndex:
        """List the samples of a split from labels alone; `train` only `config.limit` of them.

        Raises:
            UserError: the split is empty, a label has no class name, or a class-name file has too many.
        """
        index = self._read_index(split)
        where = f"dataset {self.config.name}, {split} split"
        if len(index) == 0:
            raise UserError(f"{where}: no images. Check dataset.path")
        lowest, highest = int(index.labels.min()), int(index.labels.max())
        # Data may come with the name of a class without images; in a file of one's own that is a mistake.
        surplus = self.config.class_names is not None and split == "train"
        if lowest < 0 or highest >= len(self.class_names) or (surplus and highest + 1 < len(self.class_names)):
            raise UserError(
                f"{where}: labels run {lowest}..{highest} but {len(self.class_names)} class names are given. "
                "Name each label in the file of dataset.class_names, or choose another label column"
            )
        if split == "train" and self.config.limit is not None:
            return limit_samples(index, self.config.limit, self.config.split_seed)
        return index

    @abstractmethod
    def read(self, split: Split, index: SampleIndex) -> list[bytes | np.ndarray | UnreadableImageError]:
        """Read the images of some rows of the split's index, in their order.

        Returns:
            Per row the encoded file's content, or a decoded array, or why there is neither.
        """

    @abstractmethod
    def fingerprint(self, split: Split) -> str:
        """Return a SHA-256 that changes with the split's data (all of it: `limit` has no part in it)."""

    @abstractmethod
    def _read_index(self, split: Split) -> SampleIndex:
        """List all samples of a split; `index` checks them."""

    @abstractmethod
    def _own_class_names(self) -> Sequence[str]:
        """Return the class names that come with the data."""

    def _apply_class_file(self, names: list[str] | dict[str, str]) -> Sequence[str]:
        """Return the class names, in the order of the labels, that a class-name file stands for."""
        if isinstance(names, dict):
            raise UserError(
                f"dataset.class_names: {self.config.class_names} is a JSON object, which only image_folder "
                "takes; expected a list of names in the order of the labels"
            )
        return names


def read_class_names(path: str) -> list[str] | dict[str, str]:
    """Read class names: one a line, a JSON list, or a JSON object from folder name to class name.

    Raises:
        UserError: there is no such file, or it is none of these.
    """
    try:
        text = read_bytes(path).decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise UserError(f"dataset.class_names: cannot read {path}: {error}") from error
    except UserError as error:
        raise UserError(f"dataset.class_names: {error}") from error
    if not text.startswith(("[", "{")):
        return [line.strip() for line in text.splitlines() if line.strip()]
    try:
        names: Any = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"dataset.class_names: {path} is not valid JSON: {error}") from error
    if not all(isinstance(name, str) for name in (names.values() if isinstance(names, dict) else names)):
        raise UserError(f"dataset.class_names: {path}: every class name must be a JSON string")
    checked: list[str] | dict[str, str] = names
    return checked


def digest(content: object) -> str:
    """Return the SHA-256 of a plain tree of values, the same on every machine."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _checked_class_names(names: Sequence[str], config: DatasetConfig) -> tuple[str, ...]:
    where = f"dataset {config.name}: " if config.class_names is None else f"{config.class_names}: "
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{where}class names given more than once: {', '.join(twice)}. Give each label its own")
    if not all(name.strip() for name in names):
        raise UserError(f"{where}a class name is empty")
    if len(names) < 2:
        raise UserError(f"{where}{len(names)} class names ({', '.join(names)}); at least two are needed")
    return tuple(names)
