"""Train a detector and use it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from tmkd_ray.config.transfer import DetectConfig
from tmkd_ray.downstream.annotated import resized, sample_generator
from tmkd_ray.downstream.coco import CocoData, Detections, average_precision
from tmkd_ray.training.context import WorkerContext
from tmkd_ray.training.loader import epoch_order, worker_batches
from tmkd_ray.training.prefetch import prefetched
from tmkd_ray.training.task import StepOutput, TrainTask
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


class DetectionTask(TrainTask):
    """A detector in training. The epoch to keep has the best mAP on the validation images."""

    def __init__(
        self, detector: nn.Module, train: CocoData, validation: CocoData, config: DetectConfig
    ) -> None:
        self.module: DetectionModule = DetectionModule(detector)
        self.train, self.validation, self.config = train, validation, config
        self.num_samples = len(train)
        cv2.setNumThreads(1)  # the workers are the parallelism

    def batches(self, epoch: int, context: WorkerContext, first_step: int = 0) -> Iterator[DetectionBatch]:
        training = self.config.training
        order_N = epoch_order(self.num_samples, training.seed, epoch)

        def read() -> Iterator[DetectionBatch]:
            for chosen_B in worker_batches(
                order_N, training.batch_size, context.rank, context.world_size, first_step
            ):
                positions: list[int] = chosen_B.tolist()
                flips = [
                    bool(sample_generator(training.seed, epoch, position).random() < self.config.flip)
                    for position in positions
                ]
                yield make_batch(self.train, positions, self.config.image_size, flips)

        for batch in prefetched(read()):
            yield batch.to(context.device)

    def sample_ids(self, indices_B: Tensor) -> list[str]:
        return [self.train.images[index].path for index in indices_B.tolist()]

    def validate(self, context: WorkerContext) -> dict[str, float]:
        predictor = DetectionPredictor({"": self.module.detector}, self.validation, self.config)
        predictor.device = context.device
        mine = np.arange(context.rank, len(self.validation), context.world_size)
        parts = context.gather(predictor(mine)[""])
        metrics = average_precision(self.validation, [found for part in parts for found in part])
        return {"accuracy": metrics["mAP"] or 0.0}

    @property
    def kept(self) -> nn.Module:
        return self.module.detector


class DetectionPredictor:
    """What detectors find on images; pickles, to be sent to workers.

    Args:
        detectors: by name.
    """

    def __init__(self, detectors: dict[str, nn.Module], data: CocoData, config: DetectConfig) -> None:
        self.detectors, self.data, self.config = detectors, data, config
        self.device = torch.device("cpu")

    def __len__(self) -> int:
        return len(self.data)

    def to(self, device: str | torch.device) -> "DetectionPredictor":
        """Move the detectors; called once, by the worker that runs them."""
        self.device = torch.device(device)
        for detector in self.detectors.values():
            detector.to(self.device).eval()
        cv2.setNumThreads(1)
        return self

    @torch.no_grad()
    def __call__(self, positions: np.ndarray) -> dict[str, list[Detections]]:
        """Return what each detector finds on the images at these positions, in their order."""
        found: dict[str, list[Detections]] = {name: [] for name in self.detectors}
        step = self.config.training.evaluation_batch_size
        for start in range(0, len(positions), step):
            chosen: list[int] = positions[start : start + step].tolist()
            batch = make_batch(self.data, chosen, self.config.image_size, [False] * len(chosen)).to(self.device)
            for name, detector in self.detectors.items():
                outputs: list[dict[str, Tensor]] = detector(crop_images(batch))
                for position, size, output in zip(chosen, batch.sizes.tolist(), outputs, strict=True):
                    found[name].append(self._in_own_pixels(position, size, output))
        return found

    def _in_own_pixels(self, position: int, size: list[int], output: dict[str, Tensor]) -> Detections:
        image = self.data.images[position]
        scale = np.array([image.width / size[1], image.height / size[0]] * 2)
        return Detections(
            image.id,
            output["boxes"].float().cpu().numpy() * scale,
            output["labels"].cpu().numpy() - 1,
            output["scores"].float().cpu().numpy(),
        )
