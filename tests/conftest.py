import os
from collections.abc import Callable
from typing import Any

# Before anything reads it, here and in all processes that tests start: batches this small are slowed down by
# threads, tenfold where another process is busy; and sums differ in the last bits with their number.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest

from tmkd_ray.analysis_record import ViewGallery
from tmkd_ray.results import (
    ClipRecord,
    DatasetRecord,
    EpochRecord,
    KnowledgeRecord,
    MethodRecord,
    RunResults,
    SetAsideImage,
    TeacherRecord,
    TrainingRecord,
)

VIEWS = ("original", "edge", "high_frequency")

_ON_META = ("test_models_torchvision.py", "test_planning.py", "test_plan_page.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the tests that build on PyTorch's meta device go first, in a process that has loaded nothing yet.

    Once transformers has loaded a model, PyTorch 2.15 computes a linear layer on that device by a Python
    decomposition that mixes it up with the CPU.
    """
    items.sort(key=lambda item: item.path.name not in _ON_META)


def history(num_epochs: int = 12, terms: tuple[str, ...] = ("ce", "kd")) -> list[EpochRecord]:
    return [
        EpochRecord(
            epoch=epoch,
            learning_rate=0.05 / epoch,
            loss=len(terms) / epoch,
            terms=dict.fromkeys(terms, 1 / epoch),
            train_accuracy=1 - 0.4 / epoch,
            validation_accuracy=1 - 0.5 / epoch,
            seconds=1.5,
            images_per_second=400.0,
        )
        for epoch in range(1, num_epochs + 1)
    ]


def method(
    name: str, test: list[float | None], validation: list[float] | None = None, terms: tuple[str, ...] = ("ce",)
) -> MethodRecord:
    """One run for each accuracy; the seconds are 10, 20, 30 …"""
    return MethodRecord(
        name=name,
        label=f"Method {name}",
        student="small",
        runs=[
            TrainingRecord(
                seed=seed,
                parameters=19466,
                best_epoch=12,
                validation_accuracy=0.5 if validation is None else validation[seed],
                test_accuracy=accuracy,
                test_top5_accuracy=None if accuracy is None else 0.99,
                seconds=10.0 * (seed + 1),
                num_workers=2,
                device="cpu",
                history=history(terms=terms),
            )
            for seed, accuracy in enumerate(test)
        ],
    )


@pytest.fixture
def make_method() -> Callable[..., MethodRecord]:
    return method


@pytest.fixture
def make_results() -> Callable[..., RunResults]:
    """A whole run; keywords replace fields of RunResults, `num_classes` sizes it."""

    def make(num_classes: int = 3, **changes: Any) -> RunResults:
        rng = np.random.default_rng(0)
        fields: dict[str, Any] = {
            "name": "digits demo",
            "created": "2026-01-31T12:00:00Z",
            "dataset": DatasetRecord(
                name="digits",
                class_names=[f"class {label}" for label in range(num_classes)],
                num_train=1000,
                num_labelled_for_students=200,
                num_validation=200,
                num_test=400,
                image_size=32,
                set_aside=[SetAsideImage(id=f"image-{i}", reason=f"truncated at {i}") for i in range(25)],
            ),
            "teacher": TeacherRecord(
                model="large",
                parameters=272474,
                source="teacher.safetensors",
                validation_accuracy=0.98,
                test_accuracy=0.97,
                view_validation_accuracy=dict(zip(VIEWS, (0.98, 0.95, 0.93), strict=True)),
                fused_validation_accuracy={"uniform": 0.975, "semantic": 0.985, "oracle": 0.995},
                history=history(),
                seconds=88.0,
            ),
            "clip": ClipRecord(
                source="fitted here",
                embedding_width=64,
                parameters=412332,
                zero_shot_validation_accuracy={
                    **dict(zip(VIEWS, (0.95, 0.93, 0.9), strict=True)),
                    "fused": 0.96,
                },
                history=history(),
                seconds=64.0,
            ),
            "knowledge": KnowledgeRecord(
                num_images=1000,
                num_variants=4,
                views=VIEWS,
                bytes_per_image_and_variant=780.5,
                total_bytes=3122000,
                seconds=14.2,
                images_per_second=281.7,
                stage_seconds={"views": 6.9, "visual teacher": 9.8},
            ),
            "methods": [
                method("alone", [0.90, 0.92, 0.94]),
                method("kd", [0.91, 0.93, 0.95], terms=("ce", "kd")),
                method("tmkd", [0.96, 0.97, 0.98], terms=("ce", "kd", "feature", "text", "contrastive")),
            ],
            "semantic_weights": rng.dirichlet([5, 4, 3], size=num_classes).tolist(),
            "stage_seconds": {"fit teacher": 88.0, "train students": 360.0, "report": 1.5},
            "config": {"seed": 0, "fusion": {"temperature": 0.07, "weighting": "label"}, "views": list(VIEWS)},
            "versions": {"python": "3.11.2", "torch": "2.11.0"},
            "hardware": {"cpu": "a processor", "cores": 8},
            "notes": ["The first note."],
        }
        return RunResults(**(fields | changes))

    return make


@pytest.fixture
def gallery() -> ViewGallery:
    rng = np.random.default_rng(1)
    return ViewGallery(
        images=rng.integers(0, 256, (2, 3, 8, 8, 3), dtype=np.uint8),
        view_names=VIEWS,
        labels=("class 0", "class 2"),
        weights=np.array([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]]),
    )
