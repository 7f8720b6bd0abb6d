"""Where images and class names come from, one kind of source a file."""

from tmkd_ray.datasets.base import DatasetConfig, ImageDataset, SampleIndex, Split
from tmkd_ray.registry import Registry, import_submodules

DATASETS: Registry[type[ImageDataset]] = Registry("dataset")


def build_dataset(config: DatasetConfig) -> ImageDataset:
    """Return the dataset that `config` names.

    Raises:
        UserError: the data is not there, or its class names are missing or wrong.
    """
    return DATASETS.get(config.name)(config)


import_submodules(__name__, __path__)

__all__ = ["DATASETS", "DatasetConfig", "ImageDataset", "SampleIndex", "Split", "build_dataset"]
