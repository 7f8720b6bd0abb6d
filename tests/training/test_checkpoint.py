"""Checkpoints: what is written is read back, by a reader that runs nothing and notices damage."""

import copy
import json
import multiprocessing
import os
import signal
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from training_samples import (
    InterruptedTrainingError,
    ScriptedTask,
    assert_same_weights,
    interrupt,
    run,
    scripted,
    student_task,
    timeless,
    training,
)

from tmkd_ray.results import EpochRecord
from tmkd_ray.training.checkpoint import (
    DamagedCheckpointError,
    PartialEpoch,
    TrainingState,
    read_checkpoint,
    written_checkpoint,
)
from tmkd_ray.training.context import PlainContext
from tmkd_ray.training.loop import train


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
    partial = PartialEpoch(3, ["ce"], [0.1 + 0.2, 1 / 3, -1.0, 12.0], 0.7, 0.1)
    return TrainingState(key, 2, partial, 1, 2 / 3, best, history, 12.25)


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
    tensors = {"module": module.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler}
    with written_checkpoint(state, tensors) as folder:
        found = read_checkpoint(folder, "mine")
    assert not folder.exists()
    assert found is not None
    read, tensors = found
    assert set(tensors) == {"module", "optimizer", "scaler"}
    assert_same_weights(read.best, state.best)
    for name in ("key", "epoch", "partial", "best_epoch", "best_accuracy", "history", "seconds"):
        assert getattr(read, name) == getattr(state, name)
    assert_same_weights(tensors["module"], expected[0])
    assert tensors["scaler"] == scaler
    assert tensors["optimizer"]["param_groups"] == expected[1]["param_groups"]
    for index, values in expected[1]["state"].items():
        for name, value in values.items():
            torch.testing.assert_close(tensors["optimizer"]["state"][index][name], value, rtol=0, atol=0)


def test_another_runs_is_none_of_ours() -> None:
    with written_checkpoint(example("another"), {}) as folder:
        assert read_checkpoint(folder, "mine") is None
        assert read_checkpoint(folder, "another") is not None


def test_temporary_folder_goes_even_when_the_body_fails() -> None:
    seen = []

    def fail() -> None:
        with written_checkpoint(example(), {}) as folder:
            seen.append(folder)
            raise InterruptedTrainingError

    with pytest.raises(InterruptedTrainingError):
        fail()
    assert not seen[0].exists()


@pytest.mark.parametrize("changes", [{}, {"optimizer": "adamw"}, {"precision": "float16"}, {"ema_decay": 0.9}])
def test_a_trainings_checkpoint_holds_tensors_only(changes: dict[str, Any], tmp_path: Path) -> None:
    """Nothing in it is executed when it is read, and another process may place its tensors elsewhere."""
    config = training(**changes)
    task = student_task(config)
    interrupt(task, config, tmp_path, epoch=2)
    newest = tmp_path / "checkpoint-00000001"
    tensors = torch.load(newest / "tensors.pt", map_location="meta", weights_only=True)
    assert set(tensors) == {"module", "optimizer", "scaler", "average", "best"}
    assert bool(tensors["average"]) == (config.ema_decay is not None)
    assert set(tensors["best"]) == set(task.kept.state_dict())
    assert bool(tensors["scaler"]) == (config.precision == "float16")
    facts = json.loads((newest / "state.json").read_text())["facts"]
    assert (facts["key"], facts["epoch"], len(facts["history"])) == ("run", 2, 2)
    found = read_checkpoint(newest, "run")
    assert found is not None
    assert_same_weights(found[1]["module"], task.module.state_dict())


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def another_loss(path: Path) -> None:
    path.write_text(path.read_text().replace('"seconds": 12.25', '"seconds": 12.5'))


def vouched_for(path: Path) -> None:
    """What torch cannot read, though the state says that it was written so."""
    path.write_bytes(b"PK but nothing else")
    state = path.with_name("state.json")
    content = json.loads(state.read_text())
    state.write_text(json.dumps(content | {"tensors_crc32": zlib.crc32(path.read_bytes())}))


DAMAGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "tensors cut": ("tensors.pt", cut),
    "a bit of the tensors": ("tensors.pt", flip),
    "tensors gone": ("tensors.pt", Path.unlink),
    "tensors that are none": ("tensors.pt", vouched_for),
    "state cut": ("state.json", cut),
    "state empty": ("state.json", lambda path: path.write_text("")),
    "state gone": ("state.json", Path.unlink),
    "state that is none": ("state.json", lambda path: path.write_text("[]")),
    "a figure of the state": ("state.json", another_loss),
    "of an earlier version": ("state.json", lambda path: path.write_text('{"key": "mine", "epoch": 3}')),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_noticed(damage: str) -> None:
    name, spoil = DAMAGES[damage]
    with written_checkpoint(example(), {"module": {"weight": torch.zeros(1000)}}) as folder:
        spoil(folder / name)
        with pytest.raises(DamagedCheckpointError):
            read_checkpoint(folder, "mine")


@pytest.mark.parametrize("damaged", [1, 2])
def test_the_one_before_a_damaged_one_serves(
    damaged: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the user is told; where both are damaged the training begins anew."""
    config = training()
    expected = run(student_task(config), config, tmp_path / "whole")
    interrupt(student_task(config), config, tmp_path / "broken", epoch=3)
    newest = sorted((tmp_path / "broken").iterdir(), reverse=True)
    for folder in newest[:damaged]:
        flip(folder / "tensors.pt")
    task = student_task(config, initial_seed=9 if damaged == 1 else 0)
    resumed = train(task, config, PlainContext(tmp_path / "broken"), "run", "test")
    assert_same_weights(resumed.weights, expected.weights)
    assert timeless(resumed.history) == timeless(expected.history)
    said = capsys.readouterr().err
    for folder in newest[:damaged]:
        assert f"checkpoint {folder.name}: tensors.pt is not what was written" in said
    assert ("test: resuming after epoch 2\n" in said) == (damaged == 1)


@pytest.mark.parametrize("keep", [1, 3])
def test_plain_context_keeps_the_newest(keep: int, tmp_path: Path) -> None:
    context = PlainContext(tmp_path / "new" / "folder", quiet=True, keep=keep)
    assert list(context.checkpoints()) == []
    context.report({}, None)
    assert list(context.checkpoints()) == []
    (tmp_path / "new" / "folder" / "incoming").mkdir(parents=True)  # a process was killed while it wrote
    (tmp_path / "new" / "folder" / "incoming" / "half").write_text("")
    (tmp_path / "source").mkdir()
    for epoch in range(1, 12):
        (tmp_path / "source" / f"epoch {epoch}").write_text(str(epoch))
        context.report({}, tmp_path / "source")
        (tmp_path / "source" / f"epoch {epoch}").unlink()
        found = [os.listdir(folder) for folder in context.checkpoints()]
        assert found == [[f"epoch {number}"] for number in range(epoch, max(epoch - keep, 0), -1)]
    assert len(os.listdir(tmp_path / "new" / "folder")) == keep


def terminate(rows: list[int], at: int) -> None:
    """Send this process SIGTERM when the batch `at` is asked for."""
    rows.append(len(rows))
    if len(rows) == at:
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("at", [1, 2, 3, 4, 7])
def test_a_warning_makes_a_checkpoint_and_an_end(
    at: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the step in hand, of three an epoch; the run goes on there, to the same end."""
    monkeypatch.setattr("tmkd_ray.training.loop._MAX_STEPS_UNSEEN", 1)
    config = scripted(epochs=3, ema_decay=0.5, checkpoint_every=3)
    expected = run(ScriptedTask([0.3, 0.2, 0.1]), config, tmp_path / "whole")

    class Terminated(ScriptedTask):
        def batches(self, epoch: int, context: PlainContext, first_step: int = 0) -> Any:  # type: ignore[override]
            for batch in super().batches(epoch, context, first_step):
                terminate(rows, at)
                yield batch

    rows: list[int] = []
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        train(Terminated([0.3, 0.2, 0.1]), config, PlainContext(tmp_path / "run"), "run", "test")
    assert ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before
    assert len(rows) == at
    epoch, step = (at - 1) // 3, (at - 1) % 3 + 1
    said = f"warned of an end; checkpoint after epoch {epoch}, step {step} of the next"
    assert said in capsys.readouterr().err

    outcome = train(Terminated([0.3, 0.2, 0.1]), config, PlainContext(tmp_path / "run"), "run", "test")
    assert len(rows) == 9, "no batch is trained twice, none is left out"
    assert_same_weights(outcome.weights, expected.weights)
    assert timeless(outcome.history) == timeless(expected.history)


def test_a_training_in_another_thread_leaves_signals_alone(tmp_path: Path) -> None:
    outcomes = []
    before = signal.getsignal(signal.SIGTERM)
    work = threading.Thread(
        target=lambda: outcomes.append(run(ScriptedTask([0.5]), scripted(epochs=1), tmp_path))
    )
    work.start()
    work.join()
    assert outcomes[0].best_epoch == 1
    assert signal.getsignal(signal.SIGTERM) == before


def test_killed_within_an_epoch(tmp_path: Path) -> None:
    """A process that is killed outright, started again, ends in the weights of one that was not: to the bit."""
    config = training(checkpoint_every_steps=1, ema_decay=0.9)
    expected = run(student_task(config), config, tmp_path / "whole")

    def train_and_die() -> None:
        task = student_task(config)
        steps = []

        def die(batch: Any) -> None:
            steps.append(len(steps))
            if len(steps) == 6:  # the third epoch's second step, before the checkpoint after it
                os.kill(os.getpid(), signal.SIGKILL)

        task.after_step = die  # type: ignore[method-assign]
        run(task, config, tmp_path / "killed")

    process = multiprocessing.get_context("fork").Process(target=train_and_die)
    process.start()
    process.join(timeout=60)
    assert process.exitcode == -signal.SIGKILL
    newest = next(iter(PlainContext(tmp_path / "killed").checkpoints()))
    found = read_checkpoint(newest, "run")
    assert found is not None
    assert (found[0].epoch, found[0].partial.steps) == (2, 1)
    resumed = run(student_task(config, initial_seed=9), config, tmp_path / "killed")
    assert_same_weights(resumed.weights, expected.weights)
    assert timeless(resumed.history) == timeless(expected.history)


def test_plain_context_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    context = PlainContext(tmp_path)
    assert (context.rank, context.world_size, context.device) == (0, 1, torch.device("cpu"))
    values = torch.tensor([1.0, 2.0])
    assert context.reduce_sum(values).tolist() == [1.0, 2.0]
    context.barrier()
    context.say("a line")
    PlainContext(tmp_path, quiet=True).say("another")
    assert capsys.readouterr() == ("", "a line\n")
