"""CRD in the training loop: its banks are told which images they are of, and go on after an interruption."""

from pathlib import Path

import pytest
import torch
from training_samples import assert_same_weights, interrupt, knowledge, run, student_task, timeless, training

from tmkd_ray.distillers.crd import CRD
from tmkd_ray.training.student import StudentTask

DISTILLER = {
    "name": "kd",
    "ce_weight": 1.0,
    "kd_weight": 0.8,
    "strategy": {"name": "crd", "embedding_width": 8, "num_negatives": 64},
}


def strategy_of(task: StudentTask) -> CRD:
    strategy = task.module.distiller.strategy
    assert isinstance(strategy, CRD)
    return strategy


@pytest.mark.parametrize("labels_per_class", [None, 2])
def test_the_bank_has_a_row_and_the_label_of_each_training_image(
    tmp_path: Path, labels_per_class: int | None
) -> None:
    config = training(epochs=1, batch_size=4, labels_per_class=labels_per_class)
    task = student_task(config, DISTILLER, train=knowledge(0, 40))
    strategy = strategy_of(task)
    assert len(strategy.bank_labels) == len(task.source) == (40 if labels_per_class is None else 20)
    run(task, config, tmp_path)
    assert strategy.step == len(task.source) // 4
    assert torch.equal(strategy.bank_labels, task.source.labels)


def test_resumed_training_is_that_of_one_that_was_not_interrupted(tmp_path: Path) -> None:
    config = training(epochs=3)
    whole = student_task(config, DISTILLER)
    expected = run(whole, config, tmp_path / "whole")
    interrupt(student_task(config, DISTILLER), config, tmp_path / "broken", epoch=1)
    task = student_task(config, DISTILLER, initial_seed=9)
    resumed = run(task, config, tmp_path / "broken")
    assert_same_weights(resumed.weights, expected.weights)
    assert timeless(resumed.history) == timeless(expected.history)
    state = task.module.distiller.state_dict()
    for name, value in whole.module.distiller.state_dict().items():
        assert torch.equal(state[name], value)
