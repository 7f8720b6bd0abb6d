"""The label-free objectives against float64 NumPy: losses, gradients, banks over several steps."""

from typing import Any

import numpy as np
import pytest
import torch
from pretraining_samples import B, C, E, build, cross_entropy, f64, lgd_step, normal, text_bank, unit
from torch import Tensor

from tmkd_ray.pretraining import PRETRAINERS, Pretrainer
from tmkd_ray.pretraining.lgd import LGD, aggregate_knowledge, lgd_terms
from tmkd_ray.pretraining.seed import SEED
from tmkd_ray.types import LossOutput

SMALL: dict[str, dict[str, Any]] = {"seed": {"queue_size": 7}}


def make(name: str, **options: Any) -> Pretrainer:
    return build(name, **{**SMALL.get(name, {}), **options})


def step(pretrainer: Pretrainer, student_BE: Tensor, teacher_BE: Tensor) -> LossOutput:
    output = pretrainer(student_BE, teacher_BE)
    pretrainer.after_step()
    pretrainer.after_update()
    return output


# LGD ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"alpha": 0.2, "momentum": 0.9, "teacher_temperature": 0.07, "student_temperature": 0.5}],
    ids=["published", "other"],
)
def test_lgd_steps_are_those_of_the_algorithm(options: dict[str, Any]) -> None:
    """Loss and both branches with the bank as it was before the step, then the bank, over several steps."""
    lgd = make("lgd", **options)
    assert isinstance(lgd, LGD)
    visual, seen = f64(lgd.visual_bank), np.zeros(C, dtype=bool)
    np.testing.assert_allclose(np.linalg.norm(visual, axis=1), 1, atol=1e-6)
    assert not lgd.seen.any()
    config = lgd.config
    moved_twice = False
    for number in range(4):
        student, teacher = 3 * normal(number, B, E), unit(50 + number, B, E)
        was_seen = seen
        loss, by_visual, by_text, visual, seen = lgd_step(
            f64(student),
            f64(teacher),
            f64(text_bank()),
            visual,
            seen,
            config.alpha,
            config.momentum,
            (config.student_temperature, config.teacher_temperature),
        )
        output = step(lgd, student, teacher)
        assert output.loss.item() == pytest.approx(loss, rel=1e-4)
        assert output.terms["visual"].item() == pytest.approx(by_visual, rel=1e-4)
        assert output.terms["text"].item() == pytest.approx(by_text, rel=1e-4)
        np.testing.assert_allclose(f64(lgd.visual_bank), visual, atol=1e-6)
        assert lgd.seen.tolist() == seen.tolist()
        moved_twice |= bool((was_seen & seen).any())
    assert moved_twice, "no row was ever moved, only set"


def test_lgka_by_hand() -> None:
    """Two embeddings of class 0, one of class 2, none of class 1; class 2 was met before."""
    text = torch.eye(3)
    bank = torch.tensor([[9.0, 9.0, 9.0], [0.0, 5.0, 0.0], [0.0, 0.0, 1.0]])
    teacher = torch.tensor([[0.8, 0.6, 0.0], [0.6, 0.0, 0.8], [1.0, 0.0, 0.0]])
    after, seen = aggregate_knowledge(bank, torch.tensor([False, False, True]), teacher, text, 0.9)
    expected = [[0.9, 0.3, 0.0], [0.0, 5.0, 0.0], [0.06, 0.0, 0.98]]
    torch.testing.assert_close(after, torch.tensor(expected))
    assert seen.tolist() == [True, False, True]


def test_the_bank_is_not_moved_by_the_loss() -> None:
    lgd = make("lgd")
    before = {name: value.clone() for name, value in lgd.state_dict().items()}
    assert set(before) == {"visual_bank", "seen"}
    lgd(normal(0, B, E), unit(1, B, E))
    assert all(torch.equal(value, before[name]) for name, value in lgd.state_dict().items())


def test_lgd_of_a_bank_of_another_task() -> None:
    """As many rows as that task has classes."""
    lgd = make("lgd", classes=11)
    assert isinstance(lgd, LGD)
    step(lgd, normal(0, B, E), unit(1, B, E))
    assert lgd.visual_bank.shape == (11, E)
    assert 1 <= int(lgd.seen.sum()) <= B


# SEED -----------------------------------------------------------------------------------------------


def test_seed_steps_are_those_of_the_algorithm() -> None:
    """The oldest rows of the queue are replaced, in a circle; 7 rows take batches of 4."""
    seed = make("seed")
    assert isinstance(seed, SEED)
    queue = f64(seed.queue)
    np.testing.assert_allclose(np.linalg.norm(queue, axis=1), 1, atol=1e-6)
    position = 0
    for number in range(5):
        student, teacher = 3 * normal(number, B, E), unit(50 + number, B, E)
        expected = cross_entropy(f64(student), f64(teacher), queue, 0.2, 0.01, own=True)
        output = step(seed, student, teacher)
        assert output.loss.item() == pytest.approx(expected, rel=1e-4)
        for row in f64(teacher):
            queue[position] = row
            position = (position + 1) % 7
        np.testing.assert_allclose(f64(seed.queue), queue, atol=1e-7)
    assert int(seed.position) == position == 20 % 7


def test_a_batch_larger_than_the_queue_leaves_its_last_rows() -> None:
    seed = make("seed", queue_size=3)
    assert isinstance(seed, SEED)
    teacher = unit(1, B, E)
    step(seed, normal(0, B, E), teacher)
    rows = sorted(map(tuple, seed.queue.tolist()))
    assert rows == sorted(map(tuple, teacher[1:].tolist()))


# Embedding ------------------------------------------------------------------------------------------


def test_embedding_distances() -> None:
    student, teacher = 3 * normal(0, B, E), unit(1, B, E)
    s, t = f64(student), f64(teacher)
    squared = np.mean([((a - b) ** 2).sum() for a, b in zip(s, t, strict=True)])
    cosine = np.mean([1 - a @ b / np.sqrt(a @ a) / np.sqrt(b @ b) for a, b in zip(s, t, strict=True)])
    assert make("embedding")(student, teacher).loss.item() == pytest.approx(squared, rel=1e-5)
    assert make("embedding", loss="cosine")(student, teacher).loss.item() == pytest.approx(cosine, rel=1e-5)


# All of them ----------------------------------------------------------------------------------------

CASES: dict[str, dict[str, Any]] = {name: {"name": name} for name in PRETRAINERS} | {
    "cosine": {"name": "embedding", "loss": "cosine"}
}


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_that_of_the_loss(case: str) -> None:
    """By finite differences in float64; of the student's embedding alone."""
    pretrainer = make(**CASES[case]).double()
    teacher = unit(1, B, E).double().requires_grad_()
    student = (2 * normal(0, B, E)).double().requires_grad_()
    pretrainer.compare(student, teacher).loss.backward()
    assert student.grad is not None
    gradient = student.grad.clone()
    assert gradient.abs().max() > 1e-3
    for row in range(B):
        for column in range(E):
            change = torch.zeros(B, E, dtype=torch.float64)
            change[row, column] = 1e-6
            with torch.no_grad():
                above = pretrainer.compare(student + change, teacher).loss
                below = pretrainer.compare(student - change, teacher).loss
            assert gradient[row, column].item() == pytest.approx(((above - below) / 2e-6).item(), abs=1e-6)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_finite_in_half_precision(case: str, dtype: torch.dtype) -> None:
    """Embeddings of half precision at opposite ends, under autocast: a float32 loss of those values."""
    pretrainer = make(**CASES[case])
    teacher = unit(1, B, E)
    student = torch.cat([teacher[:2], -teacher[2:]]).mul(100).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = pretrainer(student, teacher)
    assert output.loss.dtype == torch.float32
    assert torch.isfinite(output.loss)
    output.loss.backward()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()
    exact = pretrainer(student.detach().float(), teacher).loss
    assert output.loss.item() == pytest.approx(exact.item(), rel=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_it_learns_the_teachers_embedding(case: str) -> None:
    """Gradient descent on free embeddings turns them to the teacher's."""
    pretrainer = make(**CASES[case], **({"teacher_temperature": 0.1} if case in ("lgd", "seed") else {}))
    teacher = unit(1, B, E)
    student = normal(2, B, E).requires_grad_()
    optimizer = torch.optim.Adam([student], lr=0.05)
    before = torch.cosine_similarity(student, teacher).mean().item()
    for _ in range(150):
        optimizer.zero_grad()
        pretrainer(student, teacher).loss.backward()
        optimizer.step()
        pretrainer.after_step()
        pretrainer.after_update()
    assert torch.cosine_similarity(student, teacher).mean().item() > max(before + 0.2, 0.7)


def test_terms_of_lgd_take_the_banks_as_they_are() -> None:
    """A visual row of half the length counts with half the similarity: rows are not normalised."""
    student, teacher, text, visual = unit(0, B, E), unit(1, B, E), unit(2, C, E), unit(3, C, E)
    whole = lgd_terms(student, teacher, text, visual, 0.2, 0.01)
    half = lgd_terms(student, teacher, text, visual / 2, 0.2, 0.01)
    assert half["text"] == whole["text"]
    expected = cross_entropy(f64(student), f64(teacher), f64(visual) / 2, 0.2, 0.01, own=True)
    assert half["visual"].item() == pytest.approx(expected, rel=1e-4)
