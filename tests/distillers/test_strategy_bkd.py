"""Balanced KD against the authors' formula."""

import dataclasses

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from reference_formulas import Array, central_difference, kl_divergence, log_softmax, softmax
from teaching_samples import LABELS, SPEC, f64, student_output, teacher_output

from tmkd_ray.distillers.bkd import BKD, BKDConfig, class_weights

COUNTS = (5, 1, 2, 0, 1)


def reference_weights(counts: tuple[int, ...], beta: float) -> Array:
    """Cui et al. 2019: (1 - β) / (1 - βⁿ), scaled so that they sum to the number of classes."""
    weights = np.array([(1 - beta) / (1 - beta ** max(n, 1)) for n in counts])
    return np.asarray(weights / weights.sum() * len(counts))


def reference(teacher_BC: Array, student_BC: Array, weights_C: Array, temperature: float) -> float:
    """T² Σ q (log q - log p_S), q the teacher's softened probabilities times the weights, normalised."""
    total = 0.0
    for p_C, log_s_C in zip(
        softmax(teacher_BC / temperature), log_softmax(student_BC / temperature), strict=True
    ):
        q_C = p_C * weights_C / (p_C * weights_C).sum()
        total += float(q_C @ (np.log(q_C) - log_s_C))
    return temperature**2 * total / len(teacher_BC)


@pytest.mark.parametrize(("temperature", "beta"), [(2.0, 0.9999), (1.0, 0.5), (4.0, 0.9)])
def test_bkd_is_the_formula(temperature: float, beta: float) -> None:
    student, teacher = student_output(), teacher_output()
    strategy = BKD(BKDConfig(temperature=temperature, beta=beta), SPEC)
    loss = strategy(student, teacher, LABELS).loss
    loss.backward()
    weights = reference_weights(COUNTS, beta)

    def formula(student_BC: Array) -> float:
        return reference(f64(teacher.logits), student_BC, weights, temperature)

    logits = f64(student.logits)
    assert loss.item() == pytest.approx(formula(logits), rel=1e-5)
    np.testing.assert_allclose(
        f64(student.logits.grad), central_difference(formula, logits), rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.9999])
@pytest.mark.parametrize("counts", [COUNTS, (1000, 10, 3), (5, 5, 5, 5)])
def test_weights_are_the_inverse_effective_numbers(counts: tuple[int, ...], beta: float) -> None:
    weights = class_weights(torch.tensor(counts), beta)
    np.testing.assert_allclose(weights.numpy(), reference_weights(counts, beta), rtol=1e-5)
    assert weights.mean().item() == pytest.approx(1.0, rel=1e-6)


def test_weights_by_hand() -> None:
    """At β = 1/2 the effective numbers of 1, 2 and 3 images are 1, 3/2 and 7/4."""
    weights = class_weights(torch.tensor([1, 2, 3]), 0.5)
    expected = np.array([1, 2 / 3, 4 / 7])
    np.testing.assert_allclose(weights.numpy(), expected / expected.mean(), rtol=1e-6)


@pytest.mark.parametrize(("counts", "beta"), [(COUNTS, 0.0), ((9, 9, 9, 9, 9), 0.9999)])
def test_with_even_weights_it_is_kd(counts: tuple[int, ...], beta: float) -> None:
    strategy = BKD(BKDConfig(beta=beta), dataclasses.replace(SPEC, class_counts=counts))
    student, teacher = student_output(), teacher_output()
    expected = kl_divergence(f64(teacher.logits), f64(student.logits), 2.0)
    assert strategy(student, teacher, LABELS).loss.item() == pytest.approx(expected, rel=1e-5)


def test_the_gradient_raises_rare_classes_beyond_the_teacher() -> None:
    """A student that agrees with the teacher is moved towards the classes with few images."""
    teacher = teacher_output()
    student = student_output()
    student.logits = teacher.logits.clone().requires_grad_()
    spec = dataclasses.replace(SPEC, class_counts=(5000, 5, 5, 5, 5))
    BKD(BKDConfig(), spec)(student, teacher, LABELS).loss.backward()
    assert student.logits.grad is not None
    assert (student.logits.grad[:, 0] > 0).all()
    assert (student.logits.grad[:, 1:] < 0).all()


@pytest.mark.parametrize("option", [{"beta": 1.0}, {"beta": -0.1}, {"temperature": 0}])
def test_options_out_of_range(option: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=next(iter(option))):
        BKDConfig.model_validate(option)
