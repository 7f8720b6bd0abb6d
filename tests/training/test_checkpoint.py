"""Checkpoints: what is written is read back, by a reader that runs nothing."""

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from training_samples import InterruptedTrainingError, assert_same_weights, interrupt, student_task, training

from tmkd_ray.results import EpochRecord
from tmkd_ray.training.checkpoint import TrainingState, read_checkpoint, written_checkpoint
from tmkd_ray.training.context import PlainContext


def example(key: str = "mine") -> TrainingState:
    record = EpochRecord(
        epoch=1,
        learning_rate=0.1,
        loss=0.1 + 0.2,
        terms={"ce": 1 / 3},
        validation_accuracy=2 / 3,
        seconds=1.5,
        images_per_second=10.0,
    )
    history = [record, record.model_copy(update={"epoch": 2, "train_accuracy": 0.5})]
    best = {"weight": torch.tensor([1.0, -2.0]), "steps": torch.tensor(3)}
    return TrainingState(key, 2, 1, 2 / 3, best, history, 12.25)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_round_trip(kind: str) -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    optimizer: torch.optim.Optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    if kind == "adamw":
        optimizer = torch.optim.AdamW(module.parameters())
    module(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    scaler = {"scale": 1024.0, "growth_factor": 2.0, "_growth_tracker": 7}
    state = example()
    expected = copy.deepcopy((module.state_dict(), optimizer.state_dict()))
    with written_checkpoint(state, module.state_dict(), optimizer.state_dict(), scaler) as folder:
        found = read_checkpoint(folder, "mine")
    assert not folder.exists()
    assert found is not None
    read, tensors = found
    assert set(tensors) == {"module", "optimizer", "scaler"}
    assert_same_weights(read.best, state.best)
    for name in ("key", "epoch", "best_epoch", "best_accuracy", "history", "seconds"):
        assert getattr(read, name) == getattr(state, name)
    assert_same_weights(tensors["module"], expected[0])
    assert tensors["scaler"] == scaler
    assert tensors["optimizer"]["param_groups"] == expected[1]["param_groups"]
    for index, values in expected[1]["state"].items():
        for name, value in values.items():
            torch.testing.assert_close(tensors["optimizer"]["state"][index][name], value, rtol=0, atol=0)


def test_another_runs_is_none_of_ours() -> None:
    with written_checkpoint(example("another"), {}, {}, {}) as folder:
        assert read_checkpoint(folder, "mine") is None
        assert read_checkpoint(folder, "another") is not None


def test_temporary_folder_goes_even_when_the_body_fails() -> None:
    seen = []

    def fail() -> None:
        with written_checkpoint(example(), {}, {}, {}) as folder:
            seen.append(folder)
            raise InterruptedTrainingError

    with pytest.raises(InterruptedTrainingError):
        fail()
    assert not seen[0].exists()


@pytest.mark.parametrize("changes", [{}, {"optimizer": "adamw"}, {"precision": "float16"}])
def test_a_trainings_checkpoint_holds_tensors_only(changes: dict[str, Any], tmp_path: Path) -> None:
    """Nothing in it is executed when it is read, and another process may place its tensors elsewhere."""
    config = training(**changes)
    task = student_task(config)
    interrupt(task, config, tmp_path, epoch=2)
    tensors = torch.load(tmp_path / "checkpoint" / "tensors.pt", map_location="meta", weights_only=True)
    assert set(tensors) == {"module", "optimizer", "scaler", "best"}
    assert set(tensors["best"]) == set(task.kept.state_dict())
    assert bool(tensors["scaler"]) == (config.precision == "float16")
    facts = json.loads((tmp_path / "checkpoint" / "state.json").read_text())
    assert (facts["key"], facts["epoch"], len(facts["history"])) == ("run", 2, 2)
    found = read_checkpoint(tmp_path / "checkpoint", "run")
    assert found is not None
    assert_same_weights(found[1]["module"], task.module.state_dict())


def test_plain_context_keeps_the_newest(tmp_path: Path) -> None:
    context = PlainContext(tmp_path / "new" / "folder", quiet=True)
    with context.latest_checkpoint() as folder:
        assert folder is None
    context.report({}, None)
    with context.latest_checkpoint() as folder:
        assert folder is None
    for epoch in (1, 2):
        (tmp_path / "source").mkdir(exist_ok=True)
        (tmp_path / "source" / f"epoch {epoch}").write_text(str(epoch))
        context.report({}, tmp_path / "source")
        (tmp_path / "source" / f"epoch {epoch}").unlink()
        with context.latest_checkpoint() as folder:
            assert folder is not None
            assert os.listdir(folder) == [f"epoch {epoch}"]
    assert os.listdir(tmp_path / "new" / "folder") == ["checkpoint"]


def test_plain_context_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    context = PlainContext(tmp_path)
    assert (context.rank, context.world_size, context.device) == (0, 1, torch.device("cpu"))
    values = torch.tensor([1.0, 2.0])
    assert context.reduce_sum(values).tolist() == [1.0, 2.0]
    context.barrier()
    context.say("a line")
    PlainContext(tmp_path, quiet=True).say("another")
    assert capsys.readouterr() == ("", "a line\n")
