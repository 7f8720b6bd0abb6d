"""Optimiser and learning-rate schedule."""

import math

import torch
from torch import nn

from tmkd_ray.config import TrainingConfig
from tmkd_ray.training.dot import DOT

_ONE_CYCLE_START = 1 / 25
"""Part of the learning rate that one_cycle begins with, as in fastai and torch's OneCycleLR."""


def build_optimizer(config: TrainingConfig, module: nn.Module) -> torch.optim.Optimizer:
    """Return SGD or DOT over all parameters, or AdamW without weight decay on biases and normalisation."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    if config.optimizer == "dot":
        return DOT(parameters, config.learning_rate, config.momentum, config.dot_delta, config.weight_decay)
    if config.optimizer == "sgd":
        optimizer = torch.optim.SGD(
            parameters,
            lr=config.learning_rate,
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
            fused=True,
        )
        if config.precision == "float16" and config.momentum > 0:
            # A first step that overflows is skipped, but torch takes its momenta, never written, for real.
            for parameter in parameters:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)


def learning_rate(config: TrainingConfig, progress: float) -> float:
    """Return the learning rate after `progress` epochs (a fraction within an epoch counts).

    Linear warm-up, then constant, cosine, or steps at `milestones` (parts of all epochs). `one_cycle` rises
    linearly from a 25th over `warmup_epochs`, then falls as a cosine; see `momentum` for the rest of it.
    """
    if progress < config.warmup_epochs:
        part = (progress + 1e-8) / config.warmup_epochs
        if config.schedule == "one_cycle":
            part = _ONE_CYCLE_START + (1.0 - _ONE_CYCLE_START) * part
        return config.learning_rate * part
    if config.schedule == "constant":
        return config.learning_rate
    if config.schedule == "step":
        passed = sum(progress >= milestone * config.epochs for milestone in config.milestones)
        return config.learning_rate * config.decay**passed
    lowest = config.learning_rate * config.min_learning_rate_ratio
    return lowest + (config.learning_rate - lowest) * _cosine_fall(config, progress)


def momentum(config: TrainingConfig, progress: float) -> float:
    """Return SGD's momentum: with `one_cycle` it is lowest where the learning rate is highest.

    Source: Smith & Topin 2018, "Super-convergence: Very fast training of neural networks using large learning
    rates", arXiv 1708.07120; Smith 2018, arXiv 1803.09820, section 4.3 (momentum 0.95 and 0.85).
    """
    if config.schedule != "one_cycle":
        return config.momentum
    risen = min(progress / config.warmup_epochs, 1.0)
    height = risen if risen < 1.0 else _cosine_fall(config, progress)
    return config.momentum + (config.one_cycle_momentum - config.momentum) * height


def set_rates(config: TrainingConfig, optimizer: torch.optim.Optimizer, progress: float) -> None:
    """Set learning rate and momentum for a step."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, progress)
        if "momentum" in group:
            group["momentum"] = momentum(config, progress)


def _cosine_fall(config: TrainingConfig, progress: float) -> float:
    """Return 1 after the warm-up, falling to 0 at the end."""
    part = (progress - config.warmup_epochs) / (config.epochs - config.warmup_epochs)
    return 0.5 * (1.0 + math.cos(math.pi * part))
