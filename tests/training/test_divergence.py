"""A loss that is not finite stops the run within the epoch, and the samples of the step are told."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from training_samples import ScriptedTask, digits, run, scripted, student_task, teacher_task, training

from tmkd_ray.models import build_model
from tmkd_ray.training.context import PlainContext
from tmkd_ray.training.divergence import LossWatch
from tmkd_ray.training.loop import DivergedError, train
from tmkd_ray.types import TaskSpec


def diverge(task: Any, config: Any, folder: Path) -> tuple[str, dict[str, Any]]:
    with pytest.raises(DivergedError) as caught:
        train(task, config, PlainContext(folder / "checkpoints", quiet=True), "run", "test", str(folder))
    facts: dict[str, Any] = json.loads((folder / "diverged.json").read_text())
    assert str(folder / "diverged.json") in str(caught.value)
    return str(caught.value), facts


class Counted(ScriptedTask):
    """Infinite from its first step on; counts the steps."""

    steps_done = 0

    def batches(self, epoch: int, context: PlainContext, first_step: int = 0) -> Iterator[Any]:  # type: ignore[override]
        for batch in super().batches(epoch, context, first_step):
            self.steps_done += 1
            yield batch


class Poisoned(nn.Module):
    """Returns the student's output, with NaN logits for one image."""

    def __init__(self, student: nn.Module, step: int) -> None:
        super().__init__()
        self.student, self.step, self.calls = student, step, 0
        self.fc = student.fc

    def forward(self, images: torch.Tensor) -> Any:
        output = self.student(images)
        if self.training:
            self.calls += 1
            if self.calls == self.step:
                output.logits[3, 0] = float("nan")
        return output


@pytest.mark.parametrize("step", [1, 3, 4])
def test_the_samples_of_the_step_are_told(step: int, tmp_path: Path) -> None:
    """Two steps an epoch: the first one's terms that are not finite, with its batch."""
    config = training()
    task = student_task(config, "kd")
    expected = [batch.indices for epoch in range(2) for batch in task.batches(epoch, PlainContext(tmp_path))]
    task.module.student = Poisoned(task.module.student, step)  # type: ignore[assignment]
    message, facts = diverge(task, config, tmp_path)
    epoch, within = (step - 1) // 2 + 1, (step - 1) % 2 + 1
    assert message.startswith(
        f"training diverged in epoch {epoch}: loss, ce, kd is not finite at step {within}"
    )
    assert (facts["epoch"], facts["step"], facts["not_finite"]) == (epoch, within, ["loss", "ce", "kd"])
    (worker,) = facts["workers"]
    assert worker["sample_ids"] == [str(digits(0, 40).ids[index]) for index in expected[step - 1]]
    assert worker["not_finite"] == {"loss": "nan", "ce": "nan", "kd": "nan"}


def test_a_term_that_is_finite_is_told_as_such(tmp_path: Path) -> None:
    message, facts = diverge(ScriptedTask([0.5] * 3, poison=(1, 0)), scripted(epochs=3), tmp_path)
    assert "loss, slope is not finite at step 3" in message
    assert facts["workers"][0]["finite"] == {"constant": 2.0}
    assert facts["workers"][0]["sample_ids"] == [], "its batches have no numbers"


@pytest.mark.parametrize(("limit", "step"), [(1.5, 2), (2.5, 3), (None, None)])
def test_a_loss_that_explodes_is_divergence(limit: float | None, step: int | None, tmp_path: Path) -> None:
    """The weight is 0, -1, -2 … at the steps, and so is the loss; the constant term stays at 2."""
    config = scripted(epochs=1, max_loss=limit)
    task = Counted([0.5], steps=4)
    if step is None:
        run(task, config, tmp_path)
        assert task.steps_done == 4
        return
    message, facts = diverge(task, config, tmp_path)
    slope = f"the loss, -{step} with its largest term "
    assert slope in message
    assert f"is beyond training.max_loss, {limit}, at step {step + 1}" in message
    assert (facts["step"], facts["not_finite"]) == (step + 1, [])
    assert facts["workers"][0]["finite"] == {"loss": -step, "slope": -step, "constant": 2.0}


def test_samples_of_a_teachers_batch(tmp_path: Path) -> None:
    config = training(learning_rate=1e30)
    model = build_model("resnet8", TaskSpec(tuple("0123456789"), 16))
    _, facts = diverge(teacher_task(config, model), config, tmp_path)
    ids = facts["workers"][0]["sample_ids"]
    assert len(ids) == len(set(ids)) == 16
    assert set(ids) <= set(digits(0, 40).ids.tolist())


@pytest.mark.parametrize(("limit", "expected"), [(1, 1), (7, 1)])
def test_the_run_stops_within_the_epoch(
    limit: int, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tmkd_ray.training.loop._MAX_STEPS_UNSEEN", limit)
    task = Counted([0.5], value=float("inf"), steps=40)
    _, facts = diverge(task, scripted(epochs=1), tmp_path)
    assert task.steps_done == expected
    assert facts["step"] == 1


@pytest.mark.parametrize("limit", [1, 4, 1000])
def test_steps_between_looks_are_few(limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tmkd_ray.training.loop._MAX_STEPS_UNSEEN", limit)

    class Late(Counted):
        def batches(self, epoch: int, context: PlainContext, first_step: int = 0) -> Iterator[Any]:  # type: ignore[override]
            for batch in super().batches(epoch, context, first_step):
                if self.steps_done == 10:
                    batch.inputs.fill_(float("nan"))
                yield batch

    task = Late([0.5], steps=40)
    _, facts = diverge(task, scripted(epochs=1), tmp_path)
    assert facts["step"] == 10, "the first of those that were not looked at"
    assert 10 <= task.steps_done < 10 + min(limit, 31)


def test_no_checkpoint_of_a_diverged_step(tmp_path: Path) -> None:
    """One is due after each step; the loss of the third is NaN."""
    config = scripted(epochs=1, checkpoint_every_steps=1, keep_checkpoints=9)
    diverge(ScriptedTask([0.5], poison=(0, 0), steps=3), config, tmp_path)
    assert len(list((tmp_path / "checkpoints").glob("checkpoint-*"))) == 2


def test_nothing_is_kept_that_was_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the device there is one row for each step since."""
    monkeypatch.setattr("tmkd_ray.training.loop._MAX_STEPS_UNSEEN", 1)
    held = []
    num_bad = LossWatch.num_bad

    def count(watch: LossWatch) -> torch.Tensor:
        held.append(len(watch._steps))
        return num_bad(watch)

    monkeypatch.setattr(LossWatch, "num_bad", count)
    run(ScriptedTask([0.5] * 2, steps=3), scripted(epochs=2), tmp_path)
    assert held == [1] * 6
