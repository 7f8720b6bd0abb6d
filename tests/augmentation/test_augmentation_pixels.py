"""Resized crops, jitter, grey and blur: against real-valued formulas, to the byte against plain integers."""

import math

import cv2
import numpy as np
import numpy.typing as npt
import pytest
import torch
from augmentation_formulas import byte_by_byte, turned
from augmentation_samples import (
    MOCO,
    SIZE,
    Images,
    augmented,
    drawn_for,
    every_recipe,
    parameters_with,
    random_images,
)
from scipy import ndimage
from torchvision.transforms.v2 import functional as torchvision

from tmkd_ray import augmentation
from tmkd_ray.augmentation import JITTER_ORDERS, PARAMETERS, AugmentationConfig, augment

Pixels = npt.NDArray[np.float64]


def photograph_like(count: int, size: int) -> Images:
    """Smooth colours with edges: rectangles and waves, no noise."""
    rng = np.random.default_rng(3)
    images = np.empty((count, size, size, 3), dtype=np.uint8)
    y, x = np.mgrid[:size, :size][..., None] / size
    for image in images:
        phase, pace = rng.uniform(0, 6, 3), rng.uniform(-20, 20, (2, 3))
        waves = 127 + 120 * np.sin(phase + pace[0] * x + pace[1] * y)
        top, left = rng.integers(0, size // 2, 2)
        waves[top : top + size // 3, left : left + size // 3] = rng.integers(0, 256, 3)
        image[:] = waves
    return images


def images_of(kind: str, count: int, size: int) -> Images:
    if kind == "noise":
        return random_images(count, size, size)
    if kind == "extremes":
        return random_images(count, size, size) // 128 * 255
    return photograph_like(count, size)


KINDS = pytest.mark.parametrize("kind", ["noise", "extremes", "photograph"])


def real_crop(image: Images, top: int, left: int, height: int, width: int) -> Pixels:
    """Bilinear interpolation at half-pixel centres, in float64; the crop lies within the image."""

    def axis(start: int, length: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        position = ((np.arange(size) + 0.5) * length / size - 0.5).clip(0, length - 1)
        lower = np.floor(position).astype(int)
        return start + lower, start + np.minimum(lower + 1, length - 1), position - lower

    rows, next_rows, y = axis(top, height, image.shape[0])
    columns, next_columns, x = axis(left, width, image.shape[1])
    y, x = y[:, None, None], x[:, None]
    values = image.astype(float)
    upper = values[rows][:, columns] * (1 - x) + values[rows][:, next_columns] * x
    lower = values[next_rows][:, columns] * (1 - x) + values[next_rows][:, next_columns] * x
    result: Pixels = upper * (1 - y) + lower * y
    return result


@KINDS
def test_resized_crops_against_real_numbers(kind: str) -> None:
    """Each pass rounds its position to 1/256 pixels, its value to a level: half a level, and slope / 512."""
    size = 64
    images = images_of(kind, 40, size)
    parameters = drawn_for(AugmentationConfig(recipe="imagenet", flip=False), 40, size)
    error = augmented(images, parameters) - np.stack(
        [real_crop(image, *row[:4]) for image, row in zip(images, parameters.astype(int), strict=True)]
    )
    values = images.astype(int)
    slope = max(np.abs(np.diff(values, axis=1)).max(), np.abs(np.diff(values, axis=2)).max())
    assert np.abs(error).max() <= 1 + 2 * slope / 512
    assert np.quantile(np.abs(error), 0.99) < 1
    assert abs(error.mean()) < 0.05
    if kind == "photograph":
        assert (np.abs(error) <= 1).mean() > 0.999


def test_resized_crops_against_opencv() -> None:
    size = 64
    images = images_of("photograph", 20, size)
    parameters = drawn_for(AugmentationConfig(recipe="imagenet", flip=False), 20, size)
    for image, pixels, row in zip(images, augmented(images, parameters), parameters, strict=True):
        top, left, height, width = row[:4]
        theirs = cv2.resize(image[top : top + height, left : left + width], (size, size))
        assert np.abs(pixels.astype(int) - theirs).max() <= 2


BORDER_CROPS = [
    (-3, -5, 20, 14),
    (4, 4, 20, 20),
    (-8, 10, 40, 6),
    (12, 12, 16, 16),
    (-16, 0, 16, 16),  # wholly outside from here on
    (3, 40, 9, 9),
]


@pytest.mark.parametrize("crop", BORDER_CROPS)
def test_crops_over_the_border_are_black_there(crop: tuple[int, int, int, int]) -> None:
    images = random_images(2, 16, 16)
    named = dict(zip(PARAMETERS[:4], crop, strict=True))
    pixels = augmented(images, parameters_with(16, 2, **named))
    for image, result, row in zip(images, pixels, parameters_with(16, 2, **named), strict=True):
        np.testing.assert_array_equal(result, byte_by_byte(image, row))
        padded = np.pad(image, ((60, 60), (60, 60), (0, 0)))
        cut = padded[crop[0] + 60 : crop[0] + 60 + crop[2], crop[1] + 60 : crop[1] + 60 + crop[3]]
        theirs = cv2.resize(cut, (16, 16), interpolation=cv2.INTER_LINEAR)
        assert np.abs(result.astype(int) - theirs).max() <= 3
    if crop in BORDER_CROPS[-2:]:
        assert not pixels.any()


@every_recipe
def test_every_recipe_to_the_byte(config: AugmentationConfig) -> None:
    """In a batch of all kinds: jittered or not, blurred or not, mirrored or not."""
    size = 16
    images = np.concatenate([random_images(30, size, size), photograph_like(30, size)])
    parameters = drawn_for(config, 60, size, seed=2)
    expected = np.stack([byte_by_byte(i, p) for i, p in zip(images, parameters, strict=True)])
    np.testing.assert_array_equal(augmented(images, parameters), expected)


def test_any_parameters_to_the_byte() -> None:
    """Crops over the border, the strongest of jitter, images that are not square."""
    rng = np.random.default_rng(5)
    count, height, width = 120, 11, 14
    images = random_images(count, height, width)
    images[::3] = images[::3] // 128 * 255
    parameters = np.zeros((count, len(PARAMETERS)), dtype=np.int16)
    limits = [(-9, 9), (-9, 9), (1, 25), (1, 25), (0, 1), (0, 512), (0, 512), (0, 512), (-768, 768), (0, 24)]
    for index, (low, high) in enumerate([*limits, (0, 1), (0, 512)]):
        parameters[:, index] = rng.integers(low, high + 1, count)
    expected = np.stack([byte_by_byte(i, p) for i, p in zip(images, parameters, strict=True)])
    np.testing.assert_array_equal(augmented(images, parameters), expected)


def real_luma(values: Pixels) -> Pixels:
    """ITU-R BT.601."""
    return (values @ np.array([0.299, 0.587, 0.114]))[..., None]


def order_starting_with(name: str) -> int:
    """An order; the other operations are set to change nothing by the tests that use it."""
    first = JITTER_ORDERS[:, 0].tolist()
    return first.index(PARAMETERS.index(name))


def jittered(images: Images, **amounts: int) -> npt.NDArray[np.int64]:
    """One operation alone."""
    (name,) = amounts
    neutral = {"brightness": 256, "contrast": 256, "saturation": 256, "hue": 0}
    parameters = parameters_with(
        images.shape[1], len(images), **{**neutral, **amounts}, order=order_starting_with(name)
    )
    return augmented(images, parameters).astype(np.int64)


def channels_first(images: Images) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2)


FACTORS = pytest.mark.parametrize("factor", [0, 100, 153, 255, 257, 320, 359, 512])


@KINDS
@FACTORS
def test_brightness(kind: str, factor: int) -> None:
    images = images_of(kind, 6, SIZE)
    result, real = jittered(images, brightness=factor), (images * (factor / 256)).clip(0, 255)
    assert np.abs(result - real).max() <= 0.5
    theirs = torchvision.adjust_brightness(channels_first(images), factor / 256).permute(0, 2, 3, 1).numpy()
    assert np.abs(result - theirs).max() <= 1


@KINDS
@FACTORS
def test_contrast(kind: str, factor: int) -> None:
    """The luma and its mean are rounded: off by less than a level, the result by as much times 1 - factor."""
    images, strength = images_of(kind, 6, SIZE), factor / 256
    result, values = jittered(images, contrast=factor), images.astype(float)
    mean = real_luma(values).mean(axis=(1, 2, 3), keepdims=True)
    assert np.abs(result - (strength * values + (1 - strength) * mean).clip(0, 255)).max() <= 1.5
    theirs = torchvision.adjust_contrast(channels_first(images), strength).permute(0, 2, 3, 1).numpy()
    assert np.abs(result - theirs).max() <= 2


@KINDS
@FACTORS
def test_saturation(kind: str, factor: int) -> None:
    images, strength = images_of(kind, 6, SIZE), factor / 256
    result, values = jittered(images, saturation=factor), images.astype(float)
    real = (strength * values + (1 - strength) * real_luma(values)).clip(0, 255)
    assert np.abs(result - real).max() <= 1.5
    theirs = torchvision.adjust_saturation(channels_first(images), strength).permute(0, 2, 3, 1).numpy()
    assert np.abs(result - theirs).max() <= 2


@KINDS
@pytest.mark.parametrize("shift", [-768, -400, -153, -1, 1, 77, 256, 512, 768])
def test_hue(kind: str, shift: int) -> None:
    images = images_of(kind, 2, SIZE)
    result = jittered(images, hue=shift)
    assert np.abs(result - turned(images, shift / 1536)).max() <= 0.5 + 1e-6
    theirs = torchvision.adjust_hue(channels_first(images), shift / 1536).permute(0, 2, 3, 1).numpy()
    assert np.abs(result - theirs).max() <= 2


def test_hue_of_pure_colours() -> None:
    red, green, blue, grey = [255, 0, 0], [0, 255, 0], [0, 0, 255], [90, 90, 90]
    image = np.array([[red, green], [blue, grey]], dtype=np.uint8)[None]
    third = 1536 // 3
    np.testing.assert_array_equal(jittered(image, hue=third), [[[green, blue], [red, grey]]])
    np.testing.assert_array_equal(jittered(image, hue=-third), [[[blue, red], [green, grey]]])
    cyan, magenta, yellow = [0, 255, 255], [255, 0, 255], [255, 255, 0]
    for half in (768, -768):
        np.testing.assert_array_equal(jittered(image, hue=half), [[[cyan, magenta], [yellow, grey]]])


def test_grey() -> None:
    images = images_of("noise", 4, SIZE)
    result = augmented(images, parameters_with(SIZE, 4, grey=1)).astype(int)
    assert (result == result[..., :1]).all()
    assert np.abs(result - real_luma(images.astype(float))).max() <= 1
    theirs = torchvision.rgb_to_grayscale(channels_first(images), 3).permute(0, 2, 3, 1).numpy()
    assert np.abs(result - theirs).max() <= 1
    greys = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    np.testing.assert_array_equal(augmented(greys, parameters_with(16, grey=1)), greys)


@pytest.mark.parametrize("order", range(1, 25))
def test_jitter_applies_in_its_order(order: int) -> None:
    images = images_of("photograph", 3, SIZE)
    amounts = {"brightness": 340, "contrast": 170, "saturation": 350, "hue": 100}
    expected = images
    for operation in JITTER_ORDERS[order]:
        name = PARAMETERS[operation]
        expected = jittered(expected, **{name: amounts[name]}).astype(np.uint8)
    result = augmented(images, parameters_with(SIZE, 3, **amounts, order=order))
    np.testing.assert_array_equal(result, expected)


SIGMAS = pytest.mark.parametrize("sigma", [26, 64, 90, 128, 200, 256, 333, 400, 512])


@KINDS
@SIGMAS
def test_blur(kind: str, sigma: int) -> None:
    """An edge is off by half a level for the kernel and half for the rounding, in each pass; noise by more."""
    bound = {"photograph": 2.0, "noise": 3.0, "extremes": 3.5}[kind]
    images = images_of(kind, 3, 64)
    result = augmented(images, parameters_with(64, 3, blur=sigma)).astype(int)
    real = np.stack(
        [
            ndimage.gaussian_filter(i.astype(float), (sigma / 256, sigma / 256, 0), mode="mirror", truncate=6)
            for i in images
        ]
    )
    assert np.abs(result - real).max() <= bound
    assert (np.abs(result - real) <= 1.5).mean() > 0.97
    assert abs((result - real).mean()) < 0.1
    theirs = [cv2.GaussianBlur(i, (25, 25), sigma / 256, borderType=cv2.BORDER_REFLECT_101) for i in images]
    assert np.abs(result - theirs).max() <= bound + 0.5


@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (3, 3), (1, 9)])
def test_blur_of_images_smaller_than_the_kernel(shape: tuple[int, int]) -> None:
    images = random_images(5, *shape)
    parameters = parameters_with(0, 5, height=shape[0], width=shape[1], blur=512)
    real = [ndimage.gaussian_filter(i.astype(float), (2, 2, 0), mode="mirror", truncate=6) for i in images]
    assert np.abs(augmented(images, parameters) - np.stack(real)).max() <= 3


def test_blur_keeps_what_is_uniform_and_what_is_symmetric() -> None:
    uniform = np.full((2, SIZE, SIZE, 3), [[[[0, 131, 255]]], [[[1, 254, 77]]]], dtype=np.uint8)
    for sigma in range(1, 513):
        np.testing.assert_array_equal(augmented(uniform, parameters_with(SIZE, 2, blur=sigma)), uniform)
    image = random_images(1, 15, 15)
    for blurred, turned_back in [
        (augmented(image[:, ::-1].copy(), parameters_with(15, blur=300)), slice(None, None, -1)),
        (augmented(image, parameters_with(15, blur=300)), slice(None)),
    ]:
        np.testing.assert_array_equal(blurred[:, turned_back], augmented(image, parameters_with(15, blur=300)))


def test_the_kernels_of_the_blur_do_not_hang_on_the_last_digit() -> None:
    """No weight lies so near the middle between two integers that machines could round it differently."""
    for sigma in range(1, 513):
        gaussian = np.array([math.exp(-0.5 * (k * 256 / sigma) ** 2) for k in range(-20, 21)])
        tails = 256 * np.cumsum(gaussian)[:20] / gaussian.sum()
        assert np.abs(tails % 1 - 0.5).min() > 1e-9


@pytest.mark.parametrize(
    "identity",
    [
        {},
        {"order": 3, "brightness": 256, "contrast": 256, "saturation": 256, "hue": 0},
        {"order": 9, "brightness": 256, "contrast": 256, "saturation": 256, "hue": 1536},
        {"blur": 1},
        {"blur": 60},
    ],
)
def test_identities(identity: dict[str, int]) -> None:
    images = random_images(3, SIZE, SIZE)
    np.testing.assert_array_equal(augmented(images, parameters_with(SIZE, 3, **identity)), images)


def test_two_mirrors_and_all_between() -> None:
    """Mirroring comes last, whatever precedes it."""
    images = random_images(50, SIZE, SIZE)
    parameters = drawn_for(MOCO, 50, SIZE)
    mirrored = parameters.copy()
    mirrored[:, 4] = 1 - parameters[:, 4]
    np.testing.assert_array_equal(augmented(images, mirrored), augmented(images, parameters)[:, :, ::-1])


@every_recipe
def test_the_bytes_of_an_image_do_not_depend_on_its_batch(
    config: AugmentationConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, parameters = random_images(90, SIZE, SIZE), drawn_for(config, 90, SIZE)
    together = augmented(images, parameters)
    for b in range(90):
        np.testing.assert_array_equal(augmented(images[b : b + 1], parameters[b : b + 1])[0], together[b])
    order = np.random.default_rng(0).permutation(90)
    np.testing.assert_array_equal(augmented(images[order], parameters[order]), together[order])
    for at_once in (1, 7 * SIZE**2, 10**9):
        monkeypatch.setattr(augmentation, "_PIXELS_AT_ONCE", at_once)
        np.testing.assert_array_equal(augmented(images, parameters), together)


def test_a_batch_of_all_kinds() -> None:
    images = random_images(6, SIZE, SIZE)
    rows = [
        parameters_with(SIZE),
        parameters_with(SIZE, blur=300),
        parameters_with(SIZE, grey=1, flip=1),
        parameters_with(SIZE, top=3, left=5, height=20, width=16),
        parameters_with(SIZE, order=7, brightness=300, contrast=200, saturation=280, hue=-90),
        parameters_with(SIZE, top=-4, left=4, order=24, brightness=200, contrast=256, saturation=100, hue=50),
    ]
    result = augmented(images, np.concatenate(rows))
    np.testing.assert_array_equal(result[0], images[0])
    for image, row, pixels in zip(images, rows, result, strict=True):
        np.testing.assert_array_equal(pixels, byte_by_byte(image, row[0]))


@every_recipe
def test_augmented_images_are_new_memory_and_leave_their_source_alone(config: AugmentationConfig) -> None:
    images = torch.from_numpy(random_images(20, SIZE, SIZE))
    parameters = torch.from_numpy(drawn_for(config, 20, SIZE))
    before = images.clone(), parameters.clone()
    first = augment(images, parameters)
    assert first.dtype == torch.uint8
    assert first.shape == images.shape
    assert first.is_contiguous()
    expected = first.clone()
    second = augment(images, parameters)
    first.zero_()
    assert torch.equal(second, expected)
    assert torch.equal(images, before[0])
    assert torch.equal(parameters, before[1])
    strided = images.repeat_interleave(2, dim=0)[::2]
    assert not strided.is_contiguous()
    assert torch.equal(augment(strided, parameters), expected)
    planar = images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert torch.equal(augment(planar, parameters), expected)
    assert augment(images[:0], parameters[:0]).shape == (0, SIZE, SIZE, 3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@every_recipe
def test_a_gpu_gives_the_same_bytes(config: AugmentationConfig) -> None:
    images, parameters = random_images(100, 224, 224), drawn_for(config, 100, 224)
    expected = augmented(images, parameters)
    for place in ("cpu", "cuda"):
        on_device = augment(torch.from_numpy(images).cuda(), torch.from_numpy(parameters).to(place))
        assert on_device.is_cuda
        np.testing.assert_array_equal(on_device.cpu().numpy(), expected)
