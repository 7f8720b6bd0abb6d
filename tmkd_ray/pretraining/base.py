"""What every label-free objective is, and the student it trains."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from tmkd_ray import storage
from tmkd_ray.errors import UserError
from tmkd_ray.fusion import Weighting
from tmkd_ray.losses import gather_from_workers
from tmkd_ray.models import ImageClassifier
from tmkd_ray.registry import Registry
from tmkd_ray.settings import Settings
from tmkd_ray.types import LossOutput, ModelOutput

PRETRAINERS: Registry[type["Pretrainer"]] = Registry("pre-training objective")


class PretrainingConfig(Settings):
    """What a label-free student learns from; each objective extends it with its own options.

    The student learns the CLIP embedding of the image: that of the first view (`teacher: plain`), or of all
    views, fused by semantic weights (`teacher: fused`). The weightings `label` and `margin` look at the label,
    so that the pre-training is not label-free any more; the others use the class names at most.
    """

    name: str
    teacher: Literal["plain", "fused"] = "plain"
    views: tuple[str, ...] | None = Field(
        default=None, description="views to fuse; null: all. The plain teacher uses the first"
    )
    weighting: Weighting = Field(
        default="confidence", description="of the fused views; `label` and `margin` use labels"
    )
    fusion_temperature: float = Field(default=0.1, gt=0)
    clip_temperature: float | None = Field(default=None, gt=0, description="null: CLIP's own")
    hidden_width: int | None = Field(
        default=None,
        ge=1,
        description="of the MLP head; null: the wider of the student's feature and the embedding",
    )

    # What the configuration asks of any objective, `DistillerConfig` as well.
    requires: ClassVar[frozenset[str]] = frozenset({"clip_embedding"})
    needs_text_teacher: ClassVar[bool] = True
    needs_online: ClassVar[bool] = False
    trains_classifier: ClassVar[bool] = False
    mixes_task_and_distillation: ClassVar[bool] = False


@dataclass(frozen=True)
class PretrainingSpec:
    """The sizes and constants an objective is built for.

    Attributes:
        embedding_width: E, of the CLIP.
        text_bank: [C, E], unit length, the textual semantics bank; C need not be the dataset's.
    """

    embedding_width: int
    text_bank: Tensor


class Pretrainer(nn.Module, ABC):
    """A way to teach the student the teacher's embedding. It holds no teacher, and never sees a label.

    The loss is a mean over the batch: two workers equal one.
    """

    Config: ClassVar[type[PretrainingConfig]]

    def __init__(self, config: PretrainingConfig, spec: PretrainingSpec) -> None:
        super().__init__()

    def forward(self, student_BE: Tensor, teacher_BE: Tensor) -> LossOutput:
        """Return the loss, computed in float32, and its unweighted terms.

        Args:
            student_BE: the student's embedding, of any length. teacher_BE: the CLIP's, unit length.
        """
        # Autocast would round the similarities to half precision; the temperatures enlarge the error.
        with torch.autocast(student_BE.device.type, enabled=False):
            return self.compare(student_BE.float(), teacher_BE.float())

    @abstractmethod
    def compare(self, student_BE: Tensor, teacher_BE: Tensor) -> LossOutput:
        """Return the loss of float32 embeddings."""

    def after_step(self) -> None:
        """Take note of the batch, or micro-batch, that `forward` saw last."""

    def after_update(self) -> None:
        """Update state that no gradient trains, after the optimiser's step on the whole batch."""


class BankPretrainer(Pretrainer):
    """A pre-trainer with a bank of past teacher embeddings: buffers, and so in every checkpoint.

    The bank moves once a step of the optimiser, by the teacher's embeddings of the global batch in its order,
    gathered from all workers and micro-batches. So it is the same on every worker, and depends on neither their
    number nor on gradient accumulation.
    """

    def __init__(self, config: PretrainingConfig, spec: PretrainingSpec) -> None:
        super().__init__(config, spec)
        self._last: Tensor | None = None
        self._noted: list[Tensor] = []

    def forward(self, student_BE: Tensor, teacher_BE: Tensor) -> LossOutput:
        self._last = teacher_BE.detach().float()
        return super().forward(student_BE, teacher_BE)

    def after_step(self) -> None:
        assert self._last is not None, "forward comes first"
        self._noted.append(self._last)
        self._last = None

    @torch.no_grad()
    def after_update(self) -> None:
        # Each worker's micro-batches in turn, then the workers in turn: the order of the global batch.
        teacher_NE, _ = gather_from_workers(torch.cat(self._noted))
        self._noted = []
        self.remember(teacher_NE)

    @abstractmethod
    def remember(self, teacher_NE: Tensor) -> None:
        """Move the bank by the global batch's N teacher embeddings, float32."""


def similarity_distillation(
    student_BE: Tensor,
    teacher_BE: Tensor,
    bank_NE: Tensor,
    student_temperature: float,
    teacher_temperature: float,
    with_own: bool,
) -> Tensor:
    """Return the cross-entropy between the teacher's and the student's distributions over a bank, batch mean.

    Each distribution is the softmax of the embedding's similarities with the bank's rows over its temperature.

    Args:
        student_BE, teacher_BE: unit length.
        with_own: whether the teacher's own embedding of the image stands in front of the bank's rows: `t·t` for
            the teacher, `s·t` for the student.
    """
    student_BN, teacher_BN = student_BE @ bank_NE.T, teacher_BE @ bank_NE.T
    if with_own:
        student_BN = torch.cat([(student_BE * teacher_BE).sum(dim=1, keepdim=True), student_BN], dim=1)
        teacher_BN = torch.cat([(teacher_BE * teacher_BE).sum(dim=1, keepdim=True), teacher_BN], dim=1)
    return F.cross_entropy(student_BN / student_temperature, F.softmax(teacher_BN / teacher_temperature, dim=1))


def random_rows(count: int, width: int) -> Tensor:
    """Return unit vectors [count, width] in random directions, from torch's generator."""
    return F.normalize(torch.randn(count, width), dim=1)


def build_projector(feature_width: int, embedding_width: int, hidden_width: int | None = None) -> nn.Sequential:
    """Return the MLP head: feature [B, S] to embedding [B, E].

    Args:
        hidden_width: None for the wider of the two.
    """
    hidden_width = hidden_width or max(feature_width, embedding_width)
    return nn.Sequential(
        nn.Linear(feature_width, hidden_width), nn.ReLU(), nn.Linear(hidden_width, embedding_width)
    )


class EmbeddingStudent(nn.Module):
    """A small encoder and its MLP head: what is pre-trained. The encoder's classifier is not.

    Args:
        encoder: its penultimate feature is projected; the gradient of its `head` is switched off.
        projector: feature [B, S] to embedding [B, E], see `build_projector`.
    """

    def __init__(self, encoder: ImageClassifier, projector: nn.Sequential) -> None:
        super().__init__()
        encoder.head.requires_grad_(False)
        self.encoder = encoder
        self.projector = projector

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return [B, E], of any length, for normalised images."""
        embedding_BE: Tensor = self.projector(self.encoder(images_BCHW).feature)
        return embedding_BE

    def num_parameters(self) -> int:
        """Return the number of values in use: without the encoder's classifier."""
        return sum(p.numel() for p in self.parameters()) - sum(
            p.numel() for p in self.encoder.head.parameters()
        )


class ZeroShotStudent(ImageClassifier):
    """A pre-trained student as a classifier: cosines with the classes' text embeddings, over the temperature.

    Its feature is the unit embedding [B, E]; its head, the scaled text bank, is trained by nothing.
    Source: Radford et al. 2021, "Learning transferable visual models from natural language supervision",
    arXiv 2103.00020, section 3.1.

    Args:
        text_bank_CE: unit length.
        temperature: CLIP's own.
    """

    def __init__(self, student: EmbeddingStudent, text_bank_CE: Tensor, temperature: float) -> None:
        super().__init__()
        self.student = student
        num_classes, width = text_bank_CE.shape
        self.texts = nn.Linear(width, num_classes, bias=False).requires_grad_(False)
        self.texts.weight.copy_(text_bank_CE / temperature)

    @property
    def head(self) -> nn.Linear:
        return self.texts

    def forward(self, images_BCHW: Tensor) -> ModelOutput:
        output: ModelOutput = self.student.encoder(images_BCHW)
        embedding_BE = F.normalize(self.student.projector(output.feature).float(), dim=1)
        return ModelOutput(
            self.texts(embedding_BE), embedding_BE, output.feature_maps, output.preactivation_maps
        )


def write_projector(path: str, projector: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write the MLP head's weights and where its embedding comes from, see `read_projector`."""
    tensors = {name: value.contiguous() for name, value in projector.items()}
    storage.write_bytes(path, safetensors.torch.save(tensors, metadata=dict(metadata)))


def read_projector(path: str) -> tuple[nn.Sequential, dict[str, str]]:
    """Read the MLP head that a pre-training left: `projector.safetensors` beside `model.safetensors`.

    Returns:
        The head, feature [B, S] to embedding [B, E], and its metadata: `embedding_width`; `model`, the
        encoder's name; `clip`, the CLIP's folder or name; `clip_fingerprint` and `text_fingerprint`, of its
        image and its text tower; `text_bank`, the key of the dataset's classes' texts in the knowledge store.

    Raises:
        UserError: the file is missing or is no such head.
    """
    if not storage.exists(path):
        raise UserError(f"{path} does not exist; a pre-trained student (distiller: lgd, …) has one")
    try:
        with storage.local_copy(path) as local, safetensors.safe_open(local, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it has no iterator)
        hidden_width, feature_width = tensors["0.weight"].shape
        projector = build_projector(feature_width, tensors["2.weight"].shape[0], hidden_width)
        projector.load_state_dict(tensors)
    except (safetensors.SafetensorError, KeyError, RuntimeError, ValueError) as error:
        raise UserError(f"{path} is not the MLP head of a pre-trained student: {error}") from error
    return projector, metadata


def build_pretrainer(config: PretrainingConfig, spec: PretrainingSpec) -> Pretrainer:
    """Return the objective that `config` names."""
    return PRETRAINERS.get(config.name)(config, spec)
