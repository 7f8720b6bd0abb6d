"""A small batch of student and teacher outputs; all widths differ, so that no axis passes for another."""

import torch
from reference_formulas import Array
from torch import Tensor

from tmkd_ray.distillers import DistillationSpec
from tmkd_ray.types import ModelOutput, TeacherOutput

BATCH, VIEWS, CLASSES, TEACHER_WIDTH, STUDENT_WIDTH, CLIP_WIDTH = 4, 3, 5, 6, 7, 8
NUM_SAMPLES = 9
SPEC = DistillationSpec(CLASSES, STUDENT_WIDTH, TEACHER_WIDTH, CLIP_WIDTH, NUM_SAMPLES)
LABELS = torch.tensor([0, 3, 3, 4])


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


def unit(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.nn.functional.normalize(normal(generator, *shape), dim=-1)


def student_output(seed: int = 0, batch: int = BATCH) -> ModelOutput:
    """Leaves that collect gradients."""
    generator = torch.Generator().manual_seed(seed)
    return ModelOutput(
        (2 * normal(generator, batch, CLASSES)).requires_grad_(),
        normal(generator, batch, STUDENT_WIDTH).requires_grad_(),
    )


def teacher_output(seed: int = 1, batch: int = BATCH, views: int = VIEWS) -> TeacherOutput:
    generator = torch.Generator().manual_seed(seed)
    return TeacherOutput(
        logits=3 * normal(generator, batch, CLASSES),
        feature=normal(generator, batch, TEACHER_WIDTH),
        view_weights=torch.softmax(normal(generator, batch, views), dim=1),
        clip_embedding=unit(generator, batch, CLIP_WIDTH),
        text_bank=unit(generator, views, CLASSES, CLIP_WIDTH),
        text_logits=4 * normal(generator, batch, CLASSES),
    )


def f64(tensor: Tensor | None) -> Array:
    assert tensor is not None
    return tensor.detach().double().numpy()


def extreme_logits() -> tuple[Tensor, Tensor, Tensor]:
    """(teacher [8, C], student [8, C], labels [8]): ±100, sure of the label, another class, or none."""
    low = torch.full((8, CLASSES), -100.0)
    teacher, student = low.clone(), low.clone()
    labels = torch.tensor([1] * 8)
    for row, (teacher_high, student_high) in enumerate(
        [([1], [1]), ([1], [0]), ([0], [1]), ([0], [0]), ([0], [2]), ([0, 1], [1, 2]), ([], [1]), ([1], [])]
    ):
        teacher[row, teacher_high] = 100.0
        student[row, student_high] = 100.0
    return teacher, student, labels
