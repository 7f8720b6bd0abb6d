"""A downstream task, opened: which networks are compared, and how they see images."""

from dataclasses import dataclass

from tmkd_ray import storage
from tmkd_ray.config.transfer import ClassificationConfig, TransferConfig
from tmkd_ray.datasets.base import IMAGENET_MEAN, IMAGENET_STD
from tmkd_ray.downstream.student import StudentSource, build_student, find_student
from tmkd_ray.models import ImageClassifier
from tmkd_ray.settings import ImageStatistics

STUDENT, BASELINE, RANDOM = "student", "baseline weights", "random weights"
"""What the rows of the table are called."""


@dataclass(frozen=True)
class Opened:
    """A downstream task, checked: which networks, and how they see images.

    Attributes:
        weights: checkpoint by row of the table; None: random.
        folder: for the results.
    """

    config: TransferConfig
    source: StudentSource
    weights: dict[str, str | None]
    mean: ImageStatistics
    std: ImageStatistics
    folder: str

    def build(self, row: str, image_size: int, seed: int = 0) -> ImageClassifier:
        """Return the network of a row; random weights are a function of `seed`."""
        return build_student(self.source.model, image_size, self.weights[row], seed)


def open_transfer(config: TransferConfig) -> Opened:
    """Find the student and say how it sees images.

    Raises:
        UserError: there is no student, or no saying what it is.
    """
    source = find_student(config.student, config.model)
    weights: dict[str, str | None] = {STUDENT: source.checkpoint}
    if config.baseline is not None:
        weights[BASELINE] = storage.absolute(config.baseline)
    if config.random_baseline:
        weights[RANDOM] = None
    fallback: tuple[ImageStatistics, ImageStatistics] = (IMAGENET_MEAN, IMAGENET_STD)
    if isinstance(config, ClassificationConfig):
        fallback = config.dataset.mean, config.dataset.std
    folder = storage.join(storage.absolute(config.output), config.folder_name)
    return Opened(
        config,
        source,
        weights,
        config.mean or source.mean or fallback[0],
        config.std or source.std or fallback[1],
        folder,
    )
