import numpy as np
import pytest
import torch
from pydantic import ValidationError
from reference_formulas import Array, central_difference, kl_divergence
from teaching_samples import LABELS, SPEC, f64, student_output, teacher_output

from tmkd_ray.distillers.kd import KD, KDConfig
from tmkd_ray.distillers.richkd import RichKD, RichKDConfig, fused_logits
from tmkd_ray.objective import DistillerConfig


@pytest.mark.parametrize(("share", "temperature"), [(0.7, 3.0), (0.25, 1.0)])
def test_richkd_is_kd_from_the_fused_logits(share: float, temperature: float) -> None:
    student, teacher = student_output(), teacher_output()
    loss = RichKD(RichKDConfig(teacher_share=share, temperature=temperature), SPEC)(
        student, teacher, LABELS
    ).loss
    loss.backward()
    target = share * f64(teacher.logits) + (1 - share) * f64(teacher.text_logits)

    def formula(logits_BC: Array) -> float:
        return kl_divergence(target, logits_BC, temperature)

    assert loss.item() == pytest.approx(formula(f64(student.logits)), rel=1e-5)
    np.testing.assert_allclose(
        f64(student.logits.grad), central_difference(formula, f64(student.logits)), rtol=1e-3, atol=1e-5
    )


def test_defaults_are_the_authors() -> None:
    config = RichKDConfig()
    assert (config.teacher_share, config.temperature) == (0.7, 3.0)


def test_with_the_teacher_alone_it_is_plain_kd() -> None:
    student, teacher = student_output(), teacher_output()
    rich = RichKD(RichKDConfig(teacher_share=1.0), SPEC)(student, teacher, LABELS).loss
    assert torch.equal(rich, KD(KDConfig(temperature=3.0), SPEC)(student, teacher, LABELS).loss)


def test_with_clip_alone_the_teachers_logits_do_not_matter() -> None:
    student, teacher = student_output(), teacher_output()
    strategy = RichKD(RichKDConfig(teacher_share=0.0), SPEC)
    loss = strategy(student, teacher, LABELS).loss
    teacher.logits = teacher.logits.flip(1)
    assert torch.equal(strategy(student, teacher, LABELS).loss, loss)


def test_zero_where_the_student_has_the_fused_logits() -> None:
    student, teacher = student_output(), teacher_output()
    assert teacher.text_logits is not None
    student.logits = fused_logits(teacher.logits, teacher.text_logits, 0.7) - 4.0
    loss = RichKD(RichKDConfig(), SPEC)(student, teacher, LABELS).loss
    assert loss.item() == pytest.approx(0.0, abs=1e-5)


def test_it_needs_a_text_teacher() -> None:
    config = DistillerConfig.model_validate({"name": "kd", "strategy": "richkd"})
    assert config.needs_text_teacher
    assert config.trains_classifier
    teacher = teacher_output()
    teacher.text_logits = None
    with pytest.raises(AssertionError):
        RichKD(RichKDConfig(), SPEC)(student_output(), teacher, LABELS)


@pytest.mark.parametrize("options", [{"temperature": 0}, {"teacher_share": -0.1}, {"teacher_share": 1.1}])
def test_options_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=next(iter(options))):
        RichKDConfig(**options)
