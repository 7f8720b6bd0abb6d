"""The moving average of weights against its formula in NumPy, and what is evaluated and kept of it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from training_samples import ScriptedTask, run, scripted, student_task, training

from tmkd_ray.models import build_model, load_checkpoint
from tmkd_ray.training.averaging import WeightAverage, batch_statistics
from tmkd_ray.training.context import PlainContext
from tmkd_ray.types import TaskSpec


def averaged(values: list[float], decay: float, start: float = 0.0) -> float:
    """Return the average after steps that left these values."""
    average = start
    for number, value in enumerate(values, start=1):
        rate = min(decay, (1 + number) / (10 + number))
        average = rate * average + (1 - rate) * value
    return average


@pytest.mark.parametrize("decay", [0.01, 0.3, 0.999])
def test_average_is_its_formula(decay: float) -> None:
    """Of weights and batch statistics; what is counted is not averaged."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    start = {name: value.double().numpy().copy() for name, value in network.state_dict().items()}
    average = WeightAverage(network, decay)
    seen: dict[str, list[Any]] = {name: [] for name in start}
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        with torch.no_grad():
            for value in (*network.parameters(), *batch_statistics(network)):
                value.add_(torch.randn(value.shape, generator=generator))
            network[1].num_batches_tracked += 1
        average.update()
        for name, value in network.state_dict().items():
            seen[name].append(value.double().numpy().copy())
    raw = {name: value.clone() for name, value in network.state_dict().items()}
    with average.applied():
        found = {name: value.clone() for name, value in network.state_dict().items()}
    for name, values in seen.items():
        if name.endswith("num_batches_tracked"):
            assert found[name] == 30
        else:
            expected = averaged(values, decay, start[name])
            np.testing.assert_allclose(found[name].numpy(), expected, rtol=1e-4, atol=1e-5)
            assert not torch.equal(found[name], raw[name])
    for name, value in network.state_dict().items():
        assert torch.equal(value, raw[name]), "the raw weights are back"


def test_raw_weights_come_back_when_the_evaluation_fails() -> None:
    network = nn.Linear(2, 2)
    average = WeightAverage(network, 0.5)
    with torch.no_grad():
        network.weight += 1
    raw = network.weight.detach().clone()
    with pytest.raises(KeyError), average.applied():
        raise KeyError
    assert torch.equal(network.weight, raw)


def test_state_is_read_back() -> None:
    network = nn.Linear(3, 2)
    average = WeightAverage(network, 0.9)
    for _ in range(5):
        with torch.no_grad():
            network.weight += 1
        average.update()
    other = WeightAverage(nn.Linear(3, 2), 0.9)
    other.load_state_dict(average.state_dict())
    assert other.steps == 5
    for found, expected in zip(other.average, average.average, strict=True):
        assert torch.equal(found, expected)


def test_the_average_is_evaluated_and_kept(tmp_path: Path) -> None:
    """The weight is -1, -2 … after the steps; training goes on from it, not from the average."""
    config = scripted(epochs=2, ema_decay=0.5)
    task = ScriptedTask([0.1, 0.2])
    outcome = run(task, config, tmp_path)
    expected = [averaged([-float(n) for n in range(1, last + 1)], 0.5) for last in (3, 6)]
    assert task.seen == pytest.approx(expected)
    assert outcome.weights["weight"].item() == pytest.approx(expected[1])
    assert task.module.weight.item() == -6
    assert outcome.history[1].terms["slope"] == pytest.approx(-4.0), "of the weights -3, -4, -5"


def test_kept_weights_have_the_accuracy_that_is_told(tmp_path: Path) -> None:
    """With batch statistics of their own."""

    def resnet8() -> Any:
        return build_model("resnet8", TaskSpec(tuple("0123456789"), 16))

    config = training(epochs=6, learning_rate=0.02, ema_decay=0.8)
    task = student_task(config, "alone", resnet8)
    outcome = run(task, config, tmp_path)
    task.save(str(tmp_path / "saved"), outcome.weights)
    fresh = student_task(config, "alone", resnet8, initial_seed=7)
    load_checkpoint(fresh.kept, str(tmp_path / "saved" / "model.safetensors"))
    fresh.module.eval()
    assert fresh.validate(PlainContext(tmp_path))["accuracy"] == outcome.accuracy
    raw = task.kept.state_dict()
    for name in ("conv1.weight", "bn1.running_var"):
        assert not torch.equal(outcome.weights[name], raw[name])
