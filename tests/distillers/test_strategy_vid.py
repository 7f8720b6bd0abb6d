import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from reference_formulas import Array, central_difference, linear, mean_squared_error
from scipy.stats import norm
from teaching_samples import LABELS, SPEC, TEACHER_WIDTH, f64, student_output, teacher_output

from tmkd_ray.distillers.vid import VID, VIDConfig, gaussian_nll


@pytest.fixture
def strategy() -> VID:
    torch.manual_seed(0)
    built = VID(VIDConfig(), SPEC)
    with torch.no_grad():
        built.raw_variance.copy_(torch.linspace(-3.0, 4.0, TEACHER_WIDTH))
    return built


def reference(mean_BD: Array, raw_variance_D: Array, target_BD: Array) -> float:
    """Ahn et al. 2019: σ² = log(1 + exp(α)) + ε; minus the log density without log √2π, averaged."""
    total = 0.0
    for mean_D, target_D in zip(mean_BD, target_BD, strict=True):
        for mean, raw, target in zip(mean_D, raw_variance_D, target_D, strict=True):
            variance = np.log(1 + np.exp(raw)) + 1e-5
            total += 0.5 * np.log(variance) + (target - mean) ** 2 / (2 * variance)
    return float(total / target_BD.size)


def test_vid_is_the_formula(strategy: VID) -> None:
    student, teacher = student_output(), teacher_output()
    loss = strategy(student, teacher, LABELS).loss
    loss.backward()
    feature, weight, bias = f64(student.feature), f64(strategy.mean.weight), f64(strategy.mean.bias)
    raw = f64(strategy.raw_variance)

    def formula(
        feature_BS: Array = feature,
        weight_DS: Array = weight,
        bias_D: Array = bias,
        raw_variance_D: Array = raw,
    ) -> float:
        return reference(linear(feature_BS, weight_DS, bias_D), raw_variance_D, f64(teacher.feature))

    assert loss.item() == pytest.approx(formula(), rel=1e-5)
    for actual, expected in (
        (student.feature.grad, central_difference(formula, feature)),
        (strategy.mean.weight.grad, central_difference(lambda w: formula(weight_DS=w), weight)),
        (strategy.mean.bias.grad, central_difference(lambda b: formula(bias_D=b), bias)),
        (strategy.raw_variance.grad, central_difference(lambda a: formula(raw_variance_D=a), raw)),
    ):
        np.testing.assert_allclose(f64(actual), expected, rtol=1e-3, atol=1e-5)
    assert student.logits.grad is None


def test_it_is_the_gaussian_log_density_without_its_constant() -> None:
    mean, target = student_output().feature.detach()[:, :TEACHER_WIDTH], teacher_output().feature
    variance = torch.linspace(0.1, 7.0, TEACHER_WIDTH)
    log_density = norm.logpdf(f64(target), f64(mean), np.sqrt(f64(variance))).mean()
    loss = gaussian_nll(mean, variance, target).item()
    assert loss == pytest.approx(-log_density - 0.5 * math.log(2 * math.pi), rel=1e-5)


@pytest.mark.parametrize("variance", [0.01, 1.0, 5.0, 90.0])
def test_the_first_variance_is_the_options(variance: float) -> None:
    strategy = VID(VIDConfig(initial_variance=variance), SPEC)
    assert strategy.variance.tolist() == pytest.approx([variance] * TEACHER_WIDTH, rel=1e-4)
    assert VIDConfig().initial_variance == 5.0


def test_at_the_right_mean_only_the_variances_are_left() -> None:
    """The mean's gradient vanishes there, and half the log variance is the loss."""
    target = teacher_output().feature
    mean = target.clone().requires_grad_()
    loss = gaussian_nll(mean, torch.full((TEACHER_WIDTH,), 5.0), target)
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * math.log(5.0), rel=1e-6)
    assert mean.grad is not None
    assert torch.equal(mean.grad, torch.zeros_like(mean))


def test_the_best_variance_is_the_mean_squared_residual() -> None:
    mean, target = student_output().feature.detach()[:, :TEACHER_WIDTH], teacher_output().feature
    variance = (target - mean).square().mean(dim=0).requires_grad_()
    gaussian_nll(mean, variance, target).backward()
    assert variance.grad is not None
    assert variance.grad.abs().max() < 1e-6


def test_with_unit_variance_it_is_half_the_squared_error() -> None:
    mean, target = student_output().feature.detach()[:, :TEACHER_WIDTH], teacher_output().feature
    expected = 0.5 * mean_squared_error(f64(mean), f64(target))
    assert gaussian_nll(mean, torch.ones(TEACHER_WIDTH), target).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("variance", [0, 1e-6])
def test_options_out_of_range(variance: float) -> None:
    with pytest.raises(ValidationError, match="initial_variance"):
        VIDConfig(initial_variance=variance)
