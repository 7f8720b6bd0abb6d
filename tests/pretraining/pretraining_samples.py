"""Hand-sized embeddings, banks, and the objectives' formulas in float64 NumPy."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tmkd_ray.pretraining import PRETRAINERS, Pretrainer, PretrainingSpec, build_pretrainer

Array = npt.NDArray[np.float64]

B, C, E = 4, 3, 5


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def unit(seed: int, *shape: int) -> Tensor:
    return torch.nn.functional.normalize(normal(seed, *shape), dim=-1)


def text_bank(classes: int = C) -> Tensor:
    return unit(100, classes, E)


def build(name: str, seed: int = 0, classes: int = C, **options: Any) -> Pretrainer:
    torch.manual_seed(seed)
    config = PRETRAINERS.get(name).Config.model_validate({"name": name, **options})
    return build_pretrainer(config, PretrainingSpec(E, text_bank(classes)))


def f64(tensor: Tensor) -> Array:
    return tensor.detach().double().numpy()


def normalised(rows: Array) -> Array:
    return rows / np.sqrt((rows**2).sum(axis=1, keepdims=True))


def softmax(logits: Array) -> Array:
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def cross_entropy(
    student: Array,
    teacher: Array,
    bank: Array,
    student_temperature: float,
    teacher_temperature: float,
    own: bool,
) -> float:
    """The mean over images of -Σ p_teacher log p_student, over the bank's rows, `t` itself in front or not."""
    total = 0.0
    for s, t in zip(normalised(student), teacher, strict=True):
        candidates = np.vstack([t, bank]) if own else bank
        p = softmax((candidates @ t)[None] / teacher_temperature)[0]
        q = softmax((candidates @ s)[None] / student_temperature)[0]
        total -= float((p * np.log(q)).sum())
    return total / len(student)


def lgd_step(
    student: Array,
    teacher: Array,
    text: Array,
    visual: Array,
    seen: npt.NDArray[np.bool_],
    alpha: float = 0.5,
    momentum: float = 0.999,
    temperatures: tuple[float, float] = (0.2, 0.01),
) -> tuple[float, float, float, Array, npt.NDArray[np.bool_]]:
    """LGD's algorithm: (loss, visual branch, text branch), then the visual bank and its flags after LGKA."""
    by_visual = cross_entropy(student, teacher, visual, *temperatures, own=True)
    by_text = cross_entropy(student, teacher, text, *temperatures, own=False)
    after, seen = visual.copy(), seen.copy()
    members: dict[int, list[Array]] = {}
    for t in teacher:
        members.setdefault(int(np.argmax(text @ t)), []).append(t)
    for label, rows in members.items():
        mean = np.mean(rows, axis=0)
        after[label] = momentum * after[label] + (1 - momentum) * mean if seen[label] else mean
        seen[label] = True
    return alpha * by_visual + (1 - alpha) * by_text, by_visual, by_text, after, seen
