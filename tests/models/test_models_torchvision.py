"""torchvision's classifiers as students and visual teachers."""

import pickle
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch
import torchvision
from torchvision.models import regnet

from tmkd_ray.errors import UserError
from tmkd_ray.models import build_model, count_parameters, load_checkpoint, model_names, torchvision_models
from tmkd_ray.models.wrapped import try_out
from tmkd_ray.types import ModelOutput, TaskSpec

NAMES = [name for name in model_names() if name.startswith("torchvision/")]

# The smallest of each family that takes small images, at about the smallest it can take.
FAMILIES = {
    "alexnet": 64,
    "convnext_tiny": 32,
    "densenet121": 32,
    "efficientnet_b0": 32,
    "googlenet": 32,
    "inception_v3": 80,
    "mnasnet0_5": 32,
    "mobilenet_v2": 32,
    "mobilenet_v3_small": 32,
    "regnet_y_400mf": 32,
    "resnet18": 32,
    "shufflenet_v2_x0_5": 32,
    "squeezenet1_1": 32,
    "swin_t": 32,
    "vgg11_bn": 32,
    "vit_b_32": 64,
}


def task(num_classes: int, image_size: int) -> TaskSpec:
    return TaskSpec(tuple(f"class {index}" for index in range(num_classes)), image_size)


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name: str) -> None:
    torch.manual_seed(0)
    model = build_model(f"torchvision/{name}", task(5, FAMILIES[name]))
    assert model.training
    images = torch.randn(2, 3, FAMILIES[name], FAMILIES[name])

    output = model(images)
    # DDP waits for ever for a parameter without gradient: this raises if there is one.
    torch.autograd.grad(output.logits.sum(), list(model.parameters()))
    assert output.logits.shape == (2, 5)
    assert output.feature.shape == (2, model.feature_width)

    model.eval()
    with torch.no_grad():
        output = model(images)
        torch.testing.assert_close(model.inner(images), output.logits)
        if not name.startswith("squeezenet"):
            torch.testing.assert_close(model.head(output.feature), output.logits)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_builds_with_the_published_number_of_parameters(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # RegNet computes its widths with tensors, which must have values, also when building on no device at all.
    widths = regnet.BlockParams.from_init_params.__func__

    def widths_on_cpu(*args: Any, **kwargs: Any) -> Any:
        with torch.device("cpu"):
            return widths(*args, **kwargs)

    outputs = []

    def recorded_try_out(*args: Any) -> ModelOutput:
        outputs.append(try_out(*args))
        return outputs[0]

    monkeypatch.setattr(regnet.BlockParams, "from_init_params", classmethod(widths_on_cpu))
    monkeypatch.setattr(torchvision_models, "try_out", recorded_try_out)
    with torch.device("meta"):
        model = build_model(name, task(1000, 224))
    (output,) = outputs
    short_name = name.removeprefix("torchvision/")
    # Inception's published number counts the auxiliary classifier.
    auxiliary = 3_326_696 if short_name == "inception_v3" else 0
    published = {weights.meta["num_params"] for weights in torchvision.models.get_model_weights(short_name)}
    assert count_parameters(model) + auxiliary in published
    assert output.feature.shape == (1, model.feature_width)

    sizes = [feature_map.shape[2] for feature_map in output.feature_maps]
    three = ("alexnet", "shufflenet")
    assert len(sizes) == (0 if short_name.startswith("vit_") else 3 if short_name.startswith(three) else 4)
    assert sizes == sorted(set(sizes), reverse=True), "one map per resolution, channels first"


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", "mobilenet_v3_small"])
def test_pickles_after_a_forward_pass(name: str) -> None:
    model = build_model(f"torchvision/{name}", task(3, 32))
    images = torch.randn(2, 3, 32, 32)
    model(images)
    model.eval()
    output = model(images)
    for copy in (pickle.loads(pickle.dumps(model)), pickle.loads(cloudpickle.dumps(model)), deepcopy(model)):
        copied = copy(images)
        torch.testing.assert_close(output.logits, copied.logits)
        torch.testing.assert_close(output.feature, copied.feature)
        assert len(copied.feature_maps) == 4
        torch.testing.assert_close(output.feature_maps, copied.feature_maps)
        torch.testing.assert_close(output.preactivation_maps, copied.preactivation_maps)


def test_maps_of_a_resnet_are_its_stages() -> None:
    model = build_model("torchvision/resnet18", task(3, 64)).eval()
    images = torch.randn(2, 3, 64, 64)
    resnet = model.inner
    with torch.no_grad():
        x = resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1(images))))
        expected = [x := layer(x) for layer in (resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4)]
        maps = model(images).feature_maps
    assert len(maps) == 4
    torch.testing.assert_close(maps, tuple(expected))


def relu_ends_each_stage(name: str) -> bool:
    return name.startswith(("resnet", "resnext", "wide_resnet", "vgg", "alexnet"))


@pytest.mark.parametrize("name", FAMILIES)
def test_preactivations_are_what_the_last_relu_of_a_stage_is_given(name: str) -> None:
    torch.manual_seed(0)
    model = build_model(f"torchvision/{name}", task(3, FAMILIES[name])).eval()
    images = torch.randn(2, 3, FAMILIES[name], FAMILIES[name])
    with torch.no_grad():
        output = model(images)
    if relu_ends_each_stage(name):
        assert all((value < 0).any() for value in output.preactivation_maps)
        relu = tuple(value.relu() for value in output.preactivation_maps)
        torch.testing.assert_close(relu, output.feature_maps)
    elif name.startswith(("mobilenet", "mnasnet")):
        torch.testing.assert_close(output.preactivation_maps, output.feature_maps)
        assert all((value < 0).any() for value in output.preactivation_maps)
    else:
        assert output.preactivation_maps == ()


@pytest.mark.parametrize("name", ["resnet50", "wide_resnet50_2", "resnext50_32x4d", "vgg16", "vgg11_bn"])
def test_preactivations_of_larger_relatives(name: str) -> None:
    with torch.device("meta"):
        model = build_model(f"torchvision/{name}", task(3, 64))
        output = model(torch.empty(2, 3, 64, 64))
    assert [v.shape for v in output.preactivation_maps] == [v.shape for v in output.feature_maps]
    assert len(output.preactivation_maps) == 4


def test_preactivations_of_a_resnet_are_its_last_sums() -> None:
    """And outputs and gradients are torchvision's own, although the last ReLUs are not in place."""
    torch.manual_seed(0)
    model = build_model("torchvision/resnet18", task(3, 64))
    plain = torchvision.models.resnet18(num_classes=3)
    plain.load_state_dict(model.inner.state_dict())
    images = torch.randn(2, 3, 64, 64)
    output, expected = model(images), plain(images)
    assert torch.equal(output.logits, expected)
    output.logits.sum().backward()
    expected.sum().backward()
    for (name, parameter), same in zip(model.inner.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(parameter.grad, same.grad), name
    model.eval()
    with torch.no_grad():
        output = model(images)
        block = model.inner.layer2[1]
        x = model.inner.layer2[0](output.feature_maps[0])
        last_sum = block.bn2(block.conv2(block.bn1(block.conv1(x)).relu())) + x
    torch.testing.assert_close(output.preactivation_maps[1], last_sum)


def test_map_shapes() -> None:
    assert build_model("torchvision/resnet18", task(3, 64)).map_shapes(64) == (
        (64, 16, 16),
        (128, 8, 8),
        (256, 4, 4),
        (512, 2, 2),
    )
    assert build_model("torchvision/swin_t", task(3, 64)).map_shapes(64)[0] == (96, 16, 16)
    assert build_model("torchvision/vit_b_32", task(3, 64)).map_shapes(64) == ()
    assert len(build_model("torchvision/squeezenet1_1", task(3, 32)).map_shapes(32)) == 4


def test_swin_maps_have_channels_first() -> None:
    maps = build_model("torchvision/swin_t", task(3, 64))(torch.randn(1, 3, 64, 64)).feature_maps
    assert [tuple(m.shape[1:]) for m in maps] == [(96, 16, 16), (192, 8, 8), (384, 4, 4), (768, 2, 2)]


def test_using_the_head_alone_leaves_no_trace() -> None:
    model = build_model("torchvision/resnet18", task(3, 32))
    size = len(pickle.dumps(model))
    model.head(torch.randn(1000, 512, requires_grad=True))
    assert len(pickle.dumps(model)) == size


def test_compiles_without_a_graph_break() -> None:
    model = build_model("torchvision/resnet18", task(3, 32)).eval()
    images = torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        expected, output = model(images), compiled(images)
    torch.testing.assert_close(output.logits, expected.logits)
    torch.testing.assert_close(output.feature, expected.feature)
    assert len(output.feature_maps) == 4
    torch.testing.assert_close(output.preactivation_maps, expected.preactivation_maps)


def test_building_draws_the_weights_torchvision_draws() -> None:
    torch.manual_seed(0)
    model = build_model("torchvision/resnet18", task(3, 32))
    after = torch.rand(1)
    torch.manual_seed(0)
    plain = torchvision.models.resnet18(num_classes=3)
    assert torch.equal(after, torch.rand(1))
    assert all(
        torch.equal(model.inner.state_dict()[name], tensor) for name, tensor in plain.state_dict().items()
    )
    # The trial run at building time must not count as training.
    assert model.inner.bn1.num_batches_tracked == 0


def test_squeezenet_cannot_be_a_teacher() -> None:
    model = build_model("torchvision/squeezenet1_1", task(3, 32))
    with pytest.raises(UserError, match="no linear classifier"):
        _ = model.head
    assert model.feature_width == 512


@pytest.mark.parametrize(("name", "image_size"), [("alexnet", 32), ("vit_b_32", 40), ("maxvit_t", 32)])
def test_image_size_that_does_not_suit(name: str, image_size: int) -> None:
    with pytest.raises(UserError, match=rf"torchvision/{name} cannot take images of {image_size}×{image_size}"):
        build_model(f"torchvision/{name}", task(3, image_size))


@pytest.mark.parametrize("name", ["resnet18", "mnasnet0_5", "googlenet", "densenet121"])
def test_loads_torchvisions_own_state_dict(name: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of how GoogLeNet is initialised
        plain = torchvision.models.get_model(name, weights=None, num_classes=5)
    for buffer_name, buffer in plain.named_buffers():
        if buffer_name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
    state = plain.state_dict()
    if name == "densenet121":  # its published file has the names of an older torchvision
        for layer in [n for n in state if "denselayer" in n]:
            state[layer.replace("norm1", "norm.1").replace("conv2", "conv.2")] = state.pop(layer)
    torch.save(state, tmp_path / "weights.pth")

    model = build_model(f"torchvision/{name}", task(5, 32)).eval()
    load_checkpoint(model, str(tmp_path / "weights.pth"))
    plain.eval()
    if name == "googlenet":
        plain.transform_input = True  # as torchvision does when it loads its own weights
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(images).logits, plain(images))
