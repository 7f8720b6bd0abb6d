"""Edge view: where brightness changes abruptly, drawn alone (`map`) or into the image (`enhance`).

1. Luma `Y = 0.299 R + 0.587 G + 0.114 B` (ITU-R BT.601), rounded to uint8. One channel costs a third of
   three; the price is that an edge between two colours of equal luma is not seen.
2. Optionally a Gaussian blur of `Y` in float32, cut off at 4 sigma.
3. Edge magnitude `m`: the gradient's Euclidean norm (Sobel, Scharr), the absolute Laplacian, or for Canny 255
   on its edge pixels and 0 elsewhere.
4. `m` is divided by the operator's largest response to a straight unit step along an axis, so that a step from
   black to white gives 255 whatever the operator and the kernel size, and `strength` means the same for all of
   them. A step of `d` grey levels gives `d`; slanted edges, corners and thin lines can exceed their step, and
   saturate: `edge = min(255, round(m))`.
5. `map` is `edge` on three channels; `enhance` is `min(255, x + round(strength · edge))` on each channel, which
   brightens contours and leaves flat regions exactly as they are.

Rounding is to nearest, halves to even. Borders are mirrored without repeating the outermost pixel.

Sources: J. Canny, A Computational Approach to Edge Detection, IEEE TPAMI 1986; H. Scharr, Optimal Operators in
Digital Image Processing, PhD thesis, Heidelberg 2000; OpenCV's documentation of the kernels.
"""

from math import ceil
from typing import Any, ClassVar, Literal, Self

import cv2
import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from tmkd_ray.views.base import VIEWS, ImageBatch, View, ViewConfig, check_images

# The largest norm that the 3×3 Sobel gradient of 8-bit values can have is √20 · 255 ≈ 1140.4.
_MAX_CANNY_THRESHOLD = 1140.0


class EdgeConfig(ViewConfig):
    """How edges are found and shown.

    Attributes:
        operator: the edge detector.
        mode: `enhance` adds the edges to the image, `map` shows nothing else.
        strength: the share of the edge magnitude that `enhance` adds.
        kernel_size: side of the Sobel or Laplacian kernel in pixels; 1 is the bare difference without smoothing
            (for the Laplacian the four-neighbour kernel). Canny and Scharr are 3×3.
        blur_sigma: standard deviation in pixels of the Gaussian blur before the operator; 0 is no blur.
        canny_low: gradient norm above which a pixel continues an edge, on OpenCV's scale, where a step of `d`
            grey levels has 4 `d`.
        canny_high: gradient norm above which a pixel starts an edge, on the same scale.
    """

    prompts: tuple[str, ...] = (
        "an image of a {} with sharp contours and clear edges.",
        "a photo of a {} with its outlines emphasized.",
        "a photo of a {} with bright, crisp edges.",
        "the contours and edges of a {}.",
    )
    operator: Literal["canny", "sobel", "scharr", "laplacian"] = "sobel"
    mode: Literal["enhance", "map"] = "enhance"
    strength: float = Field(default=0.15, ge=0, le=1)
    kernel_size: Literal[1, 3, 5, 7] = 3
    blur_sigma: float = Field(default=0.0, ge=0, le=32)
    canny_low: float = Field(default=100.0, ge=0, le=_MAX_CANNY_THRESHOLD)
    canny_high: float = Field(default=200.0, ge=0, le=_MAX_CANNY_THRESHOLD)

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.operator in ("canny", "scharr") and self.kernel_size != 3:
            raise ValueError(f"kernel_size must be 3 for {self.operator}, not {self.kernel_size}")
        if self.canny_low > self.canny_high:
            raise ValueError(f"canny_low ({self.canny_low}) must not exceed canny_high ({self.canny_high})")
        return self


@VIEWS.register("edge")
class Edge(View):
    """Edges of the luma, normalised so that a step keeps its height in grey levels."""

    Config: ClassVar[type[ViewConfig]] = EdgeConfig
    version: ClassVar[int] = 1
    config: EdgeConfig

    def __init__(self, config: ViewConfig) -> None:
        super().__init__(config)
        self._scale = 1.0 / _step_response(self.config)

    def __call__(self, images_BHWC: ImageBatch) -> ImageBatch:
        images_BHWC = check_images(images_BHWC)
        views_BHWC = np.empty_like(images_BHWC)
        for image, view in zip(images_BHWC, views_BHWC, strict=True):
            edge = self._edge(image)
            if self.config.mode == "map":
                cv2.cvtColor(edge, cv2.COLOR_GRAY2RGB, dst=view)
            else:
                added = cv2.convertScaleAbs(edge, alpha=self.config.strength)
                cv2.add(image, cv2.cvtColor(added, cv2.COLOR_GRAY2RGB), dst=view)
        return views_BHWC

    def _edge(self, image_HWC: npt.NDArray[np.uint8]) -> Any:
        """Return the normalised edge magnitude, [H, W] uint8."""
        config = self.config
        luma = cv2.cvtColor(image_HWC, cv2.COLOR_RGB2GRAY)
        if config.blur_sigma > 0:
            # In float32: rounding the blur to grey levels would put steps into smooth gradients.
            size = 2 * ceil(4 * config.blur_sigma) + 1
            luma = cv2.GaussianBlur(luma.astype(np.float32), (size, size), config.blur_sigma)
        if config.operator == "canny":
            # Canny takes bytes only; on bytes convertScaleAbs changes nothing.
            luma = cv2.convertScaleAbs(luma)
            return cv2.Canny(luma, config.canny_low, config.canny_high, L2gradient=True)
        ksize, scale = _opencv_kernel_size(config), self._scale
        if config.operator == "laplacian":
            return cv2.convertScaleAbs(cv2.Laplacian(luma, cv2.CV_32F, ksize=ksize, scale=scale))
        gradient_x = cv2.Sobel(luma, cv2.CV_32F, 1, 0, ksize=ksize, scale=scale)
        gradient_y = cv2.Sobel(luma, cv2.CV_32F, 0, 1, ksize=ksize, scale=scale)
        # Not cv2.magnitude: its last bit depends on where the arrays lie in memory, and with it the pixel where
        # the norm is halfway between two levels. NumPy rounds products and roots correctly.
        np.square(gradient_x, out=gradient_x)
        np.square(gradient_y, out=gradient_y)
        gradient_x += gradient_y
        return cv2.convertScaleAbs(np.sqrt(gradient_x, out=gradient_x))


def _opencv_kernel_size(config: EdgeConfig) -> int:
    """Return the kernel size by which OpenCV's Sobel filter knows the operator."""
    return int(cv2.FILTER_SCHARR) if config.operator == "scharr" else config.kernel_size


def _step_response(config: EdgeConfig) -> float:
    """Return the largest response of the operator's kernel to a vertical step of height 1.

    Along the step the kernel's smoothing part sums up; across it the response is a running sum of the
    derivative part, as the step moves over the kernel.
    """
    order = 2 if config.operator == "laplacian" else 1
    derivative, smoothing = cv2.getDerivKernels(order, 0, _opencv_kernel_size(config))
    return float(np.abs(np.cumsum(derivative)).max() * smoothing.sum())
