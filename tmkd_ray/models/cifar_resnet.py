"""ResNets for CIFAR (He et al., arXiv 1512.03385, section 4.2), with the parameter names of the field.

`resnetN` has the paper's widths 16-16-32-64 (stem and three stages), `resnetNx4` 32-64-128-256.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from tmkd_ray.models import MODELS
from tmkd_ray.models.base import ImageClassifier
from tmkd_ray.models.cifar_layers import (
    conv1x1,
    conv3x3,
    fold_convolution_biases,
    global_average_pool,
    initialise_convolutions,
)
from tmkd_ray.types import ModelOutput, TaskSpec


class CifarResNet(ImageClassifier):
    """Three stages of basic blocks at full, half and quarter resolution.

    Args:
        depth: number of layers, 6n + 2.
        widths: channels of the stem and of each stage.
    """

    def __init__(self, depth: int, widths: tuple[int, int, int, int], num_classes: int) -> None:
        super().__init__()
        assert (depth - 2) % 6 == 0
        blocks = (depth - 2) // 6
        self.conv1 = conv3x3(3, widths[0])
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.layer1 = _stage(widths[0], widths[1], blocks, stride=1)
        self.layer2 = _stage(widths[1], widths[2], blocks, stride=2)
        self.layer3 = _stage(widths[2], widths[3], blocks, stride=2)
        self.fc = nn.Linear(widths[3], num_classes)
        initialise_convolutions(self)

    @property
    def head(self) -> nn.Linear:
        return self.fc

    def forward(self, images_BCHW: Tensor) -> ModelOutput:
        x = F.relu(self.bn1(self.conv1(images_BCHW)), inplace=True)
        # Not in place, for what a stage ends with is handed out before its ReLU too.
        map1 = F.relu(pre1 := self.layer1(x))
        map2 = F.relu(pre2 := self.layer2(map1))
        map3 = F.relu(pre3 := self.layer3(map2))
        feature_BS = global_average_pool(map3)
        return ModelOutput(self.fc(feature_BS), feature_BS, (map1, map2, map3), (pre1, pre2, pre3))

    def adapt_checkpoint(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        # Some published variants kept the convolutions' default bias.
        return fold_convolution_biases(state, {"conv1": "bn1", "conv2": "bn2", "downsample.0": "downsample.1"})


class _BasicBlock(nn.Module):
    def __init__(self, in_width: int, width: int, stride: int, is_last: bool) -> None:
        super().__init__()
        self.is_last = is_last
        self.conv1 = conv3x3(in_width, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = (
            nn.Sequential(conv1x1(in_width, width, stride), nn.BatchNorm2d(width))
            if stride != 1 or in_width != width
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out)) + shortcut
        return out if self.is_last else F.relu(out, inplace=True)


def _stage(in_width: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    """Return the blocks of a stage; the last ReLU is left to the network."""
    first = _BasicBlock(in_width, width, stride, is_last=blocks == 1)
    rest = (_BasicBlock(width, width, 1, is_last=index == blocks - 1) for index in range(1, blocks))
    return nn.Sequential(first, *rest)


def _register(name: str, depth: int, widths: tuple[int, int, int, int]) -> None:
    @MODELS.register(name)
    def build(task: TaskSpec) -> ImageClassifier:
        return CifarResNet(depth, widths, task.num_classes)


for _depth in (8, 14, 20, 32, 44, 56, 110):
    _register(f"resnet{_depth}", _depth, (16, 16, 32, 64))
for _depth in (8, 32):
    _register(f"resnet{_depth}x4", _depth, (32, 64, 128, 256))
