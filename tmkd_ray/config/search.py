"""What a sweep searches, how, and with what: the section `search`."""

import math
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import (
    Field,
    JsonValue,
    ValidationInfo,
    field_serializer,
    field_validator,
    model_validator,
)

from tmkd_ray.config.training import Seed
from tmkd_ray.settings import SectionError, Settings, shown

Bounds = tuple[float, float]
Steps = tuple[float, float, float]

SEARCHERS = ("random", "grid", "optuna")
"""Those of our own; any other name is one of Ray Tune's, whose package must be installed."""


class Distribution(Settings, allow_inf_nan=False):
    """The values of one field: exactly one of these, as `training.learning_rate: {loguniform: [0.01, 0.3]}`.

    `randint` and `lograndint` leave out the upper bound, as in Ray Tune; the third number of `quniform` and
    `qloguniform` is the step that values are rounded to. `grid` tries each value with every draw of the others.
    """

    uniform: Bounds | None = None
    loguniform: Bounds | None = None
    quniform: Steps | None = None
    qloguniform: Steps | None = None
    randint: tuple[int, int] | None = None
    lograndint: tuple[int, int] | None = None
    choice: tuple[JsonValue, ...] | None = None
    grid: tuple[JsonValue, ...] | None = None

    @model_validator(mode="before")
    @classmethod
    def _is_one(cls, data: Any) -> Any:
        kinds = ", ".join(cls.model_fields)
        if not isinstance(data, dict):
            raise ValueError(f"expected one of {kinds}, as `uniform: [0, 1]` (given: {shown(data)})")
        if len(data) != 1:
            raise ValueError(f"expected exactly one of {kinds} (given: {', '.join(map(str, data)) or 'none'})")
        return data

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        if info.field_name in ("choice", "grid"):  # of any kind
            return value
        if isinstance(value, list | tuple) and any(isinstance(item, bool | str) for item in value):
            raise ValueError("expected numbers")
        return value

    @model_validator(mode="after")
    def _check(self) -> "Distribution":
        if self.is_finite_list:
            if not self.values or any(value in self.values[:i] for i, value in enumerate(self.values)):
                raise SectionError([((self.kind,), "give at least one value, each once")])
            return self
        low, high = self.bounds
        problems = []
        if not low < high:
            problems.append(((self.kind,), f"the lower bound, {low:g}, is not below the upper, {high:g}"))
        if "log" in self.kind and low <= 0:
            problems.append(((self.kind,), f"a logarithmic scale begins above 0 (given: {low:g})"))
        if self.step is not None and not 0 < self.step <= high - low:
            problems.append(((self.kind,), f"the step, {self.step:g}, does not fit between the bounds"))
        if problems:
            raise SectionError(problems)
        return self

    @property
    def kind(self) -> str:
        return next(name for name in type(self).model_fields if getattr(self, name) is not None)

    @property
    def is_finite_list(self) -> bool:
        return self.choice is not None or self.grid is not None

    @property
    def is_whole(self) -> bool:
        """Whether it draws whole numbers."""
        return self.randint is not None or self.lograndint is not None

    @property
    def is_log(self) -> bool:
        return "log" in self.kind

    @property
    def values(self) -> tuple[Any, ...]:
        """The values of `choice` and `grid`."""
        values = self.choice if self.choice is not None else self.grid
        assert values is not None
        return values

    @property
    def bounds(self) -> Bounds:
        """The least and the greatest value."""
        low, high = getattr(self, self.kind)[:2]
        return (low, high - 1) if self.is_whole else (low, high)

    @property
    def step(self) -> float | None:
        steps = self.quniform or self.qloguniform
        return None if steps is None else steps[2]

    @property
    def count(self) -> int | None:
        """How many values there are; None for a continuum, also one in steps."""
        if self.is_finite_list:
            return len(self.values)
        low, high = self.bounds
        return int(high - low) + 1 if self.is_whole else None

    def all_values(self, at_most: int) -> tuple[Any, ...] | None:
        """Return every value it can take; None if these are more, or a continuum."""
        if self.count is None or self.count > at_most:
            return None
        low, high = (0, 0) if self.is_finite_list else self.bounds
        return self.values if self.is_finite_list else tuple(range(int(low), int(high) + 1))

    def at(self, part: float) -> Any:
        """Return the value at a part, 0 to 1, of the range, on its own scale: uniform parts make draws."""
        if self.is_finite_list:
            return self.values[min(int(part * len(self.values)), len(self.values) - 1)]
        low, high = self.bounds
        if self.is_whole:
            high += 1  # every whole number has a part as wide, but for the logarithm
        value = (
            math.exp(math.log(low) + part * math.log(high / low)) if self.is_log else low + part * (high - low)
        )
        if self.is_whole:
            return min(int(value), int(high) - 1)
        return self.rounded(value)

    def rounded(self, value: Any) -> Any:
        """Return a number as the next one of `step`, within the bounds."""
        if self.step is None:
            return value
        low, high = self.bounds
        stepped = float(f"{round(value / self.step) * self.step:.12g}")  # 0.3, not 0.30000000000000004
        return min(max(stepped, low), high)

    def end_points(self) -> tuple[Any, ...]:
        """Return values by which to judge them all: the choices, or the bounds and one within."""
        if self.is_finite_list:
            return self.values
        points = [self.at(0.0), self.at(1.0), self.at(0.381966)]  # no round number: a whole one is told apart
        return tuple(point for i, point in enumerate(points) if point not in points[:i])


class SchedulerConfig(Settings):
    """What ends or changes trials before their last epoch; as a bare string (`scheduler: asha`) its name.

    asha: asynchronous successive halving (Li et al. 2020, arXiv 1810.05934).
    pbt: population-based training (Jaderberg et al. 2017, arXiv 1711.09846).
    """

    name: Literal["none", "asha", "pbt"] = "none"
    grace_epochs: int = Field(default=1, ge=1, description="asha: no trial is stopped before")
    reduction_factor: float = Field(default=3.0, gt=1, description="asha: one in so many goes on at each rung")
    brackets: int = Field(default=1, ge=1, description="asha: of different first rungs")
    perturbation_epochs: int = Field(default=2, ge=1, description="pbt: between two changes of a trial")
    quantile: float = Field(default=0.25, gt=0, le=0.5, description="pbt: the worst part copies the best part")
    resample_probability: float = Field(
        default=0.25, ge=0, le=1, description="pbt: draw anew, or else × 0.8 or 1.2"
    )

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, data: Any) -> Any:
        if data is None:
            return {"name": "none"}
        return {"name": data} if isinstance(data, str) else data

    @model_validator(mode="after")
    def _check(self) -> "SchedulerConfig":
        of = {
            "asha": {"grace_epochs", "reduction_factor", "brackets"},
            "pbt": {"perturbation_epochs", "quantile", "resample_probability"},
        }
        problems = [
            ((field,), f"is an option of {owner}, but the scheduler is {self.name}")
            for owner, fields in of.items()
            for field in sorted(fields & self.model_fields_set)
            if owner != self.name and getattr(self, field) != type(self).model_fields[field].default
        ]
        if problems:
            raise SectionError(problems)
        return self


class TrialResources(Settings, allow_inf_nan=False):
    """What one trial takes."""

    workers: int = Field(default=1, ge=1, description="above 1 a trial is a DDP training under Ray Train")
    cpus: float = Field(default=1.0, gt=0, description="of each worker")
    gpus: float | None = Field(
        default=None, ge=0, description="of each worker, also a part of one; null: 1 where the cluster has GPUs"
    )

    @model_validator(mode="after")
    def _check(self) -> "TrialResources":
        if self.gpus is not None and self.gpus > 1 and self.gpus % 1:
            raise SectionError([(("gpus",), f"{self.gpus:g} is neither a part of a GPU nor a whole number")])
        if self.workers > 1 and self.gpus is not None and 0 < self.gpus < 1:
            text = "workers of one trial cannot share a GPU (NCCL refuses it); give each a whole one"
            raise SectionError([(("gpus",), text)])
        return self


class ConfirmConfig(Settings):
    """Train the best few again: the best of many trials flatters itself."""

    top: int = Field(default=3, ge=1)
    seeds: int = Field(default=3, ge=1, description="fresh ones, the same for each")


class SearchConfig(Settings, allow_inf_nan=False):
    """A sweep over fields of this configuration.

    The objective is the accuracy on the validation part of train, never on test; `latency` is that of the
    student on one image.
    """

    parameters: dict[str, Distribution] = Field(min_length=1, description="dotted path: distribution")
    num_trials: int | None = Field(default=None, ge=1, description="null: 20; with searcher grid all of it")
    searcher: str = Field(default="random", description="random, grid, optuna, or another of Ray Tune's")
    scheduler: SchedulerConfig = Field(default_factory=SchedulerConfig)
    objectives: tuple[Literal["validation_accuracy", "latency"], ...] = ("validation_accuracy",)
    max_concurrent_trials: int | None = Field(default=None, ge=1, description="null: as many as find room")
    resources: TrialResources = Field(default_factory=TrialResources)
    retries: int = Field(default=1, ge=0, description="of a trial that failed; then it is marked")
    time_budget_s: float | None = Field(
        default=None, gt=0, description="of one run of the command; given again, the sweep goes on"
    )
    confirm: ConfirmConfig | None = None
    seed: Seed = Field(default=0, description="of the suggestions; training.seed is that of the trials")

    @field_validator("objectives", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_serializer("parameters")
    def _without_null(self, value: dict[str, Distribution]) -> dict[str, Any]:
        return {path: {each.kind: list(getattr(each, each.kind))} for path, each in value.items()}

    @model_validator(mode="after")
    def _check(self) -> "SearchConfig":
        problems: list[tuple[tuple[str, ...], str]] = []
        if self.objectives[:1] != ("validation_accuracy",) or len(set(self.objectives)) != len(self.objectives):
            text = "begin with validation_accuracy, each once"
            problems.append((("objectives",), text))
        if self.searcher == "grid":
            for path, distribution in self.parameters.items():
                if not distribution.is_finite_list:
                    text = f"searcher grid needs `grid` or `choice`, not {distribution.kind}"
                    problems.append((("parameters", path), text))
        if self.scheduler.name == "pbt":
            if self.searcher != "random":
                problems.append((("searcher",), "pbt changes the trials by itself; use random"))
            if self.resources.workers > 1:
                problems.append((("resources", "workers"), "pbt is for trials of one worker"))
            if (self.num_trials or DEFAULT_TRIALS) < 2:
                problems.append((("num_trials",), "pbt needs at least two trials"))
        if problems:
            raise SectionError(problems)
        return self

    def grids(self) -> dict[str, Sequence[Any]]:
        """Return the values that are all tried: by path."""
        crossed = self.searcher in ("random", "grid")
        return {
            path: each.values
            for path, each in self.parameters.items()
            if crossed and (each.grid is not None or (self.searcher == "grid" and each.is_finite_list))
        }


DEFAULT_TRIALS = 20
