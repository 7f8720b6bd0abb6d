import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from reference_formulas import Array, central_difference
from teaching_samples import LABELS, SPEC, f64, student_output, teacher_output

from tmkd_ray.distillers.rkd import RKD, RKDConfig, relational_losses, relations


def huber(x: float, y: float) -> float:
    difference = abs(x - y)
    return 0.5 * difference**2 if difference <= 1 else difference - 0.5


def reference(teacher_ND: Array, student_NS: Array) -> tuple[float, float]:
    """Park et al. 2019, §3.2: pairs and triplets of distinct samples; their sums over N² and N³."""
    n = len(teacher_ND)
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]

    def distances(x: Array) -> dict[tuple[int, int], float]:
        raw = {(i, j): float(np.sqrt(((x[i] - x[j]) ** 2).sum())) for i, j in pairs}
        mean = sum(raw.values()) / len(raw)
        return {pair: value / mean for pair, value in raw.items()}

    def angle(x: Array, i: int, j: int, k: int) -> float:
        a, b = x[i] - x[j], x[k] - x[j]
        return float(a @ b / np.sqrt((a @ a) * (b @ b)))

    t, s = distances(teacher_ND), distances(student_NS)
    distance = sum(huber(t[pair], s[pair]) for pair in pairs) / n**2
    triplets = [(i, j, k) for i, j in pairs for k in range(n) if k not in (i, j)]
    return distance, sum(huber(angle(teacher_ND, *each), angle(student_NS, *each)) for each in triplets) / n**3


def rotation(width: int, seed: int = 3) -> torch.Tensor:
    matrix = torch.randn(width, width, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(matrix)[0]


def test_rkd_is_the_formula() -> None:
    student, teacher = student_output(), teacher_output()
    output = RKD(RKDConfig(distance_weight=3.0, angle_weight=0.7), SPEC)(student, teacher, LABELS)
    output.loss.backward()

    def formula(feature_BS: Array) -> float:
        distance, angle = reference(f64(teacher.feature), feature_BS)
        return 3.0 * distance + 0.7 * angle

    distance, angle = reference(f64(teacher.feature), f64(student.feature))
    assert output.terms["distance"].item() == pytest.approx(distance, rel=1e-4)
    assert output.terms["angle"].item() == pytest.approx(angle, rel=1e-4)
    assert output.loss.item() == pytest.approx(formula(f64(student.feature)), rel=1e-4)
    np.testing.assert_allclose(
        f64(student.feature.grad), central_difference(formula, f64(student.feature)), rtol=1e-3, atol=1e-5
    )
    assert student.logits.grad is None


def test_huber_is_linear_beyond_one() -> None:
    """Of four points another one is far off: two ratios of distances differ by more than one."""
    teacher = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 0.01], [0.0, 0.02]])
    student = torch.tensor([[0.0, 0.0], [0.0, 0.02], [10.0, 0.0], [0.0, 0.01]])
    distance, angle = relational_losses(teacher, student)
    expected = reference(f64(teacher), f64(student))
    t, s = relations(teacher)[0], relations(student)[0]
    assert (t - s).abs().max() > 1
    assert distance.item() == pytest.approx(expected[0], rel=1e-4)
    assert angle.item() == pytest.approx(expected[1], rel=1e-4)


def test_relations_of_a_right_triangle() -> None:
    """Sides 3, 4, 5: mean 4; the cosines at its corners are 0, 3/5 and 4/5."""
    distance, angle = relations(torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]]))
    expected = torch.tensor([[0.0, 3.0, 4.0], [3.0, 0.0, 5.0], [4.0, 5.0, 0.0]]) / 4
    torch.testing.assert_close(distance, expected)
    assert angle[0, 1, 2].item() == pytest.approx(0.0, abs=1e-6)
    assert angle[1, 0, 2].item() == pytest.approx(3 / 5)
    assert angle[2, 0, 1].item() == pytest.approx(4 / 5)
    assert angle[1, 2, 0] == angle[1, 0, 2]


def test_defaults_are_the_papers() -> None:
    student, teacher = student_output(), teacher_output()
    distance, angle = reference(f64(teacher.feature), f64(student.feature))
    loss = RKD(RKDConfig(), SPEC)(student, teacher, LABELS).loss.item()
    assert loss == pytest.approx(25 * distance + 50 * angle, rel=1e-4)


def test_zero_with_zero_gradient_where_the_student_is_the_teacher_rotated_scaled_and_moved() -> None:
    teacher = teacher_output().feature
    student = (0.3 * teacher @ rotation(teacher.shape[1]) + 2.0).requires_grad_()
    distance, angle = relational_losses(teacher, student)
    (25 * distance + 50 * angle).backward()
    assert distance.item() == pytest.approx(0.0, abs=1e-9)
    assert angle.item() == pytest.approx(0.0, abs=1e-9)
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-4


def test_invariant_to_rotation_scale_and_translation_of_either_side() -> None:
    teacher, student = teacher_output().feature, student_output().feature.detach()
    for a, b in (
        (teacher, 40 * student),
        (teacher, student @ rotation(student.shape[1])),
        (teacher, student - 3.0),
        (0.1 * teacher @ rotation(teacher.shape[1]) + 1.0, student),
    ):
        for moved, still in zip(relational_losses(a, b), relational_losses(teacher, student), strict=True):
            assert moved.item() == pytest.approx(still.item(), rel=1e-3)
    stretched = student * torch.linspace(0.2, 3.0, student.shape[1])
    assert relational_losses(teacher, stretched)[1].item() != pytest.approx(
        relational_losses(teacher, student)[1].item(), rel=1e-2
    )


@pytest.mark.parametrize("same", [[0, 1], [0, 1, 2, 3]])
def test_equal_features_have_finite_moderate_gradients(same: list[int]) -> None:
    """Two images with one feature have no direction between them; all with one have no distances either."""
    teacher, student = teacher_output().feature, student_output().feature.detach()
    student[same] = student[same[0]].clone()
    student.requires_grad_()
    distance, angle = relational_losses(teacher, student)
    (distance + angle).backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert student.grad.abs().max() < 10


def test_a_lone_image_has_no_relations() -> None:
    teacher, student = teacher_output().feature[:1], student_output().feature[:1]
    assert [value.item() for value in relational_losses(teacher, student)] == [0.0, 0.0]


def test_far_points_are_right_in_float32() -> None:
    """Distances are of differences, not of large squares: points a thousand away from the origin."""
    teacher, student = teacher_output().feature, student_output().feature.detach()
    for moved, still in zip(
        relational_losses(teacher, student + 1000.0), relational_losses(teacher, student), strict=True
    ):
        assert math.isclose(moved.item(), still.item(), rel_tol=1e-2)


@pytest.mark.parametrize("options", [{"distance_weight": -1}, {"angle_weight": -0.1}])
def test_options_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=next(iter(options))):
        RKDConfig(**options)
