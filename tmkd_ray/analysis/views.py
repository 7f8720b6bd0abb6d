"""Which view the text teacher preferred, and on which images."""

from collections.abc import Mapping

import numpy as np

from tmkd_ray.analysis_record import ViewGallery, ViewWins
from tmkd_ray.views.base import View


def win_counts(weights_NV: np.ndarray, labels_N: np.ndarray, num_classes: int) -> np.ndarray:
    """Return int64 [C, V]: images of each class for which each view's weight is largest."""
    counts_CV = np.zeros((num_classes, weights_NV.shape[1]), dtype=np.int64)
    np.add.at(counts_CV, (labels_N, weights_NV.argmax(axis=1)), 1)
    return counts_CV


def clearest_wins(weights_NV: np.ndarray, labels_N: np.ndarray, view: int, most: int) -> np.ndarray:
    """Return the rows that `view` won by the largest lead over the next view, one a class first.

    Without that the images of one class could take all places.
    """
    rows = np.flatnonzero(weights_NV.argmax(axis=1) == view)
    ordered = np.sort(weights_NV[rows], axis=1)
    rows = rows[np.argsort(ordered[:, -2] - ordered[:, -1], kind="stable")]
    _, first = np.unique(labels_N[rows], return_index=True)
    is_first = np.zeros(len(rows), dtype=bool)
    is_first[first] = True
    return np.concatenate([rows[is_first], rows[~is_first]])[:most]


def view_gallery(
    images_NHWC: np.ndarray,
    labels_N: np.ndarray,
    views: Mapping[str, View],
    class_names: tuple[str, ...],
    weights_NV: np.ndarray | None = None,
) -> ViewGallery:
    """Show images in every view."""
    contiguous = np.ascontiguousarray(images_NHWC)
    return ViewGallery(
        images=np.stack([view(contiguous) for view in views.values()], axis=1),
        view_names=tuple(views),
        labels=tuple(class_names[label] for label in labels_N),
        weights=None if weights_NV is None else weights_NV.astype(np.float32),
    )


def view_wins(
    images_NHWC: np.ndarray,
    labels_N: np.ndarray,
    weights_NV: np.ndarray,
    views: Mapping[str, View],
    class_names: tuple[str, ...],
    most: int = 3,
) -> ViewWins:
    """Count the images that each view won, and show those it won most clearly.

    Args:
        weights_NV: of `views`, in their order; there are at least two.
        most: images a view.
    """

    def won(view: int) -> ViewGallery:
        rows = clearest_wins(weights_NV, labels_N, view, most)
        return view_gallery(images_NHWC[rows], labels_N[rows], views, class_names, weights_NV[rows])

    return ViewWins(
        view_names=tuple(views),
        counts=win_counts(weights_NV, labels_N, len(class_names)),
        won_by=tuple(won(view) for view in range(len(views))),
    )
