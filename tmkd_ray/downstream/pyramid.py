"""A classifier's feature maps as the backbone of a detector or a segmentation network."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tmkd_ray.errors import UserError
from tmkd_ray.models import ImageClassifier
from tmkd_ray.types import ModelOutput

PROBE_SIZE = 128
"""Pixels of the image on which strides are measured."""


class FeatureMaps(nn.Module):
    """The feature maps of a classifier, early to late: of several at one resolution the last.

    What lies behind the last map, the classifier above all, does not train.

    Args:
        output_stride: convolutions that would shrink the maps beyond it are dilated; see `dilate`. None: none.

    Attributes:
        channels: of each map. strides: of each map, image pixels to one of the map's, powers of two.

    Raises:
        UserError: the model has no feature maps, or cannot take images of another size than it was built for.
    """

    def __init__(self, model: ImageClassifier, output_stride: int | None = None) -> None:
        super().__init__()
        self.model = model
        if output_stride is not None:
            dilate(model, output_stride)
        maps = self._measure()
        if not maps:
            raise UserError(
                f"{type(model.inner).__name__} has no feature maps, which detection and segmentation need; "
                "take a convolutional student"
            )
        strides = [stride_of(feature_map.shape[-1]) for feature_map in maps]
        self.positions = [i for i, stride in enumerate(strides) if stride not in strides[i + 1 :]]
        self.channels = [maps[position].shape[1] for position in self.positions]
        self.strides = [strides[position] for position in self.positions]

    def _measure(self) -> tuple[Tensor, ...]:
        """Return the maps of a probe image, and freeze the parameters that have no part in them."""
        mode = self.model.training
        maps = _run_probe(self.model)
        if maps:
            torch.stack([feature_map.float().sum() for feature_map in maps]).sum().backward()  # type: ignore[no-untyped-call]
        for parameter in self.model.parameters():
            parameter.requires_grad_(parameter.grad is not None)
            parameter.grad = None
        self.model.train(mode)
        return maps

    def forward(self, images_BCHW: Tensor) -> list[Tensor]:
        output: ModelOutput = self.model(images_BCHW)
        return [output.feature_maps[position] for position in self.positions]


def stride_of(width: int) -> int:
    """Return the stride, to the nearest power of two, of a map so many pixels wide of the probe image."""
    return int(2 ** round(math.log2(PROBE_SIZE / width)))


def dilate(model: nn.Module, output_stride: int) -> None:
    """Let no convolution shrink the maps beyond a stride: it keeps their size, and those behind it are dilated.

    Each keeps its weights and sees the pixels it saw before, at their finer spacing: Chen et al. 2017,
    "Rethinking atrous convolution for semantic image segmentation", arXiv 1706.05587, section 3.1. Pooling
    layers and convolutions with an even kernel (patch merging) shrink the maps as before.
    """
    before = _input_strides(model)
    for convolution, stride in before.items():
        if max(convolution.stride) == 2 and stride >= output_stride and _odd(convolution):
            convolution.stride = (1, 1)
    after = _input_strides(model)
    for convolution, stride in before.items():
        factor = stride // after[convolution]
        if factor > 1 and max(convolution.kernel_size) > 1 and _odd(convolution):
            assert not isinstance(convolution.padding, str)
            convolution.dilation = tuple(factor * value for value in convolution.dilation)
            convolution.padding = tuple(factor * value for value in convolution.padding)


def _odd(convolution: nn.Conv2d) -> bool:
    return all(size % 2 == 1 for size in convolution.kernel_size)


def _input_strides(model: nn.Module) -> dict[nn.Conv2d, int]:
    """Return the stride of what each convolution is given."""
    strides: dict[nn.Conv2d, int] = {}

    def note(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        assert isinstance(module, nn.Conv2d)
        strides[module] = stride_of(arguments[0].shape[-1])

    hook: Callable[..., None] = note
    handles = [m.register_forward_pre_hook(hook) for m in model.modules() if isinstance(m, nn.Conv2d)]
    mode = model.training
    with torch.no_grad():
        _run_probe(model)
    model.train(mode)
    for handle in handles:
        handle.remove()
    return strides


def _run_probe(model: nn.Module) -> tuple[Tensor, ...]:
    device = next(model.parameters()).device
    # In evaluation mode, so that the running statistics stay as they are.
    try:
        output: ModelOutput = model.eval()(torch.zeros(1, 3, PROBE_SIZE, PROBE_SIZE, device=device))
    except (AssertionError, RuntimeError, ValueError) as error:  # what the libraries' own shape checks raise
        raise UserError(
            f"the student cannot take images of another size, as detection and segmentation need: {error}"
        ) from error
    return output.feature_maps
