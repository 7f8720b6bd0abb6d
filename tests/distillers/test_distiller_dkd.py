import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from reference_formulas import Array, central_difference, softmax
from reference_formulas import decoupled_kl as reference_decoupled_kl
from reference_formulas import kl_divergence as reference_kl
from teaching_samples import LABELS, SPEC, extreme_logits, f64, student_output, teacher_output

from tmkd_ray.distillers.dkd import DKD, DKDConfig, decoupled_kl
from tmkd_ray.losses import kl_divergence

every_temperature = pytest.mark.parametrize("temperature", [1.0, 4.0])


def test_decoupled_kl_of_a_hand_sized_example() -> None:
    teacher = torch.tensor([[math.log(2), math.log(1), math.log(3)]])  # (2/6, 1/6, 3/6); target the first
    student = torch.zeros(1, 3)  # (1/3, 1/3, 1/3)
    tckd, nckd = decoupled_kl(teacher, student, torch.tensor([0]), 1.0)
    assert tckd.item() == pytest.approx(0.0, abs=1e-7)  # both give the target one third
    # Among the others: (1/4, 3/4) against (1/2, 1/2).
    assert nckd.item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5), rel=1e-6)

    tckd, nckd = decoupled_kl(teacher, student, torch.tensor([2]), 1.0)
    assert tckd.item() == pytest.approx(0.5 * math.log(1.5) + 0.5 * math.log(0.75), rel=1e-5)
    assert nckd.item() == pytest.approx(2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3), rel=1e-5)


@every_temperature
def test_dkd_is_the_formula(temperature: float) -> None:
    student, teacher = student_output(), teacher_output()
    config = DKDConfig(temperature=temperature, target_weight=0.7, non_target_weight=3.0)
    output = DKD(config, SPEC)(student, teacher, LABELS)
    output.loss.backward()

    def parts(logits_BC: Array) -> tuple[float, float]:
        tckd, nckd = reference_decoupled_kl(f64(teacher.logits), logits_BC, LABELS.numpy(), temperature)
        return float(tckd.mean()), float(nckd.mean())

    def formula(logits_BC: Array) -> float:
        tckd, nckd = parts(logits_BC)
        return 0.7 * tckd + 3.0 * nckd

    tckd, nckd = parts(f64(student.logits))
    assert output.terms.keys() == {"tckd", "nckd"}
    assert output.terms["tckd"].item() == pytest.approx(tckd, rel=1e-4)
    assert output.terms["nckd"].item() == pytest.approx(nckd, rel=1e-4)
    assert output.loss.item() == pytest.approx(formula(f64(student.logits)), rel=1e-4)
    np.testing.assert_allclose(
        f64(student.logits.grad), central_difference(formula, f64(student.logits)), rtol=1e-3, atol=1e-5
    )
    assert student.feature.grad is None


def test_defaults_are_the_papers() -> None:
    student, teacher = student_output(), teacher_output()
    tckd, nckd = reference_decoupled_kl(f64(teacher.logits), f64(student.logits), LABELS.numpy(), 4.0)
    output = DKD(DKDConfig(), SPEC)(student, teacher, LABELS)
    assert output.loss.item() == pytest.approx(tckd.mean() + 8.0 * nckd.mean(), rel=1e-4)


@every_temperature
def test_kd_is_tckd_and_the_weighted_nckd(temperature: float) -> None:
    """Eq. 7 of the paper, sample by sample: KD = TCKD + (1 - p_T(target)) NCKD."""
    student, teacher = student_output().logits.detach(), teacher_output().logits
    for b, label in enumerate(LABELS.tolist()):
        row = slice(b, b + 1)
        tckd, nckd = decoupled_kl(teacher[row], student[row], LABELS[row], temperature)
        target = softmax(f64(teacher[row]) / temperature)[0, label]
        kd = reference_kl(f64(teacher[row]), f64(student[row]), temperature)
        assert tckd.item() + (1 - target) * nckd.item() == pytest.approx(kd, rel=1e-4)
        assert kl_divergence(teacher[row], student[row], temperature).item() == pytest.approx(kd, rel=1e-4)


@every_temperature
def test_both_parts_are_zero_where_the_student_agrees(temperature: float) -> None:
    teacher = teacher_output().logits
    for part in decoupled_kl(teacher, teacher + 5.0, LABELS, temperature):
        assert part.item() == pytest.approx(0.0, abs=1e-5)


def test_the_target_part_sees_only_the_targets_probability() -> None:
    teacher, student = teacher_output().logits, student_output().logits.detach()
    probabilities = torch.softmax(student, dim=1)
    mixed = probabilities.clone()
    for b, label in enumerate(LABELS.tolist()):  # the other classes swap their shares
        others = [c for c in range(5) if c != label]
        mixed[b, others] = probabilities[b, others[::-1]]
    before = decoupled_kl(teacher, student, LABELS, 1.0)
    after = decoupled_kl(teacher, mixed.log(), LABELS, 1.0)
    assert after[0].item() == pytest.approx(before[0].item(), rel=1e-4)
    assert after[1].item() != pytest.approx(before[1].item(), rel=1e-2)


def test_the_non_target_part_does_not_see_the_targets_logit() -> None:
    teacher, student = teacher_output().logits, student_output().logits.detach()
    raised = student + 3.0 * torch.nn.functional.one_hot(LABELS, 5)
    before = decoupled_kl(teacher, student, LABELS, 4.0)
    after = decoupled_kl(teacher, raised, LABELS, 4.0)
    assert after[1].item() == pytest.approx(before[1].item(), rel=1e-4)
    assert after[0].item() != pytest.approx(before[0].item(), rel=1e-2)


@every_temperature
def test_right_at_extreme_logits(temperature: float) -> None:
    """A probability of one leaves nothing to the others; the formulas still hold, and so do the gradients."""
    teacher, student, labels = extreme_logits()
    student.requires_grad_()
    tckd, nckd = decoupled_kl(teacher, student, labels, temperature)
    (tckd + nckd).backward()
    expected = reference_decoupled_kl(f64(teacher), f64(student), labels.numpy(), temperature)
    assert tckd.item() == pytest.approx(expected[0].mean(), rel=1e-4)
    assert nckd.item() == pytest.approx(expected[1].mean(), rel=1e-4)

    def formula(logits_BC: Array) -> float:
        parts = reference_decoupled_kl(f64(teacher), logits_BC, labels.numpy(), temperature)
        return float(sum(part.mean() for part in parts))

    np.testing.assert_allclose(
        f64(student.grad), central_difference(formula, f64(student), 1e-3), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("options", [{"temperature": 0}, {"target_weight": -1}, {"non_target_weight": -0.1}])
def test_options_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=next(iter(options))):
        DKDConfig(**options)
