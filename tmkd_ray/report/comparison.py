"""Is one method better than another, given how much its seeds scatter?"""

import math
import statistics
from dataclasses import dataclass
from typing import Literal

from scipy import stats

from tmkd_ray.report.formatting import signed
from tmkd_ray.results import MethodRecord, Split

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
    """The difference of two means with its 95 % interval by Student's t.

    Runs of the same seeds are compared seed by seed (a paired interval: a seed's draw of labelled images, order
    and initial weights is the same for every method); others by Welch's interval for unequal variances.
    """
    ours, theirs = (
        dict(zip((run.seed for run in record.runs), record.accuracies(split), strict=True))
        for record in (method, reference)
    )
    return seeded_difference(ours, theirs)


def seeded_difference(ours: dict[int, float], theirs: dict[int, float]) -> Difference:
    """The same of accuracies by seed."""
    mean = statistics.fmean(ours.values()) - statistics.fmean(theirs.values())
    if min(len(ours), len(theirs)) < 2:
        return Difference(mean, None)
    if ours.keys() == theirs.keys():
        squared_error = statistics.variance(ours[seed] - theirs[seed] for seed in ours) / len(ours)
        degrees = len(ours) - 1.0
    else:
        squared_errors = [statistics.variance(group.values()) / len(group) for group in (ours, theirs)]
        squared_error = sum(squared_errors)
        shares = (
            squared**2 / (len(group) - 1) for squared, group in zip(squared_errors, (ours, theirs), strict=True)
        )
        degrees = squared_error**2 / max(sum(shares), 1e-300)
    # Below 1e-9 the scatter is the rounding of equal accuracies.
    if squared_error < 1e-18:
        return Difference(mean, None)
    return Difference(mean, float(stats.t.ppf(0.975, degrees)) * math.sqrt(squared_error))
