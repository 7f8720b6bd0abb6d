"""A small batch of student and teacher outputs; all widths differ, so that no axis passes for another."""

from collections.abc import Callable
from typing import Any

import torch
from reference_formulas import Array
from torch import Tensor

from tmkd_ray.distillers import DistillationSpec
from tmkd_ray.objective import TERMS, Distiller, DistillerConfig
from tmkd_ray.types import ModelOutput, TeacherOutput

BATCH, VIEWS, CLASSES, TEACHER_WIDTH, STUDENT_WIDTH, CLIP_WIDTH = 4, 3, 5, 6, 7, 8
NUM_SAMPLES = 9
# (channels, height, width) of each stage. Stages are paired from the last one: the student's first is left out.
STUDENT_MAPS = ((2, 7, 7), (3, 4, 4), (4, 3, 3))
TEACHER_MAPS = ((5, 6, 6), (7, 2, 2))
SPEC = DistillationSpec(
    CLASSES,
    STUDENT_WIDTH,
    TEACHER_WIDTH,
    CLIP_WIDTH,
    NUM_SAMPLES,
    class_counts=(5, 1, 2, 0, 1),
    student_maps=STUDENT_MAPS,
    teacher_maps=TEACHER_MAPS,
)
LABELS = torch.tensor([0, 3, 3, 4])


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


def unit(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.nn.functional.normalize(normal(generator, *shape), dim=-1)


def student_output(seed: int = 0, batch: int = BATCH) -> ModelOutput:
    """Leaves that collect gradients."""
    generator = torch.Generator().manual_seed(seed)
    logits, feature = 2 * normal(generator, batch, CLASSES), normal(generator, batch, STUDENT_WIDTH)
    before = tuple(normal(generator, batch, *shape) for shape in STUDENT_MAPS)
    return ModelOutput(
        logits.requires_grad_(),
        feature.requires_grad_(),
        feature_maps=tuple(value.relu().requires_grad_() for value in before),
        preactivation_maps=tuple(value.requires_grad_() for value in before),
    )


def leaves(student: ModelOutput) -> dict[str, Tensor]:
    """All tensors of a student's output by name; those of maps are numbered."""
    found = {"logits": student.logits, "feature": student.feature}
    for field in ("feature_maps", "preactivation_maps"):
        found |= {f"{field}.{index}": value for index, value in enumerate(getattr(student, field))}
    return found


def mapped(output: ModelOutput | TeacherOutput, change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """The fields of an output with every tensor changed; the text bank, which is no image's, stays."""
    found = {}
    for name, value in vars(output).items():
        if isinstance(value, tuple):
            found[name] = tuple(change(part) for part in value)
        else:
            found[name] = value if value is None or name == "text_bank" else change(value)
    return found


def teacher_output(seed: int = 1, batch: int = BATCH, views: int = VIEWS) -> TeacherOutput:
    generator = torch.Generator().manual_seed(seed)
    return TeacherOutput(
        logits=3 * normal(generator, batch, CLASSES),
        feature=normal(generator, batch, TEACHER_WIDTH),
        view_weights=torch.softmax(normal(generator, batch, views), dim=1),
        clip_embedding=unit(generator, batch, CLIP_WIDTH),
        text_bank=unit(generator, views, CLASSES, CLIP_WIDTH),
        text_logits=4 * normal(generator, batch, CLASSES),
        feature_maps=tuple(normal(generator, batch, *shape).relu() for shape in TEACHER_MAPS),
        preactivation_maps=tuple(normal(generator, batch, *shape) for shape in TEACHER_MAPS),
    )


def maps_from(feature_BS: Tensor) -> dict[str, tuple[Tensor, ...]]:
    """Maps of a student, a fixed function of its feature: so their gradients reach what made it."""
    generator = torch.Generator().manual_seed(8)
    widths = [channels * height * width for channels, height, width in STUDENT_MAPS]
    before = [
        (feature_BS @ normal(generator, STUDENT_WIDTH, width)).unflatten(1, shape)
        for shape, width in zip(STUDENT_MAPS, widths, strict=True)
    ]
    return {
        "feature_maps": tuple(value.relu() for value in before),
        "preactivation_maps": tuple(before),
    }


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


def extreme_outputs(dtype: torch.dtype) -> tuple[ModelOutput, TeacherOutput, Tensor]:
    """(student in `dtype`, teacher, labels): logits of `extreme_logits`, features and maps at ±100."""
    teacher_logits, student_logits, labels = extreme_logits()

    def extreme(value: Tensor) -> Tensor:
        return 100 * value.detach().sign()

    student = ModelOutput(**mapped(student_output(batch=len(labels)), lambda value: extreme(value).to(dtype)))
    student.logits = student_logits.to(dtype)
    for value in leaves(student).values():
        value.requires_grad_()
    teacher = teacher_output(batch=len(labels))
    teacher.logits, teacher.feature = teacher_logits, extreme(teacher.feature)
    teacher.text_logits = teacher_logits.roll(1, dims=0)
    for field in ("feature_maps", "preactivation_maps"):
        setattr(teacher, field, tuple(extreme(value) for value in getattr(teacher, field)))
    return student, teacher, labels


def config_of(**options: Any) -> DistillerConfig:
    """A fused teacher and only the weights that are given."""
    off = {f"{term}_weight": 0.0 for term in TERMS}
    return DistillerConfig.model_validate({"name": "tmkd", **off, **options})


def distiller_of(label_smoothing: float = 0.0, **options: Any) -> Distiller:
    torch.manual_seed(0)
    return Distiller(config_of(**options), SPEC, label_smoothing)
