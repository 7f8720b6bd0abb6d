"""Optimiser and learning-rate schedule."""

import math

import torch
from torch import nn

from tmkd_ray.config import TrainingConfig


def build_optimizer(config: TrainingConfig, module: nn.Module) -> torch.optim.Optimizer:
    """Return SGD over all parameters, or AdamW without weight decay on biases and normalisation."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=config.learning_rate,
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
            fused=True,
        )
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)


def learning_rate(config: TrainingConfig, progress: float) -> float:
    """Return the learning rate after `progress` epochs (a fraction within an epoch counts).

    Linear warm-up, then constant, cosine to zero, or steps at `milestones` (parts of all epochs).
    """
    if progress < config.warmup_epochs:
        return config.learning_rate * (progress + 1e-8) / config.warmup_epochs
    if config.schedule == "constant":
        return config.learning_rate
    if config.schedule == "cosine":
        part = (progress - config.warmup_epochs) / (config.epochs - config.warmup_epochs)
        return config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * part))
    passed = sum(progress >= milestone * config.epochs for milestone in config.milestones)
    return config.learning_rate * config.decay**passed
