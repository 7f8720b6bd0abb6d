"""Train a semantic segmentation network and measure it."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.segmentation import FCN, LRASPP, DeepLabV3
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from torchvision.models.segmentation.fcn import FCNHead

from tmkd_ray import storage
from tmkd_ray.config.transfer import SegmentConfig
from tmkd_ray.downstream.annotated import sample_generator
from tmkd_ray.downstream.dense import DenseData, DenseKind, DenseMetrics, set_apart
from tmkd_ray.downstream.masks import (
    UNLABELLED,
    MaskData,
    random_crop,
    read_class_list,
    read_masks,
    scaled_pair,
)
from tmkd_ray.downstream.pyramid import FeatureMaps
from tmkd_ray.models import ImageClassifier
from tmkd_ray.settings import ImageStatistics
from tmkd_ray.teachers.pixels import Normalize
from tmkd_ray.training.task import StepOutput
from tmkd_ray.types import LossOutput

_LOW_STRIDE = 8
"""Of LR-ASPP's finer map (Howard et al. 2019, arXiv 1905.02244, section 6.4)."""


class SegmentationBackbone(nn.Module):
    """The maps that torchvision's heads ask for: `out` and `high` are the last one, `low` is a finer one."""

    def __init__(self, maps: FeatureMaps) -> None:
        super().__init__()
        self.maps = maps
        fine = [i for i, stride in enumerate(maps.strides[:-1]) if stride <= _LOW_STRIDE]
        self.low = fine[-1] if fine else 0
        self.low_channels, self.channels = maps.channels[self.low], maps.channels[-1]

    def forward(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        maps = self.maps(images_BCHW)
        return OrderedDict(out=maps[-1], high=maps[-1], low=maps[self.low])


class Segmenter(nn.Module):
    """uint8 images [B, 3, H, W] to logits [B, C, H, W]."""

    def __init__(
        self, maps: FeatureMaps, num_classes: int, head: str, mean: ImageStatistics, std: ImageStatistics
    ) -> None:
        super().__init__()
        backbone = SegmentationBackbone(maps)
        self.normalize = Normalize(mean, std)
        self.network: nn.Module
        if head == "lraspp":
            self.network = LRASPP(backbone, backbone.low_channels, backbone.channels, num_classes)
        elif head == "deeplabv3":
            self.network = DeepLabV3(backbone, DeepLabHead(backbone.channels, num_classes))
        else:
            self.network = FCN(backbone, FCNHead(backbone.channels, num_classes))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        logits: Tensor = self.network(self.normalize(images_BCHW))["out"]
        return logits


@dataclass
class SegmentationBatch:
    """Crops and their masks.

    Attributes:
        images: uint8 [B, 3, crop, crop]. labels: uint8 [B, crop, crop], 255: unlabelled.
        indices: int64 [B], positions in the training set.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor

    def to(self, device: torch.device) -> "SegmentationBatch":
        values = (self.images, self.labels, self.indices)
        return SegmentationBatch(*(value.to(device, non_blocking=True) for value in values))


class SegmentationModule(nn.Module):
    """A segmentation network and its loss: mean cross-entropy over the labelled pixels."""

    def __init__(self, segmenter: nn.Module) -> None:
        super().__init__()
        self.segmenter = segmenter

    def forward(self, batch: SegmentationBatch) -> StepOutput:
        logits = self.segmenter(batch.images)
        labels = batch.labels.long()
        total = F.cross_entropy(logits.float(), labels, ignore_index=UNLABELLED, reduction="sum")
        loss = total / (labels != UNLABELLED).sum().clamp(min=1)  # a crop may have no labelled pixel
        return StepOutput(LossOutput(loss, {"ce": loss}))


class Segmentation(DenseKind[SegmentConfig, MaskData]):
    """Semantic segmentation; the score is mIoU, what is found a confusion matrix.

    The network sees the image scaled to `image_size`; its logits are scaled back, so that every labelled pixel
    of the mask counts once.
    """

    @property
    def head(self) -> str:
        return self.config.head

    def read(self) -> DenseData[MaskData]:
        config = self.config
        root = storage.absolute(config.data)
        names = read_class_list(storage.join(root, config.classes))

        def read(split: str) -> MaskData:
            images, masks = (storage.join(root, folder, split) for folder in (config.images, config.masks))
            return read_masks(images, masks, names)

        train, test = read(config.train), read(config.test)
        if config.validation is None:
            train, validation = set_apart(train, config)
        else:
            validation = read(config.validation)
        return DenseData(train, validation, test)

    def build(self, model: ImageClassifier, num_classes: int) -> nn.Module:
        maps = FeatureMaps(model, self.config.output_stride)
        return Segmenter(maps, num_classes, self.config.head, self.mean, self.std)

    def module(self, network: nn.Module) -> nn.Module:
        return SegmentationModule(network)

    def batch(self, data: MaskData, positions: Sequence[int], epoch: int) -> SegmentationBatch:
        pairs = [self._augmented(data, position, epoch) for position in positions]
        return SegmentationBatch(
            torch.from_numpy(np.stack([image for image, _ in pairs])).permute(0, 3, 1, 2),
            torch.from_numpy(np.stack([mask for _, mask in pairs])),
            torch.tensor(positions, dtype=torch.int64),
        )

    def _augmented(self, data: MaskData, position: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return an image, uint8 [crop, crop, 3], and its mask, scaled, cropped and mirrored by chance."""
        config = self.config
        generator = sample_generator(config.training.seed, epoch, position)
        image, mask = data.read(position)
        scale = generator.uniform(config.min_scale, config.max_scale)
        image, mask = scaled_pair(image, mask, scale * config.image_size)
        fill = np.array([round(255 * value) for value in self.mean], np.uint8)
        image, mask = random_crop(image, mask, config.crop_size or config.image_size, generator, fill)
        if generator.random() < config.flip:
            image, mask = image[:, ::-1], mask[:, ::-1]
        return np.ascontiguousarray(image), np.ascontiguousarray(mask)

    def nothing(self, data: MaskData) -> np.ndarray:
        """Return int64 [C, C]: rows are labels, columns predictions."""
        return np.zeros((len(data.class_names),) * 2, np.int64)

    def look(
        self, networks: dict[str, nn.Module], data: MaskData, positions: Sequence[int], device: torch.device
    ) -> dict[str, np.ndarray]:
        pairs = [data.read(position) for position in positions]
        scaled = [scaled_pair(image, mask, self.config.image_size)[0] for image, mask in pairs]
        found = {name: self.nothing(data) for name in networks}
        for rows in _same_shape([image.shape for image, _ in pairs]):
            images = torch.from_numpy(np.stack([scaled[row] for row in rows])).to(device)
            masks = np.stack([pairs[row][1] for row in rows])
            for name, segmenter in networks.items():
                logits: Tensor = segmenter(images.permute(0, 3, 1, 2))
                logits = F.interpolate(logits.float(), masks.shape[1:], mode="bilinear", align_corners=False)
                found[name] += confusion_matrix(masks, logits.argmax(dim=1).cpu().numpy(), len(found[name]))
        return found

    def metrics(self, data: MaskData, found: np.ndarray) -> DenseMetrics:
        metrics = segmentation_metrics(found)
        figures: dict[str, float | None] = {
            "mIoU": metrics.mean_iou,
            "pixel accuracy": metrics.pixel_accuracy,
        }
        iou = dict(zip(data.class_names, metrics.iou, strict=True))
        return DenseMetrics(metrics.mean_iou, figures, {"iou": iou})


def _same_shape(shapes: list[tuple[int, ...]]) -> list[list[int]]:
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, shape in enumerate(shapes):
        groups.setdefault(shape, []).append(row)
    return list(groups.values())


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """Return int64 [C, C] over the labelled pixels: rows are labels, columns predictions."""
    counted = labels != UNLABELLED
    pairs = labels[counted].astype(np.int64) * num_classes + predicted[counted]
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


@dataclass(frozen=True)
class SegmentationMetrics:
    """What a segmentation is worth, all 0 to 1.

    Attributes:
        mean_iou: mean of `iou` over the classes that have one.
        pixel_accuracy: labelled pixels that are right.
        iou: of each class, intersection of labels and predictions over their union (Everingham et al. 2015);
            None for a class that is neither labelled nor predicted anywhere.
    """

    mean_iou: float
    pixel_accuracy: float
    iou: tuple[float | None, ...]


def segmentation_metrics(confusion_CC: np.ndarray) -> SegmentationMetrics:
    """Return the metrics of a confusion matrix; without a labelled pixel they are 0."""
    hits_C = np.diag(confusion_CC)
    union_C = confusion_CC.sum(axis=0) + confusion_CC.sum(axis=1) - hits_C
    iou = tuple(float(hit / size) if size else None for hit, size in zip(hits_C, union_C, strict=True))
    known = [value for value in iou if value is not None]
    if not known:
        return SegmentationMetrics(0.0, 0.0, iou)
    return SegmentationMetrics(sum(known) / len(known), float(hits_C.sum() / confusion_CC.sum()), iou)
