"""mixup and cutmix: the pixels, the labels' shares, and the loss of both labels."""

from pathlib import Path

import numpy as np
import pytest
import reference_formulas as reference
import torch
import torch.nn.functional as F
from torch import Tensor
from training_samples import constants, run, student_task, training

from tmkd_ray.training.context import PlainContext
from tmkd_ray.training.mixing import Mixing, Mixture, _cut_box, mixed_loss
from tmkd_ray.types import LossOutput


def numbered(count: int, height: int = 12, width: int = 16) -> tuple[Tensor, Tensor]:
    """Return images that hold their own number everywhere, and that number as label."""
    labels = torch.arange(count)
    return labels.float()[:, None, None, None].expand(count, 3, height, width).clone(), labels


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_mixup_blends_by_the_shares_of_the_labels(alpha: float) -> None:
    shares = []
    for seed in range(300):
        torch.manual_seed(seed)
        images, labels = numbered(6)
        mixed, mixture = Mixing(mixup=alpha)(images, labels)
        expected = mixture.own_weight * labels + (1 - mixture.own_weight) * mixture.labels
        np.testing.assert_allclose(mixed.numpy(), expected[:, None, None, None].expand_as(mixed), atol=1e-5)
        assert sorted(mixture.labels.tolist()) == labels.tolist()
        assert torch.equal(images, numbered(6)[0]), "the images are left as they are"
        shares.append(mixture.own_weight)
    # Of Beta(a, a): mean 1/2, variance 1 / (4 (2a + 1)).
    assert np.mean(shares) == pytest.approx(0.5, abs=0.1)
    assert np.var(shares) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.3)


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_cutmix_puts_in_a_box_of_the_labels_share(alpha: float) -> None:
    shares, sides = [], []
    for seed in range(300):
        torch.manual_seed(seed)
        images, labels = numbered(5)
        mixed, mixture = Mixing(cutmix=alpha)(images, labels)
        for image, own, other in zip(mixed, labels, mixture.labels, strict=True):
            if own == other:
                assert (image == own).all()
                continue
            replaced = (image == other).all(dim=0)
            assert ((image == own).all(dim=0) | replaced).all()
            assert replaced.double().mean().item() == pytest.approx(1 - mixture.own_weight)
            rows, columns = replaced.any(dim=1), replaced.any(dim=0)
            assert torch.equal(replaced, rows[:, None] & columns[None]), "a box"
            assert all(len(side.int().unique_consecutive()) <= 3 for side in (rows, columns)), "in one piece"
            if replaced.any():
                sides.append((rows.sum().item() / 12, columns.sum().item() / 16, int(rows.int().argmax())))
        assert torch.equal(images, numbered(5)[0])
        shares.append(mixture.own_weight)
    assert {side[2] for side in sides} == set(range(12)), "anywhere"
    assert min(shares) < 0.2 < 0.8 < max(shares)
    heights, widths, _ = zip(*sides, strict=True)
    assert np.mean(heights) == pytest.approx(np.mean(widths), abs=0.05), "of the image's proportions"


@pytest.mark.parametrize(("own", "sides"), [(0.75, (10, 20)), (0.19, (18, 36)), (1.0, (0, 0))])
def test_the_box_has_the_share_that_was_drawn(own: float, sides: tuple[int, int]) -> None:
    """In the middle of the image; at its border it is cut."""
    torch.manual_seed(0)
    boxes = [_cut_box(20, 40, own) for _ in range(400)]
    for side, length in enumerate(sides):
        lengths = [box[side].stop - box[side].start for box in boxes]
        assert max(lengths) == length
        assert min(lengths) == (length + 1) // 2


def test_a_coin_picks_one_of_both() -> None:
    cuts = 0
    for seed in range(200):
        torch.manual_seed(seed)
        mixed, _ = Mixing(mixup=4.0, cutmix=1.0)(*numbered(8))
        cuts += bool((mixed == mixed.round()).all())
    assert 70 < cuts < 130


def test_draws_follow_the_seed() -> None:
    def draw(seed: int) -> tuple[Tensor, Mixture]:
        torch.manual_seed(seed)
        return Mixing(mixup=1.0, cutmix=1.0)(*numbered(7))

    assert torch.equal(draw(3)[0], draw(3)[0])
    assert draw(3)[1].own_weight != draw(4)[1].own_weight


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixed_loss_is_cross_entropy_with_the_mixed_targets(smoothing: float) -> None:
    """The same as one cross-entropy with a soft target, in NumPy."""
    rng = np.random.default_rng(0)
    logits, labels, others = rng.normal(size=(6, 4)), rng.integers(4, size=6), rng.integers(4, size=6)

    def loss_of(given: Tensor) -> LossOutput:
        value = F.cross_entropy(torch.from_numpy(logits), given, label_smoothing=smoothing)
        return LossOutput(2 * value, {"ce": value})

    output = mixed_loss(loss_of, torch.from_numpy(labels), Mixture(torch.from_numpy(others), 0.3))
    soft = 0.3 * np.eye(4)[labels] + 0.7 * np.eye(4)[others]
    soft = (1 - smoothing) * soft + smoothing / 4
    expected = -(soft * reference.log_softmax(logits)).sum(axis=1).mean()
    assert output.terms["ce"].item() == pytest.approx(expected)
    assert output.loss.item() == pytest.approx(2 * expected)


def test_a_student_learns_from_mixed_images(tmp_path: Path) -> None:
    config = training(epochs=2, mixup=0.4)
    task = student_task(config, "alone")
    task.module.train()
    batch = next(iter(task.batches(0, PlainContext(tmp_path))))
    torch.manual_seed(1)
    images, mixture = Mixing(mixup=0.4)(task.module.normalize(batch.images), batch.labels)
    logits = task.module.student(images).logits
    expected = mixture.own_weight * F.cross_entropy(logits, batch.labels)
    expected = expected + (1 - mixture.own_weight) * F.cross_entropy(logits, mixture.labels)
    torch.manual_seed(1)
    output = task.module(batch)
    torch.testing.assert_close(output.loss.terms["ce"], expected)
    assert output.correct is None
    history = run(task, config, tmp_path).history
    assert [record.train_accuracy for record in history] == [None, None]
    plain = training(epochs=2)
    assert history[0].loss != run(student_task(plain, "alone"), plain, tmp_path / "plain").history[0].loss


def test_mixing_beside_a_teacher_is_our_mistake() -> None:
    """The configuration refuses it."""
    assert constants() is not None
    with pytest.raises(AssertionError, match="no teacher saw"):
        student_task(training(mixup=0.4), "kd")
