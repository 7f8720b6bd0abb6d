"""DOT in the training loop, and where the configuration refuses it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from training_samples import assert_same_weights, interrupt, run, student_task, timeless, training

from tmkd_ray.config_reading import read_config
from tmkd_ray.errors import ConfigError


def dot(**changes: Any) -> Any:
    return training(**{"optimizer": "dot", "epochs": 3, **changes})


@pytest.mark.parametrize("distiller", ["kd", "tmkd"])
def test_without_delta_the_student_is_that_of_sgd(tmp_path: Path, distiller: str) -> None:
    expected = run(student_task(training(epochs=3), distiller), training(epochs=3), tmp_path / "sgd")
    config = dot(dot_delta=0.0)
    found = run(student_task(config, distiller), config, tmp_path / "dot")
    for name, value in expected.weights.items():
        torch.testing.assert_close(found.weights[name], value, rtol=1e-3, atol=1e-4)
    assert found.history[-1].loss == pytest.approx(expected.history[-1].loss, rel=1e-3)


def test_delta_makes_a_difference_and_survives_an_interruption(tmp_path: Path) -> None:
    config = dot(max_gradient_norm=1.0)
    whole = run(student_task(config), config, tmp_path / "whole")
    interrupt(student_task(config), config, tmp_path / "broken", epoch=1)
    resumed = run(student_task(config, initial_seed=9), config, tmp_path / "broken")
    assert_same_weights(resumed.weights, whole.weights)
    assert timeless(resumed.history) == timeless(whole.history)
    plain = dot(max_gradient_norm=1.0, dot_delta=0.0)
    other = run(student_task(plain), plain, tmp_path / "plain")
    assert other.history[-1].loss != pytest.approx(whole.history[-1].loss, rel=1e-4)


@pytest.mark.parametrize(
    ("overrides", "path"),
    [
        (["distiller=alone"], "training.optimizer"),
        (["distiller.ce_weight=0"], "training.optimizer"),
        (["methods={a: kd, b: alone}"], "training.optimizer"),
        (["training.precision=float16"], "training.precision"),
        (["training.nesterov=true"], "training.nesterov"),
        (["training.gradient_accumulation=2"], "training.gradient_accumulation"),
        (["training.momentum=0.95"], "training.dot_delta"),
        (["teacher.visual.fit.optimizer=dot"], "teacher.visual.fit.optimizer"),
        (["teacher.text.fit.optimizer=dot"], "teacher.text.fit.optimizer"),
    ],
)
def test_where_there_are_no_two_gradients_it_is_refused(overrides: list[str], path: str) -> None:
    options = ["dataset=digits", "training.optimizer=dot"]
    read_config(None, options)
    with pytest.raises(ConfigError, match=rf"(?m)^  {path}: "):
        read_config(None, [*options, *overrides])
