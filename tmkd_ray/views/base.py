"""The contract of a view: a deterministic image operation and the prompts that name its prior."""

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import field_validator

from tmkd_ray.errors import UserError
from tmkd_ray.registry import Registry
from tmkd_ray.settings import Settings

ImageBatch = npt.NDArray[np.uint8]
"""[B, H, W, 3], RGB."""


class ViewConfig(Settings):
    """What every view is configured with.

    Attributes:
        prompts: templates for the text encoder that name the view's prior; `{}` stands for the class name.
    """

    prompts: tuple[str, ...]

    @field_validator("prompts")
    @classmethod
    def _one_placeholder_each(cls, prompts: tuple[str, ...]) -> tuple[str, ...]:
        return check_prompts(prompts)


def check_prompts(prompts: tuple[str, ...]) -> tuple[str, ...]:
    """Return the templates.

    Raises:
        ValueError: there is none, or one does not have exactly one `{}`.
    """
    if not prompts:
        raise ValueError("give at least one prompt, such as 'a photo of a {}.'")
    for prompt in prompts:
        # No other brace may be there, so that `str.format` and `str.replace` fill a template alike.
        if prompt.count("{}") != 1 or prompt.count("{") != 1 or prompt.count("}") != 1:
            raise ValueError(
                f"the prompt {prompt!r} must contain one {{}}, for the class name, and no other brace"
            )
    return prompts


class View(ABC):
    """A visual prior made visible: uint8 RGB images in, uint8 RGB images of the same shape out.

    A view draws no random numbers, treats every image independently of its batch mates, never writes to its
    input and can be pickled. Calls share no scratch memory, so one view may serve several threads.

    Attributes:
        Config: the view's section of the configuration, with defaults for every field.
        version: raised by hand whenever the pixels for a given config change; it enters the fingerprints of
            knowledge stores, so that knowledge about the old pixels is not taught with the new ones.
    """

    Config: ClassVar[type[ViewConfig]]
    version: ClassVar[int]

    def __init__(self, config: ViewConfig) -> None:
        assert isinstance(config, self.Config)
        self.config = config

    @abstractmethod
    def __call__(self, images_BHWC: ImageBatch) -> ImageBatch:
        """Return the view of each image.

        The result may share memory with the input (the original view returns it unchanged), so treat it as
        read-only.

        Args:
            images_BHWC: [B, H, W, 3] uint8, RGB; B may be 0, H and W are at least 1. May be read-only.

        Returns:
            [B, H, W, 3] uint8, RGB.

        Raises:
            UserError: the images have another type or shape.
        """


VIEWS: Registry[type[View]] = Registry("view")


def check_images(images_BHWC: ImageBatch) -> ImageBatch:
    """Return the batch in C order, without a copy where it is so already; OpenCV would copy image by image.

    Raises:
        UserError: the batch is not [B, H, W, 3] uint8 with H and W of at least 1.
    """
    shape = images_BHWC.shape
    if images_BHWC.dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape[1:]:
        raise UserError(
            "a view takes RGB images as a uint8 array [batch, height, width, 3] of at least 1×1 pixels, "
            f"not {images_BHWC.dtype} {list(shape)}: decode the images to RGB and stack them along a first axis"
        )
    return np.ascontiguousarray(images_BHWC)
