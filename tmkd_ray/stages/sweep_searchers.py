"""Searchers and schedulers as Ray Tune asks for them; all have heard of earlier runs of the command."""

import functools
import random
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining
from ray.tune.search import SEARCH_ALG_IMPORT, Searcher, create_searcher

from tmkd_ray.config.search import SEARCHERS, Distribution
from tmkd_ray.errors import UserError
from tmkd_ray.search.space import Parameters, Space, trial_config
from tmkd_ray.search.suggest import OptunaSuggestions
from tmkd_ray.stages.progress import say
from tmkd_ray.stages.sweep_records import Recorder, student_key
from tmkd_ray.stages.trials import TRIAL, Assignment
from tmkd_ray.trials import TrialRecord

METRIC = "validation_accuracy"

_PATIENCE = 100
"""Suggestions in a row that were tried before, after which a searcher of Ray Tune's has nothing new."""


def plain_assignment(trial: Assignment) -> dict[str, Any]:
    """Return the trial as Tune's configuration holds it."""
    return {"number": trial.number, "parameters": trial.parameters, "seed": trial.seed}


class OptunaSearcher(Searcher):  # type: ignore[misc]
    """Asks Optuna for the next trial, and tells it of those before, also of earlier runs of the command.

    Args:
        done: records of the trials that are over. again: those to run again, first.
        numbers: for new trials.
    """

    def __init__(
        self,
        space: Space,
        recorder: Recorder,
        done: Sequence[TrialRecord],
        again: Sequence[Assignment],
        numbers: Iterator[int],
    ) -> None:
        super().__init__()
        self.space, self.recorder, self.numbers = space, recorder, numbers
        self.again = list(again)
        self.suggestions = OptunaSuggestions(space.search)
        self.asked: dict[str, tuple[int, Parameters]] = {}
        for record in done:
            number = self.suggestions.begin(record.parameters)
            ok = record.status != "failed" and record.accuracy is not None
            self.suggestions.tell(number, self._values(record.accuracy, record.parameters) if ok else None)

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        if self.again:
            trial = self.again.pop(0)
            self.asked[trial_id] = self.suggestions.begin(trial.parameters), trial.parameters
            return {TRIAL: plain_assignment(trial)}
        suggested = self.suggestions.suggest()
        if suggested is None:
            return Searcher.FINISHED  # type: ignore[no-any-return]
        number, parameters = suggested
        self.asked[trial_id] = number, parameters
        seed = self.space.config.training.seed
        return {TRIAL: plain_assignment(Assignment(next(self.numbers), parameters, seed))}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        number, parameters = self.asked.pop(trial_id)
        ok = result is not None and "best_accuracy" in result and not error
        values = self._values(result["best_accuracy"], parameters) if ok and result is not None else None
        self.suggestions.tell(number, values)

    def _values(self, accuracy: float | None, parameters: Parameters) -> list[float]:
        values = [accuracy or 0.0]
        if "latency" in self.space.search.objectives:
            config = trial_config(self.space.config, parameters)
            values.append(self.recorder.latencies[student_key(config)])
        return values


class NamedSearcher(Searcher):  # type: ignore[misc]
    """One of Ray Tune's searchers, whose suggestions become trials of ours, none of them twice.

    Args:
        known: values of the trials that are over.
    """

    def __init__(
        self,
        inner: Searcher,
        seed: int,
        again: Sequence[Assignment],
        numbers: Iterator[int],
        known: Sequence[Parameters] = (),
    ) -> None:
        super().__init__()
        self.inner, self.seed, self.numbers = inner, seed, numbers
        self.again = list(again)
        self.known = [*known, *(trial.parameters for trial in again)]
        self.names: dict[str, str] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if self.again:
            return {TRIAL: plain_assignment(self.again.pop(0))}
        for attempt in range(_PATIENCE):
            name = trial_id if attempt == 0 else f"{trial_id}-{attempt}"
            suggested = self.inner.suggest(name)
            if suggested is None or suggested == Searcher.FINISHED:
                return suggested  # type: ignore[no-any-return]
            if dict(suggested) not in self.known:
                self.known.append(dict(suggested))
                self.names[trial_id] = name
                return {TRIAL: plain_assignment(Assignment(next(self.numbers), dict(suggested), self.seed))}
            self.inner.on_trial_complete(name, None, True)  # the same again tells nothing new
        return Searcher.FINISHED  # type: ignore[no-any-return]

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        if trial_id in self.names:
            self.inner.on_trial_complete(self.names.pop(trial_id), result, error)


def build_named_searcher(
    space: Space, done: Sequence[TrialRecord], again: Sequence[Assignment], numbers: Iterator[int]
) -> Searcher:
    """Return a searcher of Ray Tune by its name.

    Raises:
        UserError: there is none, or its package is not installed.
    """
    search = space.search
    check_searcher(search.searcher)
    values = {path: _tune_distribution(each) for path, each in search.parameters.items()}
    try:
        inner = create_searcher(search.searcher, space=values, metric="best_accuracy", mode="max")
    except (ImportError, AssertionError) as error:
        raise UserError(f"search.searcher: {search.searcher} cannot be used: {error}") from error
    for record in done:
        if record.accuracy is not None and record.status != "failed":
            try:
                inner.add_evaluated_point(dict(record.parameters), record.accuracy)
            except NotImplementedError:
                say(f"search: {search.searcher} cannot be told of earlier trials; it begins anew")
                break
    known = [dict(record.parameters) for record in done]
    return NamedSearcher(inner, space.config.training.seed, again, numbers, known)


def check_searcher(name: str) -> None:
    """Refuse a searcher that neither we nor Ray Tune have.

    Raises:
        UserError: names the choices.
    """
    theirs = sorted(set(SEARCH_ALG_IMPORT) - {"variant_generator", *SEARCHERS})
    if name not in SEARCHERS and name not in theirs:
        raise UserError(f"search.searcher: unknown {name!r}. Choices: {', '.join([*SEARCHERS, *theirs])}")


def _tune_distribution(distribution: Distribution) -> Any:
    if distribution.is_finite_list:
        return tune.choice(list(distribution.values))
    bounds = getattr(distribution, distribution.kind)
    return getattr(tune, distribution.kind)(*bounds)


def build_asha(space: Space, records: Any) -> ASHAScheduler:
    """Return ASHA, which has heard what the trials of earlier runs reached at its rungs."""
    search = space.search
    epochs = max(
        trial_config(space.config, {"training.epochs": value}).training.epochs
        for value in (
            search.parameters["training.epochs"].end_points()
            if "training.epochs" in search.parameters
            else [space.config.training.epochs]
        )
    )
    scheduler = ASHAScheduler(
        time_attr="epoch",
        metric=METRIC,
        mode="max",
        max_t=epochs,
        grace_period=min(search.scheduler.grace_epochs, epochs),
        reduction_factor=search.scheduler.reduction_factor,
        brackets=search.scheduler.brackets,
    )
    for record in records:
        if record.status == "running":
            continue
        stand_in = SimpleNamespace(trial_id=f"earlier-{record.key}")
        scheduler.on_trial_add(None, stand_in)
        for epoch in record.history:
            result = {"epoch": epoch.epoch, METRIC: epoch.validation_accuracy or 0.0}
            scheduler.on_trial_result(None, stand_in, result)
    return scheduler


class Population(PopulationBasedTraining):  # type: ignore[misc]
    """PBT that leaves each member its name: a member that copies another takes its values and weights alone."""

    def _get_new_config(self, trial: Any, trial_to_clone: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        config, operations = super()._get_new_config(trial, trial_to_clone)
        return {**config, TRIAL: trial.config[TRIAL]}, operations


def build_population(parameters: Mapping[str, Distribution], space: Space) -> Population:
    """Return PBT over the parameters, which stay within their bounds."""
    options = space.search.scheduler
    generator = random.Random(space.search.seed)
    mutations: dict[str, Any] = {}
    for path, distribution in parameters.items():
        if distribution.is_finite_list:
            mutations[path] = list(distribution.values)
        else:
            mutations[path] = functools.partial(_drawn, distribution, generator)

    def within(config: dict[str, Any]) -> dict[str, Any]:
        for path, distribution in parameters.items():
            if not distribution.is_finite_list:
                low, high = distribution.bounds
                config[path] = distribution.rounded(min(max(config[path], low), high))
        return config

    return Population(
        time_attr="epoch",
        metric=METRIC,
        mode="max",
        perturbation_interval=options.perturbation_epochs,
        hyperparam_mutations=mutations,
        quantile_fraction=options.quantile,
        resample_probability=options.resample_probability,
        custom_explore_fn=within,
        log_config=False,
        synch=True,  # else which trials meet hangs on how fast each machine starts them
    )


def _drawn(distribution: Distribution, generator: random.Random) -> Any:
    return distribution.at(generator.random())
