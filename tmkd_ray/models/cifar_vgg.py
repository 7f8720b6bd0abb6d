"""VGG (Simonyan and Zisserman, arXiv 1409.1556, table 1) for CIFAR, with the field's parameter names.

Batch norm after each convolution, one linear layer on top. `vgg8` has one convolution a block.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from tmkd_ray.errors import UserError
from tmkd_ray.models import MODELS
from tmkd_ray.models.base import ImageClassifier
from tmkd_ray.models.cifar_layers import global_average_pool, initialise_convolutions
from tmkd_ray.types import ModelOutput, TaskSpec

_WIDTHS = (64, 128, 256, 512, 512)
_CONVOLUTIONS = {
    "vgg8": (1, 1, 1, 1, 1),
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}


class CifarVGG(ImageClassifier):
    """Five blocks, the first of which counts as the stem: four feature maps.

    Three max poolings; a fourth before the last block for images of 64 pixels or more, as the field does at 64.

    Args:
        convolutions: their number in each block.
    """

    def __init__(self, convolutions: tuple[int, int, int, int, int], num_classes: int) -> None:
        super().__init__()
        in_widths = (3, *_WIDTHS)
        self.block0 = _block(in_widths[0], _WIDTHS[0], convolutions[0])
        self.block1 = _block(in_widths[1], _WIDTHS[1], convolutions[1])
        self.block2 = _block(in_widths[2], _WIDTHS[2], convolutions[2])
        self.block3 = _block(in_widths[3], _WIDTHS[3], convolutions[3])
        self.block4 = _block(in_widths[4], _WIDTHS[4], convolutions[4])
        self.classifier = nn.Linear(_WIDTHS[4], num_classes)
        initialise_convolutions(self)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    @property
    def head(self) -> nn.Linear:
        return self.classifier

    def forward(self, images_BCHW: Tensor) -> ModelOutput:
        x = F.relu(self.block0(images_BCHW), inplace=True)
        # Not in place, for what a block ends with is handed out before its ReLU too.
        map1 = F.relu(pre1 := self.block1(F.max_pool2d(x, 2)))
        map2 = F.relu(pre2 := self.block2(F.max_pool2d(map1, 2)))
        map3 = F.relu(pre3 := self.block3(F.max_pool2d(map2, 2)))
        pooled = F.max_pool2d(map3, 2) if images_BCHW.shape[2] >= 64 else map3
        map4 = F.relu(pre4 := self.block4(pooled))
        feature_BS = global_average_pool(map4)
        maps, preactivations = (map1, map2, map3, map4), (pre1, pre2, pre3, pre4)
        return ModelOutput(self.classifier(feature_BS), feature_BS, maps, preactivations)


def _block(in_width: int, width: int, convolutions: int) -> nn.Sequential:
    """Return convolution, batch norm, ReLU …; the last ReLU is left to `forward`, as in the field's names."""
    layers: list[nn.Module] = []
    for index in range(convolutions):
        layers += [
            nn.Conv2d(width if index else in_width, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers[:-1])


def _register(name: str, convolutions: tuple[int, int, int, int, int]) -> None:
    @MODELS.register(name)
    def build(task: TaskSpec) -> ImageClassifier:
        if task.image_size < 8:
            raise UserError(
                f"{name} pools three times: it needs images of 8 pixels or more, not {task.image_size}"
            )
        return CifarVGG(convolutions, task.num_classes)


for _name, _convolutions in _CONVOLUTIONS.items():
    _register(_name, _convolutions)
