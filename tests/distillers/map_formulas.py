"""What networks do to feature maps, written out in float64 NumPy, and gradients by every map of a student."""

from collections.abc import Callable, Sequence

import numpy as np
from reference_formulas import Array, central_difference

Maps = list[Array]


def pooled(map_BCHW: Array, height: int, width: int) -> Array:
    """Mean over the window of each target pixel: from floor(i n / m) to ceil((i + 1) n / m)."""
    batch, channels, rows, columns = map_BCHW.shape
    result = np.zeros((batch, channels, height, width))
    for i in range(height):
        for j in range(width):
            top, bottom = i * rows // height, -(-(i + 1) * rows // height)
            left, right = j * columns // width, -(-(j + 1) * columns // width)
            result[:, :, i, j] = map_BCHW[:, :, top:bottom, left:right].mean(axis=(2, 3))
    return result


def alike(student_BCHW: Array, teacher_BCHW: Array) -> tuple[Array, Array]:
    height = min(student_BCHW.shape[2], teacher_BCHW.shape[2])
    width = min(student_BCHW.shape[3], teacher_BCHW.shape[3])
    return pooled(student_BCHW, height, width), pooled(teacher_BCHW, height, width)


def nearest(map_BCHW: Array, height: int, width: int) -> Array:
    """Each target pixel is the source's pixel at floor(i n / m)."""
    rows = [i * map_BCHW.shape[2] // height for i in range(height)]
    columns = [j * map_BCHW.shape[3] // width for j in range(width)]
    result: Array = map_BCHW[:, :, rows][:, :, :, columns]
    return result


def convolution(map_BCHW: Array, weight_OCKK: Array, bias_O: Array | None = None) -> Array:
    """Stride 1, zeros around the map, which keeps its size."""
    pad = weight_OCKK.shape[2] // 2
    padded = np.pad(map_BCHW, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    batch, _, height, width = map_BCHW.shape
    result = np.zeros((batch, len(weight_OCKK), height, width))
    for i in range(height):
        for j in range(width):
            window = padded[:, :, i : i + 2 * pad + 1, j : j + 2 * pad + 1]
            result[:, :, i, j] = np.tensordot(window, weight_OCKK, axes=([1, 2, 3], [1, 2, 3]))
    return result if bias_O is None else result + bias_O[:, None, None]


def batch_norm(map_BCHW: Array, scale_C: Array, shift_C: Array) -> Array:
    """By the batch's own mean and (population) variance."""
    mean = map_BCHW.mean(axis=(0, 2, 3), keepdims=True)
    variance = map_BCHW.var(axis=(0, 2, 3), keepdims=True)
    normalized = (map_BCHW - mean) / np.sqrt(variance + 1e-5)
    return normalized * scale_C[:, None, None] + shift_C[:, None, None]


def map_gradients(formula: Callable[[Maps], float], maps: Sequence[Array]) -> list[Array]:
    """The gradient of a formula of several maps by each of them."""

    def by_one(index: int) -> Array:
        before, after = list(maps[:index]), list(maps[index + 1 :])
        return central_difference(lambda value: formula([*before, value, *after]), maps[index])

    return [by_one(index) for index in range(len(maps))]
