"""The pixels of edge and high_frequency against their definitions, written out in float64 NumPy.

A view rounds once, at its end, so it may differ from the unrounded value by half a grey level (HALF adds a
little for float32); edge's `enhance` rounds twice and may differ by a whole one.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tmkd_ray.views import build_view

Images = npt.NDArray[np.uint8]
Array = npt.NDArray[np.float64]

HALF = 0.51

# Pascal's triangle smooths; its difference across one or two pixels differentiates.
SMOOTH = {1: [1], 3: [1, 2, 1], 5: [1, 4, 6, 4, 1], 7: [1, 6, 15, 20, 15, 6, 1]}
FIRST = {1: [-1, 0, 1], 3: [-1, 0, 1], 5: [-1, -2, 0, 2, 1], 7: [-1, -4, -5, 0, 5, 4, 1]}
SECOND = {1: [1, -2, 1], 3: [1, -2, 1], 5: [1, 0, -2, 0, 1], 7: [1, 2, -1, -4, -1, 2, 1]}
SOBEL_STEP = {1: 1, 3: 4, 5: 48, 7: 640}
LAPLACIAN_STEP = {1: 1, 3: 4, 5: 16, 7: 192}


def correlate(image_HW: Array, kernel: npt.ArrayLike) -> Array:
    """Slide the kernel over the image, whose borders are mirrored without repeating the outermost pixel."""
    kernel = np.asarray(kernel, np.float64)
    height, width = image_HW.shape
    padded = np.pad(image_HW, [(kernel.shape[0] // 2,) * 2, (kernel.shape[1] // 2,) * 2], mode="reflect")
    result = np.zeros_like(image_HW)
    for (dy, dx), weight in np.ndenumerate(kernel):
        result += weight * padded[dy : dy + height, dx : dx + width]
    return result


def luma(image_HWC: Images) -> Array:
    return np.rint(image_HWC.astype(np.float64) @ [0.299, 0.587, 0.114])


def without_luma_ties(images: Images) -> Images:
    """Change green by a level where the luma is so near a half that a fixed-point sum may round either way."""
    images = images.copy()
    for _ in range(3):
        exact = images.astype(np.float64) @ [0.299, 0.587, 0.114]
        near_tie = np.abs(exact % 1 - 0.5) < 0.05
        images[..., 1] = np.where(near_tie, images[..., 1] ^ 1, images[..., 1])
    assert not near_tie.any()
    return images


def gaussian_kernel(sigma: float) -> Array:
    offset = np.arange(-np.ceil(4 * sigma), np.ceil(4 * sigma) + 1)
    weight = np.exp(-(offset**2) / (2 * sigma**2))
    return np.outer(weight, weight) / weight.sum() ** 2


def edge_magnitude(gray: Array, operator: str, size: int) -> Array:
    if operator == "laplacian":
        second_x, second_y = np.outer(SMOOTH[size], SECOND[size]), np.outer(SECOND[size], SMOOTH[size])
        return np.abs(correlate(gray, second_x) + correlate(gray, second_y)) / LAPLACIAN_STEP[size]
    if operator == "scharr":
        kernel, step = np.array([[-3, 0, 3], [-10, 0, 10], [-3, 0, 3]]), 16
    else:
        kernel, step = np.outer(SMOOTH[size], FIRST[size]), SOBEL_STEP[size]
    return np.hypot(correlate(gray, kernel), correlate(gray, kernel.T)) / step


@pytest.mark.parametrize(
    ("operator", "size"),
    [*(("sobel", k) for k in (1, 3, 5, 7)), *(("laplacian", k) for k in (1, 3, 5, 7)), ("scharr", 3)],
)
@pytest.mark.parametrize("blur_sigma", [0.0, 0.8])
def test_edge(
    operator: str, size: int, blur_sigma: float, noise: Images, digits: Images, scenes: Images
) -> None:
    options = {"operator": operator, "kernel_size": size, "blur_sigma": blur_sigma}
    edge_map = build_view("edge", options | {"mode": "map"})
    enhanced = build_view("edge", options | {"mode": "enhance", "strength": 0.3})
    for images in map(without_luma_ties, (noise, digits, scenes)):
        maps, results = edge_map(images), enhanced(images)
        for image, drawn, result in zip(images, maps, results, strict=True):
            gray = luma(image)
            if blur_sigma:
                gray = correlate(gray, gaussian_kernel(blur_sigma))
            edge = np.minimum(edge_magnitude(gray, operator, size), 255)[..., None]
            np.testing.assert_allclose(drawn, np.broadcast_to(edge, drawn.shape), rtol=0, atol=HALF)
            np.testing.assert_allclose(result, np.minimum(image + 0.3 * edge, 255), rtol=0, atol=1)
    assert edge_map(scenes).std() > 2, "the comparison needs images with edges"


def test_edge_enhances_by_exactly_the_rounded_map(scenes: Images, noise: Images) -> None:
    for operator in ("canny", "sobel", "scharr", "laplacian"):
        for images in (scenes, noise):
            edges = build_view("edge", {"operator": operator, "mode": "map"})(images)
            result = build_view("edge", {"operator": operator, "mode": "enhance", "strength": 0.25})(images)
            expected = np.minimum(images + np.rint(0.25 * edges), 255)
            np.testing.assert_array_equal(result, expected)


def detail(image_HW: Array, options: dict[str, Any]) -> Array:
    if options["filter"] == "laplacian":
        return correlate(image_HW, [[0, -1 / 4, 0], [-1 / 4, 1, -1 / 4], [0, -1 / 4, 0]])
    if options["filter"] == "gaussian":
        return image_HW - correlate(image_HW, gaussian_kernel(options["sigma"]))
    y, x = np.meshgrid(*(np.abs(np.fft.fftfreq(n)) / 0.5 for n in image_HW.shape), indexing="ij")
    radius = np.sqrt(y**2 + x**2) if options["cutoff_shape"] == "disc" else np.maximum(y, x)
    return np.fft.ifft2(np.where(radius <= options["cutoff"], 0, np.fft.fft2(image_HW))).real


@pytest.mark.parametrize(
    "options",
    [
        *(
            {"filter": "fft", "cutoff": cutoff, "cutoff_shape": shape}
            for cutoff in (0.21, 0.57)
            for shape in ("disc", "box")
        ),
        *({"filter": "gaussian", "sigma": sigma} for sigma in (0.5, 1.0, 2.3)),
        {"filter": "laplacian"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_high_frequency(options: dict[str, Any], noise: Images, digits: Images, scenes: Images) -> None:
    residual = build_view("high_frequency", options | {"mode": "residual"})
    for images in (noise, digits, scenes):
        images_BCHW = images.transpose(0, 3, 1, 2).astype(np.float64)
        expected = np.stack([[detail(channel, options) for channel in image] for image in images_BCHW])
        expected = expected.transpose(0, 2, 3, 1)
        np.testing.assert_allclose(residual(images), np.clip(128 + expected, 0, 255), rtol=0, atol=HALF)
        for strength in (0.5, 1.0, 4.0):
            enhanced = build_view("high_frequency", options | {"mode": "enhance", "strength": strength})
            np.testing.assert_allclose(
                enhanced(images), np.clip(images + strength * expected, 0, 255), rtol=0, atol=HALF
            )
    assert residual(noise).std() > 5, "the comparison needs images with detail"


def test_mirror_swaps_left_and_right(noise: Images) -> None:
    """Pixel by pixel; twice is the image itself."""
    mirror = build_view("mirror", {})
    expected = np.array([[row[::-1].tolist() for row in image] for image in noise], np.uint8)
    np.testing.assert_array_equal(mirror(noise), expected)
    np.testing.assert_array_equal(mirror(mirror(noise)), noise)
