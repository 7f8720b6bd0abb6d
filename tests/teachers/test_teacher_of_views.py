"""A visual teacher with batch-norm statistics of each view: each image under those of its own view."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tmkd_ray.datasets.base import SampleIndex
from tmkd_ray.knowledge.compute import ShardPlan, VisualStage, pack, unpack
from tmkd_ray.knowledge.layout import KnowledgeLayout
from tmkd_ray.models import ImageClassifier, build_model
from tmkd_ray.models.view_batch_norm import ViewBatchNorm, use_view_statistics
from tmkd_ray.teachers import FrozenTeachers, VisualTeacher
from tmkd_ray.types import TaskSpec

TASK = TaskSpec(tuple("abcdefg"), 16)
MEAN, STD = (0.5, 0.45, 0.4), (0.2, 0.25, 0.3)
VIEWS = 3


def build(seed: int = 0) -> ImageClassifier:
    torch.manual_seed(seed)
    model = build_model("resnet8", TASK)
    model(torch.randn(8, 3, 16, 16))
    return model


def viewed() -> ImageClassifier:
    """The second and third view have statistics unlike the first's, which are the given ones."""
    model = build()
    use_view_statistics(model, VIEWS)
    generator = torch.Generator().manual_seed(5)
    for norm in model.modules():
        if isinstance(norm, ViewBatchNorm):
            shape = norm.running_mean[1:].shape
            norm.running_mean[1:] += 0.3 * torch.randn(shape, generator=generator)
            norm.running_var[1:] *= 0.5 + torch.rand(shape, generator=generator)
    return model


def alone(view: int) -> VisualTeacher:
    """A plain teacher that has the statistics of one view."""
    model, source = build(), viewed().state_dict()
    model.load_state_dict({n: v[view] if "running" in n or "num_b" in n else v for n, v in source.items()})
    return VisualTeacher(model, MEAN, STD)


def pixels(count: int = 10) -> Tensor:
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8))


@pytest.mark.parametrize("first_view", [0, 1, 2])
@pytest.mark.parametrize("count", [1, 2, 10])
def test_images_go_through_the_views_in_turn(first_view: int, count: int) -> None:
    teacher, images = VisualTeacher(viewed(), MEAN, STD), pixels(count)
    output = teacher.outputs(images, first_view)
    for row in range(count):
        expected = alone((first_view + row) % VIEWS).outputs(images[row : row + 1])
        torch.testing.assert_close(output.feature[row], expected.feature[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(output.logits[row], expected.logits[0], rtol=1e-4, atol=1e-5)
        for mine, plain in zip(output.feature_maps, expected.feature_maps, strict=True):
            torch.testing.assert_close(mine[row], plain[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(teacher(images, first_view), output.feature)


def test_frozen_teachers_and_the_stage_agree_whatever_the_batch() -> None:
    """Batches cut across images and views; every view is under its own statistics all the same."""
    pixels_BVHWC = pixels(4 * VIEWS).reshape(4, VIEWS, 16, 16, 3)
    expected = torch.stack([alone(view)(pixels_BVHWC[:, view]) for view in range(VIEWS)], dim=1)
    for batch in (1, 4, 5, 12):
        frozen = FrozenTeachers(
            VisualTeacher(viewed(), MEAN, STD), None, torch.device("cpu"), visual_batch=batch
        )
        torch.testing.assert_close(frozen(pixels_BVHWC).feature, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_stage_of_the_store(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_eagerly = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compile_eagerly(function, backend="eager"))
    layout = KnowledgeLayout(("original", "edge", "mirror"), 2, 16, 64, None, dtype="float32")
    index = SampleIndex(np.array(["a", "b"]), np.zeros(2, np.int64), np.zeros(2, np.int32), np.arange(2))
    table = ShardPlan("train", 0, index, np.arange(2)).to_table()
    pixels_NKVHWC = pixels(2 * 2 * VIEWS).numpy()
    table = table.append_column("pixels", pack(pixels_NKVHWC))
    stage = VisualStage(
        VisualTeacher(viewed(), MEAN, STD), {"train": layout}, "cpu", batch_size=5, compile=compiled
    )
    found = unpack(stage(table), "feature", np.float32, 64)
    for row in range(len(found)):
        expected = alone(row % VIEWS)(pixels(12)[row : row + 1])[0]
        np.testing.assert_allclose(found[row], expected, rtol=1e-4, atol=1e-5)


def test_the_first_view_is_the_given_teachers() -> None:
    given, teacher = VisualTeacher(build(), MEAN, STD), VisualTeacher(viewed(), MEAN, STD)
    with torch.no_grad():
        images = given.normalize(pixels())
        assert torch.equal(teacher.model(images).feature, given.model(images).feature)
    assert torch.equal(teacher.head_weight, given.head_weight)


def test_saved_loaded_and_fingerprinted(tmp_path: Path) -> None:
    model = viewed()
    path = str(tmp_path / "teacher.pth")
    torch.save(model.state_dict(), path)
    loaded = VisualTeacher.load("resnet8", TASK, path, MEAN, STD, VIEWS)
    teacher = VisualTeacher(model, MEAN, STD)
    assert torch.equal(loaded(pixels()), teacher(pixels()))
    assert loaded.fingerprint() == teacher.fingerprint()
    other = copy.deepcopy(model)
    other.bn1.running_mean[2, 0] += 1e-3
    fingerprints = {
        VisualTeacher(candidate, MEAN, STD).fingerprint() for candidate in (model, other, build(), other)
    }
    assert len(fingerprints) == 3


def test_teachers_without_views_of_their_own_are_as_before() -> None:
    teacher = VisualTeacher(build(), MEAN, STD)
    assert teacher.num_view_statistics is None
    assert torch.equal(teacher(pixels(), 2), teacher(pixels()))
    frozen = FrozenTeachers(teacher, None, torch.device("cpu"), visual_batch=5)
    views_BVHWC = pixels(8).reshape(4, 2, 16, 16, 3)
    torch.testing.assert_close(frozen(views_BVHWC).feature.flatten(0, 1), teacher(pixels(8)))
