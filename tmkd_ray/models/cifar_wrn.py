"""Wide ResNets (Zagoruyko and Komodakis, arXiv 1605.07146), no dropout, with the field's parameter names."""

import torch.nn.functional as F
from torch import Tensor, nn

from tmkd_ray.models import MODELS
from tmkd_ray.models.base import ImageClassifier
from tmkd_ray.models.cifar_layers import conv1x1, conv3x3, global_average_pool, initialise_convolutions
from tmkd_ray.types import ModelOutput, TaskSpec


class WideResNet(ImageClassifier):
    """Three stages of pre-activation blocks at full, half and quarter resolution.

    Args:
        depth: number of layers, 6n + 4.
        widen_factor: the stages are 16, 32 and 64 times this wide.
    """

    def __init__(self, depth: int, widen_factor: int, num_classes: int) -> None:
        super().__init__()
        assert (depth - 4) % 6 == 0
        blocks = (depth - 4) // 6
        width = 16 * widen_factor
        self.conv1 = conv3x3(3, 16)
        self.block1 = _Stage(16, width, blocks, stride=1)
        self.block2 = _Stage(width, 2 * width, blocks, stride=2)
        self.block3 = _Stage(2 * width, 4 * width, blocks, stride=2)
        self.bn1 = nn.BatchNorm2d(4 * width)
        self.fc = nn.Linear(4 * width, num_classes)
        initialise_convolutions(self)
        nn.init.zeros_(self.fc.bias)

    @property
    def head(self) -> nn.Linear:
        return self.fc

    def forward(self, images_BCHW: Tensor) -> ModelOutput:
        map1, _ = self.block1(self.conv1(images_BCHW))
        map2, pre1 = self.block2(map1)
        map3, pre2 = self.block3(map2)
        pre3 = self.bn1(map3)
        feature_BS = global_average_pool(F.relu(pre3))
        return ModelOutput(self.fc(feature_BS), feature_BS, (map1, map2, map3), (pre1, pre2, pre3))


class _Block(nn.Module):
    def __init__(self, in_width: int, width: int, stride: int, is_first: bool = False) -> None:
        super().__init__()
        self.is_first = is_first
        self.bn1 = nn.BatchNorm2d(in_width)
        self.conv1 = conv3x3(in_width, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width)
        self.convShortcut = None if in_width == width else conv1x1(in_width, width, stride)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the block's output, and what its first ReLU was given."""
        normalized = self.bn1(x)
        activated = F.relu(normalized, inplace=not self.is_first)
        shortcut = x if self.convShortcut is None else self.convShortcut(activated)
        out: Tensor = self.conv2(F.relu(self.bn2(self.conv1(activated)), inplace=True))
        return out + shortcut, normalized


class _Stage(nn.Module):
    def __init__(self, in_width: int, width: int, blocks: int, stride: int) -> None:
        super().__init__()
        first = _Block(in_width, width, stride, is_first=True)
        self.layer = nn.ModuleList([first, *(_Block(width, width, 1) for _ in range(blocks - 1))])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the stage's output, and what the first ReLU in it was given."""
        x, normalized = self.layer[0](x)
        for block in self.layer[1:]:
            x, _ = block(x)
        return x, normalized


def _register(depth: int, widen_factor: int) -> None:
    @MODELS.register(f"wrn_{depth}_{widen_factor}")
    def build(task: TaskSpec) -> ImageClassifier:
        return WideResNet(depth, widen_factor, task.num_classes)


for _depth in (16, 40):
    for _widen_factor in (1, 2):
        _register(_depth, _widen_factor)
