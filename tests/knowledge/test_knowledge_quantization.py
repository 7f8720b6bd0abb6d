"""int8 with a scale for each vector: never further than half a step from the value."""

import numpy as np
import pytest

from tmkd_ray.errors import UserError
from tmkd_ray.knowledge.quantization import dequantize, quantize


def check_bound(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    with np.errstate(all="raise", under="ignore"):
        quantized, scale = quantize(values)
    assert quantized.dtype == np.int8
    assert quantized.shape == values.shape
    assert scale.dtype == np.float32
    assert scale.shape == values.shape[:-1]
    assert (np.abs(quantized.astype(int)) <= 127).all()
    error = np.abs(
        values.astype(np.float64) - quantized.astype(np.float64) * scale[..., None].astype(np.float64)
    )
    # The last factor is float64's own rounding in this very line.
    assert (error <= scale[..., None].astype(np.float64) / 2 * (1 + 1e-12)).all()
    return quantized, scale


@pytest.mark.parametrize("magnitude", [1e-44, 1e-38, 1e-3, 1.0, 6e4, 3e38])
@pytest.mark.parametrize("dtype", ["<f4", "<f8"])
def test_within_half_a_step(magnitude: float, dtype: str) -> None:
    rng = np.random.default_rng(0)
    values = (rng.uniform(-1, 1, (50, 3, 64)) * magnitude).astype(dtype)
    quantized, scale = check_bound(values)
    if magnitude > 1e-37:  # below, a float32 has too few digits for 127 steps
        assert (np.abs(quantized).max(axis=-1) == 127).all()
        np.testing.assert_allclose(scale, np.abs(values).max(axis=-1).astype(np.float64) / 127, rtol=2e-7)


def test_quotients_are_not_rounded_across_a_half() -> None:
    """float32 values beside the middle of two steps, for which a float32 quotient is that middle itself."""
    largest = np.random.default_rng(0).uniform(1, 2, (500, 1)).astype(np.float32)
    _, scale = quantize(largest)
    middles = ((np.arange(126) + 0.5) * scale[:, None].astype(np.float64)).astype(np.float32)
    for towards in (0.0, np.inf):
        check_bound(np.concatenate([largest, np.nextafter(middles, np.float32(towards))], axis=1))


def test_of_float16_and_strided_values() -> None:
    values = np.random.default_rng(0).normal(size=(4, 6, 5)).astype(np.float16).transpose(2, 0, 1)[::2]
    check_bound(values)


def test_halves_and_extremes() -> None:
    """Values that lie exactly between two steps, and both signs of the largest."""
    steps = np.arange(-127, 128)
    check_bound(np.concatenate([steps, steps[:-1] + 0.5])[None].astype(np.float32))
    quantized, scale = quantize(np.array([[-127.0, 0.0, 126.6, 1.4]], dtype=np.float32))
    assert quantized.tolist() == [[-127, 0, 127, 1]]
    assert scale.tolist() == [1.0]


def test_zeros_and_nothing() -> None:
    values = np.zeros((3, 8), np.float32)
    values[1] = 2.0
    quantized, scale = check_bound(values)
    assert scale[[0, 2]].tolist() == [0.0, 0.0]
    np.testing.assert_array_equal(dequantize(quantized, scale)[[0, 2]], 0.0)
    quantized, scale = quantize(np.zeros((0, 3, 8), np.float32))
    assert (quantized.shape, scale.shape) == ((0, 3, 8), (0, 3))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    values = np.ones((2, 3, 4), np.float32)
    values[1, 2, 3] = bad
    with pytest.raises(UserError, match="NaN or infinite"):
        quantize(values)
    with pytest.raises(UserError, match="NaN or infinite"):
        quantize(np.full((1, 4), 1e300))


def test_dequantize() -> None:
    quantized = np.array([[[-127, 3], [0, 5]]], np.int8)
    scale = np.array([[0.5, 2.0]], np.float32)
    found = dequantize(quantized, scale)
    assert found.dtype == np.float32
    assert found.tolist() == [[[-63.5, 1.5], [0.0, 10.0]]]
