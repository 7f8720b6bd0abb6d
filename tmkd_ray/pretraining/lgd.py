"""LGD: language-guided distillation, arXiv 2406.11689."""

from collections import Counter
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor

from tmkd_ray import storage
from tmkd_ray.errors import UserError
from tmkd_ray.pretraining.base import (
    PRETRAINERS,
    BankPretrainer,
    PretrainingConfig,
    PretrainingSpec,
    random_rows,
    similarity_distillation,
)
from tmkd_ray.settings import Location
from tmkd_ray.types import LossOutput
from tmkd_ray.views.base import check_prompts


class LGDConfig(PretrainingConfig):
    """The paper's values.

    The textual semantics bank is of the dataset's classes, by the prompts of the first view that is taught; it
    may as well be of the classes of the task that the student is for (`bank_classes`).
    """

    name: Literal["lgd"] = "lgd"
    alpha: float = Field(default=0.5, ge=0, le=1, description="of the visual branch; 1 - alpha of the textual")
    teacher_temperature: float = Field(default=0.01, gt=0)
    student_temperature: float = Field(default=0.2, gt=0)
    momentum: float = Field(default=0.999, ge=0, lt=1, description="of the visual bank's rows")
    bank_classes: Location | None = Field(
        default=None, description="file of the bank's class names, one a line; null: the dataset's classes"
    )
    bank_prompts: tuple[str, ...] | None = Field(
        default=None, description="of the bank, each with one {}; null: those of the first view that is taught"
    )

    @field_validator("bank_prompts")
    @classmethod
    def _one_placeholder_each(cls, prompts: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return None if prompts is None else check_prompts(prompts)


def read_bank_classes(path: str) -> tuple[str, ...]:
    """Read the class names of a textual bank, one a line.

    Raises:
        UserError: the file cannot be read, names a class twice, or fewer than two.
    """
    try:
        lines = storage.read_bytes(path).decode("utf-8-sig").splitlines()
    except (UnicodeDecodeError, UserError) as error:
        raise UserError(f"bank_classes: cannot read {path}: {error}") from error
    names = tuple(filter(None, map(str.strip, lines)))
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(
            f"bank_classes: {path} names more than once: {', '.join(twice[:5])}; give each class once"
        )
    if len(names) < 2:
        raise UserError(f"bank_classes: {path} has {len(names)} class names, one a line; give at least two")
    return names


def lgd_terms(
    student_BE: Tensor,
    teacher_BE: Tensor,
    text_bank_CE: Tensor,
    visual_bank_CE: Tensor,
    student_temperature: float,
    teacher_temperature: float,
) -> dict[str, Tensor]:
    """Return the `visual` and the `text` branch's cross-entropies.

    Args:
        student_BE, teacher_BE, text_bank_CE: unit length. visual_bank_CE: as it is, also where it is shorter.
    """
    temperatures = (student_temperature, teacher_temperature)
    return {
        "visual": similarity_distillation(student_BE, teacher_BE, visual_bank_CE, *temperatures, with_own=True),
        "text": similarity_distillation(student_BE, teacher_BE, text_bank_CE, *temperatures, with_own=False),
    }


def aggregate_knowledge(
    visual_bank_CE: Tensor, seen_C: Tensor, teacher_NE: Tensor, text_bank_CE: Tensor, momentum: float
) -> tuple[Tensor, Tensor]:
    """Return the visual bank and its flags after a batch: language-guided knowledge aggregation (LGKA).

    Each embedding belongs to the class whose text is most similar. A class's first mean in a batch sets its
    row, later ones move it: `row ← momentum·row + (1 - momentum)·mean`. Rows are not normalised.

    Args:
        seen_C: bool, whether a class was ever met.
        teacher_NE, text_bank_CE: unit length.
    """
    nearest_N = (teacher_NE @ text_bank_CE.T).argmax(dim=1)
    # A product instead of `index_add`, whose sums on a GPU come in any order: workers would drift apart.
    belongs_NC = F.one_hot(nearest_N, len(text_bank_CE)).to(teacher_NE.dtype)
    count_C = belongs_NC.sum(dim=0)
    mean_CE = belongs_NC.T @ teacher_NE / count_C.clamp(min=1)[:, None]
    moved_CE = torch.where(seen_C[:, None], momentum * visual_bank_CE + (1 - momentum) * mean_CE, mean_CE)
    is_met_C = count_C > 0
    return torch.where(is_met_C[:, None], moved_CE, visual_bank_CE), seen_C | is_met_C


@PRETRAINERS.register("lgd")
class LGD(BankPretrainer):
    """Cross-entropies over the textual bank of class names and the visual bank of class means."""

    Config = LGDConfig
    text_bank: Tensor
    visual_bank: Tensor
    seen: Tensor

    def __init__(self, config: LGDConfig, spec: PretrainingSpec) -> None:
        super().__init__(config, spec)
        self.config = config
        self.register_buffer("text_bank", spec.text_bank.float(), persistent=False)
        self.register_buffer("visual_bank", random_rows(*spec.text_bank.shape))
        self.register_buffer("seen", torch.zeros(len(spec.text_bank), dtype=torch.bool))

    def compare(self, student_BE: Tensor, teacher_BE: Tensor) -> LossOutput:
        config = self.config
        terms = lgd_terms(
            F.normalize(student_BE, dim=1),
            teacher_BE,
            self.text_bank,
            self.visual_bank,
            config.student_temperature,
            config.teacher_temperature,
        )
        return LossOutput(config.alpha * terms["visual"] + (1 - config.alpha) * terms["text"], terms)

    def remember(self, teacher_NE: Tensor) -> None:
        bank_CE, seen_C = aggregate_knowledge(
            self.visual_bank, self.seen, teacher_NE, self.text_bank, self.config.momentum
        )
        self.visual_bank.copy_(bank_CE)
        self.seen.copy_(seen_C)
