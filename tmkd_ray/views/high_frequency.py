"""High-frequency view: what a low-pass filter takes away, drawn alone (`residual`) or amplified (`enhance`).

All filters share one form, per colour channel and in float32: `detail = x − low(x)`, and then

    enhance:   x + strength · detail  (unsharp masking)
    residual:  128 + detail

rounded to nearest, halves to even, and saturated to 0…255 once, at the end. `low` is

- `fft`: the image rebuilt from the frequencies within `cutoff` of the spectrum's centre, where a frequency is
  taken relative to Nyquist's, half a cycle per pixel on either axis: `|f| ≤ cutoff` in Euclidean norm (`disc`)
  or in the larger of both components (`box`). The transform takes the image as periodic, so opposite borders
  that differ count as detail.
- `gaussian`: a Gaussian blur of `sigma`, cut off at 4 sigma.
- `laplacian`: the mean of the four neighbours; `detail` is then −1/4 of the four-neighbour Laplacian.

The last two mirror the image at its borders without repeating the outermost pixel.

Source: R. Gonzalez, R. Woods, Digital Image Processing, 4th edition, sections 3.6 and 4.9.
"""

from functools import lru_cache
from math import ceil
from typing import Any, ClassVar, Literal

import cv2
import numpy as np
import numpy.typing as npt
from pydantic import Field

from tmkd_ray.views.base import VIEWS, ImageBatch, View, ViewConfig, check_images

_FOUR_NEIGHBOUR_MEAN = np.array([[0, 0.25, 0], [0.25, 0, 0.25], [0, 0.25, 0]], np.float32)


class HighFrequencyConfig(ViewConfig):
    """How detail is separated and shown.

    Attributes:
        filter: the low-pass filter whose remainder is the detail.
        mode: `enhance` amplifies the detail, `residual` shows nothing else, on mid-grey.
        strength: how much of the detail `enhance` adds; 1 doubles it.
        cutoff: radius of the low frequencies that `fft` removes, relative to the Nyquist frequency. 0.5 suits
            32 pixels; large photos have little left above it, so lower it for them.
        cutoff_shape: their outline in the spectrum.
        sigma: standard deviation in pixels of the `gaussian` filter.
    """

    prompts: tuple[str, ...] = (
        "an image of a {} with fine texture and rich detail.",
        "a detailed photo of a {} with crisp texture.",
        "a sharpened photo of a {} that shows its fine details.",
        "the surface texture and fine details of a {}.",
    )
    filter: Literal["fft", "gaussian", "laplacian"] = "fft"
    mode: Literal["enhance", "residual"] = "enhance"
    strength: float = Field(default=0.5, ge=0, le=4)
    cutoff: float = Field(default=0.5, gt=0, lt=1)
    cutoff_shape: Literal["disc", "box"] = "disc"
    sigma: float = Field(default=1.0, ge=0.1, le=32)


@VIEWS.register("high_frequency")
class HighFrequency(View):
    """The image's own detail, isolated by a high-pass filter."""

    Config: ClassVar[type[ViewConfig]] = HighFrequencyConfig
    version: ClassVar[int] = 1
    config: HighFrequencyConfig

    def __call__(self, images_BHWC: ImageBatch) -> ImageBatch:
        images_BHWC = check_images(images_BHWC)
        # Both modes are image_weight · x − low_weight · low(x) + offset: one pass that rounds and saturates.
        if self.config.mode == "residual":
            image_weight, low_weight, offset = 1.0, 1.0, 128.0
        else:
            image_weight, low_weight, offset = 1.0 + self.config.strength, self.config.strength, 0.0
        views_BHWC = np.empty_like(images_BHWC)
        for image_bytes, view in zip(images_BHWC, views_BHWC, strict=True):
            image = image_bytes.astype(np.float32)
            low = self._low_pass(image)
            cv2.addWeighted(image, image_weight, low, -low_weight, offset, dst=view, dtype=cv2.CV_8U)
        return views_BHWC

    def _low_pass(self, image_HWC: npt.NDArray[np.float32]) -> Any:
        """Return the image's low frequencies, [H, W, 3] float32."""
        config = self.config
        if config.filter == "gaussian":
            size = 2 * ceil(4 * config.sigma) + 1
            return cv2.GaussianBlur(image_HWC, (size, size), config.sigma)
        if config.filter == "laplacian":
            return cv2.filter2D(image_HWC, -1, _FOUR_NEIGHBOUR_MEAN)
        return _fft_low_pass(image_HWC, config.cutoff, config.cutoff_shape)


def _fft_low_pass(
    image_HWC: npt.NDArray[np.float32], cutoff: float, cutoff_shape: str
) -> npt.NDArray[np.float32]:
    # A mask that is real and even has a real impulse response, so one complex transform filters two channels:
    # red + i·green and blue + i·0. OpenCV's complex transform is also faster than SciPy's or its own real one.
    height, width, _ = image_HWC.shape
    mask_HW2 = _low_pass_mask(height, width, cutoff, cutoff_shape)
    pairs = [np.empty((height, width, 2), np.float32) for _ in range(2)]
    cv2.mixChannels([image_HWC], pairs, [0, 0, 1, 1, 2, 2, -1, 3])  # -1 fills with zeros
    for pair in pairs:
        cv2.dft(pair, dst=pair)
        np.multiply(pair, mask_HW2, out=pair)
        cv2.idft(pair, dst=pair, flags=cv2.DFT_SCALE)
    low_HWC = np.empty_like(image_HWC)
    cv2.mixChannels(pairs, [low_HWC], [0, 0, 1, 1, 2, 2])
    return low_HWC


@lru_cache(maxsize=32)
def _low_pass_mask(height: int, width: int, cutoff: float, cutoff_shape: str) -> npt.NDArray[np.float32]:
    """Return 1 for frequencies to keep and 0 for others, in FFT order, [H, W, 2] with equal channels."""
    # Quotients of integers, so that a frequency on the cutoff compares equal to it.
    y, x = (2 * np.minimum(np.arange(n), n - np.arange(n)) / n for n in (height, width))
    radius_HW = np.hypot(y[:, None], x) if cutoff_shape == "disc" else np.maximum(y[:, None], x)
    mask_HW2 = np.repeat((radius_HW <= cutoff).astype(np.float32)[:, :, None], 2, axis=2)
    mask_HW2.flags.writeable = False
    return mask_HW2
