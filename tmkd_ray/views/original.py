"""The image as it is: the view that every other one is compared with."""

from typing import ClassVar

from tmkd_ray.views.base import VIEWS, ImageBatch, View, ViewConfig, check_images


class OriginalConfig(ViewConfig):
    """Nothing but prompts."""

    prompts: tuple[str, ...] = (
        "a photo of a {}.",
        "a natural photo of a {}.",
        "a color photo of a {}.",
        "a picture of a {}.",
    )


@VIEWS.register("original")
class Original(View):
    """Returns its input, without a copy."""

    Config: ClassVar[type[ViewConfig]] = OriginalConfig
    version: ClassVar[int] = 1

    def __call__(self, images_BHWC: ImageBatch) -> ImageBatch:
        return check_images(images_BHWC)
