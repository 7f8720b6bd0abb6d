"""Choices of samples: stratified, stable, and independent of the rows' order."""

from collections import Counter

import numpy as np
import pytest

from tmkd_ray.datasets.base import SampleIndex
from tmkd_ray.datasets.splits import few_labels, limit_samples, split_train, stratified_part


def make_index(class_sizes: list[int]) -> SampleIndex:
    labels = np.repeat(np.arange(len(class_sizes)), class_sizes).astype(np.int64)
    order = np.random.default_rng(0).permutation(len(labels))
    ids = np.array([f"image/{i}" for i in range(len(labels))])
    return SampleIndex(ids, labels[order], np.zeros(len(ids), np.int32), np.arange(len(ids), dtype=np.int64))


def shuffled(index: SampleIndex) -> SampleIndex:
    return index.take(np.random.default_rng(7).permutation(len(index)))


CHOICES = {
    "train": lambda index, seed: split_train(index, 0.25, seed)[0],
    "validation": lambda index, seed: split_train(index, 0.25, seed)[1],
    "few": lambda index, seed: few_labels(index, 3, seed),
    "limit": lambda index, seed: limit_samples(index, 17, seed),
}


@pytest.mark.parametrize("name", CHOICES)
def test_choice_depends_on_ids_and_seed_alone(name: str) -> None:
    index, choose = make_index([20, 11, 5]), CHOICES[name]
    chosen = choose(index, 0)
    assert set(choose(shuffled(index), 0).ids) == set(chosen.ids)
    assert set(choose(index, 1).ids) != set(chosen.ids)
    places = [list(index.ids).index(i) for i in chosen.ids]
    assert places == sorted(places), "keeps the order of the rows"
    np.testing.assert_array_equal(chosen.labels, index.labels[places])
    np.testing.assert_array_equal(chosen.row, index.row[places])


def test_choices_of_known_ids_never_change() -> None:
    """By hashlib alone, the keys (BLAKE2b, 8 bytes, little-endian, of "5/few labels/image/0" …) are in the
    order 2, 1, 3, 0.
    """
    assert list(few_labels(make_index([4]), 2, seed=5).ids) == ["image/1", "image/2"]


def test_split_train_is_a_partition_with_rounded_shares() -> None:
    index = make_index([100, 45, 10, 4, 2, 1])
    train, validation = split_train(index, 0.1, seed=0)
    assert sorted([*train.ids, *validation.ids]) == sorted(index.ids)
    # round half up of 10, 4.5, 1, .4, .2; at least one where a class has two, none from a single image
    assert Counter(validation.labels.tolist()) == {0: 10, 1: 5, 2: 1, 3: 1, 4: 1}
    large_train, large_validation = split_train(index, 0.99, seed=0)
    assert set(large_train.labels) == set(range(6)), "never takes a whole class"
    assert set(large_validation.labels) == set(range(5))


def test_few_labels_takes_the_same_number_of_each_class() -> None:
    index = make_index([20, 11, 2])
    assert Counter(few_labels(index, 3, seed=0).labels.tolist()) == {0: 3, 1: 3, 2: 2}
    one, three = few_labels(index, 1, seed=0), few_labels(index, 3, seed=0)
    assert set(one.ids) < set(three.ids)


def test_limit_keeps_shares_and_every_class() -> None:
    index = make_index([600, 300, 99, 1])
    for limit in (4, 5, 10, 50, 100, 999):
        counts = Counter(limit_samples(index, limit, seed=3).labels.tolist())
        assert sum(counts.values()) == limit
        assert all(counts[label] >= 1 for label in range(4))
        for label, size in enumerate((600, 300, 99, 1)):
            assert abs(counts[label] - limit * size / 1000) <= 1.5, (limit, counts)
    assert limit_samples(index, 1000, seed=3) is index
    assert limit_samples(index, 2000, seed=3) is index
    smaller, larger = limit_samples(index, 50, seed=3), limit_samples(index, 100, seed=3)
    assert set(smaller.ids) < set(larger.ids)


def test_limit_below_the_number_of_classes_takes_different_classes() -> None:
    index = make_index([5] * 20)
    chosen = [limit_samples(index, 6, seed=seed) for seed in range(20)]
    assert all(len(set(some.labels)) == 6 for some in chosen)
    assert set(np.concatenate([some.labels for some in chosen])) == set(range(20))


def test_choices_are_independent_of_one_another() -> None:
    """The limited part of train holds as many validation images as the whole, in expectation."""
    index = make_index([2000, 2000])
    _, validation = split_train(index, 0.5, seed=0)
    limited = limit_samples(index, 1000, seed=0)
    shared = len(set(validation.ids) & set(limited.ids))
    assert abs(shared - 500) < 5 * np.sqrt(1000 / 4)  # five standard deviations of a fair coin


def test_stratified_part_is_a_fair_sample() -> None:
    ids = np.array([f"{i}" for i in range(5000)])
    labels = np.zeros(5000, dtype=np.int64)
    chosen = np.stack([stratified_part(ids, labels, 0.3, seed, "test") for seed in range(20)])
    assert (chosen.sum(1) == 1500).all()
    often = chosen.sum(0)  # binomial(20, .3): mean 6, variance 4.2
    assert abs(often.var() - 4.2) < 0.5
