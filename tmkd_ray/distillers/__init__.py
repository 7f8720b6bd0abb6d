"""Distillation strategies, one a file, and the TMKD objective that any of them fits into."""

from tmkd_ray.distillers.base import DistillationSpec, Strategy, StrategyConfig
from tmkd_ray.registry import Registry, import_submodules

STRATEGIES: Registry[type[Strategy]] = Registry("distillation strategy")


def build_strategy(config: StrategyConfig, spec: DistillationSpec) -> Strategy:
    """Return the strategy that `config` names."""
    return STRATEGIES.get(config.name)(config, spec)


import_submodules(__name__, __path__)

__all__ = ["STRATEGIES", "DistillationSpec", "Strategy", "StrategyConfig", "build_strategy"]
