"""What a training section refuses, and in which words."""

from typing import Any

import pytest
from pydantic import ValidationError

from tmkd_ray.config import ClipTrainingConfig, ExperimentConfig, TrainingConfig
from tmkd_ray.settings import explain


def problems(section: Any, fields: dict[str, Any]) -> dict[str, str]:
    """Return what is wrong, by dotted path."""
    with pytest.raises(ValidationError) as caught:
        section.model_validate(fields)
    return {".".join(path): text for path, text in explain(caught.value, section)}


@pytest.mark.parametrize(
    ("fields", "path", "text"),
    [
        ({"min_workers": 3}, "min_workers", "3 is above num_workers 2"),
        ({"batch_size": 63}, "batch_size", "63 is not divisible by num_workers 2"),
        (
            {"num_workers": 4, "min_workers": 2},
            "batch_size",
            "64 is not divisible by 3, but so many workers can",
        ),
        ({"num_workers": 8, "min_workers": 5}, "batch_size", "64 is not divisible by 5, 6, 7, but so many"),
        ({"gradient_accumulation": 33}, "gradient_accumulation", "more than the 32 images of a worker's batch"),
        ({"gradient_accumulation": 0}, "gradient_accumulation", "must be at least 1"),
        (
            {"schedule": "one_cycle"},
            "warmup_epochs",
            "one_cycle rises for so long, which cannot be 0; 6 is usual",
        ),
        ({"schedule": "onecycle"}, "schedule", "one_cycle"),
        ({"min_learning_rate_ratio": 1.0}, "min_learning_rate_ratio", "must be below 1"),
        ({"ema_decay": 1.0}, "ema_decay", "must be below 1"),
        ({"ema_decay": 0.0}, "ema_decay", "must be above 0"),
        ({"mixup": -0.1}, "mixup", "must be at least 0"),
        ({"keep_checkpoints": 0}, "keep_checkpoints", "must be at least 1"),
        ({"checkpoint_every_steps": 0}, "checkpoint_every_steps", "must be at least 1"),
        ({"loggers": ["tensorbord"]}, "loggers.0", "expected 'tensorboard', 'mlflow' or 'wandb'"),
        ({"loggers": ["wandb", "wandb"]}, "loggers", "each once"),
    ],
)
def test_refused(fields: dict[str, Any], path: str, text: str) -> None:
    found = problems(TrainingConfig, fields)
    assert list(found) == [path]
    assert text in found[path]


@pytest.mark.parametrize(
    "fields",
    [
        {"num_workers": 4, "min_workers": 4},
        {"batch_size": 60, "num_workers": 6, "min_workers": 1},
        {"num_workers": 2, "min_workers": 1},
        {"gradient_accumulation": 32},
        {"schedule": "one_cycle", "warmup_epochs": 6, "min_learning_rate_ratio": 0.01},
    ],
    ids=str,
)
def test_taken(fields: dict[str, Any]) -> None:
    assert TrainingConfig.model_validate(fields) is not None


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("none", ()),
        (None, ()),
        ([], ()),
        ("wandb", ("wandb",)),
        (["tensorboard", "mlflow"], ("tensorboard", "mlflow")),
    ],
)
def test_loggers(given: Any, expected: tuple[str, ...]) -> None:
    assert TrainingConfig.model_validate({"loggers": given}).loggers == expected
    assert TrainingConfig().loggers == ("tensorboard",)


def test_what_clip_is_not_trained_with() -> None:
    found = problems(ClipTrainingConfig, {"mixup": 0.2, "cutmix": 1.0, "compile": True})
    assert list(found) == ["mixup", "cutmix", "compile"]
    assert all("not offered for CLIP" in text for text in found.values())


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
@pytest.mark.parametrize(
    ("choice", "taught"),
    [
        ({"distiller": "kd"}, "distiller"),
        ({"distiller": "tmkd"}, "distiller"),
        ({"methods": {"a": "alone", "b": "kd", "c": "tmkd"}}, "methods.b, methods.c"),
        ({"methods": {"b": {"name": "kd", "ce_weight": 1.0}}, "distiller": "alone"}, "methods.b"),
    ],
    ids=str,
)
def test_mixed_images_are_refused_beside_a_teacher(name: str, choice: dict[str, Any], taught: str) -> None:
    """It saw the images as they were; where it runs online too."""
    for mode in ("cached", "online"):
        fields = {"dataset": "digits", "training": {name: 0.2}, "knowledge": {"mode": mode}, **choice}
        found = problems(ExperimentConfig, fields)
        assert list(found) == [f"training.{name}"]
        assert f"of the unmixed ones ({taught})" in found[f"training.{name}"]


def test_mixed_images_without_a_teacher() -> None:
    alone = {"dataset": "digits", "training": {"mixup": 0.2, "cutmix": 1.0}}
    assert ExperimentConfig.model_validate({**alone, "distiller": "alone"}).training.mixes
    # `distiller` is not trained where methods are.
    assert ExperimentConfig.model_validate({**alone, "methods": {"a": "alone"}}).training.mixes
    assert not TrainingConfig().mixes


def test_mixed_images_are_not_for_teachers() -> None:
    fields = {"dataset": "digits", "teacher": {"visual": {"fit": {"cutmix": 1.0}}}}
    assert list(problems(ExperimentConfig, fields)) == ["teacher.visual.fit.cutmix"]
