"""What image folders with annotations share: finding files, reading pixels, batches' order."""

import os
from collections.abc import Sequence

import cv2
import numpy as np

from tmkd_ray import storage
from tmkd_ray.datasets.base import digest
from tmkd_ray.datasets.decode import to_rgb
from tmkd_ray.datasets.splits import stratified_part
from tmkd_ray.errors import UnreadableImageError, UserError


def checked_relative(folder: str, name: str, source: str) -> str:
    """Return the path of a file below a folder.

    Raises:
        UserError: `name`, which stands in `source`, leads out of the folder, by itself or through a link.
    """
    parts = name.replace("\\", "/").split("/")
    if (
        not name
        or "\0" in name
        or "://" in name
        or name.startswith(("/", "~"))
        or ".." in parts
        or ":" in parts[0]
    ):
        raise UserError(f"{source}: the file name {name!r} leads out of the image folder {folder}")
    path = storage.join(folder, name)
    if "://" not in folder and os.path.islink(path):
        root, target = os.path.realpath(folder), os.path.realpath(path)
        if os.path.commonpath([root, target]) != root:
            raise UserError(f"{source}: {name!r} is a link that leads out of the image folder {folder}")
    return path


def check_files(folder: str, names: Sequence[str], source: str) -> None:
    """Check that the files are there, by listing each folder once.

    Raises:
        UserError: some are missing; names the first of them and `source`, where they are asked for.
    """
    folders = {name.rpartition("/")[0] for name in names}
    there = {
        parent: set(storage.sizes(storage.join(folder, parent) if parent else folder)) for parent in folders
    }
    missing = [name for name in names if name.rpartition("/")[2] not in there[name.rpartition("/")[0]]]
    if missing:
        shown = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
        raise UserError(f"{source}: {len(missing)} of {len(names)} files are not in {folder}: {shown}")


def read_image(path: str) -> np.ndarray:
    """Return an image, uint8 [H, W, 3].

    Raises:
        UserError: it cannot be read or decoded; names the file.
    """
    try:
        return to_rgb(storage.read_bytes(path))
    except UnreadableImageError as error:
        raise UserError(f"{path}: {error}") from error


def resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return an image scaled: means over areas when shrinking, bilinear when growing."""
    if image.shape[:2] == (height, width):
        return image
    shrinks = height * width < image.shape[0] * image.shape[1]
    scaled: np.ndarray = cv2.resize(
        image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    )
    return scaled


def files_digest(folder: str) -> str:
    """Return what tells the files directly in a folder from others: their names and sizes."""
    return digest(storage.sizes(folder))


def validation_part(names: Sequence[str], fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions of the training and of the validation images, by the hash of their names.

    Raises:
        UserError: there are fewer than two images.
    """
    if len(names) < 2:
        raise UserError(f"{len(names)} training images; at least two are needed, one to choose the epoch on")
    zeros = np.zeros(len(names), np.int64)
    chosen = stratified_part(np.array(names), zeros, fraction, seed, "validation")
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def sample_generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    """Return the generator of one image's augmentation in one epoch."""
    return np.random.default_rng([seed, epoch, index])
