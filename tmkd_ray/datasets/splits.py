"""Choices of samples: validation part, few labels, a limit.

Every choice is stratified by class and made by the hash of (seed, purpose, sample id): it does not
depend on the order of the rows, on the machine, or on which other choices were made. What is
returned keeps the rows' order.
"""

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from tmkd_ray.datasets.base import SampleIndex


def split_train(
    index: "SampleIndex", validation_fraction: float, seed: int
) -> tuple["SampleIndex", "SampleIndex"]:
    """Split into (train, validation), the fraction rounded within each class.

    A class of two or more images gives at least one to each side; the only image of a class stays in train.
    """
    chosen = stratified_part(index.ids, index.labels, validation_fraction, seed, "validation")
    return index.take(np.flatnonzero(~chosen)), index.take(np.flatnonzero(chosen))


def few_labels(index: "SampleIndex", per_class: int, seed: int) -> "SampleIndex":
    """Keep `per_class` images of each class, or all of a class that has fewer."""
    ranks, _ = _ranks_in_class(index.labels, _keys(index.ids, seed, "few labels"))
    return index.take(np.flatnonzero(ranks < per_class))


def limit_samples(index: "SampleIndex", limit: int, seed: int) -> "SampleIndex":
    """Keep `limit` images (all, if there are not more), the classes' shares kept as far as possible.

    A `limit` of at least the number of classes present keeps at least one image of each. A smaller limit's
    choice is part of a larger one's.
    """
    if len(index) <= limit:
        return index
    keys = _keys(index.ids, seed, "limit")
    ranks, sizes = _ranks_in_class(index.labels, keys)
    # The order of Webster's proportional seats: at any length of the list a class's part of it is its part of
    # the whole. The first image of every class goes ahead.
    turns = np.where(ranks == 0, 0.0, (ranks + 0.5) / sizes)
    chosen = np.lexsort((keys, turns))[:limit]
    return index.take(np.sort(chosen))


def stratified_part(
    ids: np.ndarray, labels: np.ndarray, fraction: float, seed: int, purpose: str
) -> np.ndarray:
    """Choose a fraction of each class, rounded; of a class of two or more at least one and never all.

    Args:
        ids: unicode [N]. labels: int64 [N].
        purpose: choices of different purpose are independent of one another.

    Returns:
        bool [N].
    """
    ranks, sizes = _ranks_in_class(labels, _keys(ids, seed, purpose))
    counts = np.floor(fraction * sizes + 0.5).astype(np.int64)
    chosen: np.ndarray = ranks < np.minimum(np.maximum(counts, 1), sizes - 1)
    return chosen


def _keys(ids: np.ndarray, seed: int, purpose: str) -> np.ndarray:
    prefix = f"{seed}/{purpose}/"
    hashes = b"".join(hashlib.blake2b((prefix + i).encode(), digest_size=8).digest() for i in ids.tolist())
    return np.frombuffer(hashes, dtype="<u8")


def _ranks_in_class(labels: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return int64 [N] each: the sample's place among its class, ordered by key; the size of its class."""
    order = np.lexsort((keys, labels))
    _, starts, sizes = np.unique(labels[order], return_index=True, return_counts=True)
    ranks, class_sizes = np.empty((2, len(labels)), dtype=np.int64)
    ranks[order] = np.arange(len(labels)) - np.repeat(starts, sizes)
    class_sizes[order] = np.repeat(sizes, sizes)
    return ranks, class_sizes
