"""ImageNet's ResNet-18 and -50 (He et al., arXiv 1512.03385, table 1) for CIFAR.

The stem is a 3×3 convolution of stride 1, without max pooling.
Named `ResNet18`, `ResNet50` by mdistiller (`resnet20` and its like are CIFAR's own ResNets).
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


class CifarImageNetResNet(ImageClassifier):
    """Four stages, at full to eighth resolution.

    Args:
        block: `BasicBlock` or `Bottleneck`.
        blocks: number of blocks of each stage.
    """

    def __init__(
        self, block: "type[BasicBlock | Bottleneck]", blocks: tuple[int, int, int, int], num_classes: int
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(3, 64)
        self.bn1 = nn.BatchNorm2d(64)
        width = 64 * block.expansion
        self.layer1 = _stage(block, 64, 64, blocks[0], stride=1)
        self.layer2 = _stage(block, width, 128, blocks[1], stride=2)
        self.layer3 = _stage(block, 2 * width, 256, blocks[2], stride=2)
        self.layer4 = _stage(block, 4 * width, 512, blocks[3], stride=2)
        self.linear = nn.Linear(8 * width, num_classes)
        initialise_convolutions(self)

    @property
    def head(self) -> nn.Linear:
        return self.linear

    def forward(self, images_BCHW: Tensor) -> ModelOutput:
        x = F.relu(self.bn1(self.conv1(images_BCHW)), inplace=True)
        # Not in place, for what a stage ends with is handed out before its ReLU too.
        map1 = F.relu(pre1 := self.layer1(x))
        map2 = F.relu(pre2 := self.layer2(map1))
        map3 = F.relu(pre3 := self.layer3(map2))
        map4 = F.relu(pre4 := self.layer4(map3))
        feature_BS = global_average_pool(map4)
        maps, preactivations = (map1, map2, map3, map4), (pre1, pre2, pre3, pre4)
        return ModelOutput(self.linear(feature_BS), feature_BS, maps, preactivations)

    def adapt_checkpoint(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        # Some published variants kept the convolutions' default bias.
        return fold_convolution_biases(
            state, {"conv1": "bn1", "conv2": "bn2", "conv3": "bn3", "shortcut.0": "shortcut.1"}
        )


def _shortcut(in_width: int, out_width: int, stride: int) -> nn.Sequential:
    if stride == 1 and in_width == out_width:
        return nn.Sequential()
    return nn.Sequential(conv1x1(in_width, out_width, stride), nn.BatchNorm2d(out_width))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions (figure 5, left)."""

    expansion = 1

    def __init__(self, in_width: int, width: int, stride: int, is_last: bool) -> None:
        super().__init__()
        self.is_last = is_last
        self.conv1 = conv3x3(in_width, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = _shortcut(in_width, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out)) + self.shortcut(x)
        return out if self.is_last else F.relu(out, inplace=True)


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions (figure 5, right); the 3×3 one has the stride."""

    expansion = 4

    def __init__(self, in_width: int, width: int, stride: int, is_last: bool) -> None:
        super().__init__()
        self.is_last = is_last
        out_width = width * self.expansion
        self.conv1 = conv1x1(in_width, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv1x1(width, out_width)
        self.bn3 = nn.BatchNorm2d(out_width)
        self.shortcut = _shortcut(in_width, out_width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out)) + self.shortcut(x)
        return out if self.is_last else F.relu(out, inplace=True)


def _stage(
    block: type[BasicBlock | Bottleneck], in_width: int, width: int, blocks: int, stride: int
) -> nn.Sequential:
    """Return the blocks of a stage; the last ReLU is left to the network."""
    wide = width * block.expansion
    first = block(in_width, width, stride, is_last=blocks == 1)
    return nn.Sequential(first, *(block(wide, width, 1, is_last=i == blocks - 1) for i in range(1, blocks)))


@MODELS.register("ResNet18")
def _resnet18(task: TaskSpec) -> ImageClassifier:
    return CifarImageNetResNet(BasicBlock, (2, 2, 2, 2), task.num_classes)


@MODELS.register("ResNet50")
def _resnet50(task: TaskSpec) -> ImageClassifier:
    return CifarImageNetResNet(Bottleneck, (3, 4, 6, 3), task.num_classes)
