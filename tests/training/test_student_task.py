"""A student taught from a store: few labels, the same for every method; what a teacher adds."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_samples import VIEWS, constants, knowledge, run, student_task, training

from tmkd_ray.errors import UserError
from tmkd_ray.fusion import TeachingSignal
from tmkd_ray.objective import DistillerConfig
from tmkd_ray.training.context import PlainContext
from tmkd_ray.training.loader import ResidentKnowledge
from tmkd_ray.training.student import labelled_positions


def test_exactly_so_many_labels_of_each_class() -> None:
    arrays = knowledge(0, 300)
    for per_class in (1, 7):
        rows = labelled_positions(arrays.ids, arrays.labels, training(labels_per_class=per_class))
        assert rows is not None
        assert np.bincount(arrays.labels[rows]).tolist() == [per_class] * 10
        assert (np.diff(rows) > 0).all()
    assert labelled_positions(arrays.ids, arrays.labels, training()) is None


def test_a_class_with_fewer_images_gives_them_all() -> None:
    arrays = knowledge(0, 300)
    smallest = int(np.bincount(arrays.labels).min())
    rows = labelled_positions(arrays.ids, arrays.labels, training(labels_per_class=smallest + 1))
    assert rows is not None
    counts = np.bincount(arrays.labels[rows])
    assert set(counts.tolist()) == {smallest, smallest + 1}


def images_seen(distiller: str, seed: int) -> set[bytes]:
    config = training(labels_per_class=3, seed=seed)
    return {
        image.numpy().tobytes()
        for image in student_task(config, distiller, train=knowledge(0, 300)).source.images
    }


def test_few_labels_are_the_same_for_every_method_at_a_seed() -> None:
    chosen = images_seen("tmkd", 0)
    assert len(chosen) == 30
    assert images_seen("alone", 0) == images_seen("kd", 0) == chosen
    assert images_seen("tmkd", 1) != chosen
    assert len(images_seen("tmkd", 1) & chosen) < 15


@pytest.mark.parametrize(
    ("distiller", "terms"),
    [
        ("alone", {"ce"}),
        ("kd", {"ce", "kd"}),
        ("tmkd", {"ce", "kd", "feature", "text", "contrastive"}),
        ({"name": "tmkd", "strategy": "dkd", "text_weight": 0}, {"ce", "kd", "feature", "contrastive"}),
    ],
)
def test_terms(distiller: Any, terms: set[str], tmp_path: Path) -> None:
    config = training(epochs=1)
    outcome = run(student_task(config, distiller), config, tmp_path)
    assert set(outcome.history[0].terms) >= terms
    assert not {"ce", "kd", "feature", "text", "contrastive"} - terms & set(outcome.history[0].terms)


def test_loss_is_the_weighted_sum(tmp_path: Path) -> None:
    config = training(epochs=1)
    section = DistillerConfig.model_validate("tmkd")
    record = run(student_task(config), config, tmp_path).history[0]
    weighted = [getattr(section, f"{name}_weight") * value for name, value in record.terms.items()]
    assert record.loss == pytest.approx(sum(weighted), rel=1e-6)


def test_without_a_teacher_nothing_of_the_knowledge_is_kept() -> None:
    task = student_task(training(), "alone")
    assert not isinstance(task.source, ResidentKnowledge)
    assert task.module.signal is None
    batch = next(task.batches(0, PlainContext(Path("nowhere"))))
    assert batch.knowledge is None


def test_the_plain_teacher_looks_at_one_view() -> None:
    """Its output is the head over the first view's feature, whatever CLIP says."""
    task = student_task(training(), "kd")
    batch = next(task.batches(0, PlainContext(Path("nowhere"))))
    assert task.module.signal is not None
    assert batch.knowledge is not None
    output = task.module.signal(batch.knowledge, batch.labels)
    expected = batch.knowledge.feature[:, 0].double().numpy() @ constants().head_weight.double().numpy().T
    np.testing.assert_allclose(output.logits, expected, rtol=1e-4, atol=1e-4)
    assert output.view_weights.shape == (16, 1)


def test_an_unknown_view_is_a_clear_error() -> None:
    alone = replace(constants(), view_names=VIEWS[:1])
    with pytest.raises(UserError, match="edge not in the knowledge"):
        TeachingSignal(alone, VIEWS, "uniform", 0.1)


def test_validation_sees_the_images_as_they_are(tmp_path: Path) -> None:
    task = student_task(training())
    task.module.eval()
    validation = knowledge(500, 550, num_variants=1)
    images = (validation.images / 255.0 - 0.309) / 0.349
    with torch.inference_mode():
        logits = task.module.student(torch.from_numpy(images.transpose(0, 3, 1, 2)).float()).logits
    expected = (logits.argmax(1).numpy() == validation.labels).mean()
    assert task.validate(PlainContext(tmp_path))["accuracy"] == pytest.approx(expected)


def test_the_teacher_alone_teaches_the_classes(tmp_path: Path) -> None:
    """Without labels in the loss the student learns the classes, from the teacher alone."""
    config = training(epochs=30, optimizer="adamw", learning_rate=0.01, batch_size=50)
    taught = {"name": "kd", "ce_weight": 0.0, "kd_weight": 1.0}
    outcome = run(student_task(config, taught, train=knowledge(0, 200)), config, tmp_path)
    assert outcome.accuracy > 0.3
    losses = [record.terms["kd"] for record in outcome.history]
    assert losses[-1] < 0.8 * losses[0]
