import numpy as np
import pytest
import torch
from pydantic import ValidationError
from reference_formulas import Array, central_difference
from teaching_samples import LABELS, SPEC, f64, student_output, teacher_output

from tmkd_ray.distillers.sp import SP, SPConfig, similarities, similarity_loss


def reference(teacher_ND: Array, student_NS: Array) -> float:
    """Tung and Mori 2019: squared Frobenius distance of the row-normalised Gram matrices, over N²."""
    total = 0.0
    for i in range(len(teacher_ND)):
        t = np.array([teacher_ND[i] @ other for other in teacher_ND])
        s = np.array([student_NS[i] @ other for other in student_NS])
        total += float(((t / np.sqrt(t @ t) - s / np.sqrt(s @ s)) ** 2).sum())
    return total / len(teacher_ND) ** 2


def test_sp_is_the_formula() -> None:
    student, teacher = student_output(), teacher_output()
    loss = SP(SPConfig(weight=5.0), SPEC)(student, teacher, LABELS).loss
    loss.backward()

    def formula(feature_BS: Array) -> float:
        return 5.0 * reference(f64(teacher.feature), feature_BS)

    assert loss.item() == pytest.approx(formula(f64(student.feature)), rel=1e-4)
    np.testing.assert_allclose(
        f64(student.feature.grad), central_difference(formula, f64(student.feature)), rtol=1e-3, atol=1e-5
    )
    assert student.logits.grad is None


def test_the_weight_is_the_papers() -> None:
    student, teacher = student_output(), teacher_output()
    loss = SP(SPConfig(), SPEC)(student, teacher, LABELS).loss.item()
    assert loss == pytest.approx(3000 * reference(f64(teacher.feature), f64(student.feature)), rel=1e-4)


def test_similarities_of_a_hand_sized_example() -> None:
    """Features (3, 0) and (1, 1): inner products 9, 3, 3, 2."""
    expected = torch.tensor([[9.0, 3.0], [3.0, 2.0]])
    expected = expected / torch.tensor([[90.0], [13.0]]).sqrt()
    torch.testing.assert_close(similarities(torch.tensor([[3.0, 0.0], [1.0, 1.0]])), expected)


def test_zero_with_zero_gradient_where_the_student_is_the_teacher_rotated_and_scaled() -> None:
    teacher = teacher_output().feature
    matrix = torch.randn(*[teacher.shape[1]] * 2, generator=torch.Generator().manual_seed(3))
    student = (0.2 * teacher @ torch.linalg.qr(matrix)[0]).requires_grad_()
    loss = 3000 * similarity_loss(teacher, student)
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-2


def test_invariant_to_rotation_and_one_scale_but_not_to_each_features_length() -> None:
    teacher, student = teacher_output().feature, student_output().feature.detach()
    loss = similarity_loss(teacher, student).item()
    matrix = torch.randn(*[student.shape[1]] * 2, generator=torch.Generator().manual_seed(3))
    assert similarity_loss(teacher, 30 * student).item() == pytest.approx(loss, rel=1e-4)
    assert similarity_loss(teacher, student @ torch.linalg.qr(matrix)[0]).item() == pytest.approx(
        loss, rel=1e-4
    )
    lengths = torch.tensor([[0.2], [1.0], [3.0], [9.0]])
    assert similarity_loss(teacher, lengths * student).item() != pytest.approx(loss, rel=1e-2)


def test_options_out_of_range() -> None:
    with pytest.raises(ValidationError, match="weight"):
        SPConfig(weight=0)
