"""Draws: against plain integers and Python numbers, and their statistics."""

import itertools
import math

import numpy as np
import numpy.typing as npt
import pytest
import reference_formulas as reference
import torch
from augmentation_samples import (
    CIFAR,
    IMAGENET,
    JITTERED_IMAGENET,
    MOCO,
    SIZE,
    augmented,
    drawn_for,
    every_recipe,
    ids_of,
    parameters_of,
    random_images,
)
from scipy import stats
from torchvision.transforms import RandomResizedCrop

from tmkd_ray.augmentation import (
    JITTER_ORDERS,
    PARAMETERS,
    VERSION,
    AugmentationConfig,
    ColorJitterConfig,
    draw_parameters,
    sample_keys,
    variant_offsets,
)

MANY = 20_000


@pytest.fixture(scope="module")
def keys() -> np.ndarray:
    return sample_keys(ids_of(MANY), seed=7)


def chi_square_is_plausible(counts: np.ndarray, expected: float | np.ndarray, freedom: int) -> bool:
    """Within four standard deviations of its mean: neither uneven nor suspiciously even."""
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return abs(statistic - freedom) < 4 * np.sqrt(2 * freedom)


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
    np.testing.assert_array_equal(augmented(images, drawn[:, 1]), images)


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
