"""What predictions on labelled images add up to: sums over any parts of a split are those of the whole."""

from collections import Counter
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from torch import Tensor

Number = TypeVar("Number", int, float)

NUM_BINS = 15
"""Of the confidence, of equal width, as in Guo et al. 2017."""


@dataclass(frozen=True)
class Metrics:
    """What a classifier's predictions are worth.

    Attributes:
        accuracy, top5_accuracy: 0 to 1; with fewer than five classes the latter is 1.
        loss: mean cross-entropy, nats.
        per_class_accuracy: C values, 0 to 1; None for a class without images.
        ece: expected calibration error, 0 to 1: the mean gap between confidence and accuracy over `NUM_BINS`
            bins of the confidence (Guo et al. 2017, "On calibration of modern neural networks", arXiv
            1706.04599, eq. 3).
        agreement: how often the teacher's first class is the network's, 0 to 1. teacher_kl: mean
            KL(teacher ‖ network) at temperature 1, nats. Both None without a teacher.
    """

    accuracy: float
    top5_accuracy: float
    loss: float
    per_class_accuracy: tuple[float | None, ...]
    ece: float
    agreement: float | None
    teacher_kl: float | None


@dataclass(frozen=True, eq=False)
class Tally:
    """Sums over images; `a + b` is the tally of the images of both.

    Attributes:
        confusion: number of images by (label, predicted class), without the zeros: of many classes few pairs
            are ever met.
        top5_hits: images whose label is among the five largest logits.
        loss_sum: of the cross-entropy, nats.
        bin_counts, bin_hits: int64 [NUM_BINS], images in each bin of the confidence, which is the first
            class's probability, and those of them that are right.
        bin_confidences: float64 [NUM_BINS], sums.
        agreements, kl_sum: with a teacher's predictions; None without one.
    """

    num_classes: int
    confusion: Counter[tuple[int, int]]
    top5_hits: int
    loss_sum: float
    bin_counts: np.ndarray
    bin_hits: np.ndarray
    bin_confidences: np.ndarray
    agreements: int | None
    kl_sum: float | None

    @classmethod
    def of(cls, logits_BC: Tensor, labels_B: Tensor, teacher_logits_BC: Tensor | None = None) -> "Tally":
        """Count the predictions of a batch; probabilities are float64, whatever the logits are.

        Args:
            logits_BC: finite. labels_B: int64. teacher_logits_BC: of the same images. All on one device.
        """
        num_classes = logits_BC.shape[1]
        log_p_BC = logits_BC.double().log_softmax(dim=1)
        top_BK = _largest(logits_BC)
        predicted_B = top_BK[:, 0]
        hits_B = (predicted_B == labels_B).cpu().numpy()
        # Summed by NumPy, in the images' order: a GPU's sums depend on chance in the last bit.
        confidence_B = log_p_BC.gather(1, predicted_B[:, None])[:, 0].exp().cpu().numpy()
        loss_B = -log_p_BC.gather(1, labels_B[:, None])[:, 0].cpu().numpy()
        # Bin m holds the confidences in (m / NUM_BINS, (m + 1) / NUM_BINS].
        bins_B = np.searchsorted(np.arange(1, NUM_BINS) / NUM_BINS, confidence_B, side="left")
        agreements, kl_sum = None, None
        if teacher_logits_BC is not None:
            log_t_BC = teacher_logits_BC.double().log_softmax(dim=1)
            kl_B = (log_t_BC.exp() * (log_t_BC - log_p_BC)).sum(dim=1).cpu().numpy()
            agreements = int((_largest(teacher_logits_BC)[:, 0] == predicted_B).sum())
            kl_sum = float(kl_B.sum())
        return cls(
            num_classes=num_classes,
            confusion=Counter(zip(labels_B.tolist(), predicted_B.tolist(), strict=True)),
            top5_hits=int((top_BK == labels_B[:, None]).sum()),
            loss_sum=float(loss_B.sum()),
            bin_counts=np.bincount(bins_B, minlength=NUM_BINS),
            bin_hits=np.bincount(bins_B[hits_B], minlength=NUM_BINS),
            bin_confidences=np.bincount(bins_B, weights=confidence_B, minlength=NUM_BINS),
            agreements=agreements,
            kl_sum=kl_sum,
        )

    def __add__(self, other: "Tally") -> "Tally":
        assert self.num_classes == other.num_classes
        assert (self.kl_sum is None) == (other.kl_sum is None), "one with a teacher, one without"
        return Tally(
            num_classes=self.num_classes,
            confusion=self.confusion + other.confusion,
            top5_hits=self.top5_hits + other.top5_hits,
            loss_sum=self.loss_sum + other.loss_sum,
            bin_counts=self.bin_counts + other.bin_counts,
            bin_hits=self.bin_hits + other.bin_hits,
            bin_confidences=self.bin_confidences + other.bin_confidences,
            agreements=_plus(self.agreements, other.agreements),
            kl_sum=_plus(self.kl_sum, other.kl_sum),
        )

    @property
    def num_images(self) -> int:
        return self.confusion.total()

    def confusion_matrix(self) -> np.ndarray:
        """Return the confusion matrix, int64 [C, C]: rows are labels, columns predictions."""
        confusion_CC = np.zeros((self.num_classes, self.num_classes), dtype=np.int64)
        for pair, count in self.confusion.items():
            confusion_CC[pair] = count
        return confusion_CC

    def metrics(self) -> Metrics:
        """Return what the sums mean; there must be an image."""
        number = self.num_images
        assert number > 0, "no images"
        images_C, hits_C = [0] * self.num_classes, [0] * self.num_classes
        for (label, predicted), count in self.confusion.items():
            images_C[label] += count
            hits_C[label] += count if label == predicted else 0
        return Metrics(
            accuracy=sum(hits_C) / number,
            top5_accuracy=self.top5_hits / number,
            loss=self.loss_sum / number,
            per_class_accuracy=tuple(
                hits / images if images else None for hits, images in zip(hits_C, images_C, strict=True)
            ),
            ece=float(np.abs(self.bin_hits - self.bin_confidences).sum()) / number,
            agreement=None if self.agreements is None else self.agreements / number,
            # Never below zero; the sum of a teacher compared with itself may be, by rounding.
            teacher_kl=None if self.kl_sum is None else max(self.kl_sum, 0.0) / number,
        )


def _largest(logits_BC: Tensor) -> Tensor:
    """Return the classes of the five largest logits, [B, 5] or [B, C] where there are fewer."""
    return logits_BC.float().topk(min(5, logits_BC.shape[1]), dim=1).indices


def _plus(left: Number | None, right: Number | None) -> Number | None:
    return None if left is None or right is None else left + right
