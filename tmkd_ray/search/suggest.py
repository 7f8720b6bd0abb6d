"""Which values are tried: drawn at random, gone through, or asked of Optuna."""

import itertools
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tmkd_ray.config.search import DEFAULT_TRIALS, Distribution, SearchConfig
from tmkd_ray.errors import UserError
from tmkd_ray.search.space import Parameters

_PATIENCE = 1000
"""After so many draws without a value that is new, there is taken to be none."""

_MAX_LISTED = 10_000
"""Values of all parameters together that are gone through one by one, when Optuna repeats itself."""


def planned_trials(search: SearchConfig) -> list[Parameters]:
    """Return all trials of the searchers `random` and `grid`: a function of the configuration alone.

    With more trials the first ones stay the same, but for grids that are crossed with draws. None is tried
    twice, so that there are fewer than asked for where there are no more values. (Members of a population may
    begin alike.)
    """
    grids = search.grids()
    drawn = [path for path in search.parameters if path not in grids]
    combinations = [dict(zip(grids, values, strict=True)) for values in itertools.product(*grids.values())]
    if not drawn:
        return combinations[: search.num_trials]
    count = search.num_trials or DEFAULT_TRIALS
    draws = [_draws(search, drawn, place, count) for place in range(len(combinations))]
    return [
        {path: (combination | draws[place][number])[path] for path in search.parameters}
        for number in range(count)
        for place, combination in enumerate(combinations)
        if number < len(draws[place])
    ]


def _draws(search: SearchConfig, paths: Sequence[str], place: int, count: int) -> list[Parameters]:
    """Return so many draws for a place of the grid, none of them twice."""
    found: list[Parameters] = []
    known: set[str] = set()
    fruitless = 0
    for number in itertools.count():
        if len(found) == count or fruitless == _PATIENCE:
            break
        # Each draw has a generator of its own, so that none depends on how many there are.
        generator = np.random.default_rng((search.seed, number, place))
        values = {path: search.parameters[path].at(float(generator.random())) for path in paths}
        if search.scheduler.name != "pbt" and _name(values) in known:
            fruitless += 1
            continue
        fruitless = 0
        known.add(_name(values))
        found.append(values)
    return found


def _name(values: Parameters) -> str:
    return json.dumps(values, sort_keys=True)


def total_trials(search: SearchConfig) -> int:
    """Return how many trials there will be."""
    if search.searcher in ("random", "grid"):
        return len(planned_trials(search))
    counts = [distribution.count for distribution in search.parameters.values()]
    return min([search.num_trials or DEFAULT_TRIALS, *_product(counts)])


def _product(counts: Sequence[int | None]) -> list[int]:
    """Return the product, alone in a list; nothing where one is without end."""
    known = [count for count in counts if count is not None]
    return [math.prod(known)] if len(known) == len(counts) else []


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
        self._known: set[str] = set()

    def suggest(self) -> tuple[int, Parameters] | None:
        """Return the study's number of a new trial, and its values; None if all values were tried."""
        for _ in range(_PATIENCE // 10):
            trial = self.study.ask(self._distributions)
            values = {path: self._value(path, trial.params[path]) for path in self.search.parameters}
            if _name(values) not in self._known:
                self._known.add(_name(values))
                return trial.number, values
            self.tell(trial.number, None)  # the same again tells nothing new
        left = self._untried()
        return None if left is None else (self.begin(left), left)

    def _untried(self) -> Parameters | None:
        lists = [each.all_values(_MAX_LISTED) for each in self.search.parameters.values()]
        known = [values for values in lists if values is not None]
        if len(known) < len(lists) or math.prod(len(values) for values in known) > _MAX_LISTED:
            return None
        for combination in itertools.product(*known):
            values = dict(zip(self.search.parameters, combination, strict=True))
            if _name(values) not in self._known:
                return values
        return None

    def begin(self, parameters: Parameters) -> int:
        """Add a trial that is to be run, with values known from before; return its number."""
        self._known.add(_name(parameters))
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
