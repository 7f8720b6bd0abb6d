"""What a sweep may search: every path and value is tried on the configuration before anything starts."""

import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from tmkd_ray import __version__, storage
from tmkd_ray.config import ExperimentConfig
from tmkd_ray.config.search import SearchConfig
from tmkd_ray.errors import ConfigError
from tmkd_ray.registry import nearest
from tmkd_ray.settings import explain, shown

MAX_STORES = 16
"""Knowledge stores that one sweep may build."""

_MAX_COMBINATIONS = 128
"""Of end points, tried together before the sweep starts."""

_POOLS_DECIDE = {"batch_size", "precision", "channels_last", "compile"}
"""Of a teacher's pool: what decides the last bits of what it says."""

_REFUSED = {
    "name": "is where the run lies",
    "output": "is where the run lies",
    "cluster": "says where to compute, not what is learnt",
    "search": "is the sweep itself",
    "report": "does not change what is learnt",
    "methods": "are not trained by a sweep, which trains `distiller`; search distiller.… instead",
    "seeds": "are not what a sweep chooses; search.confirm trains the best again with fresh seeds",
    "training.seed": "is luck, not a setting; search.confirm trains the best again with fresh seeds",
    "training.num_workers": "is set by search.resources.workers",
    "training.min_workers": "is set by search.resources.workers",
    "training.num_cpus_per_worker": "is set by search.resources.cpus",
    "training.use_gpu": "is set by search.resources.gpus",
    "training.loggers": "does not change what is learnt",
    "knowledge.path": "is chosen by the sweep, which builds each store it needs",
    "knowledge.loader": "does not change what is learnt",
    "knowledge.node_copies": "does not change what is learnt",
    "knowledge.mode": "does not change what is learnt but for fresh augmentation; sweep in one mode",
    "distiller.name": "only picks defaults, which are set by now; search `distiller`: choice: [kd, tmkd]",
}
"""Paths that are no matter of a sweep, and why; all below them too."""

_DATASET_MAY = ("dataset.image_size", "dataset.mean", "dataset.std")
"""Of the dataset; anything else would change the validation images, on which the trials are compared."""

MUTABLE = {
    "training.learning_rate",
    "training.momentum",
    "training.label_smoothing",
    "training.max_gradient_norm",
    "distiller.ce_weight",
    "distiller.kd_weight",
    "distiller.feature_weight",
    "distiller.text_weight",
    "distiller.contrastive_weight",
    "distiller.fusion_temperature",
    "distiller.clip_temperature",
    "distiller.text_temperature",
    "distiller.contrastive_temperature",
}
"""What a training reads anew at every start, and neither network nor optimiser's state depends on: for PBT."""

Parameters = dict[str, Any]
"""Dotted path: value."""


@dataclass(frozen=True)
class Space:
    """A sweep's configuration, checked.

    Attributes:
        config: of the experiment; `config.search` is set.
        stores: the parameters of each knowledge store that the trials need, by `store_key`; the first is one
            without parameters if nothing searched needs a teacher.
    """

    config: ExperimentConfig
    stores: dict[str, Parameters]

    @property
    def search(self) -> SearchConfig:
        assert self.config.search is not None
        return self.config.search


def trial_config(config: ExperimentConfig, parameters: Mapping[str, Any]) -> ExperimentConfig:
    """Return a trial's configuration: one student, trained as `tmkd distill` would.

    Raises:
        ConfigError: a path does not exist, or the values do not go together.
    """
    problems = _problems(config, parameters)
    if problems:
        listing = "; ".join(f"{path}: {text}" if path else text for path, text in problems)
        raise ConfigError(f"the trial {_listed(parameters)} is refused: {listing}")
    return ExperimentConfig.model_validate(_tree(config, parameters))


def check_space(config: ExperimentConfig) -> Space:
    """Check a sweep before anything starts.

    Raises:
        ConfigError: with all that is wrong, by dotted path.
    """
    search = config.search
    if search is None:
        raise ConfigError("search: nothing is given; add the section, with `parameters`")
    problems: list[tuple[str, str]] = []
    for path, distribution in search.parameters.items():
        where = f"search.parameters.{path}"
        refusal = _refusal(path) or _missing(config, path) or _covered(path, search.parameters)
        if refusal is None and search.scheduler.name == "pbt":
            refusal = _immutable(path, distribution.end_points(), distribution.is_finite_list)
        if refusal is not None:
            problems.append((where, refusal))
            continue
        found: dict[tuple[str, str], list[Any]] = {}
        for value in distribution.end_points():
            for problem in _problems(config, {path: value}):
                found.setdefault(problem, []).append(value)
        for (at, text), values in found.items():
            given = ", ".join(_written(value) for value in values)
            about = "" if at == path or not at else f"{at}: "
            problems.append((where, f"{given}: {about}{text}"))
    if config.knowledge.mode == "streaming":
        text = "streaming runs the teachers again for every epoch of every trial; set it to cached"
        problems.append(("knowledge.mode", text))
    if not problems:
        problems += _problems_together(config, search)
    stores: dict[str, Parameters] = {}
    if not problems:
        stores, problems = _stores(config, search)
    if problems:
        count = "1 error" if len(problems) == 1 else f"{len(problems)} errors"
        listing = "\n".join(f"  {where}: {text}" for where, text in problems)
        raise ConfigError(f"{count} in the sweep:\n{listing}")
    return Space(config, stores)


def store_key(config: ExperimentConfig) -> str:
    """Return what tells the knowledge store of one configuration from that of another: a short hash.

    Prompts are in it, since a CLIP that is fitted here is fitted to them.
    """
    pools = config.knowledge
    content = {
        name: getattr(config, name).model_dump(mode="json") for name in ("dataset", "augmentation", "teacher")
    }
    content["views"] = [(name, view.model_dump(mode="json")) for name, view in config.views.items()]
    content["knowledge"] = pools.model_dump(
        mode="json", include={"mode", "num_variants", "dtype", "images", "shard_rows", "seed"}
    )
    for name in ("visual", "text"):
        content[f"knowledge.{name}"] = getattr(pools, name).model_dump(mode="json", include=_POOLS_DECIDE)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def sweep_folder(space: Space) -> str:
    """Return where a sweep lies: in the run's folder, by what is searched and how; not by how long."""
    config = space.config
    return storage.join(storage.absolute(config.output), config.name, f"search-{sweep_key(space)}")


def sweep_key(space: Space) -> str:
    """Return what names a sweep: a longer one goes on with the trials there are."""
    config = space.config.model_dump(mode="json", exclude={"name", "output", "cluster", "search", "report"})
    search = space.search.model_dump(
        mode="json",
        include={"parameters", "searcher", "scheduler", "objectives", "seed"},
    )
    workers = {"workers": space.search.resources.workers, "cpus": space.search.resources.cpus}
    content = json.dumps([__version__, config, search, workers], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def _refusal(path: str) -> str | None:
    for refused, reason in _REFUSED.items():
        if path == refused or path.startswith(f"{refused}."):
            return f"{refused} {reason}"
    if path.split(".")[0] == "dataset" and path not in _DATASET_MAY:
        may = ", ".join(_DATASET_MAY)
        return f"changes the validation images, on which the trials are compared; there may be searched: {may}"
    return None


def _missing(config: ExperimentConfig, path: str) -> str | None:
    """Return what is wrong with a path that the resolved configuration does not have."""
    node: Any = config.model_dump(mode="json")
    passed: list[str] = []
    for key in path.split("."):
        if not isinstance(node, dict):
            return f"{'.'.join(passed)} is {shown(node)}, which has no keys"
        if key not in node:
            guess = nearest(key, node)
            hint = f"did you mean {'.'.join([*passed, guess])!r}?" if guess else f"there: {', '.join(node)}"
            return f"there is no such field; {hint}"
        node = node[key]
        passed.append(key)
    return None


def _covered(path: str, paths: Iterable[str]) -> str | None:
    for other in paths:
        if path.startswith(f"{other}."):
            return f"lies within {other}, which is searched too; give the whole values there"
    return None


def _immutable(path: str, values: Sequence[Any], is_list: bool) -> str | None:
    if path not in MUTABLE:
        return (
            "cannot change while a student trains (network, optimiser's state or batches hang on it), as pbt "
            f"asks for; of what is searched it changes: {', '.join(sorted(MUTABLE))}"
        )
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in values):
        return "pbt changes numbers only"
    if is_list and list(values) != sorted(values):
        return "pbt moves to the neighbouring value of a list; give the values in order"
    if path.endswith("_weight") and min(values) <= 0:
        return "a weight of 0 leaves out the term's head, which cannot come back in training; begin above 0"
    return None


def _tree(config: ExperimentConfig, parameters: Mapping[str, Any]) -> dict[str, Any]:
    search = config.search
    assert search is not None
    tree = config.model_dump(mode="json")
    resources = search.resources
    tree["search"], tree["methods"], tree["seeds"] = None, {}, None
    tree["training"] |= {
        "num_workers": resources.workers,
        "min_workers": None,
        "num_cpus_per_worker": resources.cpus,
        "use_gpu": None if resources.gpus is None else resources.gpus > 0,
    }
    for path, value in parameters.items():
        *above, last = path.split(".")
        node = tree
        for key in above:
            node = node[key]
        node[last] = value
    return tree


def _problems(config: ExperimentConfig, parameters: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (dotted path, what is wrong) of a trial's configuration."""
    try:
        ExperimentConfig.model_validate(_tree(config, parameters))
    except ValidationError as error:
        return [(".".join(path), text) for path, text in explain(error, ExperimentConfig)]
    return []


def _problems_together(config: ExperimentConfig, search: SearchConfig) -> list[tuple[str, str]]:
    """Return what is wrong with values that each alone are right."""
    ends = {path: distribution.end_points() for path, distribution in search.parameters.items()}
    if math.prod(len(values) for values in ends.values()) > _MAX_COMBINATIONS:
        ends = {path: tuple({0: values[0], 1: values[-1]}.values()) for path, values in ends.items()}
    combinations = itertools.islice(itertools.product(*ends.values()), _MAX_COMBINATIONS)
    for combination in combinations:
        parameters = dict(zip(ends, combination, strict=True))
        problems = _problems(config, parameters)
        if problems:
            found = "; ".join(f"{at}: {text}" if at else text for at, text in problems)
            return [("search.parameters", f"{_listed(parameters)} do not go together: {found}")]
    return []


def _stores(
    config: ExperimentConfig, search: SearchConfig
) -> tuple[dict[str, Parameters], list[tuple[str, str]]]:
    """Return the stores that the trials need, and what is wrong with them."""
    plain = store_key(ExperimentConfig.model_validate(_tree(config, {})))
    needing: dict[str, Sequence[Any]] = {}
    problems: list[tuple[str, str]] = []
    for path, distribution in search.parameters.items():
        keys = {store_key(trial_config(config, {path: value})) for value in distribution.end_points()}
        if keys == {plain}:
            continue
        values = distribution.all_values(MAX_STORES)
        if values is None:
            text = (
                "needs the teachers again for every value, so it can be given few values only: "
                f"`choice` or `grid` of at most {MAX_STORES}, not {distribution.kind}"
            )
            problems.append((f"search.parameters.{path}", text))
        else:
            needing[path] = values
    if math.prod(len(values) for values in needing.values()) > MAX_STORES:
        number = math.prod(len(values) for values in needing.values())
        text = (
            f"{', '.join(needing)} need {number} knowledge stores, of at most {MAX_STORES}; give fewer values"
        )
        problems.append(("search.parameters", text))
    if problems:
        return {}, problems
    stores: dict[str, Parameters] = {}
    for combination in itertools.product(*needing.values()):
        parameters = dict(zip(needing, combination, strict=True))
        stores.setdefault(store_key(trial_config(config, parameters)), parameters)
    return stores, []


def _listed(parameters: Mapping[str, Any]) -> str:
    return ", ".join(f"{path}={_written(value)}" for path, value in parameters.items())


def _written(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list | tuple) else shown(value)
