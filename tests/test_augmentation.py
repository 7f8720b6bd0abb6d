"""Pixels against real-valued formulas and, to the byte, against plain integers; draws and their statistics."""

import colorsys
import itertools
import math
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
import reference_formulas as reference
import torch
from pydantic import ValidationError
from scipy import ndimage, stats
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as torchvision

from tmkd_ray import augmentation
from tmkd_ray.augmentation import (
    JITTER_ORDERS,
    PARAMETERS,
    VERSION,
    AugmentationConfig,
    ColorJitterConfig,
    augment,
    draw_parameters,
    sample_keys,
    variant_offsets,
)
from tmkd_ray.settings import explain

Images = npt.NDArray[np.uint8]
Pixels = npt.NDArray[np.float64]
Parameters = npt.NDArray[np.int16]

CIFAR = AugmentationConfig()
IMAGENET = AugmentationConfig(recipe="imagenet")
MOCO = AugmentationConfig(recipe="moco_v2")
JITTERED_IMAGENET = AugmentationConfig(recipe="imagenet", color_jitter=ColorJitterConfig())
RECIPES = {"cifar": CIFAR, "imagenet": IMAGENET, "jittered": JITTERED_IMAGENET, "moco": MOCO}
every_recipe = pytest.mark.parametrize("config", RECIPES.values(), ids=RECIPES)

SIZE = 32
MANY = 20_000


def apply_crop(images_BHWC: np.ndarray, parameters_BP: np.ndarray) -> np.ndarray:
    """`augment` on arrays; parameters may say no more than the crop."""
    images = torch.from_numpy(np.ascontiguousarray(images_BHWC))
    return apply_crop_torch(images, torch.from_numpy(parameters_BP.copy())).permute(0, 2, 3, 1).numpy()


def apply_crop_torch(images_BHWC: torch.Tensor, parameters_BP: torch.Tensor) -> torch.Tensor:
    """`augment` as the loaders use it: a strided [B, 3, H, W] view."""
    missing = len(PARAMETERS) - parameters_BP.shape[1]
    whole = torch.nn.functional.pad(parameters_BP, (0, missing))
    return augment(images_BHWC, whole).permute(0, 3, 1, 2)


def ids_of(count: int, prefix: str = "image") -> np.ndarray:
    return np.array([f"{prefix}/{number:05d}.png" for number in range(count)])


@pytest.fixture(scope="module")
def keys() -> np.ndarray:
    return sample_keys(ids_of(MANY), seed=7)


def chi_square_is_plausible(counts: np.ndarray, expected: float | np.ndarray, freedom: int) -> bool:
    """Within four standard deviations of its mean: neither uneven nor suspiciously even."""
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return abs(statistic - freedom) < 4 * np.sqrt(2 * freedom)


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


# Crops --------------------------------------------------------------------------------------------

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
    np.testing.assert_array_equal(apply_crop(images, parameters), expected)
    on_device = apply_crop_torch(torch.from_numpy(images), torch.from_numpy(parameters))
    np.testing.assert_array_equal(on_device.permute(0, 2, 3, 1).numpy(), expected)


def test_drawn_crops_are_the_same_in_numpy_and_torch() -> None:
    images = random_images(200, SIZE, SIZE)
    parameters = draw_parameters(
        AugmentationConfig(padding=SIZE), sample_keys(ids_of(200), 0), np.arange(1), SIZE
    )
    crops = apply_crop(images, parameters[:, 0])
    on_device = apply_crop_torch(torch.from_numpy(images), torch.from_numpy(parameters[:, 0]))
    np.testing.assert_array_equal(on_device.permute(0, 2, 3, 1).numpy(), crops)
    for b in range(0, 200, 20):
        np.testing.assert_array_equal(crops[b], reference.crop(images[b], parameters[b, 0, :5]))


def test_a_crop_by_hand() -> None:
    image = np.arange(1, 10, dtype=np.uint8).reshape(1, 3, 3, 1).repeat(3, axis=3)
    right_and_down = apply_crop(image, parameters_of((1, 1, 0), size=3))[0, :, :, 0]
    np.testing.assert_array_equal(right_and_down, [[5, 6, 0], [8, 9, 0], [0, 0, 0]])
    mirrored = apply_crop(image, parameters_of((1, 1, 1), size=3))[0, :, :, 0]
    np.testing.assert_array_equal(mirrored, [[0, 6, 5], [0, 9, 8], [0, 0, 0]])
    up = apply_crop(image, parameters_of((-1, 0, 0), size=3))[0, :, :, 0]
    np.testing.assert_array_equal(up, [[0, 0, 0], [1, 2, 3], [4, 5, 6]])


def test_crops_are_new_memory_and_leave_the_images_as_they_are() -> None:
    images = random_images(3, 8, 8)
    before = images.copy()
    parameters = parameters_of((0, 0, 0), (3, 0, 0), (0, 0, 1), size=8)
    crops = apply_crop(images, parameters)
    on_device = apply_crop_torch(torch.from_numpy(images), torch.from_numpy(parameters))
    assert not np.shares_memory(crops, images)
    assert crops.flags.writeable
    crops[:] = 0
    on_device.zero_()
    np.testing.assert_array_equal(images, before)


def test_crops_in_torch_are_channels_first() -> None:
    crops = apply_crop_torch(
        torch.zeros(2, 8, 8, 3, dtype=torch.uint8), torch.from_numpy(parameters_with(8, 2))
    )
    assert crops.shape == (2, 3, 8, 8)
    assert crops.dtype == torch.uint8


def test_images_that_are_not_contiguous() -> None:
    images = random_images(6, 8, 8)
    parameters = parameters_of((1, -2, 1), (0, 3, 0), (-1, 0, 1), size=8)
    expected = apply_crop(images[::2].copy(), parameters)
    np.testing.assert_array_equal(apply_crop(images[::2], parameters), expected)
    strided = torch.from_numpy(images)[::2]
    np.testing.assert_array_equal(
        apply_crop_torch(strided, torch.from_numpy(parameters)).permute(0, 2, 3, 1).numpy(), expected
    )


def test_a_mirror_image_of_a_mirror_image() -> None:
    images = random_images(4, 9, 9)
    mirror = parameters_of(*[(0, 0, 1)] * 4, size=9)
    np.testing.assert_array_equal(apply_crop(images, mirror), images[:, :, ::-1])
    np.testing.assert_array_equal(apply_crop(apply_crop(images, mirror), mirror), images)


# Keys and draws -----------------------------------------------------------------------------------


def test_keys_are_hashes_of_seed_and_id() -> None:
    ids = np.array(["a/1.png", "b", "катя.jpg", "0"])
    for seed in (0, 3):
        assert sample_keys(ids, seed).tolist() == [reference.sample_key(i, seed) for i in ids]
    assert sample_keys(ids, 0).dtype == np.uint64
    assert sample_keys(ids[:0], 0).shape == (0,)


@pytest.mark.parametrize(
    ("padding", "flip", "image_size"), [(4, True, 32), (0, True, 32), (2, False, 8), (32, True, 8)]
)
def test_draws_are_those_of_python_integers(padding: int, flip: bool, image_size: int) -> None:
    config = AugmentationConfig(padding=padding, flip=flip)
    keys, variants = sample_keys(ids_of(50), 1), np.array([0, 1, 2, 63, 10_000])
    drawn = draw_parameters(config, keys, variants, image_size)
    assert drawn.dtype == np.int16
    expected = [
        [reference.crop_parameters(int(key), int(k), image_size, padding, flip) for k in variants]
        for key in keys
    ]
    np.testing.assert_array_equal(drawn[..., :5], expected)
    assert not drawn[..., 5:].any()


GOLDEN = [
    # id, seed; top, left, flip of variants 0, 1, 2 and 1000 of the CIFAR recipe; the offset among 4 variants
    ("image/00000.png", 0, [(1, 4, 1), (-3, 0, 1), (4, -1, 1), (-1, -3, 0)], 2),
    ("image/00000.png", 1, [(-3, -2, 1), (4, -1, 0), (0, 1, 1), (-3, 1, 0)], 2),
    ("image/00001.png", 0, [(-1, -2, 0), (-2, 0, 0), (0, -3, 1), (-3, 4, 0)], 1),
    ("a/b.jpg", 5, [(-3, -3, 0), (0, -2, 1), (-1, -4, 1), (1, -2, 1)], 3),
    ("49999", 123, [(4, 4, 0), (1, 4, 0), (-2, -4, 0), (3, -1, 1)], 2),
]


@pytest.mark.parametrize(("sample_id", "seed", "crops", "offset"), GOLDEN)
def test_the_draws_of_this_version(
    sample_id: str, seed: int, crops: list[tuple[int, int, int]], offset: int
) -> None:
    """Stored knowledge fits these crops alone: if a change is meant, raise VERSION and pin the new ones."""
    assert VERSION == 1
    keys = sample_keys(np.array([sample_id]), seed)
    drawn = draw_parameters(CIFAR, keys, np.array([0, 1, 2, 1000]), SIZE)[0]
    np.testing.assert_array_equal(drawn, parameters_of(*crops, size=SIZE))
    assert variant_offsets(keys, 4).tolist() == [offset]


def test_the_reference_is_splitmix64() -> None:
    """The first numbers of the generator from the seed 1234567, as its authors' program prints them."""
    states = [(1234567 + i * 0x9E3779B97F4A7C15) % 2**64 for i in (1, 2, 3)]
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [reference.splitmix64(state) for state in states] == published


def test_the_largest_and_smallest_draws_stay_within_the_padding(keys: np.ndarray) -> None:
    drawn = draw_parameters(CIFAR, keys, np.arange(2), SIZE)
    assert drawn[..., :2].min() == -4
    assert drawn[..., :2].max() == 4
    assert (drawn[..., 2:4] == SIZE).all()
    assert set(np.unique(drawn[..., 4])) == {0, 1}


def test_offsets_and_flips_are_uniform_and_independent(keys: np.ndarray) -> None:
    """All 9 × 9 × 2 combinations are equally frequent, in every variant."""
    drawn = draw_parameters(CIFAR, keys, np.array([0, 1, 500]), SIZE).astype(int)
    for variant in range(3):
        top, left, flip = drawn[:, variant, 0] + 4, drawn[:, variant, 1] + 4, drawn[:, variant, 4]
        counts = np.bincount((top * 9 + left) * 2 + flip, minlength=162)
        assert len(counts) == 162
        assert chi_square_is_plausible(counts, MANY / 162, 161)
        assert abs(flip.mean() - 0.5) < 4 * 0.5 / np.sqrt(MANY)


def test_neighbouring_variants_of_an_image_are_independent(keys: np.ndarray) -> None:
    drawn = draw_parameters(CIFAR, keys, np.arange(2), SIZE).astype(int) + 4
    for column in (0, 1):
        counts = np.bincount(drawn[:, 0, column] * 9 + drawn[:, 1, column], minlength=81)
        assert chi_square_is_plausible(counts, MANY / 81, 80)


def test_the_variants_of_one_image_are_uniform() -> None:
    drawn = draw_parameters(CIFAR, sample_keys(np.array(["one"]), 0), np.arange(MANY), SIZE).astype(int)[0]
    counts = np.bincount((drawn[:, 0] + 4) * 9 + drawn[:, 1] + 4, minlength=81)
    assert chi_square_is_plausible(counts, MANY / 81, 80)


def test_images_whose_ids_hardly_differ_are_independent() -> None:
    """Each image's draw against its neighbour's, ids being consecutive numbers."""
    drawn = draw_parameters(CIFAR, sample_keys(np.arange(MANY), 0), np.arange(1), SIZE).astype(int)[:, 0, 0] + 4
    counts = np.bincount(drawn[0::2] * 9 + drawn[1::2], minlength=81)
    assert chi_square_is_plausible(counts, MANY / 2 / 81, 80)


@every_recipe
def test_a_draw_depends_neither_on_the_order_nor_on_the_set_of_images(config: AugmentationConfig) -> None:
    ids = ids_of(100)
    drawn = draw_parameters(config, sample_keys(ids, 5), np.arange(4), SIZE)
    order = np.random.default_rng(0).permutation(100)
    for rows in (order, order[:7]):
        again = draw_parameters(config, sample_keys(ids[rows], 5), np.arange(4), SIZE)
        np.testing.assert_array_equal(again, drawn[rows])


@every_recipe
def test_a_variant_does_not_depend_on_the_others(config: AugmentationConfig) -> None:
    keys = sample_keys(ids_of(100), 5)
    drawn = draw_parameters(config, keys, np.arange(8), SIZE)
    np.testing.assert_array_equal(draw_parameters(config, keys, np.arange(3), SIZE), drawn[:, :3])
    for variant in (0, 3, 7):
        alone = draw_parameters(config, keys, np.array([variant]), SIZE)
        np.testing.assert_array_equal(alone[:, 0], drawn[:, variant])


@every_recipe
def test_variants_and_seeds_differ(config: AugmentationConfig) -> None:
    ids = ids_of(200)
    drawn = draw_parameters(config, sample_keys(ids, 0), np.arange(6), SIZE)
    for variant in range(1, 6):
        same = (drawn[:, 0] == drawn[:, variant]).all(axis=1)
        assert same.mean() < 0.05  # one in 162 by chance
    other_seed = draw_parameters(config, sample_keys(ids, 1), np.arange(6), SIZE)
    assert (drawn == other_seed).all(axis=2).mean() < 0.05
    assert not set(sample_keys(ids, 0).tolist()) & set(sample_keys(ids, 1).tolist())


def test_no_two_images_share_a_key(keys: np.ndarray) -> None:
    assert len(np.unique(keys)) == MANY


def test_without_flip_the_crops_are_the_same() -> None:
    keys = sample_keys(ids_of(100), 0)
    drawn = draw_parameters(CIFAR, keys, np.arange(3), SIZE)
    unflipped = draw_parameters(AugmentationConfig(flip=False), keys, np.arange(3), SIZE)
    np.testing.assert_array_equal(unflipped[..., :4], drawn[..., :4])
    assert not unflipped[..., 4].any()


def test_no_recipe_is_the_identity() -> None:
    keys = sample_keys(ids_of(10), 0)
    drawn = draw_parameters(AugmentationConfig(recipe="none"), keys, np.arange(3), 8)
    np.testing.assert_array_equal(drawn, np.broadcast_to([0, 0, 8, 8, *[0] * 8], (10, 3, 12)))
    images = random_images(10, 8, 8)
    np.testing.assert_array_equal(apply_crop(images, drawn[:, 1]), images)
    on_device = apply_crop_torch(torch.from_numpy(images), torch.from_numpy(drawn[:, 1]))
    np.testing.assert_array_equal(on_device.permute(0, 2, 3, 1).numpy(), images)


@pytest.mark.parametrize("num_variants", [1, 2, 4, 7])
def test_variant_offsets_are_uniform(keys: np.ndarray, num_variants: int) -> None:
    offsets = variant_offsets(keys, num_variants)
    assert offsets.dtype == np.int64
    assert offsets.tolist()[:50] == [reference.splitmix64(int(key)) % num_variants for key in keys[:50]]
    counts = np.bincount(offsets, minlength=num_variants)
    assert len(counts) == num_variants
    if num_variants > 1:
        assert chi_square_is_plausible(counts, MANY / num_variants, num_variants - 1)


def test_variant_offsets_are_independent_of_the_crops(keys: np.ndarray) -> None:
    top = draw_parameters(CIFAR, keys, np.arange(1), SIZE)[:, 0, 0].astype(int) + 4
    counts = np.bincount(top * 4 + variant_offsets(keys, 4), minlength=36)
    assert chi_square_is_plausible(counts, MANY / 36, 35)


# Random resized crops, jitter, grey and blur: draws ------------------------------------------------------


def uniform_of(key: int, variant: int, draw: int) -> float:
    """Draw number `draw` of a variant: 16 of them by the counter of each key, more by further keys."""
    modulus = 2**64
    stream, number = divmod(draw, 16)
    if stream:
        key = reference.splitmix64((key + stream * 0xD1B54A32D192ED03) % modulus)
    counter = (16 * variant + number + 1) * 0x9E3779B97F4A7C15
    return (reference.splitmix64((key + counter) % modulus) >> 11) / 2**53


def moco_parameters(key: int, variant: int, size: int, min_scale: float) -> list[int]:
    """One draw of the recipe `moco_v2`, a Python number at a time."""

    def draw(number: int) -> float:
        return uniform_of(key, variant, number)

    def between(low: float, high: float, number: int) -> float:
        return low + (high - low) * draw(number)

    top, left, height, width = 0, 0, size, size
    for attempt in range(10):
        area = size * size * between(min_scale, 1, 16 + attempt)
        shape = math.exp(between(math.log(3 / 4), math.log(4 / 3), 32 + attempt))
        rows, columns = round(math.sqrt(area / shape)), round(math.sqrt(area * shape))
        if 1 <= rows <= size and 1 <= columns <= size:
            top, left = math.floor(draw(0) * (size - rows + 1)), math.floor(draw(1) * (size - columns + 1))
            height, width = rows, columns
            break
    jitter = [0] * 5
    if draw(3) < 0.8:
        factors = [round(256 * between(0.6, 1.4, number)) for number in (4, 5, 6)]
        jitter = [*factors, round(1536 * between(-0.1, 0.1, 7)), 1 + math.floor(draw(8) * 24)]
    blur = round(256 * between(0.1, 2, 11)) if draw(10) < 0.5 else 0
    return [top, left, height, width, int(draw(2) < 0.5), *jitter, int(draw(9) < 0.2), blur]


@pytest.mark.parametrize("size", [5, 32, 224])
@pytest.mark.parametrize("min_scale", [0.2, 0.9])  # of the latter some ten attempts do not fit
def test_draws_of_moco_are_those_of_python_numbers(size: int, min_scale: float) -> None:
    """Stored knowledge fits these alone: if a change is meant, raise VERSION."""
    config = AugmentationConfig(recipe="moco_v2", min_scale=min_scale)
    keys, variants = sample_keys(ids_of(60), 1), np.array([0, 1, 2, 63, 10_000])
    expected = [[moco_parameters(int(key), int(k), size, min_scale) for k in variants] for key in keys]
    np.testing.assert_array_equal(draw_parameters(config, keys, variants, size), expected)


@pytest.fixture(scope="module")
def moco_draws(keys: np.ndarray) -> npt.NDArray[np.float64]:
    """[MANY, 2 variants, P]"""
    return draw_parameters(MOCO, keys, np.arange(2), 224).astype(float)


def column(draws: npt.NDArray[np.float64], name: str) -> npt.NDArray[np.float64]:
    values: npt.NDArray[np.float64] = draws[:, 0, PARAMETERS.index(name)]
    return values


@pytest.mark.parametrize(("config", "min_scale"), [(IMAGENET, 0.08), (MOCO, 0.2)])
def test_crops_are_distributed_as_torchvisions(
    config: AugmentationConfig, min_scale: float, keys: np.ndarray
) -> None:
    size = 224
    drawn = draw_parameters(config, keys, np.arange(1), size)[:, 0].astype(float)
    torch.manual_seed(0)
    image = torch.zeros(3, size, size)
    theirs = np.array(
        [RandomResizedCrop.get_params(image, [min_scale, 1.0], [3 / 4, 4 / 3]) for _ in range(MANY // 4)]
    )
    for name, of in {
        "height": lambda crops: crops[:, 2],
        "width": lambda crops: crops[:, 3],
        "area": lambda crops: crops[:, 2] * crops[:, 3],
        "shape": lambda crops: crops[:, 3] / crops[:, 2],
        "top": lambda crops: crops[:, 0],
        "left": lambda crops: crops[:, 1],
    }.items():
        assert stats.ks_2samp(of(drawn), of(theirs)).pvalue > 1e-3, name


@pytest.mark.parametrize("size", [1, 2, 7, 224])
@pytest.mark.parametrize("min_scale", [1e-6, 0.08, 1.0])
def test_random_crops_lie_within_the_image(size: int, min_scale: float) -> None:
    config = AugmentationConfig(recipe="imagenet", min_scale=min_scale)
    top, left, height, width = drawn_for(config, 2000, size).T[:4].astype(int)
    assert min(top.min(), left.min()) == 0
    assert min(height.min(), width.min()) >= 1
    assert max((top + height).max(), (left + width).max()) == size


def test_a_crop_that_never_fits_is_the_whole_image() -> None:
    """All of the area fits in no other shape than the square's own."""
    crops = drawn_for(AugmentationConfig(recipe="imagenet", min_scale=1.0), 2000, 1000)[:, :4]
    whole = (crops == [0, 0, 1000, 1000]).all(axis=1)
    assert whole.mean() > 0.95
    np.testing.assert_array_equal(crops[:, 2][~whole], 1000)


def test_areas_and_shapes_of_crops(keys: np.ndarray) -> None:
    """Small crops, which always fit at once: the area is uniform, and the logarithm of the shape."""
    config = AugmentationConfig(recipe="imagenet", min_scale=0.01)
    height, width = draw_parameters(config, keys, np.arange(1), 10_000)[:, 0, 2:4].astype(float).T
    area = height * width / 10_000**2
    small = area < 0.5
    assert stats.kstest(area[small], stats.uniform(0.01, 0.49).cdf).pvalue > 1e-3
    log_shape = np.log(width / height)[small] / np.log(4 / 3)
    assert stats.kstest(log_shape, stats.uniform(-1, 2).cdf).pvalue > 1e-3
    assert abs(np.corrcoef(area[small], log_shape)[0, 1]) < 4 / np.sqrt(small.sum())
    assert area.min() < 0.0102
    assert area.max() > 0.98


def test_jitter_is_uniform_within_its_strengths(moco_draws: npt.NDArray[np.float64]) -> None:
    order = column(moco_draws, "order")
    jittered = order > 0
    assert abs(jittered.mean() - 0.8) < 4 * np.sqrt(0.16 / MANY)
    for name, middle, strength in [
        ("brightness", 256, 0.4 * 256),
        ("contrast", 256, 0.4 * 256),
        ("saturation", 256, 0.4 * 256),
        ("hue", 0, 0.1 * 1536),
    ]:
        values = column(moco_draws, name)
        assert not values[~jittered].any()
        # As many values at the ends as the rounding gives them: less than one unit's worth.
        low, high = round(middle - strength), round(middle + strength)
        counts = np.bincount(values[jittered].astype(int) - low, minlength=high - low + 1)
        inner = counts[1:-1]
        assert chi_square_is_plausible(inner, inner.mean(), len(inner) - 1)
        assert len(counts) == high - low + 1
        assert 0 < counts[0] <= inner.mean() + 4 * np.sqrt(inner.mean())
    counts = np.bincount(order[jittered].astype(int), minlength=25)[1:]
    assert len(counts) == 24
    assert chi_square_is_plausible(counts, jittered.sum() / 24, 23)


def test_flips_grey_and_blur(moco_draws: npt.NDArray[np.float64]) -> None:
    blur = column(moco_draws, "blur")
    for happens, probability in [
        (column(moco_draws, "flip") == 1, 0.5),
        (column(moco_draws, "grey") == 1, 0.2),
        (blur > 0, 0.5),
    ]:
        assert abs(happens.mean() - probability) < 4 * np.sqrt(probability * (1 - probability) / MANY)
    sigma = blur[blur > 0] / 256
    assert stats.kstest(sigma, stats.uniform(0.1, 1.9).cdf).pvalue > 1e-3
    assert sigma.min() >= 0.1 - 1 / 256
    assert sigma.max() <= 2


def test_all_draws_are_independent_of_each_other_and_of_the_next_variants(
    moco_draws: npt.NDArray[np.float64],
) -> None:
    both = []
    for variant in (0, 1):
        named = dict(zip(PARAMETERS, moco_draws[:, variant].T, strict=True))
        room = (225 - named["height"], 225 - named["width"])
        jittered, blurred = named["order"] > 0, named["blur"] > 0
        both += [
            named["height"] * named["width"],
            np.log(named["width"] / named["height"]),
            (named["top"] + 0.5) / room[0] * (room[0] > 30),
            (named["left"] + 0.5) / room[1] * (room[1] > 30),
            named["flip"],
            jittered,
            *((named[name] - 256) * jittered for name in ("brightness", "contrast", "saturation")),
            named["hue"],
            (named["order"] - 12.5) * jittered,
            named["grey"],
            blurred,
            (named["blur"] - 1.05 * 256) * blurred,
        ]
    correlation = np.corrcoef(both)
    # A crop's place is blanked where it has little room: the more, the larger the crop.
    width = len(both) // 2
    for first, second in itertools.combinations(range(len(both)), 2):
        if first // width == second // width and {first % width, second % width} <= {0, 1, 2, 3}:
            continue
        assert abs(correlation[first, second]) < 4.5 / np.sqrt(MANY), (first, second)


def test_a_crops_place_is_uniform_whatever_its_size(keys: np.ndarray) -> None:
    top, left, height, width = draw_parameters(IMAGENET, keys, np.arange(1), 10_000)[:, 0, :4].astype(float).T
    places = (top + 0.5) / (10_001 - height), (left + 0.5) / (10_001 - width)
    free = (height < 9000) & (width < 9000)
    for place in places:
        assert stats.kstest(place[free], "uniform").pvalue > 1e-3
    values = [place[free] for place in places] + [height[free], width[free]]
    correlation = np.corrcoef(values)[:2]
    for first, second in [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3)]:
        assert abs(correlation[first, second]) < 4.5 / np.sqrt(free.sum())


def test_the_orders_of_the_jitter_are_all_there_are() -> None:
    names = [[PARAMETERS[operation] for operation in order] for order in JITTER_ORDERS[1:]]
    assert sorted(names) == sorted(
        list(order) for order in itertools.permutations(["brightness", "contrast", "saturation", "hue"])
    )
    assert (JITTER_ORDERS[0] == -1).all()


def test_strengths_and_probabilities_are_those_of_the_config() -> None:
    jitter = ColorJitterConfig(brightness=1.0, contrast=0.0, saturation=0.25, hue=0.5, probability=1.0)
    config = AugmentationConfig(
        recipe="moco_v2", color_jitter=jitter, grayscale_probability=1.0, blur_probability=0.0, flip=False
    )
    named = dict(zip(PARAMETERS, drawn_for(config, 5000, SIZE).astype(int).T, strict=True))
    assert named["order"].min() == 1
    assert (named["grey"] == 1).all()
    assert not named["blur"].any()
    assert not named["flip"].any()
    assert (named["contrast"] == 256).all()
    for name, low, high in [("brightness", 0, 512), ("saturation", 192, 320), ("hue", -768, 768)]:
        assert low <= named[name].min() <= low + (high - low) / 100
        assert high - (high - low) / 100 <= named[name].max() <= high
    calm = AugmentationConfig(recipe="moco_v2", color_jitter={"probability": 0.0})
    assert not drawn_for(calm, 1000, SIZE)[:, 5:10].any()
    np.testing.assert_array_equal(
        drawn_for(JITTERED_IMAGENET, 500, SIZE)[:, :10],
        drawn_for(AugmentationConfig(recipe="moco_v2", min_scale=0.08), 500, SIZE)[:, :10],
    )


# Random resized crops, jitter, grey and blur: pixels -----------------------------------------------------


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


def byte_by_byte(image: Images, parameters: Parameters) -> Images:
    """The whole of `augment` for one image by NumPy's int64, in the order of its description."""
    height, width, _ = image.shape
    named = {name: int(value) for name, value in zip(PARAMETERS, parameters, strict=True)}

    def line(values: np.ndarray, index: int) -> np.ndarray:
        return values[index] if 0 <= index < len(values) else np.zeros_like(values[0])

    def resized(values: np.ndarray, start: int, length: int) -> np.ndarray:
        size, lines = len(values), []
        for o in range(size):
            position = min(
                max(math.floor((2 * o + 1) * length * 128 / size + 0.5) - 128, 0), 256 * (length - 1)
            )
            lower, weight = divmod(position, 256)
            upper = min(lower + 1, length - 1)
            total = (256 - weight) * line(values, start + lower) + weight * line(values, start + upper)
            lines.append((total + 128) // 256)
        return np.stack(lines)

    pixels = resized(image.astype(np.int64), named["top"], named["height"])
    pixels = resized(pixels.swapaxes(0, 1), named["left"], named["width"]).swapaxes(0, 1)

    def luma(values: np.ndarray) -> np.ndarray:
        total: np.ndarray = (values @ np.array([77, 150, 29]) + 128) // 256
        return total[..., None]

    def blend(values: np.ndarray, other: np.ndarray | int, factor: int) -> np.ndarray:
        return ((values * factor + other * (256 - factor) + 128) // 256).clip(0, 255)

    for operation in JITTER_ORDERS[named["order"]]:
        amount = named[PARAMETERS[operation]]
        if operation == PARAMETERS.index("brightness"):
            pixels = blend(pixels, 0, amount)
        if operation == PARAMETERS.index("contrast"):
            mean = math.floor(luma(pixels).sum() / (height * width) + 0.5)
            pixels = blend(pixels, mean, amount)
        if operation == PARAMETERS.index("saturation"):
            pixels = blend(pixels, luma(pixels), amount)
        if operation == PARAMETERS.index("hue"):
            pixels = np.floor(turned(pixels, amount / 1536) + 0.5 + 1e-9).astype(np.int64)
    if named["grey"]:
        pixels = luma(pixels).repeat(3, axis=2)
    if named["blur"]:
        sigma = named["blur"] / 256
        gaussian = [math.exp(-(k**2) / (2 * sigma**2)) for k in range(-20, 21)]
        tails = [round(256 * sum(gaussian[k:]) / sum(gaussian)) for k in range(21, 42)]
        half = [here - beyond for here, beyond in itertools.pairwise(tails)]
        kernel = np.array([*half[::-1], 256 - 2 * sum(half), *half])
        for axis in (0, 1):
            pad = [(20, 20) if a == axis else (0, 0) for a in range(3)]
            padded = np.pad(pixels, pad, mode="reflect")
            shifted = [np.take(padded, k + np.arange(pixels.shape[axis]), axis) for k in range(41)]
            pixels = (np.tensordot(kernel, np.stack(shifted), 1) + 128) // 256
    if named["flip"]:
        pixels = pixels[:, ::-1]
    return pixels.astype(np.uint8)


def turned(values: np.ndarray, turns: float) -> Pixels:
    """The hue of every pixel turned, by Python's own HSV, in 0..255."""
    flat = [colorsys.rgb_to_hsv(*(pixel / 255)) for pixel in values.reshape(-1, 3)]
    back = [colorsys.hsv_to_rgb((hue + turns) % 1.0, saturation, value) for hue, saturation, value in flat]
    return np.array(back).reshape(values.shape) * 255


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


@every_recipe
def test_the_old_names_give_the_same(config: AugmentationConfig) -> None:
    images, parameters = random_images(20, SIZE, SIZE), drawn_for(config, 20, SIZE)
    expected = augmented(images, parameters)
    np.testing.assert_array_equal(apply_crop(images, parameters), expected)
    on_device = apply_crop_torch(torch.from_numpy(images), torch.from_numpy(parameters))
    np.testing.assert_array_equal(on_device.permute(0, 2, 3, 1), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@every_recipe
def test_a_gpu_gives_the_same_bytes(config: AugmentationConfig) -> None:
    images, parameters = random_images(100, 224, 224), drawn_for(config, 100, 224)
    expected = augmented(images, parameters)
    for place in ("cpu", "cuda"):
        on_device = augment(torch.from_numpy(images).cuda(), torch.from_numpy(parameters).to(place))
        assert on_device.is_cuda
        np.testing.assert_array_equal(on_device.cpu().numpy(), expected)


# Configuration -------------------------------------------------------------------------------------------


def test_each_recipe_has_its_own_values() -> None:
    def given(config: AugmentationConfig) -> dict[str, Any]:
        return config.model_dump(exclude_none=True)

    jitter = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "probability": 0.8}
    assert given(AugmentationConfig(recipe="none")) == {"recipe": "none"}
    assert given(CIFAR) == {"recipe": "cifar", "padding": 4, "flip": True}
    assert given(IMAGENET) == {"recipe": "imagenet", "flip": True, "min_scale": 0.08}
    assert given(MOCO) == {
        "recipe": "moco_v2",
        "flip": True,
        "min_scale": 0.2,
        "color_jitter": jitter,
        "grayscale_probability": 0.2,
        "blur_probability": 0.5,
    }
    switched_on = AugmentationConfig.model_validate({"recipe": "imagenet", "color_jitter": {}})
    assert given(switched_on)["color_jitter"] == jitter
    assert given(AugmentationConfig.model_validate({"recipe": "cifar", "padding": 2, "flip": False})) == {
        "recipe": "cifar",
        "padding": 2,
        "flip": False,
    }


@pytest.mark.parametrize("config", [*RECIPES.values(), AugmentationConfig(recipe="none")])
def test_a_saved_config_can_be_read_again(config: AugmentationConfig) -> None:
    assert AugmentationConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("recipe", "field", "value"),
    [
        ("none", "padding", 4),
        ("none", "flip", False),
        ("none", "color_jitter", {}),
        ("cifar", "min_scale", 0.2),
        ("cifar", "color_jitter", {}),
        ("cifar", "grayscale_probability", 0.0),
        ("imagenet", "padding", 0),
        ("imagenet", "grayscale_probability", 0.2),
        ("imagenet", "blur_probability", 0.5),
        ("moco_v2", "padding", 4),
    ],
)
def test_a_field_that_the_recipe_does_not_use(recipe: str, field: str, value: Any) -> None:
    with pytest.raises(ValidationError) as refusal:
        AugmentationConfig.model_validate({"recipe": recipe, field: value})
    ((path, text),) = explain(refusal.value, AugmentationConfig)
    assert path == (field,)
    assert f"the recipe '{recipe}' does not use it; leave it out" in text
    assert AugmentationConfig.model_validate({"recipe": recipe, field: None}).recipe == recipe


def test_all_that_is_wrong_is_said_at_once() -> None:
    wrong = {"recipe": "imagenet", "padding": 4, "color_jitter": {"hue": 0.7, "tint": 1}, "min_scal": 0.1}
    with pytest.raises(ValidationError) as refusal:
        AugmentationConfig.model_validate(wrong)
    paths = {path for path, _ in explain(refusal.value, AugmentationConfig)}
    assert paths == {("padding",), ("color_jitter", "hue"), ("color_jitter", "tint"), ("min_scal",)}


@pytest.mark.parametrize(
    ("field", "option"),
    [
        ("padding", {"padding": -1}),
        ("padding", {"padding": 33}),
        ("padding", {"padding": True}),
        ("recipe", {"recipe": "moco"}),
        ("flip", {"flip": "maybe"}),
        ("min_scale", {"recipe": "imagenet", "min_scale": 0.0}),
        ("min_scale", {"recipe": "imagenet", "min_scale": 1.1}),
        ("min_scale", {"recipe": "imagenet", "min_scale": float("nan")}),
        ("grayscale_probability", {"recipe": "moco_v2", "grayscale_probability": 1.5}),
        ("blur_probability", {"recipe": "moco_v2", "blur_probability": -0.1}),
        ("color_jitter.brightness", {"recipe": "moco_v2", "color_jitter": {"brightness": 1.5}}),
        ("color_jitter.contrast", {"recipe": "moco_v2", "color_jitter": {"contrast": -0.1}}),
        ("color_jitter.saturation", {"recipe": "moco_v2", "color_jitter": {"saturation": "much"}}),
        ("color_jitter.hue", {"recipe": "moco_v2", "color_jitter": {"hue": 0.6}}),
        ("color_jitter.probability", {"recipe": "moco_v2", "color_jitter": {"probability": 2}}),
    ],
)
def test_options_out_of_range(field: str, option: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as refusal:
        AugmentationConfig.model_validate(option)
    assert [".".join(path) for path, _ in explain(refusal.value, AugmentationConfig)] == [field]
