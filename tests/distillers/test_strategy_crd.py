import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from reference_formulas import Array, central_difference, linear, normalize
from teaching_samples import (
    LABELS,
    NUM_SAMPLES,
    SPEC,
    STUDENT_WIDTH,
    TEACHER_WIDTH,
    f64,
    student_output,
    teacher_output,
)

from tmkd_ray.distillers.crd import CRD, CRDConfig, contrastive_nce

INDICES = torch.tensor([7, 2, 5, 0])


def build(seed: int = 0, **options: float) -> CRD:
    torch.manual_seed(seed)
    small = {"embedding_width": 3, "num_negatives": 5, "temperature": 0.5}
    return CRD(CRDConfig.model_validate(small | options), SPEC)


def nce(positive: float, negatives: Array, num_negatives: int, num_samples: int, normalizer: float) -> float:
    """Tian et al. 2020, the critic h = P / (P + K/N) of P = exp(similarity / τ) / Z: one anchor's loss."""
    constant = num_negatives / num_samples

    def critic(similarity: float | Array) -> float | Array:
        probability = np.exp(similarity) / normalizer
        return probability / (probability + constant)

    expected = np.mean(np.log(1 - critic(negatives))) if len(negatives) else 0.0
    return float(-np.log(critic(positive)) - num_negatives * expected)


def test_nce_is_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    positive = torch.randn(4, generator=generator).requires_grad_()
    negative = torch.randn(4, 6, generator=generator).requires_grad_()
    counts = torch.rand(4, 6, generator=generator) > 0.3
    counts[3] = False  # an anchor without any negative
    loss = contrastive_nce(positive, negative, counts, 50, torch.tensor(math.log(17.0)))
    loss.backward()

    def formula(positive_B: Array, negative_BK: Array) -> float:
        each = [
            nce(p, row[valid], 6, 50, 17.0)
            for p, row, valid in zip(positive_B, negative_BK, counts.numpy(), strict=True)
        ]
        return float(np.mean(each))

    p, n = f64(positive), f64(negative)
    assert loss.item() == pytest.approx(formula(p, n), rel=1e-5)
    for actual, expected in (
        (positive.grad, central_difference(lambda x: formula(x, n), p)),
        (negative.grad, central_difference(lambda x: formula(p, x), n)),
    ):
        np.testing.assert_allclose(f64(actual), expected, rtol=1e-3, atol=1e-6)


def test_crd_is_the_formula() -> None:
    """With some labels in the bank, and negatives that the test chooses."""
    strategy, student, teacher = build(), student_output(), teacher_output()
    drawn = torch.tensor([[0, 1, 2, 3, 8], [4, 4, 5, 6, 0], [8, 7, 6, 2, 1], [2, 3, 4, 5, 6]])
    strategy._draw = lambda labels_B: drawn
    strategy.bank_labels.copy_(torch.tensor([0, 3, -1, 4, 1, -1, 0, 3, 2]))
    strategy.log_normalizers.copy_(torch.tensor([11.0, 23.0]).log())
    strategy.step = 1
    output = strategy(student, teacher, LABELS)
    output.loss.backward()
    banks = f64(strategy.student_bank), f64(strategy.teacher_bank)
    parameters = {name: f64(value) for name, value in strategy.named_parameters()}
    labels = strategy.bank_labels.numpy()

    def parts(feature_BS: Array, values: dict[str, Array]) -> tuple[float, float]:
        s, t = (
            normalize(linear(feature, values[f"{side}_embedding.weight"], values[f"{side}_embedding.bias"]))
            for side, feature in (("student", feature_BS), ("teacher", f64(teacher.feature)))
        )
        by_student = by_teacher = 0.0
        for b, label in enumerate(LABELS.tolist()):
            others = [row for row in drawn[b].tolist() if labels[row] != label]
            positive = s[b] @ t[b] / 0.5
            by_student += nce(positive, banks[1][others] @ s[b] / 0.5, 5, NUM_SAMPLES, 11.0)
            by_teacher += nce(positive, banks[0][others] @ t[b] / 0.5, 5, NUM_SAMPLES, 23.0)
        return by_student / len(LABELS), by_teacher / len(LABELS)

    by_student, by_teacher = parts(f64(student.feature), parameters)
    assert output.terms["student_anchor"].item() == pytest.approx(by_student, rel=1e-5)
    assert output.terms["teacher_anchor"].item() == pytest.approx(by_teacher, rel=1e-5)
    assert output.loss.item() == pytest.approx(by_student + by_teacher, rel=1e-5)
    expected = central_difference(lambda x: sum(parts(x, parameters)), f64(student.feature))
    np.testing.assert_allclose(f64(student.feature.grad), expected, rtol=1e-3, atol=1e-5)
    for name, parameter in strategy.named_parameters():
        expected = central_difference(
            lambda x, name=name: sum(parts(f64(student.feature), parameters | {name: x})), parameters[name]
        )
        np.testing.assert_allclose(f64(parameter.grad), expected, rtol=1e-3, atol=1e-5)


def test_defaults_are_the_papers() -> None:
    config = CRDConfig()
    values = (config.embedding_width, config.num_negatives, config.temperature, config.momentum)
    assert values == (128, 16_384, 0.07, 0.5)


def test_the_first_batch_sets_the_normalizers() -> None:
    """Z = N times the mean of exp(similarity / τ) over what was drawn; without gradient, and kept."""
    strategy, student, teacher = build(), student_output(), teacher_output()
    drawn = strategy._draw(LABELS).numpy()
    strategy(student, teacher, LABELS)
    expected = []
    for side, other, output in (("student", "teacher", student), ("teacher", "student", teacher)):
        head, bank = getattr(strategy, f"{side}_embedding"), f64(getattr(strategy, f"{other}_bank"))
        embedding = normalize(linear(f64(output.feature), f64(head.weight), f64(head.bias)))
        each = [np.exp(bank[row] @ embedding[b] / 0.5) for b, rows in enumerate(drawn) for row in rows]
        expected.append(math.log(NUM_SAMPLES * np.mean(each)))
    strategy.after_step(INDICES)
    assert strategy.log_normalizers.tolist() == pytest.approx(expected, rel=1e-5)
    assert not strategy.log_normalizers.requires_grad
    kept = strategy.log_normalizers.clone()
    strategy(student_output(seed=8), teacher_output(seed=9), LABELS)
    strategy.after_step(INDICES)
    assert torch.equal(strategy.log_normalizers, kept)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_the_rows_of_the_batch_move_and_no_others(momentum: float) -> None:
    strategy, student, teacher = build(momentum=momentum), student_output(), teacher_output()
    before = {name: f64(value).copy() for name, value in strategy.named_buffers()}
    strategy(student, teacher, LABELS)
    for name, value in strategy.named_buffers():
        np.testing.assert_array_equal(f64(value), before[name])  # forward changes nothing
    strategy.after_step(INDICES)
    rows, others = INDICES.tolist(), [1, 3, 4, 6, 8]
    for side, feature in (("student", student.feature), ("teacher", teacher.feature)):
        head, bank = getattr(strategy, f"{side}_embedding"), f64(getattr(strategy, f"{side}_bank"))
        embedding = normalize(linear(f64(feature), f64(head.weight), f64(head.bias)))
        old = before[f"{side}_bank"]
        expected = normalize(momentum * old[rows] + (1 - momentum) * embedding)
        np.testing.assert_allclose(bank[rows], expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(bank[others], old[others])
    assert strategy.bank_labels.tolist() == [4, -1, 3, -1, -1, 3, -1, 0, -1]
    assert not strategy.student_bank.requires_grad


def test_rows_begin_at_random_unit_vectors() -> None:
    strategy = CRD(CRDConfig(), SPEC)
    for bank in (strategy.student_bank, strategy.teacher_bank):
        assert bank.shape == (NUM_SAMPLES, 128)
        assert bank.norm(dim=1).tolist() == pytest.approx([1.0] * NUM_SAMPLES, rel=1e-5)
    similarity = strategy.student_bank @ strategy.teacher_bank.T
    assert similarity.abs().max() < 0.5


def test_negatives_are_drawn_evenly_anew_each_step() -> None:
    strategy = build(num_negatives=20_000)
    first = strategy._draw(LABELS)
    assert first.shape == (len(LABELS), 20_000)
    share = torch.bincount(first.flatten(), minlength=NUM_SAMPLES) / first.numel()
    assert share.tolist() == pytest.approx([1 / NUM_SAMPLES] * NUM_SAMPLES, rel=0.05)
    assert not torch.equal(first[0], first[1])
    assert torch.equal(strategy._draw(LABELS), first)
    strategy.step = 1
    assert (strategy._draw(LABELS) == first).float().mean() < 0.2


def test_images_of_the_same_class_do_not_repel() -> None:
    """A bank of nothing but the anchors' own classes leaves the positives alone."""
    strategy, student, teacher = build(), student_output(), teacher_output()
    labels = torch.full_like(LABELS, 3)
    strategy.bank_labels.fill_(3)
    alone = strategy(student, teacher, labels).loss.item()
    strategy.student_bank.copy_(strategy.student_bank.flip(0))
    strategy.teacher_bank.copy_(strategy.teacher_bank.flip(0))
    strategy.step, strategy.log_normalizers = 1, strategy._seen.log_normalizers
    assert strategy(student, teacher, labels).loss.item() == pytest.approx(alone, rel=1e-6)
    strategy.bank_labels.fill_(2)
    assert strategy(student, teacher, labels).loss.item() > alone + 0.1


def test_training_brings_the_two_sides_together() -> None:
    """Gradient descent on features and heads: each image's student is nearest to its own teacher."""
    strategy = build(embedding_width=8, temperature=0.2, num_negatives=64)
    labels = torch.tensor([0, 1, 2, 3])
    feature = student_output().feature.detach().clone().requires_grad_()
    student, teacher = student_output(), teacher_output()
    student.feature = feature
    optimizer = torch.optim.SGD([feature, *strategy.parameters()], lr=0.1)
    losses = []
    for _ in range(60):
        loss = strategy(student, teacher, labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        strategy.after_step(INDICES)
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    similarity = strategy.student_bank[INDICES] @ strategy.teacher_bank[INDICES].T
    assert similarity.argmax(dim=1).tolist() == [0, 1, 2, 3]


def test_the_state_goes_on_where_it_was_saved() -> None:
    strategy = build()
    for seed in range(3):
        strategy(student_output(seed), teacher_output(seed), LABELS)
        strategy.after_step((INDICES + seed) % NUM_SAMPLES)
    other = build(seed=5)
    other.load_state_dict(strategy.state_dict())
    assert other.step == strategy.step == 3
    for one in (strategy, other):
        one(student_output(7), teacher_output(7), LABELS)
        one.after_step(INDICES)
    state, copied = strategy.state_dict(), other.state_dict()
    assert state.keys() == copied.keys()
    assert all(torch.equal(state[name], copied[name]) for name in state)


def test_a_step_follows_a_forward_pass() -> None:
    strategy = build()
    with pytest.raises(AssertionError, match="forward"):
        strategy.after_step(INDICES)


def test_heads_and_banks_have_the_specs_sizes() -> None:
    strategy = build()
    assert strategy.student_embedding.weight.shape == (3, STUDENT_WIDTH)
    assert strategy.teacher_embedding.weight.shape == (3, TEACHER_WIDTH)
    assert strategy.student_bank.shape == strategy.teacher_bank.shape == (NUM_SAMPLES, 3)


@pytest.mark.parametrize(
    "options",
    [
        {"embedding_width": 0},
        {"num_negatives": 0},
        {"temperature": 0},
        {"momentum": -0.1},
        {"momentum": 1.0},
    ],
)
def test_options_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=next(iter(options))):
        CRDConfig.model_validate(options)
