"""The loop on one worker: the same seed, the same weights; interrupted or not; best epoch; precision."""

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training_samples import (
    SIZE,
    InterruptedTrainingError,
    ScriptedTask,
    assert_same_weights,
    clip_task,
    interrupt,
    run,
    scripted,
    student_task,
    teacher_task,
    timeless,
    training,
)

from tmkd_ray.config import TrainingConfig
from tmkd_ray.errors import UserError
from tmkd_ray.models import ImageClassifier, build_model, load_checkpoint
from tmkd_ray.settings import Precision
from tmkd_ray.training.checkpoint import read_checkpoint
from tmkd_ray.training.context import PlainContext
from tmkd_ray.training.loop import DivergedError, TrainTask, train
from tmkd_ray.types import TaskSpec


def resnet8() -> ImageClassifier:
    return build_model("resnet8", TaskSpec(tuple("0123456789"), SIZE))


BuildTask = Callable[[TrainingConfig, int], TrainTask]
TASKS: dict[str, tuple[BuildTask, dict[str, Any]]] = {
    "student": (lambda config, seed: student_task(config, initial_seed=seed), {}),
    "batch norm": (lambda config, seed: student_task(config, "kd", resnet8, initial_seed=seed), {}),
    "fresh augmentation": (lambda config, seed: student_task(config, "alone", initial_seed=seed), {}),
    "adamw": (
        lambda config, seed: student_task(config, initial_seed=seed),
        {"optimizer": "adamw", "learning_rate": 1e-3, "max_gradient_norm": 1.0},
    ),
    "float16": (lambda config, seed: student_task(config, initial_seed=seed), {"precision": "float16"}),
    "bfloat16": (lambda config, seed: student_task(config, initial_seed=seed), {"precision": "bfloat16"}),
    "teacher": (lambda config, seed: teacher_task(config, resnet8(), initial_seed=seed), {}),
    "clip": (
        lambda config, seed: clip_task(config, initial_seed=seed),
        {"optimizer": "adamw", "learning_rate": 1e-3, "warmup_epochs": 1},
    ),
    "average, one cycle, micro-batches": (
        lambda config, seed: student_task(config, "kd", resnet8, initial_seed=seed),
        {"ema_decay": 0.9, "schedule": "one_cycle", "warmup_epochs": 1.5, "gradient_accumulation": 2},
    ),
    "mixed": (
        lambda config, seed: student_task(config, "alone", initial_seed=seed),
        {"mixup": 0.5, "cutmix": 1.0, "ema_decay": 0.5, "gradient_accumulation": 3},
    ),
}


@pytest.fixture(params=list(TASKS))
def trained(request: pytest.FixtureRequest) -> tuple[BuildTask, TrainingConfig]:
    build, changes = TASKS[request.param]
    return build, training(**changes)


def test_same_seed_same_weights(trained: tuple[BuildTask, TrainingConfig], tmp_path: Path) -> None:
    """Resumed after any epoch too, though the network that is resumed into was initialised otherwise."""
    build, config = trained
    expected = run(build(config, 0), config, tmp_path / "whole")
    again = run(build(config, 0), config, tmp_path / "again")
    assert_same_weights(again.weights, expected.weights)
    assert timeless(again.history) == timeless(expected.history)
    assert [record.epoch for record in expected.history] == [1, 2, 3, 4]

    for epoch in (1, 3):
        folder = tmp_path / f"interrupted {epoch}"
        interrupt(build(config, 0), config, folder, epoch)
        resumed = run(build(config, 99), config, folder)
        assert_same_weights(resumed.weights, expected.weights)
        assert timeless(resumed.history) == timeless(expected.history)
        assert (resumed.best_epoch, resumed.accuracy) == (expected.best_epoch, expected.accuracy)


def test_interrupted_within_an_epoch(trained: tuple[BuildTask, TrainingConfig], tmp_path: Path) -> None:
    """Bit by bit, and whether or not the uninterrupted run wrote checkpoints within its epochs."""
    build, config = trained
    expected = run(build(config, 0), config, tmp_path / "whole")
    config = config.model_copy(update={"checkpoint_every_steps": 1})
    folder = tmp_path / "interrupted"
    for epoch in (0, 2):
        interrupt(build(config, epoch), config, folder, epoch, step=1)
    resumed = run(build(config, 99), config, folder)
    assert_same_weights(resumed.weights, expected.weights)
    assert timeless(resumed.history) == timeless(expected.history)
    assert (resumed.best_epoch, resumed.accuracy) == (expected.best_epoch, expected.accuracy)


def test_another_seed_other_weights(tmp_path: Path) -> None:
    """From the same initial weights: the order of the images and their variants depend on it."""
    first, second = training(epochs=1), training(epochs=1, seed=1)
    weights = run(student_task(first), first, tmp_path / "0").weights
    others = run(student_task(second), second, tmp_path / "1").weights
    assert not torch.equal(weights["fc.weight"], others["fc.weight"])


def test_each_step_draws_numbers_of_its_own(tmp_path: Path) -> None:
    """By seed, epoch and step."""

    def drawn(seed: int, folder: str) -> list[float]:
        values: list[float] = []
        task = ScriptedTask([0.5] * 2, steps=3)
        task.after_step = lambda batch: values.append(torch.rand(()).item())  # type: ignore[method-assign]
        run(task, scripted(epochs=2, seed=seed), tmp_path / folder)
        return values

    first = drawn(0, "first")
    assert len(set(first + drawn(1, "another seed"))) == 12
    assert drawn(0, "again") == first


def test_interrupted_before_the_checkpoint_is_stored(tmp_path: Path) -> None:
    """The epoch is trained again, to the same end; nothing of its first run remains."""
    config = training()
    expected = run(student_task(config), config, tmp_path / "whole")
    interrupt(student_task(config), config, tmp_path / "broken", epoch=2, stored=False)
    interrupt(student_task(config), config, tmp_path / "broken", epoch=3, stored=False)
    resumed = run(student_task(config, initial_seed=9), config, tmp_path / "broken")
    assert_same_weights(resumed.weights, expected.weights)
    assert timeless(resumed.history) == timeless(expected.history)


def test_interrupted_between_checkpoints(tmp_path: Path) -> None:
    config = scripted(epochs=5, checkpoint_every=2)
    task = ScriptedTask([0.1, 0.2, 0.3, 0.4, 0.5], dies_in=3)
    with pytest.raises(InterruptedTrainingError):
        run(task, config, tmp_path)
    assert len(task.seen) == 3
    resumed = ScriptedTask(task.accuracies)
    outcome = run(resumed, config, tmp_path)
    assert len(resumed.seen) == 3, "epochs 3, 4 and 5"
    assert [record.epoch for record in outcome.history] == [1, 2, 3, 4, 5]
    expected = run(ScriptedTask(task.accuracies), config, tmp_path / "whole")
    assert_same_weights(outcome.weights, expected.weights)


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    config = scripted(epochs=2)
    first = run(ScriptedTask([0.2, 0.1]), config, tmp_path)
    again = ScriptedTask([])
    outcome = run(again, config, tmp_path)
    assert again.seen == []
    assert_same_weights(outcome.weights, first.weights)
    assert outcome == first


def test_seconds_add_up_over_restarts(tmp_path: Path) -> None:
    config = scripted(epochs=3)
    interrupt(ScriptedTask([0.1] * 3), config, tmp_path, epoch=2)
    outcome = run(ScriptedTask([0.1] * 3), config, tmp_path)
    assert outcome.seconds == pytest.approx(sum(record.seconds for record in outcome.history))


def test_another_runs_checkpoint_is_ignored(tmp_path: Path) -> None:
    config = training()
    expected = run(student_task(config), config, tmp_path / "alone", key="mine")
    interrupt(student_task(config, "kd"), config, tmp_path / "shared", epoch=2, key="another")
    found = run(student_task(config), config, tmp_path / "shared", key="mine")
    assert_same_weights(found.weights, expected.weights)
    assert timeless(found.history) == timeless(expected.history)


@pytest.mark.parametrize(
    ("accuracies", "best"), [([0.3, 0.9, 0.5], 2), ([0.3, 0.5, 0.9], 3), ([0.9, 0.5, 0.9], 1), ([0.0] * 3, 1)]
)
def test_the_best_epoch_is_kept(accuracies: list[float], best: int, tmp_path: Path) -> None:
    config = scripted(epochs=3)
    task = ScriptedTask(accuracies)
    outcome = run(task, config, tmp_path)
    assert (outcome.best_epoch, outcome.accuracy) == (best, accuracies[best - 1])
    assert outcome.weights["weight"].item() == task.seen[best - 1]
    assert len(set(task.seen)) == 3
    assert [record.validation_accuracy for record in outcome.history] == accuracies


def test_the_best_epoch_outlives_a_restart(tmp_path: Path) -> None:
    config = scripted(epochs=3)
    first = ScriptedTask([0.9, 0.5, 0.6])
    interrupt(first, config, tmp_path, epoch=2)
    outcome = run(ScriptedTask(first.accuracies), config, tmp_path)
    assert (outcome.best_epoch, outcome.accuracy) == (1, 0.9)
    assert outcome.weights["weight"].item() == first.seen[0]


def test_kept_weights_have_the_accuracy_that_is_told(tmp_path: Path) -> None:
    """A real student, whose last epoch (of a far too high learning rate) is worse than its best."""
    config = training(epochs=6, learning_rate=1.0, schedule="constant")
    task = student_task(config, "alone")
    outcome = run(task, config, tmp_path)
    assert outcome.history[-1].validation_accuracy != outcome.accuracy
    task.save(str(tmp_path / "saved"), outcome.weights)
    fresh = student_task(config, "alone", initial_seed=7)
    load_checkpoint(fresh.kept, str(tmp_path / "saved" / "model.safetensors"))
    fresh.module.eval()
    assert fresh.validate(PlainContext(tmp_path))["accuracy"] == outcome.accuracy
    assert outcome.accuracy == max(record.validation_accuracy or 0 for record in outcome.history)


def test_history(tmp_path: Path) -> None:
    """Weights 0, then minus the learning rate a step; means over the epoch's samples."""
    config = scripted(epochs=2, learning_rate=0.5)
    outcome = run(ScriptedTask([0.25, 0.75], scale=2.0, steps=3), config, tmp_path)
    first, second = outcome.history
    # The gradient is 2, the step 1: the weight is 0, -1, -2 at the epoch's three losses.
    assert first.terms == {"slope": -1.0, "constant": 2.0}
    assert first.loss == -2.0
    assert second.terms == {"slope": -4.0, "constant": 2.0}
    assert (first.learning_rate, first.train_accuracy) == (0.5, None)
    assert first.images_per_second > 0


def test_learning_rate_follows_the_schedule(tmp_path: Path) -> None:
    """What is reported is the rate of the epoch's last step."""
    config = scripted(epochs=4, schedule="step", milestones=(0.25, 0.5), decay=0.1)
    outcome = run(ScriptedTask([0.5] * 4), config, tmp_path)
    assert [record.learning_rate for record in outcome.history] == pytest.approx([1, 0.1, 0.01, 0.01])


def test_learning_rate_moves_within_an_epoch(tmp_path: Path) -> None:
    """A cosine over one epoch of three steps of gradient 1: rates 1, 3/4, 1/4."""
    config = scripted(epochs=1, schedule="cosine")
    outcome = run(ScriptedTask([0.5], steps=3), config, tmp_path)
    assert outcome.weights["weight"].item() == pytest.approx(-2.0)


def test_checkpoints_within_epochs(tmp_path: Path) -> None:
    """After two of four steps; after the fourth the epoch's own."""
    config = scripted(epochs=2, checkpoint_every_steps=2)
    train(ScriptedTask([0.5] * 2, steps=4), config, PlainContext(tmp_path, quiet=True, keep=9), "run", "test")
    found = [read_checkpoint(folder, "run") for folder in sorted(tmp_path.iterdir())]
    at = [(state.epoch, state.partial.steps) for state, _ in (pair for pair in found if pair is not None)]
    assert at == [(0, 2), (1, 0), (1, 2), (2, 0)]


def test_time_is_told_apart(tmp_path: Path) -> None:
    """Waiting from training, of the whole epoch, though it was interrupted after two of three steps."""

    class Slow(ScriptedTask):
        def batches(self, epoch: int, context: PlainContext, first_step: int = 0) -> Any:  # type: ignore[override]
            for batch in super().batches(epoch, context, first_step):
                time.sleep(0.05)
                yield batch

    config = scripted(epochs=1, checkpoint_every_steps=1)
    interrupt(Slow([0.5], steps=3), config, tmp_path, epoch=0, step=2)
    (record,) = run(Slow([0.5], steps=3), config, tmp_path).history
    assert record.data_seconds is not None
    assert record.data_share is not None
    assert 0.15 <= record.data_seconds <= record.seconds
    assert record.data_share == pytest.approx(record.data_seconds * record.images_per_second / 12)


def test_a_long_epoch_says_how_it_goes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the last line of all would say, of the steps so far: the weight is 0, -1, -2 at them."""
    monkeypatch.setattr("tmkd_ray.training.loop._STEPS_EVERY_S", 0.0)
    train(ScriptedTask([0.5], steps=3), scripted(epochs=1), PlainContext(tmp_path), "run", "test")
    first, second, end = capsys.readouterr().err.splitlines()
    assert first.startswith("test: epoch 1/1: 4/12 images  ")
    assert second.startswith("test: epoch 1/1: 8/12 images  ")
    assert " images/s" in second
    assert "  loss 0.000  slope 0.000  constant 2.000  " in first
    assert re.search(r" left  loss -0\.500  slope -0\.500  constant 2\.000  \d+ % waiting for data$", second)
    assert "  loss -1.000  slope -1.000  constant 2.000  validation 50.0 %" in end


def test_train_accuracy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = training(epochs=10, optimizer="adamw", learning_rate=0.01)
    history = train(student_task(config, "alone"), config, PlainContext(tmp_path), "run", "test").history
    values = [record.train_accuracy for record in history]
    assert all(value is not None and 0 <= value <= 1 for value in values)
    assert all(value is not None and (value * 32).is_integer() for value in values), "of two batches of 16"
    assert values[-1] is not None
    assert values[-1] > 0.3
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"epoch 10/10  loss {history[-1].loss:.3f}  ce {history[-1].terms['ce']:.3f}  training " in said
    assert f"  training {100 * values[-1]:.1f} %  validation " in said


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize(("limit", "step"), [(0.5, 0.5), (100.0, 8.0)])
def test_gradient_clipping(precision: Precision, limit: float, step: float, tmp_path: Path) -> None:
    """The gradient is 8. It is clipped at its true size, not at the loss scale's."""
    config = scripted(
        epochs=1,
        max_gradient_norm=limit,
        precision=precision,
    )
    outcome = run(ScriptedTask([0.5], scale=8.0, steps=3), config, tmp_path)
    assert outcome.weights["weight"].item() == pytest.approx(-3 * step, rel=1e-5)


def test_overflowing_gradients_are_skipped(tmp_path: Path) -> None:
    """float16 scales the loss by 2^16; where that overflows, the step is left out and the scale halved."""
    config = scripted(epochs=2, learning_rate=1e-34, precision="float16", max_loss=None)
    task = ScriptedTask([0.5, 0.5], scale=1e34, steps=4)
    run(task, config, tmp_path / "whole")
    assert task.seen == pytest.approx([-3.0, -7.0], rel=1e-3)

    interrupt(ScriptedTask([0.5, 0.5], scale=1e34, steps=4), config, tmp_path / "interrupted", epoch=1)
    resumed = ScriptedTask([0.5, 0.5], scale=1e34, steps=4)
    run(resumed, config, tmp_path / "interrupted")
    assert resumed.seen == task.seen[1:], "the halved scale is part of the checkpoint"


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("distiller", ["alone", "tmkd"])
def test_reduced_precision_learns(precision: Precision, distiller: str, tmp_path: Path) -> None:
    full, reduced = training(epochs=6), training(epochs=6, precision=precision)
    expected = run(student_task(full, distiller), full, tmp_path / "full").history
    outcome = run(student_task(reduced, distiller), reduced, tmp_path / "reduced")
    assert all(torch.isfinite(weight).all() for weight in outcome.weights.values())
    assert all(weight.dtype == torch.float32 for weight in outcome.weights.values())
    for found, exact in zip(outcome.history, expected, strict=True):
        assert found.loss != exact.loss
        assert found.loss == pytest.approx(exact.loss, rel=0.05)
        assert found.terms == pytest.approx(exact.terms, rel=0.1, abs=0.02)


@pytest.mark.parametrize("epoch", [0, 1])
def test_divergence_names_term_and_epoch(epoch: int, tmp_path: Path) -> None:
    config = scripted(epochs=3)
    task = ScriptedTask([0.5] * 3, poison=(epoch, 0))
    with pytest.raises(DivergedError) as caught:
        run(task, config, tmp_path)
    message = str(caught.value)
    assert isinstance(caught.value, UserError)
    assert message.startswith(f"training diverged in epoch {epoch + 1}: loss, slope is not finite")
    assert "constant" not in message
    assert "learning_rate" in message
    assert len(task.seen) == epoch, "it is neither validated nor kept"
    assert len(list(tmp_path.glob("checkpoint-*"))) == epoch


def test_infinity_is_divergence(tmp_path: Path) -> None:
    config = scripted(epochs=1)
    with pytest.raises(DivergedError, match="epoch 1: loss, slope is not finite"):
        run(ScriptedTask([0.5], value=float("inf")), config, tmp_path)


def test_a_real_student_diverges(tmp_path: Path) -> None:
    config = training(epochs=3, learning_rate=1e30)
    with pytest.raises(DivergedError, match="ce"):
        run(student_task(config, "alone"), config, tmp_path)


def test_num_parameters_leaves_out_the_distillers_heads() -> None:
    task = student_task(training())
    assert task.num_parameters() == sum(p.numel() for p in task.module.student.parameters())
    assert sum(p.numel() for p in task.module.parameters()) > task.num_parameters()
