"""Logit standardisation, on every strategy that compares logits."""

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from reference_formulas import Array, central_difference, decoupled_kl, kl_divergence
from teaching_samples import CLASSES, LABELS, SPEC, extreme_logits, f64, student_output, teacher_output

from tmkd_ray.distillers import STRATEGIES, Strategy, build_strategy
from tmkd_ray.distillers.base import LogitStrategyConfig
from tmkd_ray.losses import standardize
from tmkd_ray.objective import DistillerConfig
from tmkd_ray.types import ModelOutput

LOGIT_STRATEGIES = [name for name in STRATEGIES if issubclass(STRATEGIES.get(name).Config, LogitStrategyConfig)]
every_strategy = pytest.mark.parametrize("name", LOGIT_STRATEGIES)


def z_score(logits_BC: Array) -> Array:
    """Sun et al. 2024: less the mean, over the standard deviation with 1/C."""
    rows = []
    for row in logits_BC:
        mean = row.sum() / len(row)
        rows.append((row - mean) / np.sqrt(((row - mean) ** 2).sum() / len(row)))
    return np.stack(rows)


def build(name: str, **options: object) -> Strategy:
    config = STRATEGIES.get(name).Config.model_validate({"standardize_logits": True, **options})
    return build_strategy(config, SPEC)


def test_every_logit_strategy_has_it_and_no_other() -> None:
    assert set(LOGIT_STRATEGIES) >= {"kd", "dkd", "dist", "mlkd", "richkd"}
    for name in STRATEGIES:
        config = STRATEGIES.get(name).Config
        if "logits" in STRATEGIES.get(name).requires:
            assert name in LOGIT_STRATEGIES
            assert config().standardize_logits is False
        else:
            with pytest.raises(ValidationError, match="standardize_logits"):
                config(standardize_logits=True)


def test_z_scores_are_the_formula() -> None:
    logits = student_output().logits
    z = standardize(logits)
    np.testing.assert_allclose(f64(z), z_score(f64(logits)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(f64(z).mean(axis=1), 0, atol=1e-6)
    np.testing.assert_allclose(f64(z).std(axis=1), 1, rtol=1e-5)
    weight = teacher_output().logits
    (z * weight).sum().backward()
    expected = central_difference(lambda x: float((z_score(x) * f64(weight)).sum()), f64(logits))
    np.testing.assert_allclose(f64(logits.grad), expected, rtol=1e-3, atol=1e-5)


def test_no_z_score_is_above_the_root_of_the_number_of_other_classes() -> None:
    one_hot = torch.eye(CLASSES)
    z = standardize(50 * one_hot)
    assert z.diagonal().tolist() == pytest.approx([math.sqrt(CLASSES - 1)] * CLASSES, rel=1e-5)
    assert standardize(teacher_output().logits).abs().max() <= math.sqrt(CLASSES - 1)


def test_z_scores_keep_the_order() -> None:
    logits = student_output().logits.detach()
    assert torch.equal(standardize(logits).argsort(dim=1), logits.argsort(dim=1))


def test_kd_and_dkd_of_z_scores_are_the_formula() -> None:
    student, teacher = student_output(), teacher_output()
    z_t, z_s = z_score(f64(teacher.logits)), z_score(f64(student.logits))
    kd = build("kd", temperature=2.0)(student, teacher, LABELS).loss.item()
    assert kd == pytest.approx(kl_divergence(z_t, z_s, 2.0), rel=1e-4)
    output = build("dkd", temperature=2.0)(student, teacher, LABELS)
    tckd, nckd = decoupled_kl(z_t, z_s, LABELS.numpy(), 2.0)
    assert output.terms["tckd"].item() == pytest.approx(tckd.mean(), rel=1e-4)
    assert output.terms["nckd"].item() == pytest.approx(nckd.mean(), rel=1e-4)


@pytest.mark.parametrize("name", [name for name in LOGIT_STRATEGIES if name != "mlkd"])
def test_the_loss_ignores_scale_and_shift_of_each_images_logits(name: str) -> None:
    """So the student need not match the teacher's range. (Of MLKD only the instance level: tested there.)"""
    strategy, student, teacher = build(name), student_output(), teacher_output()
    loss = strategy(student, teacher, LABELS).loss.item()
    scale, shift = torch.tensor([[0.3], [1.0], [7.0], [40.0]]), torch.tensor([[5.0], [-100.0], [0.0], [2.0]])
    moved = ModelOutput(scale * student.logits + shift, student.feature)
    assert strategy(moved, teacher, LABELS).loss.item() == pytest.approx(loss, rel=1e-3)
    plain = build(name, standardize_logits=False)
    assert plain(moved, teacher, LABELS).loss.item() != pytest.approx(
        plain(student, teacher, LABELS).loss.item(), rel=1e-2
    )


@every_strategy
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_finite_under_autocast_at_extreme_logits(name: str, dtype: torch.dtype) -> None:
    """Also for a row of equal logits, which has no spread to divide by."""
    teacher_logits, student_logits, labels = extreme_logits()
    student = ModelOutput(student_logits.to(dtype).requires_grad_(), student_output(batch=8).feature)
    teacher = teacher_output(batch=8)
    teacher.logits = teacher_logits
    with torch.autocast("cpu", dtype=dtype):
        loss = build(name)(student, teacher, labels).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert student.logits.grad is not None
    assert student.logits.grad.isfinite().all()


def test_it_is_an_option_of_the_strategy_in_a_config() -> None:
    section = {"name": "kd", "temperature": 2, "standardize_logits": True}
    config = DistillerConfig.model_validate(
        {"name": "kd", "strategy": section, "kd_weight": 9, "ce_weight": 0.1}
    )
    assert config.strategy.model_dump() == section
    with pytest.raises(ValidationError, match="standardize_logits"):
        DistillerConfig.model_validate(
            {"name": "kd", "strategy": {"name": "kd", "standardize_logits": "sometimes"}}
        )
