"""Attention transfer against its formula."""

import numpy as np
import pytest
import torch
from map_formulas import Maps, alike, map_gradients
from pydantic import ValidationError
from reference_formulas import Array
from teaching_samples import LABELS, SPEC, f64, student_output, teacher_output

from tmkd_ray.distillers.at import AT, ATConfig, attention


def reference_attention(map_CHW: Array, power: float) -> Array:
    """Σ_c |A_c|^p as a vector of unit length (the mean over channels in place of the sum cancels)."""
    total = np.zeros(map_CHW.shape[1:])
    for map_HW in map_CHW:
        total += np.abs(map_HW) ** power
    vector = total.ravel()
    return np.asarray(vector / np.sqrt((vector**2).sum()))


def reference(students: Maps, teachers: Maps, power: float) -> float:
    total = 0.0
    for student_BCHW, teacher_BCHW in zip(students, teachers, strict=True):
        pairs = zip(*alike(student_BCHW, teacher_BCHW), strict=True)
        each = [((reference_attention(s, power) - reference_attention(t, power)) ** 2).mean() for s, t in pairs]
        total += float(np.mean(each))
    return total


@pytest.mark.parametrize("power", [1.0, 2.0, 4.0])
def test_at_is_the_formula(power: float) -> None:
    student, teacher = student_output(), teacher_output()
    # Without zeros, at which |a| has no derivative.
    student.feature_maps = tuple((v.detach() + 0.05).requires_grad_() for v in student.feature_maps)
    loss = AT(ATConfig(power=power, weight=7.0), SPEC)(student, teacher, LABELS).loss
    loss.backward()
    assert teacher.feature_maps is not None
    teachers = [f64(value) for value in teacher.feature_maps]
    compared = student.feature_maps[1:]

    def formula(maps: Maps) -> float:
        return 7.0 * reference(maps, teachers, power)

    given = [f64(value) for value in compared]
    assert loss.item() == pytest.approx(formula(given), rel=1e-5)
    for value, expected in zip(compared, map_gradients(formula, given), strict=True):
        np.testing.assert_allclose(f64(value.grad), expected, rtol=1e-3, atol=1e-5)
    assert student.feature_maps[0].grad is None


def test_attention_by_hand() -> None:
    """Channels (3, 0) and (0, 2) in two pixels: squares 9 and 4, over their length √97."""
    maps = torch.tensor([[[[3.0, 0.0]], [[0.0, -2.0]]]])
    expected = np.array([[9.0, 4.0]]) / np.sqrt(97.0)
    np.testing.assert_allclose(attention(maps, 2.0).numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("power", [1.0, 2.0, 3.0])
def test_attention_has_no_sign_no_scale_and_no_order_of_channels(power: float) -> None:
    maps = student_output().preactivation_maps[1].detach()
    same = -3.0 * maps[:, [2, 0, 1]]
    torch.testing.assert_close(attention(same, power), attention(maps, power))
    turned = maps.flip(3)
    assert not torch.allclose(attention(turned, power), attention(maps, power), atol=1e-2)


def test_a_map_of_zeros_has_a_finite_gradient() -> None:
    maps = torch.zeros(2, 3, 4, 4, requires_grad=True)
    attention(maps, 2.0).sum().backward()
    assert maps.grad is not None
    assert torch.equal(maps.grad, torch.zeros_like(maps))


@pytest.mark.parametrize("option", [{"weight": 0}, {"power": 0.5}])
def test_options_out_of_range(option: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=next(iter(option))):
        ATConfig.model_validate(option)
