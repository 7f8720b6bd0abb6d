"""ReviewKD against its formula: attention based fusion from the last stage to the first, hierarchical loss."""

import numpy as np
import pytest
import torch
from map_formulas import Maps, batch_norm, convolution, map_gradients, nearest, pooled
from pydantic import ValidationError
from reference_formulas import Array, central_difference
from teaching_samples import LABELS, SPEC, f64, student_output, teacher_output
from torch import nn

from tmkd_ray.distillers.reviewkd import ReviewKD, ReviewKDConfig, hierarchical_context_loss


def strategy_of(width: int = 3) -> ReviewKD:
    torch.manual_seed(0)
    strategy = ReviewKD(ReviewKDConfig(width=width), SPEC)
    for module in strategy.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return strategy


def reference_hcl(student_BCHW: Array, teacher_BCHW: Array) -> float:
    levels = [(1.0, student_BCHW, teacher_BCHW)]
    for size in (4, 2, 1):
        if size < student_BCHW.shape[2]:
            levels.append(
                (levels[-1][0] / 2, pooled(student_BCHW, size, size), pooled(teacher_BCHW, size, size))
            )
    total = sum(weight * ((s - t) ** 2).mean() for weight, s, t in levels)
    return float(total / sum(weight for weight, *_ in levels))


def reference(strategy: ReviewKD, students: Maps, teachers: Maps, attention: Array | None = None) -> float:
    """Figure 3 of the paper; the levels are given early to late, the penultimate feature as the last one."""
    total, later = 0.0, None
    for index in reversed(range(len(students))):
        fusion = strategy.fusions[index]
        reduce, expand = fusion.reduce, fusion.expand
        mixed = batch_norm(
            convolution(students[index], f64(reduce[0].weight)), f64(reduce[1].weight), f64(reduce[1].bias)
        )
        if later is not None:
            weight = attention if index == 0 and attention is not None else f64(fusion.attention.weight)
            later = nearest(later, *mixed.shape[2:])
            logits = convolution(np.concatenate([mixed, later], axis=1), weight, f64(fusion.attention.bias))
            share = 1 / (1 + np.exp(-logits))
            mixed = mixed * share[:, :1] + later * share[:, 1:]
        later = nearest(mixed, *teachers[index].shape[2:])
        out = batch_norm(convolution(later, f64(expand[0].weight)), f64(expand[1].weight), f64(expand[1].bias))
        total += reference_hcl(out, teachers[index])
    return total


def test_reviewkd_is_the_formula() -> None:
    strategy = strategy_of()
    student, teacher = student_output(), teacher_output()
    loss = strategy(student, teacher, LABELS).loss
    loss.backward()
    assert teacher.preactivation_maps is not None
    teachers = [*(f64(value) for value in teacher.preactivation_maps), f64(teacher.feature)[:, :, None, None]]
    compared = [*student.feature_maps[1:], student.feature]
    given = [*(f64(value) for value in compared[:-1]), f64(student.feature)[:, :, None, None]]

    assert loss.item() == pytest.approx(reference(strategy, given, teachers), rel=1e-5)
    expected = map_gradients(lambda maps: reference(strategy, maps, teachers), given)
    for value, gradient in zip(compared, expected, strict=True):
        assert value.grad is not None
        np.testing.assert_allclose(f64(value.grad), gradient.reshape(value.shape), rtol=5e-3, atol=2e-5)
    attention = strategy.fusions[0].attention
    gradient = central_difference(lambda w: reference(strategy, given, teachers, w), f64(attention.weight))
    np.testing.assert_allclose(f64(attention.weight.grad), gradient, rtol=5e-3, atol=2e-5)
    assert student.feature_maps[0].grad is None


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 9])
def test_the_hierarchical_loss_is_the_formula(size: int) -> None:
    generator = torch.Generator().manual_seed(5)
    one, other = (torch.randn(2, 3, size, size, generator=generator) for _ in range(2))
    expected = reference_hcl(f64(one), f64(other))
    assert hierarchical_context_loss(one, other).item() == pytest.approx(expected, rel=1e-5)


def test_the_hierarchical_loss_by_hand() -> None:
    """A constant difference is the same at every level, one that cancels in 2×2 pixels only at the first."""
    zeros = torch.zeros(1, 1, 4, 4)
    assert hierarchical_context_loss(zeros + 3.0, zeros).item() == pytest.approx(9.0)
    checkered = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(2, 2)[None, None]
    assert hierarchical_context_loss(checkered, zeros).item() == pytest.approx(1 / (1 + 1 / 2 + 1 / 4))


def test_early_stages_are_taught_through_the_later_ones() -> None:
    """The student's last map is in the loss of the teacher's first stage: that is the review."""
    strategy, student, teacher = strategy_of(), student_output(), teacher_output()
    fused = None
    outputs = []
    levels = [*student.feature_maps[1:], student.feature[:, :, None, None]]
    for fusion, level in zip(reversed(strategy.fusions), reversed(levels), strict=True):
        output, fused = fusion(level, fused)
        outputs.append(output)
    gradients = torch.autograd.grad(outputs[-1].square().sum(), [*student.feature_maps[1:], student.feature])
    assert all(gradient.abs().max() > 0 for gradient in gradients)
    assert teacher.preactivation_maps is not None
    shapes = [value.shape for value in reversed(outputs)]
    assert shapes == [*(v.shape for v in teacher.preactivation_maps), (*teacher.feature.shape, 1, 1)]


@pytest.mark.parametrize(("width", "expected"), [(3, 3), (512, SPEC.student_width)])
def test_the_width_is_no_greater_than_the_students(width: int, expected: int) -> None:
    assert strategy_of(width).fusions[0].reduce[0].out_channels == expected


def test_options_out_of_range() -> None:
    with pytest.raises(ValidationError, match="width"):
        ReviewKDConfig(width=0)
