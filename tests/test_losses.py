"""kl_divergence, info_nce and gather_from_workers (the latter over two processes: test_distributed_losses)."""

import math

import numpy as np
import pytest
import torch
from reference_formulas import central_difference
from reference_formulas import info_nce as reference_info_nce
from reference_formulas import kl_divergence as reference_kl
from teaching_samples import CLASSES, LABELS, extreme_logits, f64, student_output, teacher_output

from tmkd_ray.losses import gather_from_workers, info_nce, kl_divergence

TEMPERATURES = (0.5, 1.0, 4.0, 20.0)
every_temperature = pytest.mark.parametrize("temperature", TEMPERATURES)


def test_kl_of_a_hand_sized_example() -> None:
    teacher = torch.tensor([[0.0, math.log(3)]])  # (1/4, 3/4)
    student = torch.tensor([[0.0, 0.0]])  # (1/2, 1/2)
    by_hand = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert kl_divergence(teacher, student, 1.0).item() == pytest.approx(by_hand, rel=1e-6)
    # The other way round it is another number.
    assert kl_divergence(student, teacher, 1.0).item() == pytest.approx(
        0.5 * math.log(2) + 0.5 * math.log(2 / 3), rel=1e-6
    )


@every_temperature
def test_kl_is_the_formula(temperature: float) -> None:
    teacher, student = teacher_output().logits, student_output().logits
    loss = kl_divergence(teacher, student, temperature)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(reference_kl(f64(teacher), f64(student), temperature), rel=1e-5)


@every_temperature
def test_kl_gradient_is_the_formulas(temperature: float) -> None:
    teacher, student = teacher_output().logits, student_output().logits
    kl_divergence(teacher, student, temperature).backward()
    expected = central_difference(lambda z: reference_kl(f64(teacher), z, temperature), f64(student))
    np.testing.assert_allclose(f64(student.grad), expected, rtol=1e-3, atol=1e-6)


@every_temperature
def test_kl_is_zero_with_zero_gradient_only_where_the_student_agrees(temperature: float) -> None:
    teacher = teacher_output().logits
    student = (teacher + 7.0).requires_grad_()  # a shift of all logits changes no probability
    loss = kl_divergence(teacher, student, temperature)
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-5)
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-5
    assert kl_divergence(teacher, student.detach().roll(1, dims=1), temperature) > 0.01


@every_temperature
def test_kl_ignores_a_shift_of_each_rows_logits(temperature: float) -> None:
    teacher, student = teacher_output().logits, student_output().logits
    shift = torch.tensor([[-30.0], [0.5], [3.0], [50.0]])
    loss = kl_divergence(teacher, student, temperature).item()
    assert kl_divergence(teacher + shift, student, temperature).item() == pytest.approx(loss, rel=1e-4)
    assert kl_divergence(teacher, student + shift, temperature).item() == pytest.approx(loss, rel=1e-4)


@every_temperature
def test_kl_at_a_temperature_is_t_squared_times_kl_of_the_softened_logits(temperature: float) -> None:
    teacher, student = teacher_output().logits, student_output().logits
    softened = kl_divergence(teacher / temperature, student / temperature, 1.0)
    assert kl_divergence(teacher, student, temperature).item() == pytest.approx(
        temperature**2 * softened.item(), rel=1e-5
    )


def test_kl_gradient_tends_to_the_difference_of_centred_logits_when_hot() -> None:
    """Hinton et al. 2015, eq. 4: what T² keeps. For T → ∞ the gradient is (z_S - z_T) / C of each row."""
    teacher, student = teacher_output().logits, student_output().logits
    kl_divergence(teacher, student, 1000.0).backward()
    difference = f64(student) - f64(teacher)
    centred = difference - difference.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(f64(student.grad), centred / CLASSES / len(centred), rtol=0.02, atol=2e-3)


def test_kl_is_a_mean_over_the_batch() -> None:
    teacher, student = teacher_output().logits, student_output().logits
    each = [kl_divergence(teacher[b : b + 1], student[b : b + 1], 4.0).item() for b in range(len(teacher))]
    assert kl_divergence(teacher, student, 4.0).item() == pytest.approx(np.mean(each), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_temperature
def test_kl_of_half_precision_logits_is_computed_in_float32(dtype: torch.dtype, temperature: float) -> None:
    teacher, student, _ = extreme_logits()
    student = student.to(dtype).requires_grad_()
    loss = kl_divergence(teacher.to(dtype), student, temperature)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(reference_kl(f64(teacher), f64(student), temperature), rel=1e-5)
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_info_nce_is_the_formula() -> None:
    logits = (5 * teacher_output().logits).requires_grad_()
    loss = info_nce(logits, LABELS)
    loss.backward()
    assert loss.item() == pytest.approx(reference_info_nce(f64(logits), LABELS.numpy()), rel=1e-5)
    expected = central_difference(lambda z: reference_info_nce(z, LABELS.numpy()), f64(logits))
    np.testing.assert_allclose(f64(logits.grad), expected, rtol=1e-3, atol=1e-6)


def test_info_nce_of_equal_candidates_is_log_of_their_number() -> None:
    assert info_nce(torch.full((4, 9), 0.3), LABELS).item() == pytest.approx(math.log(9), rel=1e-6)


def test_info_nce_does_not_depend_on_the_order_of_the_candidates() -> None:
    logits = teacher_output().logits
    order = torch.tensor([2, 0, 4, 1, 3])
    loss = info_nce(logits[:, order], order.argsort()[LABELS])
    assert loss.item() == pytest.approx(info_nce(logits, LABELS).item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_info_nce_of_half_precision_similarities_is_computed_in_float32(dtype: torch.dtype) -> None:
    _, logits, labels = extreme_logits()
    logits = logits.to(dtype).requires_grad_()
    loss = info_nce(logits, labels)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(reference_info_nce(f64(logits), labels.numpy()), rel=1e-5)
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_a_lone_worker_gathers_its_own_tensor() -> None:
    tensor = torch.randn(3, 2, requires_grad=True)
    gathered, start = gather_from_workers(tensor)
    torch.testing.assert_close(gathered, tensor.detach(), rtol=0, atol=0)
    assert start == 0
    assert not gathered.requires_grad
