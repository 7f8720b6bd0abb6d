"""MobileNetV1 (Howard et al., arXiv 1704.04861, table 1), the field's student of ResNet-50 on ImageNet.

Parameter names are those of mdistiller's and ReviewKD's `MobileNetV1`, so that published checkpoints load.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from tmkd_ray.models import MODELS
from tmkd_ray.models.base import ImageClassifier
from tmkd_ray.models.cifar_layers import conv1x1, conv3x3, global_average_pool
from tmkd_ray.types import ModelOutput, TaskSpec

_FEATURE_WIDTH = 1024
# (width, stride) of each depthwise separable block.
_BLOCKS = (
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    *[(512, 1)] * 5,
    (1024, 2),
    (_FEATURE_WIDTH, 1),
)
_STAGE_ENDS = (3, 5, 11, 13)


class MobileNetV1(ImageClassifier):
    """Four stages at a quarter to a thirty-second of the resolution, 128, 256, 512 and 1024 wide."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        width = 32
        layers = [nn.Sequential(conv3x3(3, width, 2), nn.BatchNorm2d(width), nn.ReLU(inplace=True))]
        for out_width, stride in _BLOCKS:
            layers.append(_separable(width, out_width, stride))
            width = out_width
        self.model = nn.Sequential(*layers)
        self.fc = nn.Linear(_FEATURE_WIDTH, num_classes)

    @property
    def head(self) -> nn.Linear:
        return self.fc

    def forward(self, images_BCHW: Tensor) -> ModelOutput:
        x = images_BCHW
        maps, preactivation_maps = [], []
        for index, block in enumerate(self.model):
            assert isinstance(block, nn.Sequential)
            if index not in _STAGE_ENDS:
                x = block(x)
                continue
            before_relu = block[:-1](x)
            x = F.relu(before_relu)  # not in place, for what it is given is handed out too
            preactivation_maps.append(before_relu)
            maps.append(x)
        feature_BS = global_average_pool(x)
        return ModelOutput(self.fc(feature_BS), feature_BS, tuple(maps), tuple(preactivation_maps))


def _separable(width: int, out_width: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        conv3x3(width, width, stride, groups=width),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        conv1x1(width, out_width),
        nn.BatchNorm2d(out_width),
        nn.ReLU(inplace=True),
    )


@MODELS.register("MobileNetV1")
def _mobilenet_v1(task: TaskSpec) -> ImageClassifier:
    return MobileNetV1(task.num_classes)
