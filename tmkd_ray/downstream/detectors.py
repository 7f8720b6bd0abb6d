"""torchvision's detectors on a classifier's feature maps."""

from collections import OrderedDict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.ssdlite import SSDLiteHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock
from torchvision.ops.misc import Conv2dNormActivation

from tmkd_ray.config.transfer import DetectConfig
from tmkd_ray.downstream.pyramid import FeatureMaps
from tmkd_ray.settings import ImageStatistics

_RATIOS = (0.5, 1.0, 2.0)
"""Height to width of the anchors."""

_SSD_LEVELS = 6
_SSD_WIDTHS = (512, 256, 256, 128)
"""Of the levels that SSDLite adds (Sandler et al. 2018, arXiv 1801.04381, section 6.2)."""


class _StridedLevels(ExtraFPNBlock):  # type: ignore[misc]
    """Coarser levels by strided convolutions of the last one, as RetinaNet's P6 and P7."""

    def __init__(self, channels: int, number: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, stride=2, padding=1) for _ in range(number)
        )

    def forward(
        self, results: list[Tensor], x: list[Tensor], names: list[str]
    ) -> tuple[list[Tensor], list[str]]:
        results, names = list(results), list(names)
        for convolution in self.convolutions:
            results.append(convolution(torch.relu(results[-1])))
            names.append(str(len(names)))
        return results, names


class PyramidBackbone(nn.Module):
    """Feature pyramid (Lin et al. 2017, arXiv 1612.03144) over the maps of stride `finest` to `coarsest`.

    Of a model whose maps are all finer than `finest` the last map is taken; what is missing up to `coarsest` is
    made by strided convolutions.

    Attributes:
        strides: of the levels. out_channels: of each.
    """

    def __init__(self, maps: FeatureMaps, channels: int, finest: int, coarsest: int) -> None:
        super().__init__()
        self.maps = maps
        chosen = [i for i, stride in enumerate(maps.strides) if finest <= stride <= coarsest]
        self.positions = chosen or [len(maps.strides) - 1]
        self.strides = [maps.strides[position] for position in self.positions]
        extra = 0
        while self.strides[-1] < coarsest:
            self.strides.append(2 * self.strides[-1])
            extra += 1
        self.out_channels = channels
        self.pyramid = FeaturePyramidNetwork(
            [maps.channels[position] for position in self.positions],
            channels,
            extra_blocks=_StridedLevels(channels, extra) if extra else None,
        )

    def forward(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        maps = self.maps(images_BCHW)
        levels: dict[str, Tensor] = self.pyramid(
            OrderedDict((str(i), maps[position]) for i, position in enumerate(self.positions))
        )
        return levels


class SsdBackbone(nn.Module):
    """The last two maps of stride 8 or more, and coarser ones by SSDLite's depthwise blocks, six in all.

    Attributes:
        out_channels: of each level.
    """

    def __init__(self, maps: FeatureMaps) -> None:
        super().__init__()
        self.maps = maps
        coarse = [i for i, stride in enumerate(maps.strides) if stride >= 8]
        self.positions = coarse[-2:] or [len(maps.strides) - 1]
        self.out_channels = [maps.channels[position] for position in self.positions]
        blocks: list[nn.Module] = []
        while len(self.out_channels) < _SSD_LEVELS:
            width = _SSD_WIDTHS[min(len(blocks), len(_SSD_WIDTHS) - 1)]
            blocks.append(_depthwise_block(self.out_channels[-1], width))
            self.out_channels.append(width)
        self.extra = nn.ModuleList(blocks)

    def forward(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        maps = self.maps(images_BCHW)
        levels = [maps[position] for position in self.positions]
        for block in self.extra:
            levels.append(block(levels[-1]))
        return OrderedDict((str(i), level) for i, level in enumerate(levels))


def _depthwise_block(width_in: int, width: int) -> nn.Sequential:
    layer = partial(Conv2dNormActivation, norm_layer=nn.BatchNorm2d, activation_layer=nn.ReLU6)
    half = width // 2
    return nn.Sequential(
        layer(width_in, half, kernel_size=1),
        layer(half, half, kernel_size=3, stride=2, groups=half),
        layer(half, width, kernel_size=1),
    )


def build_detector(
    maps: FeatureMaps, num_classes: int, config: DetectConfig, mean: ImageStatistics, std: ImageStatistics
) -> nn.Module:
    """Return a detector: images in [0, 1] and, in training, targets to losses, else to boxes.

    Args:
        num_classes: without the background, which is class 0.
    """
    build = {"faster_rcnn": _faster_rcnn, "retinanet": _retinanet, "ssdlite": _ssdlite}[config.detector]
    return build(maps, num_classes + 1, config, {"image_mean": list(mean), "image_std": list(std)})


def _faster_rcnn(
    maps: FeatureMaps, num_outputs: int, config: DetectConfig, pixels: dict[str, Any]
) -> nn.Module:
    backbone = PyramidBackbone(maps, config.channels, finest=4, coarsest=64)
    sizes = tuple((8 * stride,) for stride in backbone.strides)
    pooled = [str(i) for i, stride in enumerate(backbone.strides) if stride <= 32]
    detector: nn.Module = FasterRCNN(
        backbone,
        min_size=config.image_size,
        max_size=config.image_size,
        rpn_anchor_generator=AnchorGenerator(sizes, (_RATIOS,) * len(sizes)),
        rpn_pre_nms_top_n_train=2 * config.num_proposals,
        rpn_pre_nms_top_n_test=config.num_proposals,
        rpn_post_nms_top_n_train=config.num_proposals,
        rpn_post_nms_top_n_test=config.num_proposals,
        box_roi_pool=MultiScaleRoIAlign(featmap_names=pooled, output_size=7, sampling_ratio=2),
        box_head=TwoMLPHead(config.channels * 7 * 7, config.head_width),
        box_predictor=FastRCNNPredictor(config.head_width, num_outputs),
        **pixels,
    )
    return detector


def _retinanet(maps: FeatureMaps, num_outputs: int, config: DetectConfig, pixels: dict[str, Any]) -> nn.Module:
    backbone = PyramidBackbone(maps, config.channels, finest=8, coarsest=128)
    sizes = tuple(
        tuple(round(4 * stride * 2 ** (third / 3)) for third in range(3)) for stride in backbone.strides
    )
    head = RetinaNetHead(config.channels, 9, num_outputs, norm_layer=partial(nn.GroupNorm, 8))
    detector: nn.Module = RetinaNet(
        backbone,
        num_outputs,
        min_size=config.image_size,
        max_size=config.image_size,
        anchor_generator=AnchorGenerator(sizes, (_RATIOS,) * len(sizes)),
        head=head,
        **pixels,
    )
    return detector


def _ssdlite(maps: FeatureMaps, num_outputs: int, config: DetectConfig, pixels: dict[str, Any]) -> nn.Module:
    backbone = SsdBackbone(maps)
    boxes = DefaultBoxGenerator([[2, 3] for _ in backbone.out_channels], min_ratio=0.2, max_ratio=0.95)
    head = SSDLiteHead(backbone.out_channels, boxes.num_anchors_per_location(), num_outputs, nn.BatchNorm2d)
    size = (config.image_size, config.image_size)
    detector: nn.Module = SSD(backbone, boxes, size, num_outputs, head=head, **pixels)
    return detector
