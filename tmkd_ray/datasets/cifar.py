"""CIFAR-10 and CIFAR-100 in their original form, through torchvision (Krizhevsky 2009)."""

import functools
import os
import tarfile
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from tmkd_ray.datasets import DATASETS
from tmkd_ray.datasets.base import DatasetConfig, ImageDataset, SampleIndex, Split, digest
from tmkd_ray.errors import UnreadableImageError, UserError
from tmkd_ray.settings import ImageStatistics, Location


class CifarConfig(DatasetConfig):
    """`path` is the folder that holds, or gets, torchvision's `cifar-10-batches-py` or `cifar-100-python`."""

    path: Location
    download: bool = True


class Cifar10Config(CifarConfig):
    name: str = "cifar10"
    mean: ImageStatistics = (0.4914, 0.4822, 0.4465)
    std: ImageStatistics = (0.2470, 0.2435, 0.2616)


class Cifar100Config(CifarConfig):
    name: str = "cifar100"
    mean: ImageStatistics = (0.5071, 0.4865, 0.4409)
    std: ImageStatistics = (0.2673, 0.2564, 0.2762)


def _source(name: str) -> Any:
    from torchvision import datasets  # here, because the import takes a second

    return {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]


@functools.lru_cache(maxsize=4)
def _load(name: str, path: str, train: bool) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Return uint8 [N, 32, 32, 3] pixels, int64 [N] labels, class names; torchvision checks the files' MD5."""
    try:
        content = _source(name)(path, train=train, download=False)
    except RuntimeError as error:
        raise UserError(
            f"dataset.path: {path} does not hold {name}, or its files are damaged. Set dataset.path to the "
            f"folder that holds {_source(name).base_folder}, or dataset.download=true"
        ) from error
    labels = np.array(content.targets, dtype=np.int64)
    return np.ascontiguousarray(content.data), labels, tuple(content.classes)


class Cifar(ImageDataset):
    """32×32 RGB images in one array per split, loaded once per process."""

    config: CifarConfig
    source_name: ClassVar[str]

    def __init__(self, config: CifarConfig) -> None:
        """Download the archive if it is wanted and missing: here, once, and not where the dataset is sent to.

        Raises:
            UserError: the download fails, or the files are missing or damaged.
        """
        self._path = os.path.abspath(os.path.expanduser(config.path))
        if config.download:
            source = _source(self.source_name)
            try:
                source(self._path, train=False, download=True)
            except (OSError, RuntimeError, EOFError, tarfile.TarError) as error:
                raise UserError(
                    f"dataset {config.name}: cannot download {source.url}: {error}. Put {source.filename} into "
                    f"{config.path} by hand, or set dataset.path to a folder that holds {source.base_folder}"
                ) from error
        super().__init__(config)

    def _own_class_names(self) -> Sequence[str]:
        return _load(self.source_name, self._path, False)[2]

    def _read_index(self, split: Split) -> SampleIndex:
        _, labels, _ = _load(self.source_name, self._path, split == "train")
        rows = np.arange(len(labels), dtype=np.int64)
        ids = np.array([f"{self.source_name}/{split}/{row:05d}" for row in rows])
        return SampleIndex(ids, labels, np.zeros(len(rows), dtype=np.int32), rows)

    def read(self, split: Split, index: SampleIndex) -> list[bytes | np.ndarray | UnreadableImageError]:
        """Return uint8 [32, 32, 3] per row."""
        return list(_load(self.source_name, self._path, split == "train")[0][index.row])

    def fingerprint(self, split: Split) -> str:
        # The names and MD5 sums that torchvision has checked the files against.
        source = _source(self.source_name)
        return digest([self.source_name, source.train_list if split == "train" else source.test_list])


@DATASETS.register("cifar10")
class Cifar10(Cifar):
    Config = Cifar10Config
    source_name = "cifar10"


@DATASETS.register("cifar100")
class Cifar100(Cifar):
    Config = Cifar100Config
    source_name = "cifar100"
