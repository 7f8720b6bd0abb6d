import numpy as np
import pytest
from pydantic import ValidationError
from reference_formulas import central_difference, kl_divergence
from teaching_samples import LABELS, SPEC, f64, student_output, teacher_output

from tmkd_ray.distillers.kd import KD, KDConfig


@pytest.mark.parametrize("temperature", [1.0, 2.5, 4.0])
def test_kd_is_the_formula(temperature: float) -> None:
    student, teacher = student_output(), teacher_output()
    output = KD(KDConfig(temperature=temperature), SPEC)(student, teacher, LABELS)
    output.loss.backward()

    def formula(logits_BC: np.ndarray) -> float:
        return kl_divergence(f64(teacher.logits), logits_BC, temperature)

    assert output.loss.item() == pytest.approx(formula(f64(student.logits)), rel=1e-5)
    np.testing.assert_allclose(
        f64(student.logits.grad), central_difference(formula, f64(student.logits)), rtol=1e-3, atol=1e-6
    )
    assert output.terms == {}
    assert student.feature.grad is None


def test_kd_uses_no_labels() -> None:
    kd = KD(KDConfig(), SPEC)
    loss = kd(student_output(), teacher_output(), LABELS).loss
    assert kd(student_output(), teacher_output(), (LABELS + 1) % 5).loss == loss


def test_temperature_is_four_unless_told() -> None:
    output = KD(KDConfig(), SPEC)(student_output(), teacher_output(), LABELS)
    expected = kl_divergence(f64(teacher_output().logits), f64(student_output().logits), 4.0)
    assert output.loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("temperature", [0, -1.0, True, "hot"])
def test_temperature_is_a_positive_number(temperature: object) -> None:
    with pytest.raises(ValidationError, match="temperature"):
        KDConfig(temperature=temperature)
