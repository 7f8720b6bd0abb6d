"""ShuffleNet (Zhang et al., arXiv 1707.01083, table 1, 3 groups) for CIFAR, with the field's parameter names.

The stem is a 1×1 convolution of stride 1, without max pooling.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tmkd_ray.models import MODELS
from tmkd_ray.models.base import ImageClassifier
from tmkd_ray.models.cifar_layers import channel_shuffle, conv1x1, conv3x3, global_average_pool
from tmkd_ray.types import ModelOutput, TaskSpec

_GROUPS = 3
_STEM_WIDTH = 24


class CifarShuffleNetV1(ImageClassifier):
    """Three stages at half, quarter and eighth resolution, 240, 480 and 960 wide."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = conv1x1(3, _STEM_WIDTH)
        self.bn1 = nn.BatchNorm2d(_STEM_WIDTH)
        self.layer1 = _stage(_STEM_WIDTH, 240, blocks=4)
        self.layer2 = _stage(240, 480, blocks=8)
        self.layer3 = _stage(480, 960, blocks=4)
        self.linear = nn.Linear(960, num_classes)

    @property
    def head(self) -> nn.Linear:
        return self.linear

    def forward(self, images_BCHW: Tensor) -> ModelOutput:
        x = F.relu(self.bn1(self.conv1(images_BCHW)), inplace=True)
        # Not in place, for what a stage ends with is handed out before its ReLU too.
        map1 = F.relu(pre1 := self.layer1(x))
        map2 = F.relu(pre2 := self.layer2(map1))
        map3 = F.relu(pre3 := self.layer3(map2))
        feature_BS = global_average_pool(map3)
        return ModelOutput(self.linear(feature_BS), feature_BS, (map1, map2, map3), (pre1, pre2, pre3))


class _Unit(nn.Module):
    """The paper's figure 2 (b), or with stride 2 its figure 2 (c): the pooled input is concatenated."""

    def __init__(self, in_width: int, out_width: int, stride: int, is_last: bool = False) -> None:
        super().__init__()
        self.stride = stride
        self.is_last = is_last
        computed = out_width - in_width if stride == 2 else out_width
        mid = computed // 4
        # The paper does not group the first convolution of all: its input is too narrow.
        self.groups = 1 if in_width == _STEM_WIDTH else _GROUPS
        self.conv1 = conv1x1(in_width, mid, groups=self.groups)
        self.bn1 = nn.BatchNorm2d(mid)
        self.conv2 = conv3x3(mid, mid, stride, groups=mid)
        self.bn2 = nn.BatchNorm2d(mid)
        self.conv3 = conv1x1(mid, computed, groups=_GROUPS)
        self.bn3 = nn.BatchNorm2d(computed)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = channel_shuffle(out, self.groups)
        # The field has a ReLU after the depthwise convolution; the paper has none.
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        out = torch.cat([out, F.avg_pool2d(x, 3, stride=2, padding=1)], 1) if self.stride == 2 else out + x
        return out if self.is_last else F.relu(out, inplace=True)


def _stage(in_width: int, width: int, blocks: int) -> nn.Sequential:
    """Return the units of a stage; the last ReLU is left to the network."""
    rest = (_Unit(width, width, 1, is_last=index == blocks - 1) for index in range(1, blocks))
    return nn.Sequential(_Unit(in_width, width, 2), *rest)


@MODELS.register("ShuffleV1")
def _shuffle_v1(task: TaskSpec) -> ImageClassifier:
    return CifarShuffleNetV1(task.num_classes)
