import numpy as np
import pytest
import torch
from pydantic import ValidationError
from reference_formulas import Array, central_difference, softmax
from teaching_samples import LABELS, SPEC, extreme_logits, f64, student_output, teacher_output

from tmkd_ray.distillers.dist import DIST, DISTConfig, dist_losses, pearson_distance

every_temperature = pytest.mark.parametrize("temperature", [1.0, 4.0])


def pearson(u: Array, v: Array) -> float:
    """Covariance over the product of standard deviations."""
    covariance = ((u - u.mean()) * (v - v.mean())).mean()
    return float(covariance / (u.std() * v.std()))


def reference(teacher_BC: Array, student_BC: Array, temperature: float) -> tuple[float, float]:
    """Huang et al. 2022: 1 minus the mean correlation along each axis of the probabilities, times T²."""
    t, s = softmax(teacher_BC / temperature), softmax(student_BC / temperature)
    inter = 1 - np.mean([pearson(t[b], s[b]) for b in range(len(t))])
    intra = 1 - np.mean([pearson(t[:, c], s[:, c]) for c in range(t.shape[1])])
    return float(temperature**2 * inter), float(temperature**2 * intra)


@every_temperature
def test_dist_is_the_formula(temperature: float) -> None:
    student, teacher = student_output(), teacher_output()
    config = DISTConfig(temperature=temperature, inter_weight=0.7, intra_weight=3.0)
    output = DIST(config, SPEC)(student, teacher, LABELS)
    output.loss.backward()

    def formula(logits_BC: Array) -> float:
        inter, intra = reference(f64(teacher.logits), logits_BC, temperature)
        return 0.7 * inter + 3.0 * intra

    inter, intra = reference(f64(teacher.logits), f64(student.logits), temperature)
    assert output.terms.keys() == {"inter", "intra"}
    assert output.terms["inter"].item() == pytest.approx(inter, rel=1e-5)
    assert output.terms["intra"].item() == pytest.approx(intra, rel=1e-5)
    assert output.loss.item() == pytest.approx(formula(f64(student.logits)), rel=1e-5)
    np.testing.assert_allclose(
        f64(student.logits.grad), central_difference(formula, f64(student.logits)), rtol=1e-3, atol=1e-5
    )
    assert student.feature.grad is None


def test_defaults_are_the_papers() -> None:
    student, teacher = student_output(), teacher_output()
    inter, intra = reference(f64(teacher.logits), f64(student.logits), 4.0)
    loss = DIST(DISTConfig(), SPEC)(student, teacher, LABELS).loss.item()
    assert loss == pytest.approx(2 * inter + 2 * intra, rel=1e-5)


def test_pearson_distance_of_a_hand_sized_example() -> None:
    rows = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    others = torch.tensor([[10.0, 20.0, 30.0], [3.0, 2.0, 1.0], [1.0, -2.0, 1.0]])
    for row, distance in enumerate((0.0, 2.0, 1.0)):  # the same line, the opposite one, no correlation
        single = slice(row, row + 1)
        assert pearson_distance(rows[single], others[single]).item() == pytest.approx(distance, abs=1e-6)
    assert pearson_distance(rows, others).item() == pytest.approx(1.0, abs=1e-6)


def test_pearson_distance_ignores_an_affine_map_of_each_row() -> None:
    a, b = teacher_output().logits, student_output().logits.detach()
    scale = torch.tensor([[0.01], [1.0], [7.0], [300.0]])
    shift = torch.tensor([[-3.0], [0.0], [100.0], [5.0]])
    distance = pearson_distance(a, b).item()
    assert pearson_distance(a, scale * b + shift).item() == pytest.approx(distance, rel=1e-4)
    assert pearson_distance(scale * a + shift, b).item() == pytest.approx(distance, rel=1e-4)
    assert pearson_distance(a, -b).item() == pytest.approx(2 - distance, rel=1e-4)


@every_temperature
def test_zero_with_zero_gradient_where_the_student_agrees(temperature: float) -> None:
    teacher = teacher_output().logits
    student = (teacher + 3.0).requires_grad_()
    inter, intra = dist_losses(teacher, student, temperature)
    (inter + intra).backward()
    assert inter.item() == pytest.approx(0.0, abs=1e-5)
    assert intra.item() == pytest.approx(0.0, abs=1e-5)
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-4


def test_inter_and_intra_see_different_things() -> None:
    """Probabilities mixed with the uniform ones, each image's by its own share: inter sees nothing of it."""
    teacher = torch.softmax(teacher_output().logits, dim=1)
    share = torch.tensor([[0.1], [0.9], [0.5], [0.3]])
    mixed = share * teacher + (1 - share) / teacher.shape[1]
    inter, intra = dist_losses(teacher.log(), mixed.log(), 1.0)
    assert inter.item() == pytest.approx(0.0, abs=1e-5)
    assert intra.item() > 0.01


def test_a_row_without_spread_has_no_gradient() -> None:
    """Of twelve equal probabilities the mean is one rounding off: that is no spread to correlate."""
    teacher = 3 * torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    flat = torch.full_like(teacher, 0.37, requires_grad=True)
    inter, intra = dist_losses(teacher, flat, 1.0)
    inter.backward()
    assert inter.item() == pytest.approx(1.0, abs=1e-6)
    assert intra.item() == pytest.approx(1.0, abs=1e-6)
    assert flat.grad is not None
    assert torch.equal(flat.grad, torch.zeros_like(flat))


def test_right_at_extreme_logits() -> None:
    """Rows of the extreme sample that have a spread; equal columns of probabilities are left to rounding."""
    teacher, student, _ = extreme_logits()
    rows = [0, 1, 2, 3, 4, 5]
    inter, _ = dist_losses(teacher[rows], student[rows], 4.0)
    expected, _ = reference(
        f64(teacher[rows]) + 1e-9 * np.arange(5), f64(student[rows]) + 1e-9 * np.arange(5), 4.0
    )
    assert inter.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("options", [{"temperature": 0}, {"inter_weight": -1}, {"intra_weight": -0.1}])
def test_options_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=next(iter(options))):
        DISTConfig(**options)
