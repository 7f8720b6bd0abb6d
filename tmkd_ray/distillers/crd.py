"""CRD: Tian, Krishnan, Isola 2020, "Contrastive representation distillation", ICLR, arXiv 1910.10699."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from tmkd_ray.distillers import STRATEGIES
from tmkd_ray.distillers.base import DistillationSpec, Strategy, StrategyConfig
from tmkd_ray.losses import gather_from_workers
from tmkd_ray.types import LossOutput, ModelOutput, TeacherOutput

_UNSEEN = -1


class CRDConfig(StrategyConfig):
    """The paper's values. Its weight on CIFAR-100 is kd_weight 0.8 beside cross-entropy of weight 1.

    The banks take `8 x embedding_width` bytes a training image, in memory and in every checkpoint: 51 MB for
    CIFAR-100, 1.3 GB for ImageNet.
    """

    name: str = "crd"
    embedding_width: int = Field(default=128, ge=1)
    num_negatives: int = Field(default=16_384, ge=1)
    temperature: float = Field(default=0.07, gt=0)
    momentum: float = Field(default=0.5, ge=0, lt=1, description="of the rows of the banks")


def contrastive_nce(
    positive_B: Tensor, negative_BK: Tensor, is_negative_BK: Tensor, num_samples: int, log_normalizer: Tensor
) -> Tensor:
    """Return noise-contrastive estimation's loss, summed over candidates and averaged over the batch.

    With `P(x) = exp(x) / Z` and the paper's critic `h(x) = P(x) / (P(x) + K/N)` it is
    `-log h(positive) - K E[log(1 - h(negative))]`. Z is not in the paper but in the authors' code, after
    instance discrimination (Wu et al. 2018, arXiv 1805.01978).

    Args:
        positive_B, negative_BK: similarities over the temperature.
        is_negative_BK: which candidates count; the expectation is over those.
        num_samples: N, of the training set.
        log_normalizer: log Z.
    """
    count = negative_BK.shape[1]
    # P / (P + K/N) is the sigmoid of log P - log(K/N): exact however large or small P is.
    offset = log_normalizer + math.log(count / num_samples)
    rejected_BK = F.logsigmoid(offset - negative_BK).masked_fill(~is_negative_BK, 0.0)
    rejected_B = count * rejected_BK.sum(dim=1) / is_negative_BK.sum(dim=1).clamp(min=1)
    return -(F.logsigmoid(positive_B - offset) + rejected_B).mean()


@dataclass
class _Seen:
    """What `after_step` keeps of the batch that `forward` saw last.

    Attributes:
        student, teacher: embeddings [B, W]. labels: [B]. log_normalizers: [2].
    """

    student: Tensor
    teacher: Tensor
    labels: Tensor
    log_normalizers: Tensor


@STRATEGIES.register("crd")
class CRD(Strategy):
    """Contrasts student and teacher embeddings of one image with those of images of other classes.

    Both features are embedded by a learned linear layer and normalised. The student's embedding is the anchor
    among the teacher's bank, and the teacher's among the student's. The positive is the current pair, as in
    the paper's equations (in the authors' code it is the image's row of the bank). The negatives are drawn
    from banks of past embeddings, one row a training image, evenly among the images of other classes; an image
    not seen yet has a random row and counts as of another class. When an image was seen, its row becomes
    `momentum` of itself and the rest of the new embedding, normalised. Z of each side is estimated from the
    first batch and kept.

    What is drawn depends on the step alone: all workers draw for the global batch and keep their own part.
    """

    Config = CRDConfig
    requires = frozenset({"feature"})
    student_bank: Tensor
    teacher_bank: Tensor
    bank_labels: Tensor
    log_normalizers: Tensor

    def __init__(self, config: CRDConfig, spec: DistillationSpec) -> None:
        super().__init__(config, spec)
        assert spec.teacher_width is not None
        assert spec.num_samples is not None
        self.config = config
        self.student_embedding = nn.Linear(spec.student_width, config.embedding_width)
        self.teacher_embedding = nn.Linear(spec.teacher_width, config.embedding_width)
        for name in ("student_bank", "teacher_bank"):
            rows = torch.randn(spec.num_samples, config.embedding_width)
            self.register_buffer(name, F.normalize(rows, dim=1))
        self.register_buffer("bank_labels", torch.full((spec.num_samples,), _UNSEEN))
        self.register_buffer("log_normalizers", torch.zeros(2))
        self.step = 0
        self._seen: _Seen | None = None

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.step)

    def set_extra_state(self, state: Tensor) -> None:
        self.step = int(state)

    def forward(self, student: ModelOutput, teacher: TeacherOutput, labels_B: Tensor) -> LossOutput:
        with torch.autocast(student.feature.device.type, enabled=False):
            student_BW = F.normalize(self.student_embedding(student.feature.float()), dim=1)
            teacher_BW = F.normalize(self.teacher_embedding(teacher.feature.float()), dim=1)
            drawn_BK = self._draw(labels_B)
            is_negative_BK = self.bank_labels[drawn_BK] != labels_B[:, None]
            positive_B = (student_BW * teacher_BW).sum(dim=1) / self.config.temperature
            # All similarities, then a selection of them: far fewer bytes than K embeddings for each sample.
            negatives = [
                (anchor_BW @ bank.T / self.config.temperature).gather(1, drawn_BK)
                for anchor_BW, bank in ((student_BW, self.teacher_bank), (teacher_BW, self.student_bank))
            ]
            log_normalizers = self.log_normalizers
            if self.step == 0:
                log_normalizers = self._estimate_normalizers(negatives)
            by_student, by_teacher = (
                contrastive_nce(positive_B, negative_BK, is_negative_BK, len(self.bank_labels), log_normalizer)
                for negative_BK, log_normalizer in zip(negatives, log_normalizers, strict=True)
            )
        self._seen = _Seen(student_BW.detach(), teacher_BW.detach(), labels_B, log_normalizers)
        return LossOutput(by_student + by_teacher, {"student_anchor": by_student, "teacher_anchor": by_teacher})

    def _draw(self, labels_B: Tensor) -> Tensor:
        """Return [B, K]: this worker's part of the rows drawn for the global batch."""
        labels_N, start = gather_from_workers(labels_B)
        generator = torch.Generator(labels_B.device).manual_seed(self.step)
        shape = (len(labels_N), self.config.num_negatives)
        drawn_NK = torch.randint(len(self.bank_labels), shape, generator=generator, device=labels_B.device)
        return drawn_NK[start : start + len(labels_B)]

    def _estimate_normalizers(self, negatives: list[Tensor]) -> Tensor:
        """Return log Z of both sides: `log(N mean exp(similarity / temperature))` over the global batch."""
        logs = torch.stack([negative_BK.logsumexp(dim=(0, 1)) for negative_BK in negatives])
        logs_W2, _ = gather_from_workers(logs[None])
        drawn = len(logs_W2) * negatives[0].numel()
        return logs_W2.logsumexp(dim=0) + math.log(len(self.bank_labels) / drawn)

    @torch.no_grad()
    def after_step(self, sample_indices_B: Tensor) -> None:
        """Move the rows of the images of the global batch, on every worker alike."""
        assert self._seen is not None, "forward comes first"
        seen, self._seen = self._seen, None
        self.step += 1
        self.log_normalizers.copy_(seen.log_normalizers)
        indices_N, _ = gather_from_workers(sample_indices_B)
        self.bank_labels[indices_N] = gather_from_workers(seen.labels)[0]
        for bank, embedding_BW in (
            (self.student_bank, seen.student),
            (self.teacher_bank, seen.teacher),
        ):
            embedding_NW, _ = gather_from_workers(embedding_BW)
            moved_NW = self.config.momentum * bank[indices_N] + (1 - self.config.momentum) * embedding_NW
            bank[indices_N] = F.normalize(moved_NW, dim=1)
