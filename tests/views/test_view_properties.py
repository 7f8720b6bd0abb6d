"""What edge and high_frequency must do on flat images, steps, waves, flipped images and at uint8's limits."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from pydantic import ValidationError

from tmkd_ray.views import build_view

Images = npt.NDArray[np.uint8]

OPERATORS = ("canny", "sobel", "scharr", "laplacian")
FILTERS: tuple[dict[str, Any], ...] = (
    {"filter": "fft", "cutoff_shape": "disc"},
    {"filter": "fft", "cutoff_shape": "box"},
    {"filter": "gaussian"},
    {"filter": "laplacian"},
)
every_operator = pytest.mark.parametrize("operator", OPERATORS)
every_filter = pytest.mark.parametrize("options", FILTERS, ids=lambda options: "-".join(options.values()))


def flat_images() -> list[Images]:
    """Constant images in black, white, grey and colours, in sizes down to 1×1."""
    colours = [(0, 0, 0), (255, 255, 255), (77, 77, 77), (255, 0, 3), (10, 200, 129)]
    sizes = [(1, 1), (1, 7), (2, 3), (13, 22), (32, 32)]
    return [np.full((2, *size, 3), colour, np.uint8) for colour in colours for size in sizes]


def rgb(image_HW: npt.ArrayLike) -> Images:
    """[1, H, W, 3]: one grey image."""
    return np.repeat(np.asarray(image_HW, np.uint8)[None, :, :, None], 3, axis=3)


def vertical_step(low: int, high: int) -> Images:
    """[1, 12, 16, 3]: columns 0 to 7 are `low`, the others `high`."""
    return rgb(np.tile(np.repeat([low, high], 8), (12, 1)))


@every_operator
@pytest.mark.parametrize("blur_sigma", [0.0, 1.5])
def test_flat_images_have_no_edges(operator: str, blur_sigma: float) -> None:
    options = {"operator": operator, "blur_sigma": blur_sigma, "canny_low": 0, "canny_high": 0}
    for images in flat_images():
        np.testing.assert_array_equal(build_view("edge", options | {"mode": "map"})(images), 0)
        enhance = build_view("edge", options | {"mode": "enhance", "strength": 1})
        np.testing.assert_array_equal(enhance(images), images)


@every_filter
def test_flat_images_have_no_detail(options: dict[str, Any]) -> None:
    for images in flat_images():
        enhance = build_view("high_frequency", options | {"mode": "enhance", "strength": 1})
        np.testing.assert_array_equal(enhance(images), images)
        residual = build_view("high_frequency", options | {"mode": "residual"})
        np.testing.assert_array_equal(residual(images), 128)


@pytest.mark.parametrize(
    ("name", "options"),
    [*(("edge", {"operator": o}) for o in OPERATORS), *(("high_frequency", f) for f in FILTERS)],
)
def test_strength_zero_is_the_identity_and_more_strength_changes_more(
    name: str, options: dict[str, Any], scenes: Images, noise: Images
) -> None:
    for images in (scenes, noise):
        change = [
            np.abs(
                build_view(name, options | {"mode": "enhance", "strength": s})(images).astype(int) - images
            ).sum()
            for s in (0, 0.25, 0.5, 1)
        ]
        assert change[0] == 0
        assert change == sorted(set(change))


@every_operator
@pytest.mark.parametrize("transpose", [False, True])
def test_edge_map_finds_a_step_where_it_is(operator: str, transpose: bool) -> None:
    images = vertical_step(40, 190)
    if transpose:
        images = images.transpose(0, 2, 1, 3)
    edges = build_view("edge", {"operator": operator, "mode": "map"})(images)[0, :, :, 0]
    if transpose:
        edges = edges.T
    assert (edges[:, 7:9].max(axis=1) > 0).all(), "every row meets the step"
    assert (edges[:, :7] == 0).all()
    assert (edges[:, 9:] == 0).all()


@pytest.mark.parametrize(
    ("operator", "kernel_size"),
    [*(("sobel", k) for k in (1, 3, 5, 7)), *(("laplacian", k) for k in (1, 3, 5, 7)), ("scharr", 3)],
)
@pytest.mark.parametrize(("low", "high"), [(0, 255), (255, 0), (40, 190), (100, 103)])
def test_edge_magnitude_of_a_step_is_its_height(operator: str, kernel_size: int, low: int, high: int) -> None:
    options = {"operator": operator, "kernel_size": kernel_size, "mode": "map"}
    edges = build_view("edge", options)(vertical_step(low, high))
    np.testing.assert_array_equal(edges.max(axis=2), abs(high - low))


@pytest.mark.parametrize(("low", "high", "found"), [(100, 124, False), (100, 126, True)])
def test_canny_threshold_is_four_times_the_step(low: int, high: int, found: bool) -> None:
    canny = build_view("edge", {"operator": "canny", "mode": "map", "canny_low": 100, "canny_high": 100})
    assert canny(vertical_step(low, high)).any() == found


@pytest.mark.parametrize(("threshold", "found"), [(105, True), (107, False)])
def test_canny_takes_the_euclidean_norm(threshold: int, found: bool) -> None:
    # Along a diagonal step of 25 both derivatives are 3 · 25: the norm is 106.1, the sum of magnitudes 150.
    diagonal = rgb(100 + 25 * np.tri(16))
    options = {"operator": "canny", "mode": "map", "canny_low": threshold, "canny_high": threshold}
    assert build_view("edge", options)(diagonal)[:, 4:-4, 4:-4].any() == found


def test_canny_follows_a_weak_edge_only_from_a_strong_one() -> None:
    # The step fades from 100 grey levels at the top to 30 at the bottom: norms 400 to 120.
    fading = np.full((24, 16), 50.0)
    fading[:, 8:] += np.linspace(100, 30, 24)[:, None]
    everywhere_weak = np.full((24, 16), 50.0)
    everywhere_weak[:, 8:] += 40
    canny = build_view("edge", {"operator": "canny", "mode": "map", "canny_low": 100, "canny_high": 300})
    followed = canny(rgb(fading))[0, :, :, 0]
    assert set(np.unique(followed)) == {0, 255}
    assert (followed[2:-2, 6:10].max(axis=1) == 255).all(), "down to the weak end"
    assert not canny(rgb(everywhere_weak)).any()


def test_a_ramp_has_slope_but_no_curvature() -> None:
    ramp = rgb(np.tile(np.arange(0, 160, 5), (9, 1)))
    for operator in ("sobel", "scharr"):
        edges = build_view("edge", {"operator": operator, "mode": "map"})(ramp)
        # Both neighbours of a pixel differ by two steps of 5, and a step of 10 gives 10.
        np.testing.assert_array_equal(edges[:, :, 1:-1], 10)
    for name, options, zero in (
        ("edge", {"operator": "laplacian", "mode": "map"}, 0),
        ("high_frequency", {"filter": "laplacian", "mode": "residual"}, 128),
        ("high_frequency", {"filter": "gaussian", "sigma": 1, "mode": "residual"}, 128),
    ):
        np.testing.assert_array_equal(build_view(name, options)(ramp)[:, :, 5:-5], zero)


def test_edges_are_those_of_luma() -> None:
    red_green = vertical_step(0, 0)
    red_green[:, :, :8] = (196, 0, 0)  # luma 58.6
    red_green[:, :, 8:] = (0, 100, 0)  # luma 58.7
    assert not build_view("edge", {"mode": "map"})(red_green).any()


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("shape", ["disc", "box"])
@pytest.mark.parametrize(
    ("size", "waves", "removed"),
    [(32, 3, True), (32, 8, True), (32, 9, False), (32, 16, False), (27, 6, True), (27, 7, False)],
)
def test_fft_removes_slow_waves_and_keeps_fast_ones(
    axis: int, shape: str, size: int, waves: int, removed: bool
) -> None:
    # Cutoff 0.5 of Nyquist is a quarter of a cycle per pixel: 8 waves in 32 pixels, 6.75 in 27.
    wave = 128 + 90 * np.cos(2 * np.pi * waves * np.arange(size) / size)
    images = np.broadcast_to(wave.reshape([-1 if i == axis else 1 for i in range(4)]), (1, *[size] * 2, 3))
    images = np.rint(images).astype(np.uint8)
    residual = build_view("high_frequency", {"filter": "fft", "cutoff_shape": shape, "mode": "residual"})
    np.testing.assert_allclose(residual(images), 128.0 if removed else images, rtol=0, atol=1)


def test_fft_disc_and_box_differ_in_the_corners() -> None:
    # 7 waves in 32 pixels along both axes: 0.4375 of Nyquist on each, 0.62 in Euclidean norm.
    y, x = np.mgrid[0:32, 0:32]
    images = rgb(np.rint(128 + 90 * np.cos(2 * np.pi * 7 * (x + y) / 32)))
    options = {"filter": "fft", "mode": "residual", "cutoff": 0.5}
    disc, box = (build_view("high_frequency", options | {"cutoff_shape": s})(images) for s in ("disc", "box"))
    np.testing.assert_allclose(disc, images, rtol=0, atol=1)
    np.testing.assert_allclose(box, 128.0, rtol=0, atol=1)


def test_fft_filters_the_channels_apart() -> None:
    slow, fast = (np.rint(128 + 90 * np.cos(2 * np.pi * k * np.arange(32) / 32)) for k in (2, 13))
    images = np.stack([np.tile(wave, (32, 1)) for wave in (fast, slow, fast)], axis=-1)[None].astype(np.uint8)
    residual = build_view("high_frequency", {"filter": "fft", "mode": "residual"})(images)
    np.testing.assert_allclose(residual[..., [0, 2]], images[..., [0, 2]], rtol=0, atol=1)
    np.testing.assert_allclose(residual[..., 1], 128, rtol=0, atol=1)


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(("edge", {"operator": o}) for o in ("sobel", "scharr", "laplacian")),
        *(("edge", {"operator": "sobel", "kernel_size": k}) for k in (1, 5, 7)),
        *(("high_frequency", f) for f in FILTERS),
    ],
)
def test_flips_commute(axis: int, name: str, options: dict[str, Any], scenes: Images, noise: Images) -> None:
    # Not asked of Canny: its non-maximum suppression breaks ties by direction.
    modes = ("enhance", "map") if name == "edge" else ("enhance", "residual")
    for images in (scenes, noise):
        for mode in modes:
            view = build_view(name, options | {"mode": mode})
            flipped = np.flip(view(np.flip(images, axis)), axis)
            np.testing.assert_allclose(flipped, view(images).astype(int), rtol=0, atol=1)


def test_edge_saturates(noise: Images) -> None:
    for operator in OPERATORS:
        result = build_view("edge", {"operator": operator, "strength": 1})(noise)
        assert (result >= noise).all(), "a sum that wraps round would fall"
        assert (result == 255).mean() > 0.1


@every_filter
def test_high_frequency_saturates(options: dict[str, Any]) -> None:
    board = rgb(255 * (np.indices((16, 16)).sum(axis=0) % 2))
    enhance = build_view("high_frequency", options | {"mode": "enhance", "strength": 1})
    np.testing.assert_array_equal(enhance(board), board)
    residual = build_view("high_frequency", options | {"mode": "residual"})(board)
    assert (residual[board == 255] >= 250).all()
    assert (residual[board == 0] <= 5).all()


def test_edges_of_digits_lie_on_their_strokes(digits: Images) -> None:
    edges = build_view("edge", {"mode": "map"})(digits)[..., 0].astype(float)
    # A pixel away from any other brightness has no edge; the strongest edges are at the largest differences.
    luma = digits @ np.array([0.299, 0.587, 0.114])
    shifted = [
        np.roll(luma, shift, (1, 2))
        for shift in ((0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (-1, -1), (1, -1), (-1, 1))
    ]
    contrast = np.max([np.abs(luma - other) for other in shifted], axis=0)[:, 1:-1, 1:-1]
    edges = edges[:, 1:-1, 1:-1]
    assert (edges[contrast == 0] == 0).all()
    assert (contrast == 0).mean() > 0.1
    assert edges[contrast > 100].min() > edges[contrast < 10].max()


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("edge", {"operator": "roberts"}, "operator"),
        ("edge", {"mode": "residual"}, "mode"),
        ("edge", {"strength": -0.1}, "strength"),
        ("edge", {"strength": 1.1}, "strength"),
        ("edge", {"strength": float("nan")}, "strength"),
        ("edge", {"strength": True}, "expected a number"),
        ("edge", {"kernel_size": 4}, "kernel_size"),
        ("edge", {"operator": "scharr", "kernel_size": 5}, "kernel_size must be 3 for scharr"),
        ("edge", {"operator": "canny", "kernel_size": 1}, "kernel_size must be 3 for canny"),
        ("edge", {"blur_sigma": -1}, "blur_sigma"),
        ("edge", {"canny_low": 201}, "must not exceed canny_high"),
        ("edge", {"canny_high": 1141}, "canny_high"),
        ("high_frequency", {"filter": "median"}, "filter"),
        ("high_frequency", {"mode": "map"}, "mode"),
        ("high_frequency", {"strength": -1}, "strength"),
        ("high_frequency", {"strength": float("inf")}, "strength"),
        ("high_frequency", {"cutoff": 0}, "cutoff"),
        ("high_frequency", {"cutoff": 1}, "cutoff"),
        ("high_frequency", {"cutoff_shape": "ring"}, "cutoff_shape"),
        ("high_frequency", {"sigma": 0}, "sigma"),
    ],
)
def test_bad_fields_are_refused_by_name(name: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        build_view(name, fields)
