"""Crops with padding and mirroring, read pixel by pixel."""

import numpy as np
import pytest
import reference_formulas as reference
import torch
from augmentation_samples import SIZE, augmented, ids_of, parameters_of, random_images

from tmkd_ray.augmentation import PARAMETERS, AugmentationConfig, augment, draw_parameters, sample_keys

SOME_CROPS = [
    (0, 0, 0),
    (0, 0, 1),
    (2, -1, 0),
    (-3, 4, 1),
    (6, 6, 0),
    (-6, 0, 1),
    (7, 0, 0),  # wholly outside from here on
    (0, -7, 1),
    (-40, 30, 1),
]


def test_the_order_of_the_parameters() -> None:
    assert PARAMETERS[:5] == ("top", "left", "height", "width", "flip")
    assert PARAMETERS[5:9] == ("brightness", "contrast", "saturation", "hue")
    assert PARAMETERS[9:] == ("order", "grey", "blur")


@pytest.mark.parametrize("size", [1, 2, 7])
def test_crops_are_read_pixel_by_pixel(size: int) -> None:
    images = random_images(len(SOME_CROPS), size, size)
    parameters = parameters_of(*SOME_CROPS, size=size)
    expected = np.stack([reference.crop(i, p[:5]) for i, p in zip(images, parameters, strict=True)])
    np.testing.assert_array_equal(augmented(images, parameters), expected)


def test_drawn_crops_are_read_pixel_by_pixel() -> None:
    images = random_images(200, SIZE, SIZE)
    config = AugmentationConfig(padding=SIZE)
    parameters = draw_parameters(config, sample_keys(ids_of(200), 0), np.arange(1), SIZE)[:, 0]
    crops = augmented(images, parameters)
    for b in range(0, 200, 20):
        np.testing.assert_array_equal(crops[b], reference.crop(images[b], parameters[b, :5]))


def test_a_crop_by_hand() -> None:
    image = np.arange(1, 10, dtype=np.uint8).reshape(1, 3, 3, 1).repeat(3, axis=3)
    right_and_down = augmented(image, parameters_of((1, 1, 0), size=3))[0, :, :, 0]
    np.testing.assert_array_equal(right_and_down, [[5, 6, 0], [8, 9, 0], [0, 0, 0]])
    mirrored = augmented(image, parameters_of((1, 1, 1), size=3))[0, :, :, 0]
    np.testing.assert_array_equal(mirrored, [[0, 6, 5], [0, 9, 8], [0, 0, 0]])
    up = augmented(image, parameters_of((-1, 0, 0), size=3))[0, :, :, 0]
    np.testing.assert_array_equal(up, [[0, 0, 0], [1, 2, 3], [4, 5, 6]])


def test_crops_are_new_memory_and_leave_the_images_as_they_are() -> None:
    images = random_images(3, 8, 8)
    before = images.copy()
    crops = augmented(images, parameters_of((0, 0, 0), (3, 0, 0), (0, 0, 1), size=8))
    assert not np.shares_memory(crops, images)
    assert crops.flags.writeable
    crops[:] = 0
    np.testing.assert_array_equal(images, before)


def test_images_that_are_not_contiguous() -> None:
    images = random_images(6, 8, 8)
    parameters = parameters_of((1, -2, 1), (0, 3, 0), (-1, 0, 1), size=8)
    expected = augmented(images[::2].copy(), parameters)
    strided = torch.from_numpy(images)[::2]
    np.testing.assert_array_equal(augment(strided, torch.from_numpy(parameters)).numpy(), expected)


def test_a_mirror_image_of_a_mirror_image() -> None:
    images = random_images(4, 9, 9)
    mirror = parameters_of(*[(0, 0, 1)] * 4, size=9)
    np.testing.assert_array_equal(augmented(images, mirror), images[:, :, ::-1])
    np.testing.assert_array_equal(augmented(augmented(images, mirror), mirror), images)
