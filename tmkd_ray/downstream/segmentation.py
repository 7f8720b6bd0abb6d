"""Train a semantic segmentation network and measure it."""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.segmentation import FCN, LRASPP, DeepLabV3
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from torchvision.models.segmentation.fcn import FCNHead

from tmkd_ray.config.transfer import SegmentConfig
from tmkd_ray.downstream.annotated import sample_generator
from tmkd_ray.downstream.masks import UNLABELLED, MaskData, random_crop, scaled_pair
from tmkd_ray.downstream.pyramid import FeatureMaps
from tmkd_ray.settings import ImageStatistics
from tmkd_ray.teachers.pixels import Normalize
from tmkd_ray.training.context import WorkerContext
from tmkd_ray.training.loader import epoch_order, worker_batches
from tmkd_ray.training.prefetch import prefetched
from tmkd_ray.training.task import StepOutput, TrainTask
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


class SegmentationModule(nn.Module):
    """A segmentation network and its loss: mean cross-entropy over the labelled pixels."""

    def __init__(self, segmenter: Segmenter) -> None:
        super().__init__()
        self.segmenter = segmenter

    def forward(self, batch: SegmentationBatch) -> StepOutput:
        logits = self.segmenter(batch.images)
        labels = batch.labels.long()
        total = F.cross_entropy(logits.float(), labels, ignore_index=UNLABELLED, reduction="sum")
        loss = total / (labels != UNLABELLED).sum().clamp(min=1)  # a crop may have no labelled pixel
        return StepOutput(LossOutput(loss, {"ce": loss}))


class SegmentationTask(TrainTask):
    """A segmentation network in training. The epoch to keep has the best mIoU on the validation images."""

    def __init__(
        self,
        segmenter: Segmenter,
        train: MaskData,
        validation: MaskData,
        config: SegmentConfig,
        mean: ImageStatistics,
    ) -> None:
        self.module: SegmentationModule = SegmentationModule(segmenter)
        self.train, self.validation, self.config = train, validation, config
        self.fill = np.array([round(255 * value) for value in mean], np.uint8)
        self.num_samples = len(train)
        cv2.setNumThreads(1)  # the workers are the parallelism

    def batches(self, epoch: int, context: WorkerContext, first_step: int = 0) -> Iterator[SegmentationBatch]:
        training = self.config.training
        order_N = epoch_order(self.num_samples, training.seed, epoch)

        def read() -> Iterator[SegmentationBatch]:
            for chosen_B in worker_batches(
                order_N, training.batch_size, context.rank, context.world_size, first_step
            ):
                pairs = [self.augmented(position, epoch) for position in chosen_B.tolist()]
                images = torch.from_numpy(np.stack([image for image, _ in pairs])).permute(0, 3, 1, 2)
                yield SegmentationBatch(
                    images, torch.from_numpy(np.stack([mask for _, mask in pairs])), chosen_B
                )

        for batch in prefetched(read()):
            yield SegmentationBatch(
                *(value.to(context.device) for value in (batch.images, batch.labels, batch.indices))
            )

    def augmented(self, position: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return an image, uint8 [crop, crop, 3], and its mask, scaled, cropped and mirrored by chance."""
        config = self.config
        generator = sample_generator(config.training.seed, epoch, position)
        image, mask = self.train.read(position)
        scale = generator.uniform(config.min_scale, config.max_scale)
        image, mask = scaled_pair(image, mask, scale * config.image_size)
        image, mask = random_crop(image, mask, config.crop_size or config.image_size, generator, self.fill)
        if generator.random() < config.flip:
            image, mask = image[:, ::-1], mask[:, ::-1]
        return np.ascontiguousarray(image), np.ascontiguousarray(mask)

    def sample_ids(self, indices_B: Tensor) -> list[str]:
        return [self.train.image_paths[index] for index in indices_B.tolist()]

    def validate(self, context: WorkerContext) -> dict[str, float]:
        meter = ConfusionMeter({"": self.module.segmenter}, self.validation, self.config)
        meter.device = context.device
        mine = np.arange(context.rank, len(self.validation), context.world_size)
        confusion_CC = context.reduce_sum(torch.from_numpy(meter(mine)[""]).to(context.device))
        metrics = segmentation_metrics(confusion_CC.cpu().numpy())
        return {"accuracy": metrics.mean_iou, "pixel_accuracy": metrics.pixel_accuracy}

    @property
    def kept(self) -> nn.Module:
        return self.module.segmenter


class ConfusionMeter:
    """Confusion matrices of segmentation networks on images; pickles, to be sent to workers.

    The network sees the image scaled to `image_size`; its logits are scaled back, so that every labelled pixel
    of the mask counts once.

    Args:
        segmenters: by name.
    """

    def __init__(self, segmenters: dict[str, Segmenter], data: MaskData, config: SegmentConfig) -> None:
        self.segmenters, self.data, self.config = segmenters, data, config
        self.device = torch.device("cpu")

    def __len__(self) -> int:
        return len(self.data)

    def to(self, device: str | torch.device) -> "ConfusionMeter":
        """Move the networks; called once, by the worker that runs them."""
        self.device = torch.device(device)
        for segmenter in self.segmenters.values():
            segmenter.to(self.device).eval()
        cv2.setNumThreads(1)
        return self

    @torch.no_grad()
    def __call__(self, positions: np.ndarray) -> dict[str, np.ndarray]:
        """Return each network's int64 [C, C] over these images: rows are labels, columns predictions."""
        number = len(self.data.class_names)
        sums = {name: np.zeros((number, number), np.int64) for name in self.segmenters}
        step = self.config.training.evaluation_batch_size
        for start in range(0, len(positions), step):
            pairs = [self.data.read(int(position)) for position in positions[start : start + step]]
            scaled = [scaled_pair(image, mask, self.config.image_size)[0] for image, mask in pairs]
            for rows in _same_shape([image.shape for image, _ in pairs]):
                images = torch.from_numpy(np.stack([scaled[row] for row in rows])).to(self.device)
                masks = np.stack([pairs[row][1] for row in rows])
                for name, segmenter in self.segmenters.items():
                    logits = segmenter(images.permute(0, 3, 1, 2))
                    logits = F.interpolate(
                        logits.float(), masks.shape[1:], mode="bilinear", align_corners=False
                    )
                    sums[name] += confusion_matrix(masks, logits.argmax(dim=1).cpu().numpy(), number)
        return sums


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
