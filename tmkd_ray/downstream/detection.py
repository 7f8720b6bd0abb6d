"""Train a detector and use it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tmkd_ray import storage
from tmkd_ray.config.transfer import DetectConfig
from tmkd_ray.downstream.annotated import resized, sample_generator
from tmkd_ray.downstream.coco import CocoData, CocoImage, Detections, average_precision, read_coco
from tmkd_ray.downstream.dense import DenseData, DenseKind, DenseMetrics, set_apart
from tmkd_ray.downstream.detectors import build_detector
from tmkd_ray.downstream.pyramid import FeatureMaps
from tmkd_ray.errors import UserError
from tmkd_ray.models import ImageClassifier
from tmkd_ray.progress import say
from tmkd_ray.training.task import StepOutput
from tmkd_ray.types import LossOutput


@dataclass
class DetectionBatch:
    """Images in the upper left corner of squares, and their boxes.

    Attributes:
        images: uint8 [B, 3, image_size, image_size], zero beyond the image.
        sizes: int64 [B, 2], height and width of the image.
        boxes: float32 [B, M, 4], x1 y1 x2 y2 in pixels. labels: int64 [B, M]; -1: no box.
        indices: int64 [B], positions in the training set.
    """

    images: Tensor
    sizes: Tensor
    boxes: Tensor
    labels: Tensor
    indices: Tensor

    def to(self, device: torch.device) -> "DetectionBatch":
        values = (self.images, self.sizes, self.boxes, self.labels, self.indices)
        return DetectionBatch(*(value.to(device, non_blocking=True) for value in values))


def make_batch(
    data: CocoData, positions: Sequence[int], image_size: int, flips: Sequence[bool]
) -> DetectionBatch:
    """Read images, scale their longer side to `image_size`, mirror those that are to be.

    Boxes around crowds are left out.
    """
    images = np.zeros((len(positions), image_size, image_size, 3), np.uint8)
    sizes = np.zeros((len(positions), 2), np.int64)
    most = max(int((~data.images[position].crowd).sum()) for position in positions)
    boxes = np.zeros((len(positions), most, 4), np.float32)
    labels = np.full((len(positions), most), -1, np.int64)
    for row, (position, flip) in enumerate(zip(positions, flips, strict=True)):
        image = data.images[position]
        height, width = scaled_size(image.height, image.width, image_size)
        pixels = resized(data.read(position), height, width)
        kept = ~image.crowd
        scaled = image.boxes[kept] * np.array([width / image.width, height / image.height] * 2, np.float32)
        if flip:
            pixels = pixels[:, ::-1]
            scaled = np.stack([width - scaled[:, 2], scaled[:, 1], width - scaled[:, 0], scaled[:, 3]], axis=1)
        images[row, :height, :width] = pixels
        sizes[row] = height, width
        boxes[row, : len(scaled)] = scaled
        labels[row, : len(scaled)] = image.labels[kept]
    return DetectionBatch(
        torch.from_numpy(images).permute(0, 3, 1, 2),
        torch.from_numpy(sizes),
        torch.from_numpy(boxes),
        torch.from_numpy(labels),
        torch.tensor(positions, dtype=torch.int64),
    )


def scaled_size(height: int, width: int, longer: int) -> tuple[int, int]:
    """Return height and width with the longer side scaled to `longer`, rounded, one pixel at least."""
    scale = longer / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


class DetectionModule(nn.Module):
    """A detector and its losses."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, batch: DetectionBatch) -> StepOutput:
        targets = [
            {"boxes": boxes[labels >= 0], "labels": labels[labels >= 0] + 1}  # 0 is the background
            for boxes, labels in zip(batch.boxes, batch.labels, strict=True)
        ]
        terms: dict[str, Tensor] = self.detector(crop_images(batch), targets)
        return StepOutput(LossOutput(torch.stack(list(terms.values())).sum(), terms))


def crop_images(batch: DetectionBatch) -> list[Tensor]:
    """Return the images of a batch in [0, 1], each of its own size."""
    sizes: list[list[int]] = batch.sizes.tolist()
    return [image[:, :h, :w].float() / 255 for image, (h, w) in zip(batch.images, sizes, strict=True)]


class Detection(DenseKind[DetectConfig, CocoData]):
    """Object detection; the score is mAP, what is found a list of Detections."""

    @property
    def head(self) -> str:
        return self.config.detector

    def read(self) -> DenseData[CocoData]:
        config = self.config
        train, test = self._read(config.train, None), self._read(config.test, config.test_images)
        if config.validation is None:
            train, validation = set_apart(train, config)
        else:
            validation = self._read(config.validation, config.validation_images)
        for data in (validation, test):
            if data.class_names != train.class_names:
                names, wanted = ", ".join(data.class_names), ", ".join(train.class_names)
                raise UserError(
                    f"{data.source} has other categories than {train.source}: {names} and {wanted}, in the "
                    "order of their ids"
                )
        if not any(len(image.boxes) for image in train.images):
            raise UserError(f"{train.source} has no boxes")
        return DenseData(train, validation, test)

    def _read(self, name: str, images: str | None) -> CocoData:
        root = storage.absolute(self.config.data)
        folder = storage.join(root, self.config.images if images is None else images)
        data = read_coco(storage.join(root, name), folder, self.config.bad_boxes)
        if data.num_dropped:
            say(f"{data.source}: {data.num_dropped} boxes without area or beyond their image are left out")
        return data

    def build(self, model: ImageClassifier, num_classes: int) -> nn.Module:
        return build_detector(FeatureMaps(model), num_classes, self.config, self.mean, self.std)

    def module(self, network: nn.Module) -> nn.Module:
        return DetectionModule(network)

    def batch(self, data: CocoData, positions: Sequence[int], epoch: int) -> DetectionBatch:
        seed = self.config.training.seed
        flips = [
            bool(sample_generator(seed, epoch, position).random() < self.config.flip) for position in positions
        ]
        return make_batch(data, positions, self.config.image_size, flips)

    def nothing(self, data: CocoData) -> list[Detections]:
        return []

    def look(
        self, networks: dict[str, nn.Module], data: CocoData, positions: Sequence[int], device: torch.device
    ) -> dict[str, list[Detections]]:
        batch = make_batch(data, positions, self.config.image_size, [False] * len(positions)).to(device)
        found = {}
        for name, detector in networks.items():
            outputs: list[dict[str, Tensor]] = detector(crop_images(batch))
            sizes: list[list[int]] = batch.sizes.tolist()
            found[name] = [
                _in_own_pixels(data.images[position], size, output)
                for position, size, output in zip(positions, sizes, outputs, strict=True)
            ]
        return found

    def metrics(self, data: CocoData, found: list[Detections]) -> DenseMetrics:
        figures = average_precision(data, found)
        return DenseMetrics(figures["mAP"] or 0.0, figures)


def _in_own_pixels(image: CocoImage, size: list[int], output: dict[str, Tensor]) -> Detections:
    scale = np.array([image.width / size[1], image.height / size[0]] * 2)
    return Detections(
        image.id,
        output["boxes"].float().cpu().numpy() * scale,
        output["labels"].cpu().numpy() - 1,
        output["scores"].float().cpu().numpy(),
    )
