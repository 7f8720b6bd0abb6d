"""Neuron selectivity transfer against its formula."""

import numpy as np
import pytest
import torch
from map_formulas import Maps, alike, map_gradients
from pydantic import ValidationError
from reference_formulas import Array
from teaching_samples import LABELS, SPEC, f64, student_output, teacher_output

from tmkd_ray.distillers.nst import NST, NSTConfig, squared_mmd


def selectivity(map_CHW: Array) -> list[Array]:
    """Each channel over the pixels, of unit length; a channel of zeros stays."""
    vectors = [map_HW.ravel() for map_HW in map_CHW]
    return [vector / max(np.sqrt((vector**2).sum()), 1e-12) for vector in vectors]


def kernel(one: list[Array], other: list[Array]) -> float:
    return float(np.mean([(a @ b) ** 2 for a in one for b in other]))


def reference(students: Maps, teachers: Maps) -> float:
    """Eq. 4 of the paper: E k(s, s') + E k(t, t') - 2 E k(s, t) with k(x, y) = (xᵀy)²."""
    total = 0.0
    for student_BCHW, teacher_BCHW in zip(students, teachers, strict=True):
        each = []
        for student_CHW, teacher_CHW in zip(*alike(student_BCHW, teacher_BCHW), strict=True):
            s, t = selectivity(student_CHW), selectivity(teacher_CHW)
            each.append(kernel(s, s) + kernel(t, t) - 2 * kernel(s, t))
        total += float(np.mean(each))
    return total


def test_nst_is_the_formula() -> None:
    student, teacher = student_output(), teacher_output()
    student.feature_maps = tuple((v.detach() + 0.05).requires_grad_() for v in student.feature_maps)
    loss = NST(NSTConfig(weight=7.0), SPEC)(student, teacher, LABELS).loss
    loss.backward()
    assert teacher.feature_maps is not None
    teachers = [f64(value) for value in teacher.feature_maps]
    compared = student.feature_maps[1:]

    def formula(maps: Maps) -> float:
        return 7.0 * reference(maps, teachers)

    given = [f64(value) for value in compared]
    assert loss.item() == pytest.approx(formula(given), rel=1e-5)
    for value, expected in zip(compared, map_gradients(formula, given), strict=True):
        np.testing.assert_allclose(f64(value.grad), expected, rtol=1e-3, atol=1e-5)


def test_it_is_the_distance_of_the_mean_outer_products() -> None:
    """What the kernel trick means: |E s sᵀ - E t tᵀ|² over pairs of pixels."""
    student, teacher = (output.preactivation_maps for output in (student_output(), teacher_output()))
    assert teacher is not None
    student_BCHW, teacher_BCHW = student[1].detach(), teacher[0][:, :, :4, :4]

    def mean_outer(map_CHW: Array) -> Array:
        return np.asarray(np.mean([np.outer(v, v) for v in selectivity(map_CHW)], axis=0))

    pairs = zip(f64(student_BCHW), f64(teacher_BCHW), strict=True)
    expected = np.mean([((mean_outer(s) - mean_outer(t)) ** 2).sum() for s, t in pairs])
    assert squared_mmd(student_BCHW, teacher_BCHW).item() == pytest.approx(expected, rel=1e-4)


def test_it_is_zero_for_the_same_patterns_in_any_order_number_and_size() -> None:
    maps = student_output().preactivation_maps[1].detach()
    twice = torch.cat([5.0 * maps.flip(1), -maps], dim=1)
    assert squared_mmd(twice, maps).item() == pytest.approx(0.0, abs=1e-6)
    assert squared_mmd(maps.flip(3), maps).item() > 0.01


@pytest.mark.parametrize("weight", [0, -1])
def test_options_out_of_range(weight: float) -> None:
    with pytest.raises(ValidationError, match="weight"):
        NSTConfig(weight=weight)
