"""ShuffleNet V2 1× (Ma et al., arXiv 1807.11164, table 5) for CIFAR, with the field's parameter names.

The stem is a 1×1 convolution of stride 1, without max pooling.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tmkd_ray.models import MODELS
from tmkd_ray.models.base import ImageClassifier
from tmkd_ray.models.cifar_layers import channel_shuffle, conv1x1, conv3x3, global_average_pool
from tmkd_ray.types import ModelOutput, TaskSpec


class CifarShuffleNetV2(ImageClassifier):
    """Three stages at half, quarter and eighth resolution, 116, 232 and 464 wide; a 1×1 convolution to 1024."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = conv1x1(3, 24)
        self.bn1 = nn.BatchNorm2d(24)
        self.layer1 = _stage(24, 116, basic_units=3)
        self.layer2 = _stage(116, 232, basic_units=7)
        self.layer3 = _stage(232, 464, basic_units=3)
        self.conv2 = conv1x1(464, 1024)
        self.bn2 = nn.BatchNorm2d(1024)
        self.linear = nn.Linear(1024, num_classes)

    @property
    def head(self) -> nn.Linear:
        return self.linear

    def forward(self, images_BCHW: Tensor) -> ModelOutput:
        x = F.relu(self.bn1(self.conv1(images_BCHW)), inplace=True)
        # Not in place, for what a stage ends with is handed out before its ReLU too.
        map1 = F.relu(pre1 := self.layer1(x))
        map2 = F.relu(pre2 := self.layer2(map1))
        map3 = F.relu(pre3 := self.layer3(map2))
        feature_BS = global_average_pool(F.relu(self.bn2(self.conv2(map3)), inplace=True))
        return ModelOutput(self.linear(feature_BS), feature_BS, (map1, map2, map3), (pre1, pre2, pre3))


class _BasicUnit(nn.Module):
    """The paper's figure 3 (c): half of the channels pass unchanged."""

    def __init__(self, width: int, is_last: bool) -> None:
        super().__init__()
        self.is_last = is_last
        half = width // 2
        self.conv1 = conv1x1(half, half)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = conv3x3(half, half, groups=half)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = conv1x1(half, half)
        self.bn3 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        kept, out = x.chunk(2, dim=1)
        out = F.relu(self.bn1(self.conv1(out)), inplace=True)
        out = self.bn2(self.conv2(out))
        out = self.bn3(self.conv3(out))
        if not self.is_last:
            out = F.relu(out, inplace=True)
        return channel_shuffle(torch.cat([kept, out], 1), 2)


class _DownUnit(nn.Module):
    """The paper's figure 3 (d): both branches see all channels and halve the resolution."""

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__()
        half = out_width // 2
        self.conv1 = conv3x3(in_width, in_width, 2, groups=in_width)
        self.bn1 = nn.BatchNorm2d(in_width)
        self.conv2 = conv1x1(in_width, half)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = conv1x1(in_width, half)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = conv3x3(half, half, 2, groups=half)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = conv1x1(half, half)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        left = F.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))), inplace=True)
        right = F.relu(self.bn3(self.conv3(x)), inplace=True)
        right = F.relu(self.bn5(self.conv5(self.bn4(self.conv4(right)))), inplace=True)
        return channel_shuffle(torch.cat([left, right], 1), 2)


def _stage(in_width: int, width: int, basic_units: int) -> nn.Sequential:
    """Return the units of a stage; the last ReLU is left to the network.

    The half that passes the last unit unchanged meets that ReLU too, which does nothing to it: it is the output
    of earlier ReLUs.
    """
    units = (_BasicUnit(width, is_last=index == basic_units - 1) for index in range(basic_units))
    return nn.Sequential(_DownUnit(in_width, width), *units)


@MODELS.register("ShuffleV2")
def _shuffle_v2(task: TaskSpec) -> ImageClassifier:
    return CifarShuffleNetV2(task.num_classes)
