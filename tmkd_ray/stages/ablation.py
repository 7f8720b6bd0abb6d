"""The standard ablation of TMKD: every part left out in turn, for each strategy and seed."""

from collections.abc import Sequence
from typing import Any

from tmkd_ray import storage
from tmkd_ray.config import ExperimentConfig
from tmkd_ray.config_reading import resolve
from tmkd_ray.distillers import STRATEGIES
from tmkd_ray.errors import UserError
from tmkd_ray.objective import DistillerConfig
from tmkd_ray.report.ablation import ablation_csv, ablation_figure, ablation_markdown
from tmkd_ray.results import RunResults
from tmkd_ray.settings import resolve_named
from tmkd_ray.stages.experiment import Experiment
from tmkd_ray.stages.progress import say
from tmkd_ray.stages.run import run

DEFAULT_SEEDS = (0, 1, 2)


def ablation_config(config: ExperimentConfig, strategies: Sequence[str] | None = None) -> ExperimentConfig:
    """Return the configuration whose methods are the ablation's; `distiller` is the whole method.

    The rows, for each strategy: `full`; `no_views` (the first view alone); `PRIOR_only` for every other view
    (the first view and that one); `uniform_weights`; `no_text` and `no_contrastive` (that term left out);
    `plain` (the plain teacher: neither views nor text). And `alone`, once.

    Args:
        strategies: names; None for the distiller's own.

    Raises:
        UserError: the distiller is not on the fused teacher, has fewer than two views, or a name is unknown.
    """
    full = config.distiller
    views = config.taught_views(full)
    if not isinstance(full, DistillerConfig) or full.teacher != "fused" or len(views) < 2:
        raise UserError(
            "distiller: an ablation takes parts from a fused teacher of at least two views; use tmkd"
        )
    methods: dict[str, DistillerConfig] = {}
    named = [full.strategy.name] if strategies is None else list(strategies)
    for name in named:
        strategy = full.strategy if name == full.strategy.name else resolve_named(name, STRATEGIES)
        prefix = f"{name}-" if len(named) > 1 else ""
        for part, changes in _parts(full, views).items():
            methods[prefix + part] = DistillerConfig.model_validate(
                {**dict(full), "strategy": strategy, **changes}
            )
    methods["alone"] = DistillerConfig.model_validate("alone")
    seeds = config.seeds or DEFAULT_SEEDS
    return resolve({**dict(config), "methods": methods, "seeds": seeds}, "the ablation of distiller")


def _parts(full: DistillerConfig, views: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    first = views[0]
    parts: dict[str, dict[str, Any]] = {"full": {}, "no_views": {"views": (first,)}}
    if len(views) > 2:
        parts |= {f"{view}_only": {"views": (first, view)} for view in views[1:]}
    if full.weighting != "uniform":
        parts["uniform_weights"] = {"weighting": "uniform"}
    if full.text_weight:
        parts["no_text"] = {"text_weight": 0.0}
    if full.contrastive_weight:
        parts["no_contrastive"] = {"contrastive_weight": 0.0}
    parts["plain"] = {"teacher": "plain", "views": (first,), "text_weight": 0.0, "contrastive_weight": 0.0}
    return parts


def ablate(experiment: Experiment) -> RunResults:
    """Run an ablation's methods and seeds, and write `ablation.{json,html,md,csv,svg}` into the run's folder.

    What is finished is kept, as in `run`.

    Args:
        experiment: of an `ablation_config`.
    """
    results = run(experiment, stem="ablation")
    for suffix, content in (
        ("md", ablation_markdown(results)),
        ("csv", ablation_csv(results)),
        ("svg", ablation_figure(results)),
    ):
        path = storage.join(experiment.folder, f"ablation.{suffix}")
        storage.write_bytes(path, content.encode())
        say(f"ablation: {path}")
    return results
