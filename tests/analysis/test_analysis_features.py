"""Grad-CAM, costs and projections, against formulas written out."""

import numpy as np
import pytest
import torch
from torch import nn

from tmkd_ray.analysis.cost import count_flops, measure_latency
from tmkd_ray.analysis.features import class_activation, fused_activation, heat_maps, responses
from tmkd_ray.analysis.relations import correlation_gap, logit_correlation, mean_gap, project
from tmkd_ray.analysis.samples import balanced_rows, rows_of_classes, spread_classes
from tmkd_ray.analysis.views import clearest_wins, win_counts
from tmkd_ray.models import build_model
from tmkd_ray.teachers.pixels import Normalize
from tmkd_ray.types import ModelOutput, TaskSpec

CPU = torch.device("cpu")
NORMALIZE = Normalize((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


class Pooled(nn.Module):
    """Maps by a 1×1 convolution, then their means, then a linear layer: Grad-CAM in closed form."""

    def __init__(self, with_maps=True):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head, self.with_maps = nn.Conv2d(3, 5, 1), nn.Linear(5, 4), with_maps

    def forward(self, images):
        maps = self.conv(images)
        feature = maps.mean(dim=(2, 3))
        return ModelOutput(self.head(feature), feature, (maps,) if self.with_maps else ())


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (3, 6, 6, 3), dtype=np.uint8)


def closed_form(model, images, labels):
    """The gradient by a map is the class's weight over the number of places: the feature is the maps' mean."""
    pixels = (images / 255 - 0.5) / 0.25
    kernel = model.conv.weight.detach().double().numpy()[:, :, 0, 0]
    maps = np.einsum("nhwc,kc->nkhw", pixels, kernel) + model.conv.bias.detach().double().numpy()[:, None, None]
    weights = model.head.weight.detach().double().numpy()[labels] / 36
    return np.einsum("nk,nkhw->nhw", weights, maps)


def test_grad_cam_of_a_linear_layer_on_means(images):
    model = Pooled().eval()
    labels = torch.tensor([3, 0, 2])
    found = class_activation(model, NORMALIZE, images, labels, CPU)
    assert found is not None
    expected = closed_form(model, images, [3, 0, 2])
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-6)
    maps = heat_maps(found, (6, 6))
    positive = np.maximum(expected, 0)
    np.testing.assert_allclose(maps, 255 * positive / positive.max(axis=(1, 2), keepdims=True), atol=0.6)


def test_a_model_without_maps_is_not_explained(images):
    assert class_activation(Pooled(with_maps=False), NORMALIZE, images, torch.tensor([0, 1, 2]), CPU) is None


def test_an_image_without_evidence_is_dark():
    maps = heat_maps(torch.tensor([[[-1.0, -2.0], [-1.0, -3.0]], [[0.0, 1.0], [0.0, 0.0]]]), (4, 4))
    assert maps.shape == (2, 4, 4)
    assert maps[0].max() == 0
    assert maps[1].max() == 255


def test_the_fused_teacher_is_explained_by_its_own_gradient(images):
    """The weighted sum over views is what differentiating the fused logit gives."""
    model = Pooled().eval()
    labels = torch.tensor([1, 1, 3])
    views = [images, 255 - images]
    weights = torch.tensor([[0.3, 0.7], [0.9, 0.1], [0.5, 0.5]])
    activations = [class_activation(model, NORMALIZE, view, labels, CPU) for view in views]
    fused = fused_activation(torch.stack([a for a in activations if a is not None], dim=1), weights)
    outputs = [model(NORMALIZE(torch.from_numpy(view))) for view in views]
    feature = sum(weights[:, [v]] * output.feature for v, output in enumerate(outputs))
    target = model.head(feature).gather(1, labels[:, None]).sum()
    gradients = torch.autograd.grad(target, [output.feature_maps[0] for output in outputs])
    expected = sum(
        (gradient.mean(dim=(2, 3), keepdim=True) * output.feature_maps[0]).sum(dim=1)
        for gradient, output in zip(gradients, outputs, strict=True)
    )
    torch.testing.assert_close(fused, expected.detach())


@pytest.mark.parametrize(
    "name", ["resnet8", "wrn_16_1", "vgg8", "MobileNetV2", "torchvision/mobilenet_v3_small"]
)
def test_real_models_are_explained(name):
    model = build_model(name, TaskSpec(("a", "b", "c"), 32)).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    found = class_activation(model, NORMALIZE, pixels, torch.tensor([0, 2]), CPU)
    assert found is not None
    assert found.abs().sum() > 0
    said = responses(model, NORMALIZE, pixels, CPU, batch_size=1)
    assert said.logits.shape == (2, 3)
    assert said.feature.shape == (2, model.feature_width)


def test_operations_of_a_convolution_and_a_product():
    # 6×6 places × 5 channels × 3 products, then 5 × 4; two operations each.
    whole = nn.Sequential(nn.Conv2d(3, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4))
    pixels = torch.zeros(1, 3, 6, 6)
    assert count_flops(whole, pixels) == 2 * (36 * 5 * 3 + 5 * 4)
    assert count_flops(whole, pixels.expand(4, -1, -1, -1)) == 4 * count_flops(whole, pixels)


def test_latency_is_the_median_of_passes():
    class Counting(nn.Module):
        calls = 0

        def forward(self, values):
            self.calls += 1
            return values

    module = Counting()
    assert measure_latency(module, torch.zeros(1), budget_s=0.0) > 0
    assert module.calls == 15


def test_logit_correlation_is_pearsons():
    logits = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    np.testing.assert_allclose(logit_correlation(logits), np.corrcoef(logits.T.astype(np.float64)), atol=1e-6)
    logits[:, 2] = 3.0
    found = logit_correlation(logits)
    assert found[2].tolist() == [0, 0, 1, 0]


def test_the_gap_to_oneself_is_zero_and_to_the_opposite_two():
    logits = np.random.default_rng(0).normal(size=(50, 3))
    assert mean_gap(correlation_gap(logits, 5 * logits + 1)) == pytest.approx(0, abs=1e-12)
    left = np.stack([logits[:, 0], logits[:, 0]], axis=1)
    right = np.stack([logits[:, 0], -logits[:, 0]], axis=1)
    np.testing.assert_allclose(correlation_gap(left, right), [[0, 2], [2, 0]], atol=1e-12)
    assert mean_gap(correlation_gap(left, right)) == pytest.approx(2)


def test_projected_groups_stay_apart_and_the_map_is_the_same_again():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 20)
    features = (rng.normal(size=(40, 60)) + 20 * labels[:, None]).astype(np.float32)
    places = project(features)
    assert places is not None
    assert places.shape == (40, 2)
    centres = [places[labels == label].mean(axis=0) for label in (0, 1)]
    spread = max(places[labels == label].std() for label in (0, 1))
    assert np.linalg.norm(centres[0] - centres[1]) > spread
    np.testing.assert_array_equal(places, project(features))


@pytest.mark.parametrize("features", [np.zeros((5, 3)), np.ones((20, 3))])
def test_too_little_to_project(features):
    assert project(features.astype(np.float32)) is None


def test_a_single_feature_can_be_projected():
    places = project(np.arange(8, dtype=np.float32)[:, None])
    assert places is not None
    assert np.isfinite(places).all()


def test_balanced_rows_take_every_class_in_turn():
    labels = np.array([0, 0, 0, 0, 1, 2, 2, 1])
    assert balanced_rows(labels, 3).tolist() == [0, 4, 5]
    assert balanced_rows(labels, 6).tolist() == [0, 1, 4, 5, 6, 7]
    assert balanced_rows(labels, 100).tolist() == list(range(8))


def test_classes_are_spread_over_those_that_have_images():
    labels = np.array([9, 1, 3, 3, 5, 7])
    assert spread_classes(labels, 3).tolist() == [1, 5, 9]
    assert spread_classes(labels, 99).tolist() == [1, 3, 5, 7, 9]
    assert rows_of_classes(labels, np.array([3, 9]), 1).tolist() == [2, 0]


def test_wins_and_their_clearest():
    weights = np.array(
        [[0.5, 0.3, 0.2], [0.4, 0.35, 0.25], [0.9, 0.05, 0.05], [0.1, 0.2, 0.7], [0.6, 0.4, 0.0]]
    )
    labels = np.array([0, 1, 0, 1, 1])
    assert win_counts(weights, labels, 3).tolist() == [[2, 0, 0], [2, 0, 1], [0, 0, 0]]
    # Of the first view: the clearest of each class (rows 2 and 4), then the others by their lead.
    assert clearest_wins(weights, labels, 0, 4).tolist() == [2, 4, 0, 1]
    assert clearest_wins(weights, labels, 0, 2).tolist() == [2, 4]
    assert clearest_wins(weights, labels, 1, 2).tolist() == []
