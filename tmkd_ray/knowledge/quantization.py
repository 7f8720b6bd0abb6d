"""Vectors as int8 with one scale each: half the size of float16.

Symmetric, per vector: the largest magnitude becomes 127 (e.g. Jacob et al. 2018, arXiv 1712.05877, without its
zero point).
"""

import numpy as np

from tmkd_ray.errors import UserError

_MAX = 127


def quantize(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Round each vector along the last axis to int8 [..., D] and a float32 scale [...].

    `quantized · scale` is within `scale / 2` of every value, and `scale` is the vector's largest magnitude over
    127, rounded up to a float32: at most 127 steps, none of which overflows. A vector of zeros has scale 0.

    Args:
        values: floating point, [..., D].

    Raises:
        UserError: a value is NaN, infinite, or beyond float32.
    """
    largest = np.abs(values).max(axis=-1, initial=0).astype(np.float64)
    wanted = largest / _MAX
    with np.errstate(over="ignore"):
        scale: np.ndarray = wanted.astype(np.float32)
        scale = np.where(scale < wanted, np.nextafter(scale, np.float32(np.inf)), scale)
    if not np.isfinite(scale).all():
        raise UserError("cannot quantise NaN or infinite values to int8; check the teachers' weights")
    # In float64, so that the quotient is not rounded across a half.
    divisor = np.where(scale == 0, 1, scale).astype(np.float64)
    return np.rint(values / divisor[..., None]).astype(np.int8), scale


def dequantize(quantized: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Return float32 [..., D] of int8 [..., D] and scales [...]."""
    return quantized.astype(np.float32) * scale[..., None].astype(np.float32)
