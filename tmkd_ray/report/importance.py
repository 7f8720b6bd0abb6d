"""How much each parameter of a sweep decided the accuracy: permutation importance in a random forest."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tmkd_ray.trials import Sweep, TrialRecord, plain

MIN_TRIALS = 8
"""With fewer, a forest says nothing."""

_NUM_TREES = 300
_NUM_PERMUTATIONS = 20


@dataclass(frozen=True)
class Importance:
    """What a forest that predicts the accuracy from the values makes of each parameter.

    Attributes:
        shares: by path, largest first; they sum to one, or are all zero where nothing matters.
        explained: R² of the forest on the trials that each tree has not seen, at most 1; at or below 0 the
            shares mean nothing.
        num_trials: it was fitted to.
    """

    shares: dict[str, float]
    explained: float
    num_trials: int


def parameter_importance(sweep: Sweep) -> Importance | None:
    """Return the importance of each parameter; None with fewer than `MIN_TRIALS` trials that are over.

    Breiman 2001, "Random forests", Machine Learning 45: the loss of accuracy of a forest when a column is
    shuffled, here a forest of 300 regression trees and the mean of 20 shuffles, negative ones taken as zero.
    Numbers on a logarithmic scale enter as logarithms, categories as one column each, shuffled together.
    """
    from sklearn.ensemble import RandomForestRegressor  # a second to import

    trials = [trial for trial in sweep.with_status("finished", "stopped") if trial.accuracy is not None]
    if len(trials) < MIN_TRIALS:
        return None
    columns = {path: _columns(sweep, path, trials) for path in sweep.record.parameters}
    features = np.concatenate(list(columns.values()), axis=1)
    accuracy = np.array([trial.accuracy for trial in trials], dtype=np.float64)
    if np.ptp(accuracy) == 0:
        return Importance(dict.fromkeys(columns, 0.0), 0.0, len(trials))
    forest = RandomForestRegressor(_NUM_TREES, min_samples_leaf=2, oob_score=True, random_state=0)
    forest.fit(features, accuracy)
    generator = np.random.default_rng(0)
    error = float(np.mean((forest.predict(features) - accuracy) ** 2))
    losses: dict[str, float] = {}
    start = 0
    for path, values in columns.items():
        place = slice(start, start + values.shape[1])
        start = place.stop
        shuffled_errors = []
        for _ in range(_NUM_PERMUTATIONS):
            shuffled = features.copy()
            shuffled[:, place] = features[generator.permutation(len(trials)), place]
            shuffled_errors.append(float(np.mean((forest.predict(shuffled) - accuracy) ** 2)))
        losses[path] = max(float(np.mean(shuffled_errors)) - error, 0.0)
    total = sum(losses.values())
    ranked = sorted(losses, key=lambda path: -losses[path])
    shares = {path: losses[path] / total if total > 0 else 0.0 for path in ranked}
    return Importance(shares, float(forest.oob_score_), len(trials))


def is_logarithmic(sweep: Sweep, path: str) -> bool:
    return any("log" in kind for kind in sweep.record.parameters[path])


def is_category(sweep: Sweep, path: str) -> bool:
    """Whether a parameter's values have no order: a list with anything but numbers."""
    values = [trial.parameters.get(path) for trial in sweep.trials]
    return any(isinstance(value, bool) or not isinstance(value, int | float) for value in values)


def _columns(sweep: Sweep, path: str, trials: Sequence[TrialRecord]) -> np.ndarray:
    """Return [trials, columns] float64."""
    values: list[Any] = [trial.parameters.get(path) for trial in trials]
    if is_category(sweep, path):
        names = [str(plain(value)) for value in values]
        return np.array([[float(name == other) for other in sorted(set(names))] for name in names])
    if is_logarithmic(sweep, path):
        values = [math.log(value) for value in values]
    return np.array(values, dtype=np.float64)[:, None]
