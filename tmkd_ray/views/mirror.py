"""The image mirrored left to right: the honest baseline of every fused teacher.

`views: [original, mirror]` with `weighting: uniform` is the plain teacher averaged over the image and its
mirror (test-time augmentation, as in Krizhevsky et al. 2012, §4.1): what any other second view must beat. Where
the augmentation mirrored the crop, this view turns it back.
"""

from typing import ClassVar

import cv2
import numpy as np

from tmkd_ray.views.base import VIEWS, ImageBatch, View, ViewConfig, check_images
from tmkd_ray.views.original import OriginalConfig


class MirrorConfig(OriginalConfig):
    """The prompts of the original: a mirrored photo shows no other prior."""


@VIEWS.register("mirror")
class Mirror(View):
    """Swaps left and right."""

    Config: ClassVar[type[ViewConfig]] = MirrorConfig
    version: ClassVar[int] = 1

    def __call__(self, images_BHWC: ImageBatch) -> ImageBatch:
        images_BHWC = check_images(images_BHWC)
        views_BHWC = np.empty_like(images_BHWC)
        for image, view in zip(images_BHWC, views_BHWC, strict=True):
            cv2.flip(image, 1, dst=view)
        return views_BHWC
