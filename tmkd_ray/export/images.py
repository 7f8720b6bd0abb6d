"""Images to check, calibrate and predict with: files of one's own, or a dataset's."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tmkd_ray import storage
from tmkd_ray.config import ExperimentConfig
from tmkd_ray.datasets import build_dataset
from tmkd_ray.datasets.base import SampleIndex
from tmkd_ray.datasets.decode import LoadedImages, SetAside, load_images, resize_to_square, to_rgb
from tmkd_ray.datasets.splits import split_train
from tmkd_ray.errors import UnreadableImageError, UserError

IMAGE_SUFFIXES = (
    ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp",
)  # fmt: skip
"""What counts as an image in a folder; a file that is named is read whatever its suffix."""


@dataclass(frozen=True)
class ReadImages:
    """Decoded files.

    Attributes:
        images: uint8 [N, size, size, 3]. paths: N. set_aside: files that could not be decoded.
    """

    images: np.ndarray
    paths: list[str]
    set_aside: list[SetAside]


def list_images(paths: Sequence[str]) -> list[str]:
    """Return the files named, and those with an image's suffix in the folders named and below, sorted in each.

    Raises:
        UserError: a path does not exist, or a folder holds no image.
    """
    found: list[str] = []
    for path in paths:
        expanded = storage.absolute(path)
        if os.path.isdir(expanded):
            inside = [
                os.path.join(folder, name)
                for folder, _, names in os.walk(expanded)
                for name in names
                if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")
            ]
            if not inside:
                raise UserError(f"{path}: the folder holds no image ({' '.join(IMAGE_SUFFIXES)})")
            found += sorted(inside)
        elif "://" in expanded or os.path.exists(expanded):
            found.append(expanded)
        else:
            raise UserError(f"there is no file or folder {path}")
    return found


def read_images(paths: Sequence[str], size: int) -> ReadImages:
    """Decode files as the datasets do; what cannot be decoded is set aside.

    Raises:
        UserError: not one can be decoded, or a file cannot be read.
    """
    read = decode_files(paths, size)
    if not read.paths:
        raise none_decoded(read.set_aside)
    return read


def none_decoded(set_aside: Sequence[SetAside]) -> UserError:
    """Return the error for files of which not one can be decoded."""
    first = set_aside[0]
    return UserError(
        f"none of the {len(set_aside)} files can be decoded; the first, {first.id}: {first.reason}"
    )


def decode_files(paths: Sequence[str], size: int) -> ReadImages:
    """Decode files, of which none may be an image; raises as `read_images` where one cannot be read."""
    images, good, set_aside = [np.empty((0, size, size, 3), dtype=np.uint8)], [], []
    for path in paths:
        try:
            images.append(resize_to_square(to_rgb(storage.read_bytes(path)), size)[None])
            good.append(path)
        except UnreadableImageError as error:
            set_aside.append(SetAside(path, str(error)))
    return ReadImages(np.concatenate(images), good, set_aside)


def dataset_images(config: ExperimentConfig, part: str, most: int | None = None, seed: int = 0) -> LoadedImages:
    """Load a run's `train` or `validation` images, or `most` of them drawn at random.

    Raises:
        UserError: the data is not there any more.
    """
    dataset = build_dataset(config.dataset)
    train, validation = split_train(
        dataset.index("train"), config.dataset.validation_fraction, config.dataset.split_seed
    )
    index: SampleIndex = train if part == "train" else validation
    if most is not None and len(index) > most:
        chosen = np.random.default_rng(seed).choice(len(index), most, replace=False)
        index = index.take(np.sort(chosen))
    return load_images(dataset, "train", index)
