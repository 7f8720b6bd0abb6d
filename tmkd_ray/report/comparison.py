"""Is one method better than another, given how much its seeds scatter?"""

import math
import statistics
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tmkd_ray.report.formatting import signed
from tmkd_ray.results import MethodRecord, Split, sample_std

Verdict = Literal["better", "worse", "within noise", "noise unknown"]


@dataclass(frozen=True)
class Difference:
    """Mean accuracy of a method minus that of a reference.

    Attributes:
        mean: -1..1.
        half_width: of the 95 % confidence interval; None where the seeds cannot give one (a single seed, or
            no scatter at all, which with a few seeds only says that the accuracy is coarse).
    """

    mean: float
    half_width: float | None

    @property
    def verdict(self) -> Verdict:
        if self.half_width is None:
            return "noise unknown"
        if abs(self.mean) <= self.half_width:
            return "within noise"
        return "better" if self.mean > 0 else "worse"

    def in_points(self) -> str:
        """`+1.20 ± 0.85`, in percentage points."""
        points = signed(100 * self.mean)
        return points if self.half_width is None else f"{points} ± {100 * self.half_width:.2f}"


def difference(method: MethodRecord, reference: MethodRecord, split: Split) -> Difference:
    """Welch's interval for the difference of two means with unequal variances.

    Source: B. L. Welch, "The generalization of 'Student's' problem when several different population
    variances are involved", Biometrika 34 (1947).
    """
    groups = [method.accuracies(split), reference.accuracies(split)]
    mean = statistics.fmean(groups[0]) - statistics.fmean(groups[1])
    stds = [sample_std(group) for group in groups]
    squared_errors = [std**2 / len(group) for std, group in zip(stds, groups, strict=True) if std is not None]
    squared_error = sum(squared_errors)
    # Below 1e-9 the scatter is the rounding of equal accuracies.
    if len(squared_errors) < 2 or squared_error < 1e-18:
        return Difference(mean, None)
    degrees = squared_error**2 / sum(
        squared**2 / (len(group) - 1) for squared, group in zip(squared_errors, groups, strict=True)
    )
    return Difference(mean, student_t_quantile(degrees) * math.sqrt(squared_error))


def student_t_quantile(degrees: float, probability: float = 0.975) -> float:
    """The quantile of Student's t for `degrees` >= 1 of freedom and a `probability` above one half.

    With t = sqrt(degrees) tan(angle) the density is proportional to cos(angle)^(degrees - 1), smooth and
    bounded, so that a plain cumulative sum over the angle is accurate to five digits.
    """
    edges = np.linspace(0.0, math.pi / 2, 400_001)
    middles = (edges[:-1] + edges[1:]) / 2
    cumulative = np.concatenate([[0.0], np.cumsum(np.cos(middles) ** (degrees - 1))])
    angle = np.interp(2 * probability - 1, cumulative / cumulative[-1], edges)
    return math.sqrt(degrees) * math.tan(float(angle))
