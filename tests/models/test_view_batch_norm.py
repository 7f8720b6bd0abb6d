"""Batch normalisation with statistics for each view, against float64 and the layers it takes the place of."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tmkd_ray.errors import UserError
from tmkd_ray.models import ImageClassifier, build_model
from tmkd_ray.models.view_batch_norm import (
    ViewBatchNorm,
    estimate_statistics,
    num_view_statistics,
    samples_of_views,
    use_view_statistics,
)
from tmkd_ray.types import TaskSpec

EPS, MOMENTUM = 1e-5, 0.1
WIDTH = 4


def values(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * 2 + 1


def layer(num_views: int = 3, momentum: float | None = MOMENTUM) -> nn.Sequential:
    """One batch norm, in double precision, with statistics and weights of its own."""
    norm = nn.BatchNorm2d(WIDTH, eps=EPS, momentum=momentum).double()
    with torch.no_grad():
        for tensor, seed in ((norm.weight, 1), (norm.bias, 2), (norm.running_mean, 3)):
            tensor.copy_(values(WIDTH, seed=seed))
        norm.running_var.copy_(values(WIDTH, seed=4).abs() + 0.1)
    model = nn.Sequential(norm)
    use_view_statistics(model, num_views)
    return model


def normalised(x: np.ndarray, mean: np.ndarray, var: np.ndarray, norm: nn.Module) -> np.ndarray:
    scale, shift = (p.detach().numpy()[:, None, None] for p in (norm.weight, norm.bias))
    return (x - mean[:, None, None]) / np.sqrt(var[:, None, None] + EPS) * scale + shift


def test_training_normalises_each_view_by_itself() -> None:
    """And moves its running statistics alone: `(1 - m) old + m new`, the variance unbiased."""
    model = layer().train()
    norm = model[0]
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    x, counts = values(7, WIDTH, 5, 3, seed=5), (4, 0, 3)
    with samples_of_views(model, counts):
        found = model(x).detach().numpy()
    parts = np.split(x.numpy(), np.cumsum(counts)[:-1])
    expected = [normalised(p, p.mean((0, 2, 3)), p.var((0, 2, 3)), norm) for p in parts if len(p)]
    np.testing.assert_allclose(found, np.concatenate(expected), rtol=1e-10, atol=1e-10)
    for view, part in enumerate(parts):
        mean, var = before["running_mean"][view].numpy(), before["running_var"][view].numpy()
        if len(part):
            mean = (1 - MOMENTUM) * mean + MOMENTUM * part.mean((0, 2, 3))
            var = (1 - MOMENTUM) * var + MOMENTUM * part.var((0, 2, 3), ddof=0) * part[:, 0].size / (
                part[:, 0].size - 1
            )
        np.testing.assert_allclose(norm.running_mean[view], mean, rtol=1e-10)
        np.testing.assert_allclose(norm.running_var[view], var, rtol=1e-10)
    assert norm.num_batches_tracked.tolist() == [1, 0, 1]


def test_evaluation_applies_the_statistics_of_the_view() -> None:
    model = layer().eval()
    norm = model[0]
    with torch.no_grad():
        norm.running_mean.copy_(values(3, WIDTH, seed=6))
        norm.running_var.copy_(values(3, WIDTH, seed=7).abs() + 0.1)
    x, counts = values(6, WIDTH, 2, 2, seed=8), (1, 3, 2)
    with samples_of_views(model, counts), torch.no_grad():
        found = model(x).numpy()
    mean, var = norm.running_mean.numpy(), norm.running_var.numpy()
    for row, view in enumerate(np.repeat(range(3), counts)):
        np.testing.assert_allclose(
            found[row], normalised(x[row].numpy(), mean[view], var[view], norm), rtol=1e-10
        )
    with torch.no_grad():
        np.testing.assert_allclose(model(x).numpy(), normalised(x.numpy(), mean[0], var[0], norm), rtol=1e-10)


def test_the_mean_of_all_batches_without_momentum() -> None:
    model = layer(2, momentum=None).train()
    batches = [values(5, WIDTH, 2, 2, seed=seed) for seed in (1, 2, 3)]
    for batch in batches:
        with samples_of_views(model, (0, 5)):
            model(batch)
    expected = np.mean([batch.numpy().mean((0, 2, 3)) for batch in batches], axis=0)
    np.testing.assert_allclose(model[0].running_mean[1], expected, rtol=1e-10)


def test_a_single_value_is_normalised_by_the_running_statistics() -> None:
    """It has no variance: torch itself would refuse it."""
    model = layer(2).train()
    norm = model[0]
    before = copy.deepcopy(norm.state_dict())
    x = values(4, WIDTH, 1, 1, seed=5)
    with samples_of_views(model, (3, 1)), torch.no_grad():
        found = model(x)[3].numpy()
    mean, var = before["running_mean"][1].numpy(), before["running_var"][1].numpy()
    np.testing.assert_allclose(found, normalised(x[3].numpy(), mean, var, norm), rtol=1e-10)
    assert torch.equal(norm.running_mean[1], before["running_mean"][1])
    assert not torch.equal(norm.running_mean[0], before["running_mean"][0])


def network(name: str = "resnet8") -> ImageClassifier:
    torch.manual_seed(0)
    model = build_model(name, TaskSpec(tuple("abcde"), 16))
    model(torch.randn(16, 3, 16, 16) * 2 + 1)
    return model.eval()


IMAGES = torch.randn(9, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1", "vgg8", "torchvision/mobilenet_v3_small"])
def test_nothing_changes_until_statistics_do(name: str) -> None:
    """To the bit, for one view and for mixed ones, and under the same names."""
    model = network(name)
    viewed = copy.deepcopy(model)
    use_view_statistics(viewed, 2)
    assert num_view_statistics(viewed) == 2
    assert num_view_statistics(model) is None
    assert list(viewed.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        expected = model(IMAGES).logits
        assert torch.equal(viewed(IMAGES).logits, expected)
        with samples_of_views(viewed, (4, 5)):
            assert torch.equal(viewed(IMAGES).logits, expected)
        with samples_of_views(viewed, (0, 9)):
            assert torch.equal(viewed(IMAGES).logits, expected)


def test_what_was_told_ends_with_the_block() -> None:
    model = network()
    use_view_statistics(model, 2)
    with pytest.raises(ZeroDivisionError), samples_of_views(model, (2, 3)):
        raise ZeroDivisionError
    assert model(IMAGES).logits.shape == (9, 5), "all of the first view again"
    with samples_of_views(model, (2, 3)), pytest.raises(AssertionError, match="whose views were told"):
        model(IMAGES)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_told_on_its_own(copied: object) -> None:
    model = network()
    use_view_statistics(model, 2)
    for norm in model.modules():
        if isinstance(norm, ViewBatchNorm):
            norm.running_mean[1] += 1
    twin = copied(model)  # type: ignore[operator]
    with torch.no_grad():
        with samples_of_views(twin, (0, 9)):
            second, untold = twin(IMAGES).logits, model(IMAGES).logits
        assert not torch.allclose(second, untold)
        with samples_of_views(model, (0, 9)):
            assert torch.equal(model(IMAGES).logits, second)


def test_a_layer_in_two_places_stays_one() -> None:
    norm = nn.BatchNorm2d(WIDTH)
    model = nn.ModuleDict({"a": norm, "b": nn.Sequential(norm)})
    use_view_statistics(model, 2)
    assert model["a"] is model["b"][0]


def test_a_network_without_batch_norm_is_refused() -> None:
    with pytest.raises(UserError, match="has no batch normalisation"):
        use_view_statistics(nn.Sequential(nn.Conv2d(3, 3, 1), nn.LayerNorm(3)), 2)


def test_the_first_layers_statistics_are_those_of_all_images() -> None:
    """Mean and unbiased variance over all images and pixels, however they fall into batches; one view alone."""
    batches = [values(n, WIDTH, 3, 2, seed=n) for n in (5, 2, 8)]
    model = layer()
    before = copy.deepcopy(model.state_dict())
    estimate_statistics(model, batches, 1)
    pooled = np.concatenate([batch.numpy() for batch in batches]).transpose(1, 0, 2, 3).reshape(WIDTH, -1)
    np.testing.assert_allclose(model[0].running_mean[1], pooled.mean(1), rtol=1e-10)
    np.testing.assert_allclose(model[0].running_var[1], pooled.var(1, ddof=1), rtol=1e-10)
    for view in (0, 2):
        assert torch.equal(model[0].running_mean[view], before["0.running_mean"][view])
        assert torch.equal(model[0].running_var[view], before["0.running_var"][view])


def test_a_later_layer_is_given_what_the_earlier_ones_normalised_by_the_batch() -> None:
    first, second = nn.BatchNorm2d(WIDTH).double(), nn.BatchNorm2d(WIDTH).double()
    with torch.no_grad():
        first.weight.copy_(values(WIDTH, seed=1))
        first.bias.copy_(values(WIDTH, seed=2))
    model = nn.Sequential(first, nn.ReLU(), nn.Dropout(0.5), second)
    use_view_statistics(model, 2)
    batches = [values(n, WIDTH, 3, 2, seed=n) for n in (6, 4)]
    estimate_statistics(model, batches, 1)
    given = []
    for batch in batches:
        x = batch.numpy()
        given.append(np.maximum(normalised(x, x.mean((0, 2, 3)), x.var((0, 2, 3)), first), 0))
    pooled = np.concatenate(given).transpose(1, 0, 2, 3).reshape(WIDTH, -1)
    np.testing.assert_allclose(model[3].running_mean[1], pooled.mean(1), rtol=1e-9)
    np.testing.assert_allclose(model[3].running_var[1], pooled.var(1, ddof=1), rtol=1e-9)


def test_estimating_leaves_weights_and_mode_as_they_are() -> None:
    model = network()
    use_view_statistics(model, 2)
    before = copy.deepcopy(model.state_dict())
    estimate_statistics(model, [IMAGES, IMAGES[:4]], 1)
    for name, value in model.state_dict().items():
        if "running" in name:
            assert torch.equal(value[0], before[name][0]), name
            assert not torch.equal(value[1], before[name][1]), name
        elif "num_batches" not in name:
            assert torch.equal(value, before[name]), name
    assert not any(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
