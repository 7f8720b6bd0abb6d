"""Optimisers against their update rules in NumPy, learning rates against values worked out by hand."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tmkd_ray.config import TrainingConfig
from tmkd_ray.training.optimization import build_optimizer, learning_rate, momentum, set_rates

LEARNING_RATE, DECAY = 0.1, 0.02


class Layers(nn.Module):
    """A weight, a normalisation and its bias, a scalar (as CLIP's logit scale), and a frozen weight."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3, 2, generator=generator))
        self.bias = nn.Parameter(torch.randn(3, generator=generator))
        self.scale = nn.Parameter(torch.randn((), generator=generator))
        self.frozen = nn.Parameter(torch.randn(2, 2, generator=generator), requires_grad=False)


def gradients(value: torch.Tensor) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        yield torch.randn(value.shape, generator=generator)


def trained(config: TrainingConfig) -> Layers:
    """Take four steps with the gradients of `gradients`."""
    module = Layers()
    optimizer = build_optimizer(config, module)
    given = {name: gradients(value) for name, value in module.named_parameters()}
    for _ in range(4):
        for name, value in module.named_parameters():
            value.grad = next(given[name])
        optimizer.step()
    return module


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.9, 0.5])
def test_sgd_is_its_update_rule(momentum: float, nesterov: bool) -> None:
    """Weight decay enters the gradient of every parameter; Sutskever et al. 2013 for the momentum."""
    config = TrainingConfig(
        learning_rate=LEARNING_RATE, momentum=momentum, nesterov=nesterov, weight_decay=DECAY
    )
    module, start = trained(config), dict(Layers().named_parameters())
    for name in ("weight", "bias", "scale"):
        value, velocity = start[name].detach().double().numpy(), 0.0
        for gradient in gradients(start[name]):
            slope = gradient.double().numpy() + DECAY * value
            velocity = momentum * velocity + slope
            value = value - LEARNING_RATE * (slope + momentum * velocity if nesterov else velocity)
        np.testing.assert_allclose(getattr(module, name).detach().numpy(), value, rtol=1e-5, atol=1e-6)
    assert torch.equal(module.frozen, start["frozen"])


def test_adamw_is_its_update_rule_and_decays_matrices_alone() -> None:
    """Loshchilov & Hutter 2019, algorithm 2, with beta .9 and .999; biases, norms and scalars do not decay."""
    config = TrainingConfig(optimizer="adamw", learning_rate=LEARNING_RATE, weight_decay=DECAY)
    module, start = trained(config), dict(Layers().named_parameters())
    for name, decay in (("weight", DECAY), ("bias", 0.0), ("scale", 0.0)):
        value: Any = start[name].detach().double().numpy()
        mean, square = 0.0, 0.0
        for step, gradient in enumerate(gradients(start[name]), start=1):
            slope: Any = gradient.double().numpy()
            mean = 0.9 * mean + 0.1 * slope
            square = 0.999 * square + 0.001 * slope**2
            ratio = (mean / (1 - 0.9**step)) / (np.sqrt(square / (1 - 0.999**step)) + 1e-8)
            value = value - LEARNING_RATE * (ratio + decay * value)
        np.testing.assert_allclose(getattr(module, name).detach().numpy(), value, rtol=1e-5, atol=1e-6)
    assert torch.equal(module.frozen, start["frozen"])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_each_parameter_is_trained_once(optimizer: Any) -> None:
    module = Layers()
    groups = build_optimizer(TrainingConfig(optimizer=optimizer), module).param_groups
    held = [id(value) for group in groups for value in group["params"]]
    assert sorted(held) == sorted(id(value) for value in (module.weight, module.bias, module.scale))
    assert all(group["lr"] == TrainingConfig().learning_rate for group in groups)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_lone_linear_layer(optimizer: Any, bias: bool) -> None:
    module = nn.Linear(2, 2, bias=bias)
    before = module.weight.detach().clone()
    optimiser = build_optimizer(TrainingConfig(optimizer=optimizer), module)
    module(torch.ones(1, 2)).sum().backward()
    optimiser.step()
    assert not torch.equal(module.weight, before)


# Learning rate ------------------------------------------------------------------------------------

FIELD = {"epochs": 240, "learning_rate": 0.05, "schedule": "step"}
CYCLE = {"epochs": 12, "learning_rate": 1.0, "schedule": "one_cycle", "warmup_epochs": 4, "momentum": 0.95}


@pytest.mark.parametrize(
    ("options", "progress", "expected"),
    [
        ({"schedule": "constant", "epochs": 10, "learning_rate": 0.2}, 0.0, 0.2),
        ({"schedule": "constant", "epochs": 10, "learning_rate": 0.2}, 9.9, 0.2),
        ({"schedule": "constant", "epochs": 10, "learning_rate": 0.2, "warmup_epochs": 4}, 1.0, 0.05),
        ({"schedule": "constant", "epochs": 10, "learning_rate": 0.2, "warmup_epochs": 4}, 4.0, 0.2),
        # Cosine from 0.05 to 0 over 20 epochs.
        ({"epochs": 20}, 0.0, 0.05),
        ({"epochs": 20}, 5.0, 0.025 * (1 + math.sqrt(0.5))),
        ({"epochs": 20}, 20 / 3, 0.0375),
        ({"epochs": 20}, 10.0, 0.025),
        ({"epochs": 20}, 40 / 3, 0.0125),
        ({"epochs": 20}, 20.0, 0.0),
        # Five epochs of warm-up, then cosine over the twenty that are left.
        ({"epochs": 25, "warmup_epochs": 5}, 1.0, 0.01),
        ({"epochs": 25, "warmup_epochs": 5}, 2.5, 0.025),
        ({"epochs": 25, "warmup_epochs": 5}, 5.0, 0.05),
        ({"epochs": 25, "warmup_epochs": 5}, 15.0, 0.025),
        ({"epochs": 25, "warmup_epochs": 5}, 25.0, 0.0),
        ({"epochs": 2, "warmup_epochs": 0.5}, 0.25, 0.025),
        # The field's CIFAR schedule: a tenth at 150, 180 and 210 of 240 epochs.
        (FIELD, 0.0, 0.05),
        (FIELD, 149.99, 0.05),
        (FIELD, 150.0, 0.005),
        (FIELD, 179.99, 0.005),
        (FIELD, 180.0, 5e-4),
        (FIELD, 209.99, 5e-4),
        (FIELD, 210.0, 5e-5),
        (FIELD, 239.99, 5e-5),
        ({**FIELD, "warmup_epochs": 10}, 5.0, 0.025),
        ({**FIELD, "warmup_epochs": 10}, 155.0, 0.005),
        ({**FIELD, "decay": 0.5, "milestones": (0.5,)}, 119.0, 0.05),
        ({**FIELD, "decay": 0.5, "milestones": (0.5,)}, 120.0, 0.025),
        ({**FIELD, "milestones": ()}, 239.0, 0.05),
        # Cosine from 0.05 to a tenth of it.
        ({"epochs": 20, "min_learning_rate_ratio": 0.1}, 0.0, 0.05),
        ({"epochs": 20, "min_learning_rate_ratio": 0.1}, 10.0, 0.0275),
        ({"epochs": 20, "min_learning_rate_ratio": 0.1}, 20.0, 0.005),
        # One cycle: a 25th of 1, in 4 epochs to 1, in 8 to 0 (or 0.1).
        (CYCLE, 0.0, 0.04),
        (CYCLE, 1.0, 0.28),
        (CYCLE, 3.0, 0.76),
        (CYCLE, 4.0, 1.0),
        (CYCLE, 6.0, 0.5 + math.sqrt(0.125)),
        (CYCLE, 8.0, 0.5),
        (CYCLE, 12.0, 0.0),
        ({**CYCLE, "min_learning_rate_ratio": 0.1}, 1.0, 0.28),
        ({**CYCLE, "min_learning_rate_ratio": 0.1}, 8.0, 0.55),
        ({**CYCLE, "min_learning_rate_ratio": 0.1}, 12.0, 0.1),
    ],
    ids=str,
)
def test_learning_rate_by_hand(options: dict[str, Any], progress: float, expected: float) -> None:
    assert learning_rate(TrainingConfig(**options), progress) == pytest.approx(expected, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "step"])
def test_warm_up_rises_evenly_from_almost_nothing(schedule: Any) -> None:
    config = TrainingConfig(epochs=50, warmup_epochs=5, schedule=schedule)
    rates = [learning_rate(config, step / 10) for step in range(50)]
    assert 0 < rates[0] < 1e-6
    np.testing.assert_allclose(np.diff(rates), config.learning_rate / 50, rtol=1e-3)
    assert learning_rate(config, 5.0) == pytest.approx(config.learning_rate, rel=1e-6)


def test_cosine_falls_all_the_way() -> None:
    config = TrainingConfig(epochs=7, warmup_epochs=1)
    rates = np.array([learning_rate(config, progress) for progress in np.linspace(1, 7, 100)])
    assert (np.diff(rates) < 0).all()
    np.testing.assert_allclose(rates + rates[::-1], config.learning_rate)  # point symmetric about the middle


@pytest.mark.parametrize(
    ("progress", "expected"),
    [(0.0, 0.95), (1.0, 0.925), (3.0, 0.875), (4.0, 0.85), (8.0, 0.9), (12.0, 0.95)],
)
def test_one_cycle_moves_momentum_the_other_way(progress: float, expected: float) -> None:
    """From 0.95 to 0.85 and back, as Smith has it."""
    config = TrainingConfig.model_validate(CYCLE)
    assert momentum(config, progress) == pytest.approx(expected)
    other = config.model_copy(update={"one_cycle_momentum": 0.75})
    assert momentum(other, progress) == pytest.approx(0.95 - 2 * (0.95 - expected))


def test_rates_are_set_for_each_group() -> None:
    cycle = TrainingConfig.model_validate(CYCLE)
    optimizer = build_optimizer(cycle, Layers())
    set_rates(cycle, optimizer, 8.0)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.5])
    assert [group["momentum"] for group in optimizer.param_groups] == pytest.approx([0.9])
    for schedule in ("constant", "cosine", "step"):
        plain = TrainingConfig.model_validate({**CYCLE, "schedule": schedule})
        set_rates(plain, optimizer, 8.0)
        assert optimizer.param_groups[0]["momentum"] == 0.95
    adamw = TrainingConfig.model_validate({**CYCLE, "optimizer": "adamw"})
    optimizer = build_optimizer(adamw, Layers())
    set_rates(adamw, optimizer, 8.0)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.5, 0.5])
    assert [group["betas"] for group in optimizer.param_groups] == [(0.9, 0.999)] * 2


def test_a_first_step_that_overflows_leaves_no_trace() -> None:
    """In float16 the scaler skips it; torch's fused SGD would go on with momenta that were never written."""
    kwargs = {"precision": "float16", "learning_rate": 0.1, "momentum": 0.9, "weight_decay": 0.0}
    config = TrainingConfig.model_validate(kwargs)
    module = nn.Linear(2000, 1, bias=False)
    start = module.weight.detach().clone()
    junk = torch.full((1, 2000), 1e30)  # for the allocator to hand out again
    del junk
    optimizer = build_optimizer(config, module)
    scaler = torch.amp.GradScaler("cpu")
    for factor in (1e38, 1.0, 1.0):
        scaler.scale((module.weight * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    # Two steps of gradient one: 0.1 · 1, then 0.1 · (0.9 + 1).
    torch.testing.assert_close(module.weight.detach(), start - 0.1 - 0.19)
