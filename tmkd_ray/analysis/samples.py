"""Which images to look at closely: a bounded, balanced choice, the same every time."""

import numpy as np


def balanced_rows(labels_N: np.ndarray, most: int) -> np.ndarray:
    """Return at most `most` rows, ascending: the first of every class, the second of every class, and so on."""
    order = np.argsort(labels_N, kind="stable")
    sorted_labels = labels_N[order]
    first_of_class = np.searchsorted(sorted_labels, sorted_labels, side="left")
    rank_within_class = np.arange(len(labels_N)) - first_of_class
    by_rank = order[np.argsort(rank_within_class, kind="stable")]
    rows: np.ndarray = np.sort(by_rank[:most])
    return rows


def spread_classes(labels_N: np.ndarray, most: int) -> np.ndarray:
    """Return at most `most` of the classes that have images, evenly spread over them, ascending."""
    present = np.unique(labels_N)
    chosen: np.ndarray = present[np.linspace(0, len(present) - 1, min(most, len(present))).round().astype(int)]
    return chosen


def rows_of_classes(labels_N: np.ndarray, classes: np.ndarray, most_per_class: int) -> np.ndarray:
    """Return the first rows of each of the classes, at most `most_per_class` of each, class by class."""
    return np.concatenate([np.flatnonzero(labels_N == label)[:most_per_class] for label in classes])
