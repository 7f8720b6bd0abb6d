"""What the tests of augmentation share: recipes, images, parameters."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from tmkd_ray.augmentation import (
    PARAMETERS,
    AugmentationConfig,
    ColorJitterConfig,
    augment,
    draw_parameters,
    sample_keys,
)

Images = npt.NDArray[np.uint8]
Parameters = npt.NDArray[np.int16]

CIFAR = AugmentationConfig()
IMAGENET = AugmentationConfig(recipe="imagenet")
MOCO = AugmentationConfig(recipe="moco_v2")
JITTERED_IMAGENET = AugmentationConfig(recipe="imagenet", color_jitter=ColorJitterConfig())
RECIPES = {"cifar": CIFAR, "imagenet": IMAGENET, "jittered": JITTERED_IMAGENET, "moco": MOCO}
every_recipe = pytest.mark.parametrize("config", RECIPES.values(), ids=RECIPES)

SIZE = 32


def ids_of(count: int, prefix: str = "image") -> np.ndarray:
    return np.array([f"{prefix}/{number:05d}.png" for number in range(count)])


def random_images(count: int, height: int, width: int) -> Images:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def parameters_of(*rows: tuple[int, int, int], size: int) -> Parameters:
    """Rows of (top, left, flip)."""
    crops = [[top, left, size, size, flip] for top, left, flip in rows]
    return np.pad(np.array(crops, dtype=np.int16), ((0, 0), (0, len(PARAMETERS) - 5)))


def parameters_with(size: int, count: int = 1, **values: Any) -> Parameters:
    """Those of `count` images that stay as they are but for what is named."""
    parameters = np.zeros((count, len(PARAMETERS)), dtype=np.int16)
    for name, value in {"height": size, "width": size, **values}.items():
        parameters[:, PARAMETERS.index(name)] = value
    return parameters


def drawn_for(config: AugmentationConfig, count: int, size: int, seed: int = 0) -> Parameters:
    return draw_parameters(config, sample_keys(ids_of(count), seed), np.arange(1), size)[:, 0]


def augmented(images: Images, parameters: Parameters) -> Images:
    pixels: Images = augment(torch.from_numpy(images), torch.from_numpy(parameters)).numpy()
    return pixels
