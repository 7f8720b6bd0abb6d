"""Networks as a user would give them, `python:outside_networks:FUNCTION`."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tmkd_ray.models import ImageClassifier, build_model
from tmkd_ray.types import ModelOutput, TaskSpec


class Plain(nn.Module):
    """Convolution, batch norm, pooling, linear; returns logits."""

    def __init__(self, num_classes: int, width: int = 6) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, stride=2)
        self.bn = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, num_classes)

    def pooled(self, images_BCHW: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(images_BCHW))).mean((2, 3))

    def forward(self, images_BCHW: Tensor) -> Tensor | ModelOutput | tuple[Tensor, ...]:
        return self.fc(self.pooled(images_BCHW))


class Telling(Plain):
    """Returns a ModelOutput without being an ImageClassifier."""

    def forward(self, images_BCHW: Tensor) -> ModelOutput:
        feature = self.pooled(images_BCHW)
        return ModelOutput(self.fc(feature), feature)


class Paired(Plain):
    """What an exported program must return."""

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, ...]:
        feature = self.pooled(images_BCHW)
        return self.fc(feature), feature


class Scaled(Plain):
    """Its logits are not its last layer's alone."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return 2 * self.fc(self.pooled(images_BCHW))


class Unused(Plain):
    """Its last linear layer takes no part."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.spare = nn.Linear(6, num_classes)


def seeded(kind: type[Plain], task: TaskSpec) -> Plain:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        network = kind(task.num_classes)
        network(torch.randn(8, 3, task.image_size, task.image_size))  # statistics of its own
        return network


def plain(task: TaskSpec) -> nn.Module:
    return seeded(Plain, task)


def telling(task: TaskSpec) -> nn.Module:
    return seeded(Telling, task)


def ours(task: TaskSpec) -> ImageClassifier:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return build_model("resnet8", task)


def scaled(task: TaskSpec) -> nn.Module:
    return seeded(Scaled, task)


def unused(task: TaskSpec) -> nn.Module:
    return seeded(Unused, task)


def pair(task: TaskSpec) -> nn.Module:
    return seeded(Paired, task)


def headless(task: TaskSpec) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, task.num_classes, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def other_classes(task: TaskSpec) -> nn.Module:
    return Plain(task.num_classes + 1)


def other_size(task: TaskSpec) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(7, task.num_classes))


def failing(task: TaskSpec) -> nn.Module:
    raise KeyError("no such weights")


def no_network(task: TaskSpec) -> dict[str, Tensor]:
    return {}


not_callable = 3
