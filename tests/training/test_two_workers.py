"""Two DDP workers teach what one teaches: the same batches, the same weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_samples import (
    SIZE,
    ScriptedTask,
    TinyClassifier,
    assert_same_weights,
    clip_task,
    interrupt,
    knowledge,
    run,
    scripted,
    spawn,
    student_task,
    timeless,
    training,
)

from tmkd_ray.models import build_model
from tmkd_ray.training.context import PlainContext
from tmkd_ray.training.loop import DivergedError, TrainTask
from tmkd_ray.training.loop import train as train_task
from tmkd_ray.types import TaskSpec

OBJECTIVES: dict[str, Any] = {
    "cross-entropy": "alone",
    "plain teacher": "kd",
    "all terms": "tmkd",
    "instance contrast": {"name": "tmkd", "contrastive_mode": "instance", "contrastive_weight": 1.0},
}
NUM_IMAGES = 43
"""Two batches of 16 and a rest that no epoch uses."""

HANDED_OVER = training(epochs=3, ema_decay=0.9, checkpoint_every_steps=1)


def build_resnet() -> Any:
    return build_model("resnet8", TaskSpec(tuple("0123456789"), SIZE))


def rows_seen(task: TrainTask, context: PlainContext, epochs: int) -> list[list[list[int]]]:
    """Return, by epoch and batch, the rows; told by the first value of their feature, which is unique."""
    value = knowledge(0, NUM_IMAGES).feature[:, :, 0, :2].astype(np.float64)
    rows = {tuple(pair): row for row, variants in enumerate(value) for pair in variants.tolist()}
    assert len(rows) == 2 * NUM_IMAGES
    return [
        [
            [rows[tuple(pair)] for pair in batch.knowledge.feature[:, 0, :2].double().tolist()]
            for batch in task.batches(epoch, context)
        ]
        for epoch in range(epochs)
    ]


def scenario(folder: Path) -> dict[str, Any]:
    """What each worker does; one start of processes serves all tests."""
    results: dict[str, Any] = {}
    config = training(epochs=3)
    train = knowledge(0, NUM_IMAGES)
    context = PlainContext(folder, quiet=True)
    results["rank"] = (context.rank, context.world_size)
    for name, objective in OBJECTIVES.items():
        # Each worker starts from other weights: DDP hands out those of rank 0.
        task = student_task(config, objective, TinyClassifier, train, initial_seed=context.rank)
        outcome = run(task, config, folder / name)
        results[name] = (outcome.weights, timeless(outcome.history))
    results["rows"] = rows_seen(task, context, 3)

    task = student_task(config, "kd", build_resnet, train)
    outcome = run(task, config, folder / "whole")
    results["batch norm"] = {k: v.clone() for k, v in task.module.state_dict().items()}
    results["batch norm best"] = outcome.weights
    interrupt(student_task(config, "kd", build_resnet, train), config, folder / "broken", epoch=2)
    resumed = student_task(config, "kd", build_resnet, train, initial_seed=9)
    outcome = run(resumed, config, folder / "broken")
    results["resumed"] = {k: v.clone() for k, v in resumed.module.state_dict().items()}
    results["resumed best"] = outcome.weights

    averaged = training(
        epochs=3,
        ema_decay=0.9,
        gradient_accumulation=2,
        checkpoint_every_steps=1,
        schedule="one_cycle",
        warmup_epochs=1,
    )
    task = student_task(averaged, "kd", build_resnet, train, initial_seed=context.rank)
    results["averaged"] = run(task, averaged, folder / "averaged").weights
    interrupt(
        student_task(averaged, "kd", build_resnet, train), averaged, folder / "averaged cut", epoch=1, step=1
    )
    resumed = student_task(averaged, "kd", build_resnet, train, initial_seed=9)
    outcome = run(resumed, averaged, folder / "averaged cut")
    results["averaged resumed"] = outcome.weights
    results["averaged history"] = timeless(outcome.history)
    without = averaged.model_copy(update={"checkpoint_every_steps": None})
    task = student_task(without, "kd", build_resnet, train)
    results["expected history"] = timeless(run(task, without, folder / "without").history)
    several = training(epochs=3, ema_decay=0.9, gradient_accumulation=2)
    task = student_task(several, "kd", TinyClassifier, train, initial_seed=context.rank)
    results["several"] = run(task, several, folder / "several").weights

    # One worker trained until here, and another takes over from these two.
    task = student_task(HANDED_OVER, "kd", TinyClassifier, train, initial_seed=9)
    outcome = run(task, HANDED_OVER, folder / "from one")
    results["from one"] = (outcome.weights, timeless(outcome.history))
    task = student_task(HANDED_OVER, "kd", TinyClassifier, train)
    interrupt(task, HANDED_OVER, folder / "from two", epoch=1, step=1)

    damaged = folder / "damaged"
    interrupt(student_task(config, "kd", TinyClassifier, train), config, damaged, epoch=2)
    if context.rank == 0:
        (sorted(damaged.glob("checkpoint-*"))[-1] / "tensors.pt").write_bytes(b"")
    context.barrier()
    task = student_task(config, "kd", TinyClassifier, train, initial_seed=9)
    results["after damage"] = run(task, config, damaged).weights

    clip_config = training(epochs=2, optimizer="adamw", learning_rate=1e-3)
    clip = clip_task(clip_config, NUM_IMAGES)
    run(clip, clip_config, folder / "clip")
    results["clip"] = {k: v.clone() for k, v in clip.module.state_dict().items()}
    results["clip tokens"] = clip.module.input_ids

    for poisoned in (0, 1):
        try:
            bad = ScriptedTask([0.5] * 3, poison=(1, poisoned))
            at = folder / f"poisoned {poisoned}"
            train_task(bad, scripted(), PlainContext(at, quiet=True), "run", "test", str(at))
        except DivergedError as error:
            results[f"poisoned {poisoned}"] = str(error)
    clipped = scripted(epochs=1, max_gradient_norm=1.0)
    task = ScriptedTask([0.5], value=2.0 + 4.0 * context.rank)
    run(task, clipped, folder / "clipped")
    results["clipped"] = task.seen
    task = ScriptedTask([0.5], value=2.0 + 4.0 * context.rank)
    results["scripted history"] = timeless(run(task, scripted(epochs=1), folder / "scripted").history)
    return results


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("workers")
    task = student_task(HANDED_OVER, "kd", TinyClassifier, knowledge(0, NUM_IMAGES))
    interrupt(task, HANDED_OVER, folder / "from one", epoch=1, step=1)
    results = spawn(scenario, folder)
    results[0]["folder"] = folder
    return results


def test_there_are_two(workers: list[dict[str, Any]]) -> None:
    assert [worker["rank"] for worker in workers] == [(0, 2), (1, 2)]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_two_workers_teach_what_one_teaches(
    objective: str, workers: list[dict[str, Any]], tmp_path: Path
) -> None:
    """At the same global batch; the terms and accuracies that are told are those of all images."""
    config = training(epochs=3)
    task = student_task(config, OBJECTIVES[objective], TinyClassifier, knowledge(0, NUM_IMAGES))
    before = {name: value.clone() for name, value in task.kept.state_dict().items()}
    outcome = run(task, config, tmp_path)
    expected_history = timeless(outcome.history)
    for weights, history in (worker[objective] for worker in workers):
        for name, value in outcome.weights.items():
            torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-5)
            assert (value - before[name]).abs().max() > 1e-3, "it was trained at all"
        for found, expected in zip(history, expected_history, strict=True):
            assert found.pop("terms") == pytest.approx(expected["terms"], rel=1e-4)
            assert found == pytest.approx({k: v for k, v in expected.items() if k != "terms"}, rel=1e-4)
    assert_same_weights(workers[1][objective][0], workers[0][objective][0])
    if objective == "all terms":
        assert set(expected_history[0]["terms"]) >= {"ce", "kd", "feature", "text", "contrastive"}


def test_batches_partition_the_global_batch(workers: list[dict[str, Any]], tmp_path: Path) -> None:
    """Side by side the workers' parts are one worker's batch, in its order."""
    config = training()
    task = student_task(config, "tmkd", TinyClassifier, knowledge(0, NUM_IMAGES))
    alone = rows_seen(task, PlainContext(tmp_path), 3)
    for epoch, batches in enumerate(alone):
        assert len(batches) == 2
        for number, batch in enumerate(batches):
            parts = [worker["rows"][epoch][number] for worker in workers]
            assert [len(part) for part in parts] == [8, 8]
            assert parts[0] + parts[1] == batch
        used = [row for batch in batches for row in batch]
        assert len(set(used)) == len(used) == 32
    assert alone[0] != alone[1]


def test_batch_statistics_are_equal_on_all_workers(workers: list[dict[str, Any]]) -> None:
    first, second = (worker["batch norm"] for worker in workers)
    assert any("running_mean" in name for name in first)
    assert_same_weights(second, first)
    assert_same_weights(workers[1]["batch norm best"], workers[0]["batch norm best"])
    moved = [name for name in first if "running_mean" in name and first[name].abs().max() > 0]
    assert len(moved) == sum("running_mean" in name for name in first)


def test_interrupted_on_two_workers(workers: list[dict[str, Any]]) -> None:
    for worker in workers:
        assert_same_weights(worker["resumed"], worker["batch norm"])
        assert_same_weights(worker["resumed best"], worker["batch norm best"])


def test_interrupted_within_an_epoch_on_two_workers(workers: list[dict[str, Any]]) -> None:
    """With batch statistics, their averages, and micro-batches: to the bit."""
    assert_same_weights(workers[1]["averaged"], workers[0]["averaged"])
    for worker in workers:
        assert_same_weights(worker["averaged resumed"], workers[0]["averaged"])
        for found, expected in zip(worker["averaged history"], worker["expected history"], strict=True):
            assert found.pop("terms") == pytest.approx(expected.pop("terms"), rel=1e-9)
            assert found == pytest.approx(expected, rel=1e-9)


def test_averages_and_micro_batches_of_two_workers_are_those_of_one(
    workers: list[dict[str, Any]], tmp_path: Path
) -> None:
    config = training(epochs=3, ema_decay=0.9)
    task = student_task(config, "kd", TinyClassifier, knowledge(0, NUM_IMAGES))
    expected = run(task, config, tmp_path).weights
    raw = task.kept.state_dict()
    assert any(not torch.equal(value, raw[name]) for name, value in expected.items())
    for worker in workers:
        for name, value in expected.items():
            torch.testing.assert_close(worker["several"][name], value, rtol=1e-5, atol=1e-5)


def test_the_number_of_workers_may_change_within_an_epoch(
    workers: list[dict[str, Any]], tmp_path: Path
) -> None:
    """A run that more or fewer workers take up goes on with the same batches and schedule."""

    def task(seed: int) -> TrainTask:
        return student_task(HANDED_OVER, "kd", TinyClassifier, knowledge(0, NUM_IMAGES), initial_seed=seed)

    expected = run(task(0), HANDED_OVER, tmp_path)
    to_one = run(task(9), HANDED_OVER, workers[0]["folder"] / "from two")
    for weights, history in [
        (to_one.weights, timeless(to_one.history)),
        *(worker["from one"] for worker in workers),
    ]:
        for name, value in expected.weights.items():
            torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-5)
        for found, wanted in zip(history, timeless(expected.history), strict=True):
            assert found.pop("terms") == pytest.approx(wanted.pop("terms"), rel=1e-4)
            assert found == pytest.approx(wanted, rel=1e-4)


def test_all_workers_pass_over_a_damaged_checkpoint(workers: list[dict[str, Any]]) -> None:
    for worker in workers:
        assert_same_weights(worker["after damage"], workers[0]["plain teacher"][0])


def test_clip_on_two_workers(workers: list[dict[str, Any]]) -> None:
    """They speak of the same tokens, and end in the same weights."""
    assert torch.equal(workers[0]["clip tokens"], workers[1]["clip tokens"])
    assert_same_weights(workers[1]["clip"], workers[0]["clip"])


@pytest.mark.parametrize("poisoned", [0, 1])
def test_all_workers_stop_when_one_diverges(poisoned: int, workers: list[dict[str, Any]]) -> None:
    messages = [worker[f"poisoned {poisoned}"] for worker in workers]
    assert messages[0] == messages[1]
    assert messages[0].startswith("training diverged in epoch 2: loss, slope is not finite")


def test_the_gradient_of_all_workers_is_clipped(workers: list[dict[str, Any]]) -> None:
    """Gradients 2 and 6 make 4, clipped to 1: three steps of 1."""
    for worker in workers:
        assert worker["clipped"] == pytest.approx([-3.0], rel=1e-5)


def test_history_is_of_all_workers(workers: list[dict[str, Any]]) -> None:
    """The weight is 0, -4, -8 at the losses; the mean input is 4."""
    expected = {"slope": -16.0, "constant": 2.0}
    for worker in workers:
        (record,) = worker["scripted history"]
        assert record["terms"] == pytest.approx(expected)
        assert record["loss"] == pytest.approx(-16.0)
