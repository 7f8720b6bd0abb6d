"""FitNet against its formula: one stage, a 1×1 regressor, mean squared error."""

import dataclasses

import numpy as np
import pytest
import torch
from map_formulas import alike, convolution
from pydantic import ValidationError
from reference_formulas import Array, central_difference
from teaching_samples import LABELS, SPEC, f64, student_output, teacher_output

from tmkd_ray.distillers.fitnet import FitNet, FitNetConfig
from tmkd_ray.errors import UserError


def strategy_of(**options: float) -> FitNet:
    torch.manual_seed(0)
    return FitNet(FitNetConfig.model_validate(options), SPEC)


@pytest.mark.parametrize("stage", [1, 2])
def test_fitnet_is_the_formula(stage: int) -> None:
    """In stage 1 the teacher's map is the larger, in stage 2 the student's, whose very first is left out."""
    strategy = strategy_of(stage=stage, weight=3.0)
    student, teacher = student_output(), teacher_output()
    loss = strategy(student, teacher, LABELS).loss
    loss.backward()
    assert teacher.feature_maps is not None
    target = f64(teacher.feature_maps[stage - 1])
    guided, weight, bias = f64(student.feature_maps[stage]), f64(strategy.regressor.weight), None
    bias = f64(strategy.regressor.bias)

    def formula(map_BCHW: Array = guided, weight_DC11: Array = weight, bias_D: Array = bias) -> float:
        student_BCHW, teacher_BDHW = alike(map_BCHW, target)
        difference = convolution(student_BCHW, weight_DC11, bias_D) - teacher_BDHW
        return float(3.0 * (difference**2).sum() / difference.size)

    assert loss.item() == pytest.approx(formula(), rel=1e-5)
    for actual, expected in (
        (student.feature_maps[stage].grad, central_difference(formula, guided)),
        (strategy.regressor.weight.grad, central_difference(lambda w: formula(weight_DC11=w), weight)),
        (strategy.regressor.bias.grad, central_difference(lambda b: formula(bias_D=b), bias)),
    ):
        np.testing.assert_allclose(f64(actual), expected, rtol=1e-3, atol=1e-5)
    assert all(value.grad is None for index, value in enumerate(student.feature_maps) if index != stage)


def test_it_is_zero_where_the_regressed_map_is_the_teachers() -> None:
    """A student as wide as the teacher that says the same, under the identity."""
    spec = dataclasses.replace(SPEC, student_maps=SPEC.teacher_maps)
    strategy, student, teacher = FitNet(FitNetConfig(), spec), student_output(), teacher_output()
    torch.nn.init.dirac_(strategy.regressor.weight)
    torch.nn.init.zeros_(strategy.regressor.bias)
    assert teacher.feature_maps is not None
    student.feature_maps = teacher.feature_maps
    assert strategy(student, teacher, LABELS).loss.item() == 0.0
    student.feature_maps = tuple(value + 0.1 for value in teacher.feature_maps)
    assert strategy(student, teacher, LABELS).loss.item() == pytest.approx(100 * 0.01, rel=1e-4)


def test_a_stage_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match=r"distiller\.strategy\.stage=3: the student and the teacher have 2"):
        strategy_of(stage=3)


@pytest.mark.parametrize("option", [{"stage": 0}, {"weight": 0}])
def test_options_out_of_range(option: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=next(iter(option))):
        FitNetConfig.model_validate(option)
