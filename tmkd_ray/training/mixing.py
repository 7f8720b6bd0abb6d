"""Mixed training images: mixup and cutmix."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tmkd_ray.types import LossOutput


@dataclass
class Mixture:
    """What an image of a mixed batch is, besides itself.

    Attributes:
        labels: int64 [B], of the image that was mixed in.
        own_weight: share of the image itself, 0 to 1; the other's is the rest.
    """

    labels: Tensor
    own_weight: float


@dataclass(frozen=True)
class Mixing:
    """Mixes each image of a batch with another one of it.

    mixup blends two images, Zhang et al. 2018, "mixup: Beyond empirical risk minimization", arXiv 1710.09412;
    cutmix puts a box of one into the other, Yun et al. 2019, "CutMix: Regularization strategy to train strong
    classifiers with localizable features", arXiv 1905.04899. The share of an image is drawn from Beta(α, α),
    once a batch, by torch's global generators.

    Args:
        mixup, cutmix: α of each, 0 for none; where both are above zero a fair coin picks one for the batch.
    """

    mixup: float = 0.0
    cutmix: float = 0.0

    def __call__(self, images: Tensor, labels_B: Tensor) -> tuple[Tensor, Mixture]:
        """Return the mixed images, and what was mixed in.

        Args:
            images: float [B, 3, H, W]; they are left as they are.
        """
        assert self.mixup > 0 or self.cutmix > 0
        cuts = self.cutmix > 0 and (self.mixup == 0 or bool(torch.rand(()) < 0.5))
        alpha = self.cutmix if cuts else self.mixup
        own = float(torch.distributions.Beta(alpha, alpha).sample())
        partners_B = torch.randperm(len(labels_B), device=labels_B.device)
        if not cuts:
            return torch.lerp(images[partners_B], images, own), Mixture(labels_B[partners_B], own)
        height, width = images.shape[-2:]
        rows, columns = _cut_box(height, width, own)
        mixed = images.clone()
        mixed[..., rows, columns] = images[partners_B][..., rows, columns]
        # At the border the box is smaller than was drawn; the labels go by the pixels that were replaced.
        replaced = (rows.stop - rows.start) * (columns.stop - columns.start)
        return mixed, Mixture(labels_B[partners_B], 1.0 - replaced / (height * width))


def _cut_box(height: int, width: int, own: float) -> tuple[slice, slice]:
    """Return rows and columns of a box of `1 - own` of the image, centred anywhere in it, cut at its border."""
    side = math.sqrt(1.0 - own)

    def span(size: int) -> slice:
        length = int(size * side)
        first = int(torch.randint(size, ())) - length // 2
        return slice(max(first, 0), min(first + length, size))

    return span(height), span(width)


def mixed_loss(loss_of: Callable[[Tensor], LossOutput], labels_B: Tensor, mixture: Mixture) -> LossOutput:
    """Return the loss of a mixed batch: that of both labels, by their shares.

    Args:
        loss_of: labels to the loss, which must be linear in what is asked of each image, as cross-entropy is.
    """
    own, other = loss_of(labels_B), loss_of(mixture.labels)

    def mean(a: Tensor, b: Tensor) -> Tensor:
        return mixture.own_weight * a + (1.0 - mixture.own_weight) * b

    return LossOutput(
        mean(own.loss, other.loss), {name: mean(value, other.terms[name]) for name, value in own.terms.items()}
    )
