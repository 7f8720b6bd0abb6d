"""Which values are tried: drawn at random, gone through, or asked of Optuna."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tmkd_ray.config.search import Distribution, SearchConfig
from tmkd_ray.errors import UserError
from tmkd_ray.search.space import Parameters


def planned_trials(search: SearchConfig) -> list[Parameters]:
    """Return all trials of the searchers `random` and `grid`: a function of the configuration alone.

    With more trials the first ones stay the same, but for grids that are crossed with draws.
    """
    grids = search.grids()
    drawn = [path for path in search.parameters if path not in grids]
    combinations = [dict(zip(grids, values, strict=True)) for values in itertools.product(*grids.values())]
    total = search.total_trials()
    trials = []
    for number in range(math.ceil(total / len(combinations))):
        for place, combination in enumerate(combinations):
            # Each trial has a generator of its own, so that none depends on how many there are.
            generator = np.random.default_rng((search.seed, number, place))
            values = {path: search.parameters[path].at(float(generator.random())) for path in drawn}
            trials.append({path: (combination | values)[path] for path in search.parameters})
    return trials[:total]


class OptunaSuggestions:
    """Optuna's tree-structured Parzen estimator (Bergstra et al. 2011; several objectives: Ozaki et al. 2022).

    Values that Optuna takes for no category (lists, mappings) are told to it by their place.

    Raises:
        UserError: Optuna is not installed.
    """

    def __init__(self, search: SearchConfig) -> None:
        try:
            import optuna
        except ImportError:
            raise UserError("search.searcher is optuna, which is not installed; pip install optuna") from None
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.search = search
        self._optuna = optuna
        directions = ["maximize" if name == "validation_accuracy" else "minimize" for name in search.objectives]
        self.study = optuna.create_study(
            directions=directions,
            # Trials run at once: the estimator must not suggest the same for all of them.
            sampler=optuna.samplers.TPESampler(seed=search.seed, constant_liar=True, multivariate=False),
        )
        self._distributions = {
            path: _distribution(optuna, distribution) for path, distribution in search.parameters.items()
        }

    def suggest(self) -> tuple[int, Parameters]:
        """Return the study's number of a new trial, and its values."""
        trial = self.study.ask(self._distributions)
        return trial.number, {path: self._value(path, trial.params[path]) for path in self.search.parameters}

    def begin(self, parameters: Parameters) -> int:
        """Add a trial that is to be run, with values known from before; return its number."""
        trial = self._optuna.trial.create_trial(
            state=self._optuna.trial.TrialState.RUNNING,
            params=self._params(parameters),
            distributions=self._distributions,
        )
        self.study.add_trial(trial)
        return len(self.study.get_trials(deepcopy=False)) - 1

    def tell(self, number: int, values: Sequence[float] | None) -> None:
        """Tell what came of a trial; None: it failed."""
        if values is None:
            self.study.tell(number, state=self._optuna.trial.TrialState.FAIL)
        else:
            self.study.tell(number, list(values))

    def _params(self, parameters: Parameters) -> dict[str, Any]:
        params = {}
        for path, value in parameters.items():
            distribution = self.search.parameters[path]
            if distribution.is_finite_list:
                value = list(distribution.values).index(value)
            params[path] = value
        return params

    def _value(self, path: str, value: Any) -> Any:
        distribution = self.search.parameters[path]
        return distribution.values[value] if distribution.is_finite_list else distribution.rounded(value)


def _distribution(optuna: Any, distribution: Distribution) -> Any:
    kinds = optuna.distributions
    if distribution.is_finite_list:
        return kinds.CategoricalDistribution(range(len(distribution.values)))
    low, high = distribution.bounds
    if distribution.is_whole:
        return kinds.IntDistribution(int(low), int(high), log=distribution.is_log)
    if distribution.step is not None and not distribution.is_log:  # Optuna has no logarithmic steps
        return kinds.FloatDistribution(low, high, step=distribution.step)
    return kinds.FloatDistribution(low, high, log=distribution.is_log)
