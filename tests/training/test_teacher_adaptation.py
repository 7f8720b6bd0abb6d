"""Fitting and adapting a visual teacher to the views."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from training_samples import CIFAR, MEAN, SIZE, STD, digits, run, training, views

from tmkd_ray.datasets.digits import CLASS_NAMES
from tmkd_ray.models import ImageClassifier, build_model
from tmkd_ray.models.view_batch_norm import ViewBatchNorm, num_view_statistics, use_view_statistics
from tmkd_ray.teachers.pixels import Normalize
from tmkd_ray.training.augmented_views import AugmentedViews, ViewBatch
from tmkd_ray.training.context import PlainContext
from tmkd_ray.training.teacher import ClassifierModule, TeacherTask, adapt_statistics
from tmkd_ray.types import TaskSpec

CPU = torch.device("cpu")
SEED = 3


def resnet8() -> ImageClassifier:
    torch.manual_seed(1)
    return build_model("resnet8", TaskSpec(CLASS_NAMES, SIZE))


def mixed_batch(count: int = 24) -> ViewBatch:
    rng = np.random.default_rng(2)
    images = torch.from_numpy(rng.integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8))
    labels = torch.from_numpy(rng.integers(0, 10, count))
    return ViewBatch(images, labels, torch.from_numpy(rng.integers(0, 2, count)), torch.arange(count))


class _InDouble(Normalize):
    def __init__(self) -> None:
        super().__init__(MEAN, STD)

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).double()


def test_a_mixed_batch_is_that_of_each_view_by_itself() -> None:
    """Loss and gradients, against an untouched network given the two parts one after the other, in float64."""
    batch, normalize = mixed_batch(), _InDouble()
    plain = resnet8().double()
    model = copy.deepcopy(plain)
    use_view_statistics(model, 2)
    module = ClassifierModule(model, normalize, label_smoothing=0.1).train()
    module(batch).loss.loss.backward()

    total = torch.zeros((), dtype=torch.float64)
    for view in (0, 1):
        rows = batch.view_indices == view
        logits = plain.train()(normalize(batch.images[rows])).logits
        total = total + F.cross_entropy(logits, batch.labels[rows], label_smoothing=0.1, reduction="sum")
    loss = total / len(batch.labels)
    loss.backward()
    with torch.no_grad():
        torch.testing.assert_close(module(batch).loss.loss.double(), loss, rtol=1e-5, atol=1e-6)
    for (name, mine), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_training_keeps_the_statistics_of_views_apart(tmp_path: Path) -> None:
    config = training(epochs=2)
    model = resnet8()
    use_view_statistics(model, 2)
    task = TeacherTask(model, digits(0, 40), digits(500, 600), views(), config, CIFAR, MEAN, STD)
    result = run(task, config, tmp_path)
    assert result.weights["bn1.running_mean"].shape == (2, 16)
    first, second = result.weights["layer1.0.bn1.running_mean"]
    assert not torch.allclose(first, second)
    assert result.accuracy == max(record.validation_accuracy for record in result.history)


def test_each_view_is_validated_under_its_own_statistics(tmp_path: Path) -> None:
    """Twice the same images, but statistics that are not the same: nor are the accuracies."""
    same = {"original": views()["original"], "again": views()["original"]}
    model = resnet8()
    model(torch.randn(16, 3, SIZE, SIZE))
    plain = copy.deepcopy(model).eval()
    use_view_statistics(model, 2)
    for norm in model.modules():
        if isinstance(norm, ViewBatchNorm):
            norm.running_mean[1] += torch.linspace(-2, 2, norm.num_features)
    config = training(epochs=1)
    task = TeacherTask(model.eval(), digits(0, 40), digits(500, 600), same, config, CIFAR, MEAN, STD)
    metrics = task.validate(PlainContext(tmp_path, quiet=True))
    found = {}
    for view, name in enumerate(same):
        state = {n: v[view] if "running" in n or "num_b" in n else v for n, v in model.state_dict().items()}
        plain.load_state_dict(state)
        with torch.no_grad():
            logits = plain(Normalize(MEAN, STD)(torch.from_numpy(digits(500, 600).images))).logits
        found[name] = (logits.argmax(1).numpy() == digits(500, 600).labels).mean()
        assert metrics[f"{name}_accuracy"] == pytest.approx(found[name])
    assert found["original"] != found["again"]
    assert metrics["accuracy"] == pytest.approx(np.mean(list(found.values())))


@pytest.mark.parametrize("batch_norms_first", ["original", "edge"])
def test_statistics_are_those_of_the_view(batch_norms_first: str) -> None:
    """Of the first layer in float64: mean and variance of its input over images as augmented and viewed."""
    names = [batch_norms_first, "edge" if batch_norms_first == "original" else "original"]
    chosen = {name: views()[name] for name in names}
    model, loaded = resnet8().eval(), digits(0, 48)
    given = copy.deepcopy(model)
    adapt_statistics(model, loaded, chosen, CIFAR, Normalize(MEAN, STD), SEED, CPU)
    assert num_view_statistics(model) == 2
    original, edge = names.index("original"), names.index("edge")

    batches = list(AugmentedViews(loaded, [chosen["edge"]], CIFAR, SEED).batches(0, 256, 0, 1, CPU))
    pixels = torch.cat([batch.images for batch in batches]).double().numpy()
    assert len(pixels) == 48
    x = (pixels / 255 - MEAN) / STD
    maps = F.conv2d(torch.from_numpy(x.transpose(0, 3, 1, 2)), given.conv1.weight.double(), padding=1)
    pooled = maps.transpose(0, 1).flatten(1).detach().numpy()
    np.testing.assert_allclose(model.bn1.running_mean[edge], pooled.mean(1), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(model.bn1.running_var[edge], pooled.var(1, ddof=1), rtol=1e-4)

    for name, value in given.state_dict().items():
        mine = model.state_dict()[name]
        if "running" in name or "num_batches" in name:
            assert torch.equal(mine[original], value), "the original keeps the given statistics"
        else:
            assert torch.equal(mine, value), "no weight is changed"
