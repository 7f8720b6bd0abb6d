"""`Tally` against plain sums in float64 NumPy."""

import functools
import math
import operator
import pickle

import numpy as np
import pytest
import reference_formulas as reference
import torch

from tmkd_ray.training.tally import NUM_BINS, Tally

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def drawn(num_images: int, num_classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits that are right more often than chance, the last class without an image, and a teacher's logits."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(num_classes - 1, size=num_images)
    logits = 2 * rng.normal(size=(num_images, num_classes)).astype(np.float32)
    logits[np.arange(num_images), labels] += 1.5
    teacher = logits + rng.normal(size=logits.shape).astype(np.float32)
    return logits, labels, teacher


def tally_of(logits: np.ndarray, labels: np.ndarray, teacher: np.ndarray | None, device: str = "cpu") -> Tally:
    return Tally.of(
        torch.from_numpy(logits).to(device),
        torch.from_numpy(labels).to(device),
        None if teacher is None else torch.from_numpy(teacher).to(device),
    )


def expected_calibration_error(probabilities: np.ndarray, labels: np.ndarray, num_bins: int) -> float:
    """Guo et al. 2017, eq. 3: bin m holds the confidences in ((m - 1) / M, m / M]."""
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    total = 0.0
    for m in range(1, num_bins + 1):
        inside = (confidence > (m - 1) / num_bins) & (confidence <= m / num_bins)
        if inside.any():
            total += inside.sum() / len(labels) * abs(right[inside].mean() - confidence[inside].mean())
    return total


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_classes", [3, 5, 9])
def test_the_metrics_are_their_formulas(device: str, num_classes: int) -> None:
    logits, labels, teacher = drawn(501, num_classes)
    tally = tally_of(logits, labels, teacher, device)
    metrics = tally.metrics()
    exact, exact_teacher = logits.astype(np.float64), teacher.astype(np.float64)
    predicted = logits.argmax(axis=1)
    above = (logits > logits[np.arange(501), labels][:, None]).sum(axis=1)

    assert tally.num_images == 501
    assert metrics.accuracy == (predicted == labels).sum() / 501
    assert metrics.top5_accuracy == (above < 5).sum() / 501
    assert metrics.loss == pytest.approx(reference.cross_entropy(exact, labels), rel=1e-12)
    for label in range(num_classes - 1):
        expected = (predicted[labels == label] == label).mean()
        assert metrics.per_class_accuracy[label] == pytest.approx(expected, abs=1e-15)
    assert metrics.per_class_accuracy[-1] is None
    assert len(metrics.per_class_accuracy) == num_classes
    calibration = expected_calibration_error(reference.softmax(exact), labels, 15)
    assert calibration > 0.01
    assert metrics.ece == pytest.approx(calibration, rel=1e-12)
    assert metrics.agreement == (teacher.argmax(axis=1) == predicted).mean()
    assert 0 < metrics.agreement < 1
    divergence = reference.kl_divergence(exact_teacher, exact, 1.0)
    assert metrics.teacher_kl == pytest.approx(divergence, rel=1e-12)
    confusion = np.zeros((num_classes, num_classes), dtype=np.int64)
    for label, prediction in zip(labels, predicted, strict=True):
        confusion[label, prediction] += 1
    np.testing.assert_array_equal(tally.confusion_matrix(), confusion)
    assert tally.confusion_matrix().dtype == np.int64


@pytest.mark.parametrize("with_teacher", [True, False])
def test_the_parts_of_any_partition_add_up_to_the_whole(with_teacher: bool) -> None:
    logits, labels, teacher = drawn(200, 7)
    whole = tally_of(logits, labels, teacher if with_teacher else None)
    rng = np.random.default_rng(1)
    for parts in (1, 2, 13, 200):
        order = rng.permutation(200)
        cuts = np.sort(rng.choice(np.arange(1, 200), parts - 1, replace=False))
        tallies = [
            # Through pickle, as they come from the actors.
            pickle.loads(
                pickle.dumps(tally_of(logits[rows], labels[rows], teacher[rows] if with_teacher else None))
            )
            for rows in np.split(order, cuts)
        ]
        total = functools.reduce(operator.add, tallies)
        assert total.confusion == whole.confusion
        assert total.top5_hits == whole.top5_hits
        assert total.agreements == whole.agreements
        np.testing.assert_array_equal(total.bin_counts, whole.bin_counts)
        np.testing.assert_array_equal(total.bin_hits, whole.bin_hits)
        np.testing.assert_allclose(total.bin_confidences, whole.bin_confidences, rtol=1e-12)
        assert total.loss_sum == pytest.approx(whole.loss_sum, rel=1e-12)
        assert total.kl_sum == (pytest.approx(whole.kl_sum, rel=1e-12) if with_teacher else None)
        assert total.metrics().accuracy == whole.metrics().accuracy
        assert total.metrics().per_class_accuracy == whole.metrics().per_class_accuracy
        assert total.metrics().ece == pytest.approx(whole.metrics().ece, rel=1e-12)


def test_by_hand() -> None:
    """Two classes, four images, confidences 0.8 (right), 0.8 (wrong), 0.8 (right), 0.6 (right)."""
    log4, log15 = math.log(4), math.log(1.5)
    logits = torch.tensor([[log4, 0.0], [log4, 0.0], [0.0, log4], [0.0, log15]], dtype=torch.float64)
    tally = Tally.of(logits, torch.tensor([0, 1, 1, 1]))
    np.testing.assert_array_equal(tally.confusion_matrix(), [[1, 0], [1, 2]])
    metrics = tally.metrics()
    assert metrics.accuracy == 0.75
    assert metrics.top5_accuracy == 1.0
    assert metrics.per_class_accuracy == (1.0, 2 / 3)
    assert metrics.loss == pytest.approx(-(2 * math.log(0.8) + math.log(0.2) + math.log(0.6)) / 4)
    # 3/4 · |2/3 - 0.8| + 1/4 · |1 - 0.6|
    assert metrics.ece == pytest.approx(0.1 + 0.1)
    assert metrics.agreement is None
    assert metrics.teacher_kl is None


def test_certainty_lies_in_the_last_bin_and_huge_logits_give_finite_sums() -> None:
    logits = torch.tensor([[1e4, 0.0, 0.0], [0.0, 1e4, 0.0]])
    tally = Tally.of(logits, torch.tensor([0, 0]), logits.flip(0))
    assert tally.bin_counts.tolist() == [0] * (NUM_BINS - 1) + [2]
    assert tally.bin_hits.tolist() == [0] * (NUM_BINS - 1) + [1]
    metrics = tally.metrics()
    assert metrics.ece == 0.5
    assert metrics.loss == 5e3
    assert metrics.agreement == 0.0
    assert metrics.teacher_kl == 1e4


@pytest.mark.parametrize(("num_classes", "position"), [(3, 4), (5, 2), (15, 0)])
def test_a_confidence_on_an_edge_lies_in_the_lower_bin(num_classes: int, position: int) -> None:
    """1/3, 1/5 and 1/15 end the fifth, third and first of 15 bins, which are open below and closed above."""
    tally = Tally.of(torch.zeros(1, num_classes), torch.tensor([0]))
    assert np.flatnonzero(tally.bin_counts).tolist() == [position]


def test_rounding_does_not_push_the_divergence_below_zero() -> None:
    """A constant added to the logits changes nothing but the last bits."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(500, 1, 10, generator=generator, dtype=torch.float64)
    tallies = [Tally.of(row, torch.tensor([0]), row + 0.1) for row in logits]
    sums = [tally.kl_sum for tally in tallies if tally.kl_sum is not None]
    assert min(sums) < 0 < max(sums)
    divergences = [tally.metrics().teacher_kl for tally in tallies]
    assert all(value is not None and 0 <= value < 1e-12 for value in divergences)


def test_half_precision_logits_are_counted_in_float64() -> None:
    logits = torch.zeros(300, 2, dtype=torch.float16)
    logits[:, 0] = 11.5
    metrics = Tally.of(logits, torch.ones(300, dtype=torch.int64), logits).metrics()
    assert metrics.loss == pytest.approx(11.5 + math.log1p(math.exp(-11.5)), rel=1e-12)
    assert metrics.ece == pytest.approx(1 / (1 + math.exp(-11.5)), rel=1e-12)
    assert metrics.agreement == 1.0
    assert metrics.teacher_kl == pytest.approx(0.0, abs=1e-12)
    assert metrics.teacher_kl is not None
    assert metrics.teacher_kl >= 0


def test_what_does_not_belong_together_is_not_added() -> None:
    logits = torch.zeros(2, 3)
    labels = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(AssertionError, match="teacher"):
        Tally.of(logits, labels) + Tally.of(logits, labels, logits)
    with pytest.raises(AssertionError):
        Tally.of(logits, labels) + Tally.of(torch.zeros(2, 4), labels)
