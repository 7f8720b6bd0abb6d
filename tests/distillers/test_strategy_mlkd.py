import numpy as np
import pytest
import torch
from pydantic import ValidationError
from reference_formulas import Array, central_difference, kl_divergence, softmax
from teaching_samples import BATCH, CLASSES, LABELS, SPEC, f64, student_output, teacher_output

from tmkd_ray.distillers.mlkd import MLKD, MLKDConfig, correlation_losses


def reference(teacher_BC: Array, student_BC: Array, temperatures: tuple[float, ...]) -> Array:
    """Jin et al. 2023: (instance, batch, class) level, summed over the temperatures."""
    levels = np.zeros(3)
    for temperature in temperatures:
        t, s = softmax(teacher_BC / temperature), softmax(student_BC / temperature)
        samples = sum((t[i] @ t[j] - s[i] @ s[j]) ** 2 for i in range(len(t)) for j in range(len(t)))
        pairs = [(c, d) for c in range(t.shape[1]) for d in range(t.shape[1])]
        classes = sum((t[:, c] @ t[:, d] - s[:, c] @ s[:, d]) ** 2 for c, d in pairs)
        levels += [
            kl_divergence(teacher_BC, student_BC, temperature),
            samples / len(t),
            classes / t.shape[1],
        ]
    return levels


def test_mlkd_is_the_formula() -> None:
    student, teacher = student_output(), teacher_output()
    config = MLKDConfig(temperatures=(1.0, 3.0), instance_weight=0.2, batch_weight=5.0, class_weight=7.0)
    output = MLKD(config, SPEC)(student, teacher, LABELS)
    output.loss.backward()

    def formula(logits_BC: Array) -> float:
        return float(reference(f64(teacher.logits), logits_BC, (1.0, 3.0)) @ [0.2, 5.0, 7.0])

    names = ("instance_level", "batch_level", "class_level")
    assert tuple(output.terms) == names
    for name, level in zip(names, reference(f64(teacher.logits), f64(student.logits), (1.0, 3.0)), strict=True):
        assert output.terms[name].item() == pytest.approx(level, rel=1e-5)
    assert output.loss.item() == pytest.approx(formula(f64(student.logits)), rel=1e-5)
    np.testing.assert_allclose(
        f64(student.logits.grad), central_difference(formula, f64(student.logits)), rtol=1e-3, atol=1e-5
    )


def test_defaults_are_the_authors() -> None:
    student, teacher = student_output(), teacher_output()
    expected = reference(f64(teacher.logits), f64(student.logits), (2.0, 3.0, 4.0, 5.0, 6.0)).sum()
    assert MLKD(MLKDConfig(), SPEC)(student, teacher, LABELS).loss.item() == pytest.approx(expected, rel=1e-5)


def test_correlation_losses_of_a_hand_sized_example() -> None:
    """Teacher sure of class 0 and 1, student sure of class 0 twice: Gram matrices I against all ones."""
    teacher = torch.tensor([[100.0, 0.0], [0.0, 100.0]])
    student = torch.tensor([[100.0, 0.0], [100.0, 0.0]])
    batch_level, class_level = correlation_losses(teacher, student, 1.0)
    assert batch_level.item() == pytest.approx(2 / 2)  # two pairs off by one, over two samples
    assert class_level.item() == pytest.approx(2 / 2)  # diag(1, 1) against diag(2, 0), over two classes


def test_zero_where_the_student_agrees() -> None:
    teacher = teacher_output()
    student = student_output()
    student.logits = teacher.logits + 2.0
    for value in MLKD(MLKDConfig(), SPEC)(student, teacher, LABELS).terms.values():
        assert value.item() == pytest.approx(0.0, abs=1e-5)


def test_batch_level_ignores_the_names_of_classes_and_class_level_the_order_of_samples() -> None:
    teacher, student = teacher_output().logits, student_output().logits.detach()
    classes, samples = torch.arange(CLASSES).roll(1), torch.arange(BATCH).roll(1)
    before = correlation_losses(teacher, student, 2.0)
    renamed = correlation_losses(teacher, student[:, classes], 2.0)
    shuffled = correlation_losses(teacher, student[samples], 2.0)
    assert renamed[0].item() == pytest.approx(before[0].item(), rel=1e-5)
    assert renamed[1].item() != pytest.approx(before[1].item(), rel=1e-2)
    assert shuffled[1].item() == pytest.approx(before[1].item(), rel=1e-5)
    assert shuffled[0].item() != pytest.approx(before[0].item(), rel=1e-2)


def test_standardisation_is_of_the_instance_level_alone() -> None:
    student, teacher = student_output(), teacher_output()
    output = MLKD(MLKDConfig(standardize_logits=True, temperatures=(2.0,)), SPEC)(student, teacher, LABELS)
    raw_t, raw_s = f64(teacher.logits), f64(student.logits)
    z_t, z_s = ((x - x.mean(axis=1, keepdims=True)) / x.std(axis=1, keepdims=True) for x in (raw_t, raw_s))
    assert output.terms["instance_level"].item() == pytest.approx(kl_divergence(z_t, z_s, 2.0), rel=1e-4)
    _, batch_level, class_level = reference(raw_t, raw_s, (2.0,))
    assert output.terms["batch_level"].item() == pytest.approx(batch_level, rel=1e-5)
    assert output.terms["class_level"].item() == pytest.approx(class_level, rel=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"temperatures": []},
        {"temperatures": [4.0, 0.0]},
        {"instance_weight": -1},
        {"batch_weight": -1},
        {"class_weight": -1},
    ],
)
def test_options_out_of_range(options: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(options))):
        MLKDConfig.model_validate(options)
