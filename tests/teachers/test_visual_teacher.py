"""The visual teacher: its features, its head, what it refuses."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tmkd_ray.errors import UserError
from tmkd_ray.models import ImageClassifier, build_model
from tmkd_ray.teachers import VisualTeacher
from tmkd_ray.types import ModelOutput, TaskSpec

TASK = TaskSpec(tuple("abcdefg"), 32)
MEAN, STD = (0.5, 0.45, 0.4), (0.2, 0.25, 0.3)
MODELS = ("resnet8", "wrn_16_1", "vgg8", "MobileNetV2", "ShuffleV1")


def build(name: str = "resnet8", seed: int = 0) -> ImageClassifier:
    torch.manual_seed(seed)
    model = build_model(name, TASK)
    model(torch.randn(8, 3, 32, 32))  # so that batch norm has statistics of its own
    return model


def pixels(count: int = 6) -> Tensor:
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8))


def normalised(images: Tensor) -> Tensor:
    values = (images.double().numpy() / 255 - MEAN) / STD
    return torch.from_numpy(values.transpose(0, 3, 1, 2)).float()


@pytest.mark.parametrize("name", MODELS)
def test_feature_and_head_are_the_models(name: str) -> None:
    """`head(feature)` is the model's logits: what is stored is all that teaching needs."""
    model = build(name)
    expected = copy.deepcopy(model).eval()(normalised(pixels()))
    teacher = VisualTeacher(model, MEAN, STD)
    feature = teacher(pixels())
    assert (feature.dtype, feature.shape) == (torch.float32, (6, teacher.feature_width))
    torch.testing.assert_close(feature, expected.feature, rtol=1e-4, atol=1e-5)
    logits = nn.functional.linear(feature, teacher.head_weight, teacher.head_bias)
    torch.testing.assert_close(logits, expected.logits, rtol=1e-4, atol=1e-4)
    assert teacher.head_weight.shape == (7, teacher.feature_width)


def test_it_is_frozen() -> None:
    """In evaluation mode, without gradients, and unmoved by what it sees."""
    teacher = VisualTeacher(build(), MEAN, STD)
    before = teacher.fingerprint()
    feature = teacher(pixels())
    assert not feature.requires_grad
    assert not teacher.head_weight.requires_grad
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not teacher.model.training
    assert teacher.fingerprint() == before
    assert torch.equal(teacher(pixels()[:1])[0], teacher(pixels()[:1])[0])
    torch.testing.assert_close(teacher(pixels()[:1])[0], feature[0])


class Headed(ImageClassifier):
    """A mean of the channels below a given head."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 7, bias=bias)

    @property
    def head(self) -> nn.Linear:
        return self.fc

    def forward(self, images_BCHW: Tensor) -> ModelOutput:
        feature = images_BCHW.mean(dim=(2, 3))
        return ModelOutput(self.fc(feature), feature)


def test_a_head_without_bias() -> None:
    teacher = VisualTeacher(Headed(bias=False), MEAN, STD)
    assert torch.equal(teacher.head_bias, torch.zeros(7))


def test_load(tmp_path: Path) -> None:
    model = build(seed=3)
    torch.save(model.state_dict(), tmp_path / "teacher.pth")
    teacher = VisualTeacher.load("resnet8", TASK, str(tmp_path / "teacher.pth"), MEAN, STD)
    expected = VisualTeacher(model, MEAN, STD)
    assert torch.equal(teacher(pixels()), expected(pixels()))
    assert teacher.fingerprint() == expected.fingerprint()
    assert torch.equal(teacher.head_weight, model.head.weight)
    with pytest.raises(UserError, match="7 classes, the task has 5"):
        VisualTeacher.load("resnet8", TaskSpec(tuple("abcde"), 32), str(tmp_path / "teacher.pth"), MEAN, STD)
    with pytest.raises(UserError, match="is not a file"):
        VisualTeacher.load("resnet8", TASK, str(tmp_path / "nothing.pth"), MEAN, STD)


def test_fingerprint_is_of_the_weights() -> None:
    fingerprint = VisualTeacher(build(), MEAN, STD).fingerprint()
    assert len(fingerprint) == 64
    assert VisualTeacher(build(), MEAN, STD).fingerprint() == fingerprint
    assert VisualTeacher(build(seed=1), MEAN, STD).fingerprint() != fingerprint
    for name in ("fc.bias", "bn1.running_mean", "layer3.0.conv2.weight"):
        model = build()
        value = model.state_dict()[name].view(-1)
        value[0] = value[0] * 1.5 + 1e-3
        assert VisualTeacher(model, MEAN, STD).fingerprint() != fingerprint


def test_state_of_memory_does_not_enter_the_fingerprint() -> None:
    """The same weights, laid out otherwise in memory, are the same teacher."""
    model = build().to(memory_format=torch.channels_last)
    assert VisualTeacher(model, MEAN, STD).fingerprint() == VisualTeacher(build(), MEAN, STD).fingerprint()
