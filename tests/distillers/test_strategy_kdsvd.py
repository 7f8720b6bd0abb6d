"""KDSVD against its formula, with NumPy's singular value decomposition."""

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
import torch
from map_formulas import Maps, alike, map_gradients
from pydantic import ValidationError
from reference_formulas import Array
from teaching_samples import LABELS, SPEC, f64, student_output, teacher_output

from tmkd_ray.distillers.kdsvd import KDSVD, KDSVDConfig, aligned, singular_vectors
from tmkd_ray.errors import UserError


def reference_vectors(student_CHW: Array, teacher_CHW: Array, count: int) -> tuple[Array, Array]:
    """Right singular vectors [W, K]: the teacher's turned upwards, the student's picked and turned by them."""
    _, values, rows = np.linalg.svd(teacher_CHW.reshape(-1, teacher_CHW.shape[2]))
    teacher = np.stack([row if row.sum() > 0 else -row for row in rows[:count]])
    candidates = np.linalg.svd(student_CHW.reshape(-1, student_CHW.shape[2]))[2][: count + 3]
    student = []
    for vector in teacher:
        cosines = candidates @ vector
        best = np.abs(cosines).argmax()
        student.append(np.sign(cosines[best]) * candidates[best])
    weight = values[:count] / np.sqrt((values[:count] ** 2).sum())
    return np.stack(student, axis=1) * weight, teacher.T * weight


def reference(students: Maps, teachers: Maps, count: int) -> float:
    total = 0.0
    for b in range(len(students[0])):
        stages = [
            reference_vectors(*(maps[b] for maps in alike(student, teacher)), count)
            for student, teacher in zip(students, teachers, strict=True)
        ]
        for (early_S, early_T), (late_S, late_T) in pairwise(stages):
            for k in range(early_T.shape[1]):
                for i in range(len(late_T)):
                    for j in range(len(early_T)):
                        of_student = np.exp(-((late_S[i, k] - early_S[j, k]) ** 2) / 8)
                        of_teacher = np.exp(-((late_T[i, k] - early_T[j, k]) ** 2) / 8)
                        total += (of_student - of_teacher) ** 2
    return total / len(students[0])


@pytest.mark.parametrize("count", [1, 2])
def test_kdsvd_is_the_formula(count: int) -> None:
    student, teacher = student_output(), teacher_output()
    loss = KDSVD(KDSVDConfig(num_vectors=count, weight=7.0), SPEC)(student, teacher, LABELS).loss
    loss.backward()
    assert teacher.feature_maps is not None
    teachers = [f64(value) for value in teacher.feature_maps]
    compared = student.feature_maps[1:]
    given = [f64(value) for value in compared]

    def formula(maps: Maps) -> float:
        return 7.0 * reference(maps, teachers, count)

    assert loss.item() == pytest.approx(formula(given), rel=1e-4)
    for value, expected in zip(compared, map_gradients(formula, given), strict=True):
        np.testing.assert_allclose(f64(value.grad), expected, rtol=5e-3, atol=1e-5)


def test_singular_vectors_are_numpys() -> None:
    maps = teacher_output().preactivation_maps
    assert maps is not None
    values, vectors = singular_vectors(maps[0], 4)
    for b, map_CHW in enumerate(f64(maps[0])):
        _, expected, rows = np.linalg.svd(map_CHW.reshape(-1, map_CHW.shape[2]))
        np.testing.assert_allclose(f64(values[b]), expected[:4], rtol=1e-4)
        # Up to the sign of each vector.
        np.testing.assert_allclose(np.abs(np.diag(rows[:4] @ f64(vectors[b]))), np.ones(4), rtol=1e-4)


def test_there_are_no_more_vectors_than_columns() -> None:
    values, vectors = singular_vectors(torch.randn(2, 3, 4, 2, generator=torch.Generator().manual_seed(0)), 5)
    assert values.shape == (2, 2)
    assert vectors.shape == (2, 2, 2)


def test_alignment_picks_the_most_parallel_vector_and_its_sign() -> None:
    axes = torch.eye(3)[None]
    teacher = torch.tensor([[[0.1, 0.9], [0.2, 0.3], [-0.9, 0.1]]])
    expected = torch.tensor([[[0.0, 1.0], [0.0, 0.0], [-1.0, 0.0]]])
    assert torch.equal(aligned(axes, teacher), expected)


def test_it_is_zero_where_the_student_says_the_same() -> None:
    spec = dataclasses.replace(SPEC, student_maps=SPEC.teacher_maps)
    student, teacher = student_output(), teacher_output()
    assert teacher.feature_maps is not None
    strategy = KDSVD(KDSVDConfig(num_vectors=2), spec)
    student.feature_maps = tuple(5.0 * value.flip(1) for value in teacher.feature_maps)
    assert strategy(student, teacher, LABELS).loss.item() == pytest.approx(0.0, abs=1e-8)
    student.feature_maps = tuple(value.flip(2).roll(1, 3) for value in teacher.feature_maps)
    assert strategy(student, teacher, LABELS).loss.item() > 1e-3


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_maps_without_directions_of_their_own_have_a_finite_gradient(scale: float) -> None:
    """Zeros, or all singular values alike: the vectors are not determined."""
    student, teacher = student_output(), teacher_output()
    student.feature_maps = tuple(
        (scale * torch.eye(value.shape[3]).expand(*value.shape)).clone().requires_grad_()
        for value in student.feature_maps
    )
    loss = KDSVD(KDSVDConfig(), SPEC)(student, teacher, LABELS).loss
    loss.backward()
    assert loss.isfinite()
    for value in student.feature_maps[1:]:
        assert value.grad is not None
        assert value.grad.isfinite().all()


def test_one_common_stage_is_refused() -> None:
    spec = dataclasses.replace(SPEC, student_maps=SPEC.student_maps[-1:], student_name="a model")
    with pytest.raises(UserError, match="neighbouring stages, and a model and the teacher have only one"):
        KDSVD(KDSVDConfig(), spec)


@pytest.mark.parametrize("option", [{"weight": 0}, {"num_vectors": 0}])
def test_options_out_of_range(option: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=next(iter(option))):
        KDSVDConfig.model_validate(option)
