"""MobileNetV2 (Sandler et al., arXiv 1801.04381, table 2) for CIFAR.

The variant of Jin et al. (arXiv 1904.09149) that RepDistiller and mdistiller call MobileNetV2: expansion 6,
width 0.5, down to 1/16 of the resolution instead of 1/32, ReLU instead of ReLU6.
"""

from torch import Tensor, nn

from tmkd_ray.models import MODELS
from tmkd_ray.models.base import ImageClassifier
from tmkd_ray.models.cifar_layers import conv1x1, conv3x3, global_average_pool, initialise_convolutions
from tmkd_ray.types import ModelOutput, TaskSpec

_FEATURE_WIDTH = 1280
# (expansion, width, number of blocks, stride of the first); widths are half of the paper's.
_BLOCKS = (
    (1, 8, 1, 1),
    (6, 12, 2, 1),
    (6, 16, 3, 2),
    (6, 32, 4, 2),
    (6, 48, 3, 1),
    (6, 80, 3, 2),
    (6, 160, 1, 1),
)
_STAGE_ENDS = (1, 2, 4, 6)


class CifarMobileNetV2(ImageClassifier):
    """Four stages at half to sixteenth resolution, 12, 16, 48 and 160 wide, and a 1×1 convolution to 1280."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        width = 16
        self.conv1 = nn.Sequential(conv3x3(3, width, 2), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        self.blocks = nn.ModuleList()
        for expansion, out_width, number, stride in _BLOCKS:
            first = _InvertedResidual(width, out_width, stride, expansion)
            rest = (_InvertedResidual(out_width, out_width, 1, expansion) for _ in range(number - 1))
            self.blocks.append(nn.Sequential(first, *rest))
            width = out_width
        self.conv2 = nn.Sequential(
            conv1x1(width, _FEATURE_WIDTH), nn.BatchNorm2d(_FEATURE_WIDTH), nn.ReLU(inplace=True)
        )
        linear = nn.Linear(_FEATURE_WIDTH, num_classes)
        self.classifier = nn.Sequential(linear)
        initialise_convolutions(self)
        nn.init.normal_(linear.weight, std=0.01)
        nn.init.zeros_(linear.bias)

    @property
    def head(self) -> nn.Linear:
        linear = self.classifier[0]
        assert isinstance(linear, nn.Linear)
        return linear

    def forward(self, images_BCHW: Tensor) -> ModelOutput:
        x = self.conv1(images_BCHW)
        maps = []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in _STAGE_ENDS:
                maps.append(x)
        feature_BS = global_average_pool(self.conv2(x))
        # No ReLU follows a linear bottleneck: its map is the pre-activation too.
        return ModelOutput(self.classifier(feature_BS), feature_BS, tuple(maps), tuple(maps))


class _InvertedResidual(nn.Module):
    def __init__(self, in_width: int, out_width: int, stride: int, expansion: int) -> None:
        super().__init__()
        self.residual = stride == 1 and in_width == out_width
        mid = in_width * expansion
        self.conv = nn.Sequential(
            conv1x1(in_width, mid),
            nn.BatchNorm2d(mid),
            nn.ReLU(inplace=True),
            conv3x3(mid, mid, stride, groups=mid),
            nn.BatchNorm2d(mid),
            nn.ReLU(inplace=True),
            conv1x1(mid, out_width),
            nn.BatchNorm2d(out_width),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return x + out if self.residual else out


@MODELS.register("MobileNetV2")
def _mobilenet_v2(task: TaskSpec) -> ImageClassifier:
    return CifarMobileNetV2(task.num_classes)
