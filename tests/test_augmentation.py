"""Crops against a pixel-by-pixel reading; draws against Python integers, and their statistics."""

import numpy as np
import numpy.typing as npt
import pytest
import reference_formulas as reference
import torch
from pydantic import ValidationError

from tmkd_ray.augmentation import (
    PARAMETERS,
    VERSION,
    AugmentationConfig,
    apply_crop,
    apply_crop_torch,
    draw_parameters,
    sample_keys,
    variant_offsets,
)

Images = npt.NDArray[np.uint8]

CIFAR = AugmentationConfig()
SIZE = 32
MANY = 20_000


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


def parameters_of(*rows: tuple[int, int, int], size: int) -> npt.NDArray[np.int16]:
    """Rows of (top, left, flip)."""
    return np.array([[top, left, size, size, flip] for top, left, flip in rows], dtype=np.int16)


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
    assert PARAMETERS == ("top", "left", "height", "width", "flip")


@pytest.mark.parametrize("size", [1, 2, 7])
def test_crops_are_read_pixel_by_pixel(size: int) -> None:
    images = random_images(len(SOME_CROPS), size, size)
    parameters = parameters_of(*SOME_CROPS, size=size)
    expected = np.stack([reference.crop(i, p) for i, p in zip(images, parameters, strict=True)])
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
        np.testing.assert_array_equal(crops[b], reference.crop(images[b], parameters[b, 0]))


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
    crops = apply_crop_torch(torch.zeros(2, 8, 8, 3, dtype=torch.uint8), torch.zeros(2, 5, dtype=torch.int16))
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
    np.testing.assert_array_equal(drawn, expected)


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


def test_a_draw_depends_neither_on_the_order_nor_on_the_set_of_images() -> None:
    ids = ids_of(100)
    drawn = draw_parameters(CIFAR, sample_keys(ids, 5), np.arange(4), SIZE)
    order = np.random.default_rng(0).permutation(100)
    for rows in (order, order[:7]):
        again = draw_parameters(CIFAR, sample_keys(ids[rows], 5), np.arange(4), SIZE)
        np.testing.assert_array_equal(again, drawn[rows])


def test_a_variant_does_not_depend_on_the_others() -> None:
    keys = sample_keys(ids_of(100), 5)
    drawn = draw_parameters(CIFAR, keys, np.arange(8), SIZE)
    np.testing.assert_array_equal(draw_parameters(CIFAR, keys, np.arange(3), SIZE), drawn[:, :3])
    for variant in (0, 3, 7):
        alone = draw_parameters(CIFAR, keys, np.array([variant]), SIZE)
        np.testing.assert_array_equal(alone[:, 0], drawn[:, variant])


def test_variants_and_seeds_differ() -> None:
    ids = ids_of(200)
    drawn = draw_parameters(CIFAR, sample_keys(ids, 0), np.arange(6), SIZE)
    for variant in range(1, 6):
        same = (drawn[:, 0] == drawn[:, variant]).all(axis=1)
        assert same.mean() < 0.05  # one in 162 by chance
    other_seed = draw_parameters(CIFAR, sample_keys(ids, 1), np.arange(6), SIZE)
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
    drawn = draw_parameters(AugmentationConfig(recipe="none", padding=4, flip=True), keys, np.arange(3), 8)
    np.testing.assert_array_equal(drawn, np.broadcast_to([0, 0, 8, 8, 0], (10, 3, 5)))
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


@pytest.mark.parametrize(
    "option", [{"padding": -1}, {"padding": 33}, {"padding": True}, {"recipe": "imagenet"}]
)
def test_options_out_of_range(option: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(option))):
        AugmentationConfig.model_validate(option)
