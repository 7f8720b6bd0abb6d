"""Every entry of the model registry: the CIFAR networks."""

import pickle

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from tmkd_ray.errors import UserError
from tmkd_ray.models import MODELS, ImageClassifier, build_model, count_parameters
from tmkd_ray.models.cifar_layers import channel_shuffle
from tmkd_ray.models.cifar_mobilenet_v2 import CifarMobileNetV2
from tmkd_ray.models.cifar_wrn import WideResNet
from tmkd_ray.types import TaskSpec

NAMES = MODELS.names()

# Millions of parameters for 100 classes, as papers of the field quote them (cut, not rounded, for resnet110).
QUOTED_MILLIONS = {
    "resnet8": 0.08,
    "resnet20": 0.28,
    "resnet32": 0.47,
    "resnet56": 0.86,
    "resnet110": 1.73,
    "resnet8x4": 1.23,
    "resnet32x4": 7.43,
    "wrn_16_1": 0.18,
    "wrn_16_2": 0.70,
    "wrn_40_1": 0.57,
    "wrn_40_2": 2.26,
    "vgg8": 3.97,
    "vgg13": 9.46,
    "ShuffleV1": 0.95,
    "ShuffleV2": 1.36,
    "MobileNetV2": 0.81,
    "ResNet50": 23.71,
    "MobileNetV1": 3.31,  # 4.23 for ImageNet's 1000 classes
}

# Some tensors of the field's published checkpoints for 100 classes, and how many there are in all.
PUBLISHED_TENSORS: dict[str, tuple[int, dict[str, list[int]]]] = {
    "resnet8x4": (
        62,
        {
            "conv1.weight": [32, 3, 3, 3],
            "layer1.0.downsample.0.weight": [64, 32, 1, 1],
            "layer3.0.downsample.1.running_var": [256],
            "fc.weight": [100, 256],
        },
    ),
    "wrn_40_2": (
        227,
        {
            "block1.layer.0.convShortcut.weight": [32, 16, 1, 1],
            "block3.layer.5.conv2.weight": [128, 128, 3, 3],
            "block2.layer.0.bn1.weight": [32],
            "bn1.bias": [128],
            "fc.bias": [100],
        },
    ),
    "vgg13": (
        72,
        {
            "block0.0.bias": [64],
            "block0.3.weight": [64, 64, 3, 3],
            "block4.4.running_mean": [512],
            "classifier.weight": [100, 512],
        },
    ),
    "ShuffleV1": (
        296,
        {
            "layer1.0.conv1.weight": [54, 24, 1, 1],
            "layer2.0.conv3.weight": [240, 20, 1, 1],
            "linear.weight": [100, 960],
        },
    ),
    "ShuffleV2": (
        338,
        {
            "layer1.0.conv5.weight": [58, 58, 1, 1],
            "layer2.7.bn3.weight": [116],
            "conv2.weight": [1024, 464, 1, 1],
            "linear.bias": [100],
        },
    ),
    "MobileNetV2": (
        320,
        {
            "conv1.0.weight": [16, 3, 3, 3],
            "blocks.0.0.conv.0.weight": [16, 16, 1, 1],
            "blocks.6.0.conv.7.weight": [160],
            "conv2.1.bias": [1280],
            "classifier.0.weight": [100, 1280],
        },
    ),
    "ResNet50": (
        320,
        {
            "layer1.0.shortcut.0.weight": [256, 64, 1, 1],
            "layer4.2.bn3.running_mean": [2048],
            "linear.weight": [100, 2048],
        },
    ),
    "MobileNetV1": (
        164,
        {
            "model.0.0.weight": [32, 3, 3, 3],
            "model.6.0.weight": [256, 1, 3, 3],
            "model.6.3.weight": [512, 256, 1, 1],
            "model.13.4.running_var": [1024],
            "fc.weight": [100, 1024],
        },
    ),
}


def task(num_classes: int = 100, image_size: int = 32) -> TaskSpec:
    return TaskSpec(tuple(f"class {index}" for index in range(num_classes)), image_size)


def build(name: str, num_classes: int = 10, image_size: int = 32) -> ImageClassifier:
    torch.manual_seed(0)
    return build_model(name, task(num_classes, image_size))


def randomise_batch_norms(model: ImageClassifier) -> None:
    """Give the batch norms statistics and scales as if they had been trained."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.5)
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.5)


@pytest.fixture(params=NAMES, scope="module")
def model(request: pytest.FixtureRequest) -> ImageClassifier:
    """Each network once, in evaluation mode, as if it had been trained."""
    model = build(request.param)
    randomise_batch_norms(model)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1
    with torch.no_grad():
        model(torch.randn(8, 3, 16, 16))  # statistics that fit, or the signal would die on its way through
    return model.eval()


def test_head_of_feature_is_logits(model: ImageClassifier) -> None:
    with torch.no_grad():
        output = model(torch.randn(3, 3, 16, 16))
        torch.testing.assert_close(model.head(output.feature), output.logits)
    assert output.logits.std(dim=0).min() > 1e-3, "the logits do not depend on the image"


def test_evaluation_is_deterministic_also_after_pickling(model: ImageClassifier) -> None:
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        logits = model(images).logits
        torch.testing.assert_close(model(images).logits, logits)
        torch.testing.assert_close(pickle.loads(pickle.dumps(model))(images).logits, logits)


def test_gradient_reaches_every_parameter(model: ImageClassifier) -> None:
    # In evaluation mode, as in training batch norm cancels the gradient of a bias before it.
    parameters = dict(model.named_parameters())
    loss = model(torch.randn(2, 3, 8, 8)).logits.square().sum()
    for name, gradient in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
        assert gradient.isfinite().all(), name
        assert gradient.any(), name


@pytest.mark.parametrize("image_size", [8, 24, 32, 64])
@pytest.mark.parametrize("name", NAMES)
def test_shapes(name: str, image_size: int) -> None:
    with torch.device("meta"):
        model = build(name, num_classes=7, image_size=image_size)
        output = model(torch.empty(2, 3, image_size, image_size))
    assert output.logits.shape == (2, 7)
    assert output.feature.shape == (2, model.feature_width)
    assert all(m.ndim == 4 and m.shape[0] == 2 and m.shape[2] == m.shape[3] for m in output.feature_maps)
    sizes = [feature_map.shape[2] for feature_map in output.feature_maps]
    assert sizes == sorted(sizes, reverse=True)
    if image_size == 32:
        full = 32 if name.lower().startswith(("resnet", "wrn")) else 8 if name == "MobileNetV1" else 16
        expected = [full, full // 2, full // 4, full // 4 if name.startswith("vgg") else full // 8]
        assert sizes == expected[: 4 if name.startswith(("vgg", "Mobile", "ResNet")) else 3]


def test_preactivations_are_what_the_last_relu_of_a_stage_is_given(model: ImageClassifier) -> None:
    with torch.no_grad():
        output = model(torch.randn(2, 3, 16, 16))
    maps, before = output.feature_maps, output.preactivation_maps
    assert [value.shape for value in before] == [value.shape for value in maps]
    assert all((value < 0).any() for value in before), "nothing has cut them yet"
    if isinstance(model, WideResNet):  # the ReLU, and the normalisation before it, belong to the next stage
        norms = (model.block2.layer[0].bn1, model.block3.layer[0].bn1, model.bn1)
        maps = tuple(norm(value).relu() for norm, value in zip(norms, maps, strict=True))
        torch.testing.assert_close(maps[-1].mean((2, 3)), output.feature)
    if not isinstance(model, CifarMobileNetV2):  # no ReLU at the end of a stage
        before = tuple(value.relu() for value in before)
    torch.testing.assert_close(before, maps)


def test_a_gradient_flows_back_from_the_preactivations(model: ImageClassifier) -> None:
    output = model(torch.randn(2, 3, 16, 16))
    first = next(model.parameters())
    for value in output.preactivation_maps:
        (gradient,) = torch.autograd.grad(value.square().sum(), first, retain_graph=True)
        assert gradient.any()


@pytest.mark.parametrize("image_size", [8, 24, 32])
@pytest.mark.parametrize("name", ["resnet8x4", "wrn_16_2", "vgg8", "ShuffleV2", "MobileNetV2"])
def test_map_shapes_are_those_of_a_forward_pass(name: str, image_size: int) -> None:
    model = build(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    shapes = model.map_shapes(image_size)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    output = model(torch.randn(2, 3, image_size, image_size))
    assert shapes == tuple(tuple(value.shape[1:]) for value in output.feature_maps)
    assert model.eval().map_shapes(image_size) == shapes
    assert not model.training


def test_vgg_refuses_images_that_it_would_pool_away() -> None:
    with pytest.raises(UserError, match="8 pixels or more, not 7"):
        build("vgg8", image_size=7)


@pytest.mark.parametrize("name", QUOTED_MILLIONS)
def test_number_of_parameters_is_the_one_the_field_quotes(name: str) -> None:
    with torch.device("meta"):
        model = build(name, 100)
    assert count_parameters(model) / 1e6 == pytest.approx(QUOTED_MILLIONS[name], abs=0.007)


@pytest.mark.parametrize("name", PUBLISHED_TENSORS)
def test_tensors_have_the_published_names_and_shapes(name: str) -> None:
    number, tensors = PUBLISHED_TENSORS[name]
    with torch.device("meta"):
        state = build(name, 100).state_dict()
    assert {key: list(state[key].shape) for key in tensors} == tensors
    assert len(state) == number


@pytest.mark.parametrize("name", ["resnet8", "vgg8"])
def test_compiles_without_a_graph_break(name: str) -> None:
    model = build(name).eval()
    images = torch.randn(2, 3, 16, 16)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images).logits, model(images).logits)


def test_channel_shuffle_interleaves_the_groups() -> None:
    maps = torch.arange(6.0).reshape(1, 6, 1, 1)
    assert channel_shuffle(maps, 3).flatten().tolist() == [0, 2, 4, 1, 3, 5]


# --- logits from an independent formula, in NumPy and float64 ---


def conv(x_CHW: np.ndarray, weight: Tensor, stride: int = 1) -> np.ndarray:
    w = weight.double().numpy()
    padding = w.shape[2] // 2
    padded = np.pad(x_CHW, ((0, 0), (padding, padding), (padding, padding)))
    windows = sliding_window_view(padded, w.shape[2:], axis=(1, 2))[:, ::stride, ::stride]
    return np.einsum("ihwab,oiab->ohw", windows, w)


def norm(x_CHW: np.ndarray, state: dict[str, Tensor], name: str) -> np.ndarray:
    mean, var, scale, shift = (
        state[f"{name}.{part}"].double().numpy()[:, None, None]
        for part in ("running_mean", "running_var", "weight", "bias")
    )
    return (x_CHW - mean) / np.sqrt(var + 1e-5) * scale + shift


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


def linear_of_mean(x_CHW: np.ndarray, state: dict[str, Tensor]) -> np.ndarray:
    return state["fc.weight"].double().numpy() @ x_CHW.mean((1, 2)) + state["fc.bias"].double().numpy()


def resnet8(x: np.ndarray, s: dict[str, Tensor]) -> np.ndarray:
    x = relu(norm(conv(x, s["conv1.weight"]), s, "bn1"))
    for layer, stride in (("layer1.0", 1), ("layer2.0", 2), ("layer3.0", 2)):
        shortcut = x
        if f"{layer}.downsample.0.weight" in s:
            shortcut = norm(conv(x, s[f"{layer}.downsample.0.weight"], stride), s, f"{layer}.downsample.1")
        x = relu(norm(conv(x, s[f"{layer}.conv1.weight"], stride), s, f"{layer}.bn1"))
        x = relu(norm(conv(x, s[f"{layer}.conv2.weight"]), s, f"{layer}.bn2") + shortcut)
    return linear_of_mean(x, s)


def wrn_16_1(x: np.ndarray, s: dict[str, Tensor]) -> np.ndarray:
    x = conv(x, s["conv1.weight"])
    for block in ("block1", "block2", "block3"):
        for index in (0, 1):
            layer = f"{block}.layer.{index}"
            stride = 2 if index == 0 and block != "block1" else 1
            active = relu(norm(x, s, f"{layer}.bn1"))
            out = relu(norm(conv(active, s[f"{layer}.conv1.weight"], stride), s, f"{layer}.bn2"))
            if f"{layer}.convShortcut.weight" in s:
                x = conv(active, s[f"{layer}.convShortcut.weight"], stride)
            x = x + conv(out, s[f"{layer}.conv2.weight"])
    return linear_of_mean(relu(norm(x, s, "bn1")), s)


@pytest.mark.parametrize(("name", "formula"), [("resnet8", resnet8), ("wrn_16_1", wrn_16_1)])
def test_logits_are_those_of_the_formula(name: str, formula: object) -> None:
    model = build(name).double().eval()
    randomise_batch_norms(model)
    image = torch.randn(3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        logits = model(image[None]).logits[0].numpy()
    np.testing.assert_allclose(logits, formula(image.numpy(), model.state_dict()), rtol=1e-9)
