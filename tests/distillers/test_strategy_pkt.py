import numpy as np
import pytest
import torch
from pydantic import ValidationError
from reference_formulas import Array, central_difference
from teaching_samples import BATCH, LABELS, SPEC, f64, student_output, teacher_output

from tmkd_ray.distillers.pkt import PKT, PKTConfig, neighbour_probabilities, probabilistic_loss


def neighbours(feature_NS: Array) -> Array:
    """Passalis and Tefas 2018: cosine kernel (cos + 1) / 2, each row over its sum."""
    n = len(feature_NS)
    kernel = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            a, b = feature_NS[i], feature_NS[j]
            kernel[i, j] = (a @ b / np.sqrt((a @ a) * (b @ b)) + 1) / 2
    return np.stack([row / row.sum() for row in kernel])


def reference(teacher_ND: Array, student_NS: Array) -> float:
    """KL of the rows, the mean over all N² pairs."""
    p, q = neighbours(teacher_ND), neighbours(student_NS)
    return float((p * np.log(p / q)).sum() / p.size)


def test_pkt_is_the_formula() -> None:
    student, teacher = student_output(), teacher_output()
    loss = PKT(PKTConfig(weight=50.0), SPEC)(student, teacher, LABELS).loss
    loss.backward()

    def formula(feature_BS: Array) -> float:
        return 50.0 * reference(f64(teacher.feature), feature_BS)

    assert loss.item() == pytest.approx(formula(f64(student.feature)), rel=1e-3)
    np.testing.assert_allclose(
        f64(student.feature.grad), central_difference(formula, f64(student.feature)), rtol=1e-3, atol=1e-4
    )
    assert student.logits.grad is None


def test_the_weight_is_that_of_the_fields_comparison() -> None:
    student, teacher = student_output(), teacher_output()
    loss = PKT(PKTConfig(), SPEC)(student, teacher, LABELS).loss.item()
    assert loss == pytest.approx(30_000 * reference(f64(teacher.feature), f64(student.feature)), rel=1e-3)


def test_probabilities_of_a_hand_sized_example() -> None:
    """Kernel to itself 1, at a right angle 1/2, to the opposite 0."""
    probabilities = neighbour_probabilities(torch.tensor([[2.0, 0.0], [0.0, 5.0], [-1.0, 0.0]]))
    expected = torch.tensor([[2.0, 1.0, 0.0], [1.0, 2.0, 1.0], [0.0, 1.0, 2.0]])
    torch.testing.assert_close(probabilities, expected / expected.sum(dim=1, keepdim=True))


def test_zero_with_zero_gradient_at_the_teachers_angles() -> None:
    teacher = teacher_output().feature
    matrix = torch.randn(*[teacher.shape[1]] * 2, generator=torch.Generator().manual_seed(3))
    scale = torch.tensor([[0.2], [1.0], [3.0], [9.0]])
    student = (scale * (teacher @ torch.linalg.qr(matrix)[0])).requires_grad_()
    loss = 30_000 * probabilistic_loss(teacher, student)
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-2)
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-2


def test_invariant_to_rotation_and_to_each_features_length_but_not_to_translation() -> None:
    teacher, student = teacher_output().feature, student_output().feature.detach()
    loss = probabilistic_loss(teacher, student).item()
    matrix = torch.randn(*[student.shape[1]] * 2, generator=torch.Generator().manual_seed(3))
    lengths = torch.rand(BATCH, 1, generator=torch.Generator().manual_seed(4)) + 0.1
    assert probabilistic_loss(teacher, lengths * student).item() == pytest.approx(loss, rel=1e-3)
    assert probabilistic_loss(teacher, student @ torch.linalg.qr(matrix)[0]).item() == pytest.approx(
        loss, rel=1e-3
    )
    assert probabilistic_loss(teacher, student + 2.0).item() != pytest.approx(loss, rel=1e-2)


def test_opposite_features_are_finite() -> None:
    """The student calls two images opposite (probability zero) that the teacher calls alike."""
    teacher = torch.tensor([[1.0, 0.0], [1.0, 0.1]])
    student = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], requires_grad=True)
    loss = probabilistic_loss(teacher, student)
    loss.backward()
    assert loss.isfinite()
    assert loss > 1
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_options_out_of_range() -> None:
    with pytest.raises(ValidationError, match="weight"):
        PKTConfig(weight=0)
