"""Pre-training without labels, in the training loop: two workers, interruptions, what it leaves."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from safetensors.torch import load_file
from training_samples import (
    CIFAR,
    MEAN,
    SIZE,
    STD,
    VIEWS,
    C,
    E,
    TinyClassifier,
    assert_same_weights,
    constants,
    interrupt,
    knowledge,
    run,
    spawn,
    timeless,
    training,
    unit,
)

from tmkd_ray.config import TrainingConfig, resolve_objective
from tmkd_ray.errors import UserError
from tmkd_ray.knowledge.store import KnowledgeArrays
from tmkd_ray.models import ImageClassifier, build_model
from tmkd_ray.pretraining import PretrainingConfig, read_projector
from tmkd_ray.training.context import PlainContext
from tmkd_ray.training.pretraining import PretrainingTask
from tmkd_ray.training.student import resident_source
from tmkd_ray.types import TaskSpec

NUM_IMAGES = 43
OBJECTIVES: dict[str, Any] = {
    "lgd": {"name": "lgd", "momentum": 0.9},
    "lgd, fused": {"name": "lgd", "teacher": "fused", "momentum": 0.9},
    "seed": {"name": "seed", "queue_size": 50},
    "embedding": "embedding",
}
BANKS = {"lgd": {"visual_bank", "seen"}, "seed": {"queue", "position"}, "embedding": set()}


def pretraining_task(
    config: TrainingConfig,
    objective: Any = "lgd",
    encoder: Callable[[], ImageClassifier] = TinyClassifier,
    train: KnowledgeArrays | None = None,
    initial_seed: int = 0,
    **changes: Any,
) -> PretrainingTask:
    section = resolve_objective(objective)
    assert isinstance(section, PretrainingConfig)
    torch.manual_seed(initial_seed)
    validation = knowledge(500, 550, num_variants=1)
    assert validation.images is not None
    arrays = knowledge(0, NUM_IMAGES) if train is None else train
    return PretrainingTask(
        encoder(),
        resident_source(arrays, config, CIFAR, torch.device("cpu"), with_teacher=True),
        validation.images,
        validation.labels,
        constants(),
        section,
        VIEWS if section.teacher == "fused" else VIEWS[:1],
        config,
        MEAN,
        STD,
        **changes,
    )


def several_batches() -> TrainingConfig:
    return training(epochs=3, learning_rate=0.03)


def accumulated() -> TrainingConfig:
    return training(epochs=3, learning_rate=0.03, gradient_accumulation=2)


SETTINGS = {"whole batches": several_batches, "accumulated": accumulated}


def trained(config: TrainingConfig, objective: Any, folder: Path, initial_seed: int = 0) -> dict[str, Any]:
    task = pretraining_task(config, objective, initial_seed=initial_seed)
    outcome = run(task, config, folder)
    return {
        "weights": dict(outcome.weights),
        "state": {name: value.clone() for name, value in task.module.state_dict().items()},
        "history": timeless(outcome.history),
    }


def scenario(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, objective in OBJECTIVES.items():
        for setting, config in SETTINGS.items():
            found[f"{name}, {setting}"] = trained(config(), objective, folder / f"{name} {setting}")
    config = several_batches()
    interrupt(pretraining_task(config), config, folder / "cut", epoch=2)
    task = pretraining_task(config, initial_seed=9)
    run(task, config, folder / "cut")
    found["resumed"] = {name: value.clone() for name, value in task.module.state_dict().items()}
    task = pretraining_task(config)
    run(task, config, folder / "whole")
    found["undisturbed"] = {name: value.clone() for name, value in task.module.state_dict().items()}
    return found


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return spawn(scenario, tmp_path_factory.mktemp("pretraining"))


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_two_workers_pretrain_as_one(
    objective: str, setting: str, workers: list[dict[str, Any]], tmp_path: Path
) -> None:
    """At the same global batch: weights, bank and figures; with gradient accumulation too."""
    alone = trained(SETTINGS[setting](), OBJECTIVES[objective], tmp_path)
    start = pretraining_task(several_batches(), OBJECTIVES[objective]).module.state_dict()
    each = [worker[f"{objective}, {setting}"] for worker in workers]
    for name, value in alone["state"].items():
        torch.testing.assert_close(each[0]["state"][name], value, rtol=1e-4, atol=1e-5)
        assert torch.equal(each[0]["state"][name], each[1]["state"][name]), "the same on every worker"
        if name.startswith("pretrainer.") or name in (
            "student.projector.0.weight",
            "student.encoder.conv.weight",
        ):
            assert not torch.equal(value, start[name]), f"{name} did not move"
    for found, expected in zip(each[0]["history"], alone["history"], strict=True):
        assert found.pop("terms") == pytest.approx(expected.pop("terms"), rel=1e-3)
        assert found.pop("train_accuracy") is expected.pop("train_accuracy") is None
        assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradient_accumulation_moves_the_bank_alike(objective: str, tmp_path: Path) -> None:
    """The student has no batch statistics, so that nothing of the step depends on the micro-batches."""
    whole = trained(several_batches(), OBJECTIVES[objective], tmp_path / "whole")
    parts = trained(accumulated(), OBJECTIVES[objective], tmp_path / "parts")
    for name, value in whole["state"].items():
        torch.testing.assert_close(parts["state"][name], value, rtol=1e-4, atol=1e-5)


def test_two_workers_resume_to_the_bit(workers: list[dict[str, Any]]) -> None:
    for worker in workers:
        assert_same_weights(worker["resumed"], worker["undisturbed"])
    assert workers[0]["resumed"]["pretrainer.seen"].any()


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("step", [0, 1])
def test_resumed_to_the_bit(objective: str, step: int, tmp_path: Path) -> None:
    """After an epoch, and within one; bank, flags and the queue's position are in the checkpoint."""
    config = training(epochs=3, learning_rate=0.03, checkpoint_every_steps=1, ema_decay=0.9)
    wanted = trained(config, OBJECTIVES[objective], tmp_path / "whole")
    task = pretraining_task(config, OBJECTIVES[objective])
    interrupt(task, config, tmp_path / "cut", epoch=1, step=step)
    task = pretraining_task(config, OBJECTIVES[objective], initial_seed=9)
    outcome = run(task, config, tmp_path / "cut")
    assert_same_weights(task.module.state_dict(), wanted["state"])
    assert_same_weights(outcome.weights, wanted["weights"])
    names = {name for name in wanted["state"] if name.startswith("pretrainer.")}
    assert names == {f"pretrainer.{bank}" for bank in BANKS[objective.partition(",")[0]]}


@pytest.mark.parametrize("objective", [*OBJECTIVES, "lgd, by margin"])
def test_labels_do_not_reach_the_loss(objective: str, tmp_path: Path) -> None:
    """With all labels permuted everything is learnt alike, unless a weighting by labels is asked for."""
    by_label = {"name": "lgd", "teacher": "fused", "weighting": "margin", "momentum": 0.9}
    options = OBJECTIVES.get(objective, by_label)
    config = several_batches()
    arrays = knowledge(0, NUM_IMAGES)
    states = []
    for number, labels in enumerate((arrays.labels, (arrays.labels + 3) % C)):
        task = pretraining_task(config, options, train=replace(arrays, labels=labels))
        run(task, config, tmp_path / str(number))
        states.append(task.module.state_dict())
    alike = all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert alike == (objective != "lgd, by margin")


def test_it_learns_to_tell_the_classes_by_their_texts(tmp_path: Path) -> None:
    config = training(epochs=60, learning_rate=0.1)
    task = pretraining_task(config, train=knowledge(0, 200))
    outcome = run(task, config, tmp_path)
    assert outcome.history[-1].train_accuracy is None, "its classifier predicts nothing"
    assert set(outcome.history[0].terms) == {"visual", "text"}
    assert outcome.accuracy > 0.25  # ten classes, 200 small images, one convolution


def test_validation_is_zero_shot_by_the_formula() -> None:
    task = pretraining_task(several_batches())
    images = task.validation_images
    module = task.module.eval()
    with torch.inference_mode():
        feature = module.student.encoder(module.normalize(images)).feature
        embedding = module.student.projector(feature).double().numpy()
        logits = task._predict(images).double().numpy()
    bank = constants().text_bank
    assert bank is not None
    np.testing.assert_allclose(logits, unit(embedding) @ bank[0].double().numpy().T / 0.1, atol=1e-4)
    accuracy = (logits.argmax(axis=1) == task.validation_labels.numpy()).mean()
    metrics = task.validate(PlainContext(Path("unused"), quiet=True))
    assert metrics["accuracy"] == pytest.approx(accuracy)


def test_a_bank_of_another_task_leaves_the_validation_alone(tmp_path: Path) -> None:
    bank = torch.from_numpy(unit(np.random.default_rng(3).normal(size=(17, E)))).float()
    config = several_batches()
    task = pretraining_task(config, bank_CE=bank)
    outcome = run(task, config, tmp_path)
    assert task.module.pretrainer.visual_bank.shape == (17, E)
    assert task.zero_shot.head.out_features == C
    assert 0 <= outcome.accuracy <= 1


@pytest.mark.parametrize("ema_decay", [None, 0.5])
def test_what_it_leaves(tmp_path: Path, ema_decay: float | None) -> None:
    """The encoder loads into a plain model; encoder and head together embed as the kept student does."""
    config = training(epochs=2, learning_rate=0.03, ema_decay=ema_decay)

    def resnet() -> ImageClassifier:
        return build_model("resnet8", TaskSpec(tuple("0123456789"), SIZE))

    origin = {"model": "resnet8", "clip": "/clips/mine", "clip_fingerprint": "abc"}
    task = pretraining_task(config, encoder=resnet, origin=origin)
    initial = task.kept.encoder.head.weight.clone()
    outcome = run(task, config, tmp_path / "run")
    task.save(str(tmp_path), outcome.weights)
    encoder = resnet()
    encoder.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(encoder.head.weight, initial), "the classifier is as it was at first"
    with safetensors.safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["classifier"] == "untrained"
    assert metadata["measured_by"] == "zero-shot"
    assert metadata["model"] == "resnet8"
    tensors = load_file(tmp_path / "projector.safetensors")
    assert {name: tuple(value.shape) for name, value in tensors.items()} == {
        "0.weight": (64, 64),
        "0.bias": (64,),
        "2.weight": (E, 64),
        "2.bias": (E,),
    }
    projector, metadata = read_projector(str(tmp_path / "projector.safetensors"))
    assert metadata == {"embedding_width": str(E), **origin}
    task.kept.load_state_dict(outcome.weights)
    images = task.module.normalize(task.validation_images[:5])
    with torch.inference_mode():
        found = projector(encoder.eval()(images).feature)
        torch.testing.assert_close(found, task.kept.eval()(images))
    assert task.num_parameters() == sum(
        value.numel() for value in [*encoder.parameters(), *projector.parameters()]
    ) - sum(value.numel() for value in encoder.head.parameters())


def test_hidden_width_of_the_head() -> None:
    task = pretraining_task(several_batches(), {"name": "embedding", "hidden_width": 3})
    assert task.kept.projector[0].weight.shape == (3, 32)


def test_a_file_that_is_no_projector(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist; a pre-trained student"):
        read_projector(str(tmp_path / "projector.safetensors"))
    safetensors.torch.save_file({"0.weight": torch.zeros(2, 3)}, tmp_path / "projector.safetensors")
    with pytest.raises(UserError, match="not the MLP head of a pre-trained student"):
        read_projector(str(tmp_path / "projector.safetensors"))
    (tmp_path / "projector.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="not the MLP head of a pre-trained student"):
        read_projector(str(tmp_path / "projector.safetensors"))


@pytest.mark.parametrize("objective", ["lgd", {"name": "seed", "queue_size": 50}, "embedding"])
@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_half_precision_stays_finite(objective: Any, precision: str, tmp_path: Path) -> None:
    config = training(epochs=2, learning_rate=0.03, precision=precision)
    outcome = run(pretraining_task(config, objective), config, tmp_path)
    assert all(np.isfinite(record.loss) for record in outcome.history)
    assert outcome.history[1].loss < outcome.history[0].loss


STUDENTS = ["torchvision/resnet18", "torchvision/mobilenet_v2", "torchvision/mobilenet_v3_small"]
STUDENTS += ["torchvision/efficientnet_b0", "MobileNetV2", "ShuffleV1", "vgg8", "wrn_16_1"]


@pytest.mark.parametrize("name", STUDENTS)
def test_students_can_be_pretrained(name: str) -> None:
    """Every parameter but the classifier's has a gradient, as DDP wants it."""
    config = training(batch_size=4)

    def encoder() -> ImageClassifier:
        return build_model(name, TaskSpec(tuple("0123456789"), 32))

    task = pretraining_task(config, encoder=encoder)
    task.module.train()
    batch = next(iter(task.batches(0, PlainContext(Path("unused"), quiet=True))))
    enlarged = torch.nn.functional.interpolate(batch.images, size=(32, 32))
    task.module(replace(batch, images=enlarged)).loss.loss.backward()
    head = set(map(id, task.kept.encoder.head.parameters()))
    for parameter_name, parameter in task.module.named_parameters():
        assert (parameter.grad is None) == (id(parameter) in head), parameter_name
        assert parameter.requires_grad == (id(parameter) not in head), parameter_name
