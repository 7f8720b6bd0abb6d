"""Handwritten digits that come with scikit-learn: real data for demos and tests, without a download.

1,797 grey images of 8×8 pixels (Alpaydin and Kaynak 1998, "Optical recognition of handwritten digits", UCI).
"""

import functools
import hashlib
from collections.abc import Sequence

import numpy as np

from tmkd_ray.datasets import DATASETS
from tmkd_ray.datasets.base import DatasetConfig, ImageDataset, SampleIndex, Split
from tmkd_ray.datasets.decode import resize_to_square, to_rgb
from tmkd_ray.datasets.splits import stratified_part
from tmkd_ray.errors import UnreadableImageError
from tmkd_ray.settings import ImageStatistics

CLASS_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEST_FRACTION = 0.25
TEST_SEED = 0


class DigitsConfig(DatasetConfig):
    """`mean` and `std` are those of the training images at 32 pixels."""

    name: str = "digits"
    mean: ImageStatistics = (0.309, 0.309, 0.309)
    std: ImageStatistics = (0.349, 0.349, 0.349)


@functools.cache
def _load() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return uint8 [1797, 8, 8] pixels, int64 [1797] labels, unicode [1797] ids."""
    from sklearn.datasets import load_digits  # here, because the import takes a second

    content = load_digits()
    pixels = np.floor(content.images * (255 / 16) + 0.5).astype(np.uint8)
    ids = np.array([f"digits/{row:04d}" for row in range(len(pixels))])
    return pixels, content.target.astype(np.int64), ids


@DATASETS.register("digits")
class Digits(ImageDataset):
    """A quarter of each class, always the same one, is the test split."""

    Config = DigitsConfig

    def _own_class_names(self) -> Sequence[str]:
        return CLASS_NAMES

    def _read_index(self, split: Split) -> SampleIndex:
        _, labels, ids = _load()
        is_test = stratified_part(ids, labels, TEST_FRACTION, TEST_SEED, "test")
        rows = np.flatnonzero(is_test == (split == "test"))
        return SampleIndex(ids[rows], labels[rows], np.zeros(len(rows), dtype=np.int32), rows.astype(np.int64))

    def read(self, split: Split, index: SampleIndex) -> list[bytes | np.ndarray | UnreadableImageError]:
        """Return uint8 [image_size, image_size, 3] per row."""
        pixels, _, _ = _load()
        return [resize_to_square(to_rgb(pixels[row]), self.config.image_size) for row in index.row]

    def fingerprint(self, split: Split) -> str:
        pixels, labels, _ = _load()
        rows = self._read_index(split).row
        return hashlib.sha256(pixels[rows].tobytes() + labels[rows].astype("<i8").tobytes()).hexdigest()
