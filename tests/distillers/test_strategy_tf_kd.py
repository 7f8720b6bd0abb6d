"""Teacher-free KD (regularisation) against the authors' formula."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from reference_formulas import Array, Labels, central_difference, log_softmax, softmax
from teaching_samples import CLASSES, LABELS, SPEC, f64, student_output

from tmkd_ray.distillers.tf_kd import TfKD, TfKDConfig, virtual_probabilities
from tmkd_ray.objective import Distiller, DistillerConfig
from tmkd_ray.types import LossOutput


def reference(student_BC: Array, labels_B: Labels, correct: float, temperature: float) -> float:
    total = 0.0
    for log_s_C, label in zip(log_softmax(student_BC), labels_B, strict=True):
        virtual_C = np.full(len(log_s_C), (1 - correct) / (len(log_s_C) - 1))
        virtual_C[label] = correct
        target_C = softmax(virtual_C[None] / temperature)[0]
        total += float(target_C @ (np.log(target_C) - log_s_C))
    return total / len(labels_B)


@pytest.mark.parametrize(("correct", "temperature"), [(0.99, 20.0), (0.9, 0.1), (0.5, 1.0)])
def test_tf_kd_is_the_formula(correct: float, temperature: float) -> None:
    student = student_output()
    strategy = TfKD(TfKDConfig(correct_probability=correct, temperature=temperature), SPEC)
    loss = strategy(student, None, LABELS).loss
    loss.backward()

    def formula(student_BC: Array) -> float:
        return reference(student_BC, LABELS.numpy(), correct, temperature)

    logits = f64(student.logits)
    assert loss.item() == pytest.approx(formula(logits), rel=1e-5)
    np.testing.assert_allclose(
        f64(student.logits.grad), central_difference(formula, logits), rtol=1e-3, atol=1e-6
    )


def test_the_virtual_teacher_by_hand() -> None:
    virtual = virtual_probabilities(torch.tensor([2, 0]), 4, 0.7)
    expected = [[0.1, 0.1, 0.7, 0.1], [0.7, 0.1, 0.1, 0.1]]
    torch.testing.assert_close(virtual, torch.tensor(expected))
    torch.testing.assert_close(virtual_probabilities(LABELS, CLASSES, 0.99).sum(dim=1), torch.ones(4))


def test_it_is_zero_where_the_student_is_the_softened_virtual_teacher() -> None:
    config = TfKDConfig()
    student = student_output()
    student.logits = virtual_probabilities(LABELS, CLASSES, config.correct_probability) / config.temperature + 7
    assert TfKD(config, SPEC)(student, None, LABELS).loss.item() == pytest.approx(0.0, abs=1e-6)


def test_it_needs_no_teacher() -> None:
    """The strategy of a student alone, 0.9 CE + 0.1 Tf-KD as the authors have it."""
    options = {"name": "alone", "ce_weight": 0.9, "kd_weight": 0.1, "strategy": "tf_kd"}
    config = DistillerConfig.model_validate(options)
    assert config.teacher == "none"
    assert config.requires == frozenset()
    assert config.trains_classifier
    student = student_output()
    output: LossOutput = Distiller(config, SPEC)(student, None, LABELS)
    assert output.terms.keys() == {"ce", "kd"}
    virtual = reference(f64(student.logits), LABELS.numpy(), 0.99, 20.0)
    assert output.terms["kd"].item() == pytest.approx(virtual, rel=1e-5)
    expected = 0.9 * output.terms["ce"].item() + 0.1 * virtual
    assert output.loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("option", [{"correct_probability": 1}, {"correct_probability": 0}, {"temperature": 0}])
def test_options_out_of_range(option: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=next(iter(option))):
        TfKDConfig.model_validate(option)
