import numpy as np
import pytest
import torch
from reference_formulas import Array, central_difference, linear, mean_squared_error
from teaching_samples import BATCH, LABELS, SPEC, TEACHER_WIDTH, f64, student_output, teacher_output

from tmkd_ray.distillers.feature_mse import FeatureMSE, FeatureMSEConfig


@pytest.fixture
def strategy() -> FeatureMSE:
    torch.manual_seed(0)
    return FeatureMSE(FeatureMSEConfig(), SPEC)


def test_feature_mse_is_the_formula(strategy: FeatureMSE) -> None:
    student, teacher = student_output(), teacher_output()
    output = strategy(student, teacher, LABELS)
    output.loss.backward()
    weight, bias = f64(strategy.projection.weight), f64(strategy.projection.bias)

    def formula(feature_BS: Array, weight_DS: Array = weight, bias_D: Array = bias) -> float:
        return mean_squared_error(linear(feature_BS, weight_DS, bias_D), f64(teacher.feature))

    feature = f64(student.feature)
    assert output.loss.item() == pytest.approx(formula(feature), rel=1e-5)
    for actual, expected in (
        (student.feature.grad, central_difference(formula, feature)),
        (strategy.projection.weight.grad, central_difference(lambda w: formula(feature, weight_DS=w), weight)),
        (strategy.projection.bias.grad, central_difference(lambda b: formula(feature, bias_D=b), bias)),
    ):
        np.testing.assert_allclose(f64(actual), expected, rtol=1e-3, atol=1e-6)
    assert output.terms == {}
    assert student.logits.grad is None


def test_mean_over_batch_and_width(strategy: FeatureMSE) -> None:
    """One unit off in one of B × D numbers is a loss of 1 / (B D)."""
    student, teacher = student_output(), teacher_output()
    teacher.feature = strategy.projection(student.feature).detach()
    assert strategy(student, teacher, LABELS).loss.item() == 0.0
    teacher.feature[2, 1] += 1.0
    assert strategy(student, teacher, LABELS).loss.item() == pytest.approx(
        1 / (BATCH * TEACHER_WIDTH), rel=1e-5
    )
