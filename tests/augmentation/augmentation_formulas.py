"""Augmentation written out for one image, in NumPy and Python's own colours."""

import colorsys
import itertools
import math

import numpy as np
import numpy.typing as npt
from augmentation_samples import Images, Parameters

from tmkd_ray.augmentation import JITTER_ORDERS, PARAMETERS


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


def turned(values: np.ndarray, turns: float) -> npt.NDArray[np.float64]:
    """The hue of every pixel turned, by Python's own HSV, in 0..255."""
    flat = [colorsys.rgb_to_hsv(*(pixel / 255)) for pixel in values.reshape(-1, 3)]
    back = [colorsys.hsv_to_rgb((hue + turns) % 1.0, saturation, value) for hue, saturation, value in flat]
    return np.array(back).reshape(values.shape) * 255
