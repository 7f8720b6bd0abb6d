"""An analysis that fits the results of `make_results`."""

from collections.abc import Callable

import numpy as np
import pytest

from tmkd_ray.analysis_record import Analysis, Explanation, GradCam, NetworkFindings, ViewGallery, ViewWins
from tmkd_ray.results import RunResults


@pytest.fixture
def make_analysis(gallery) -> Callable[[RunResults], Analysis]:
    """Every part of an analysis, on random numbers."""

    def network(rng: np.random.Generator, key: str, num_classes: int, labels: np.ndarray) -> NetworkFindings:
        # Of 40 images a class 36 are right, 3 taken for the next class and 1 for the one after.
        pairs = [
            (label, (label + step) % num_classes, number)
            for label in range(num_classes)
            for step, number in enumerate((36, 3, 1))
        ]
        counts = np.array([0, 5, 15, 80])
        is_student = key != "teacher"
        gap = np.abs(rng.normal(size=(num_classes, num_classes)))
        return NetworkFindings(
            key=key,
            role="student" if is_student else "teacher",
            seeds=3 if is_student else 1,
            confusion=np.array(pairs),
            bin_counts=counts,
            bin_hits=np.array([0, 2, 10, 78]),
            bin_confidences=counts * np.array([0.125, 0.375, 0.625, 0.875]),
            projection=(rng.normal(size=(len(labels), 2)) + labels[:, None]).astype(np.float32),
            correlation_gap=gap.astype(np.float16) if is_student else None,
            mean_correlation_gap=0.123 if is_student else None,
        )

    def make(results: RunResults) -> Analysis:
        rng = np.random.default_rng(2)
        names = results.dataset.class_names
        labels = np.repeat(np.arange(min(len(names), 10)), 6)
        images = rng.integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
        keys = ("teacher", "fused teacher", *(method.name for method in results.methods))
        maps = rng.integers(0, 256, (len(keys), 2, 8, 8), dtype=np.uint8)
        none = ViewGallery(
            images=gallery.images[:0], view_names=gallery.view_names, labels=(), weights=np.zeros((0, 3))
        )
        counts = np.zeros((len(names), 3), dtype=np.int64)
        counts[0] = [1, 1, 0]
        return Analysis(
            created=results.created,
            gallery=gallery,
            view_wins=ViewWins(view_names=gallery.view_names, counts=counts, won_by=(gallery, gallery, none)),
            networks=tuple(network(rng, key, len(names), labels) for key in keys if key != "fused teacher"),
            num_images=100,
            projected_labels=labels,
            correlated_classes=np.arange(len(names)),
            grad_cam=GradCam(
                images=images,
                labels=(names[0], names[1]),
                explanations=tuple(
                    Explanation(key=key, maps=maps[index], probabilities=np.array([0.25, 0.75]))
                    for index, key in enumerate(keys)
                ),
            ),
        )

    return make
