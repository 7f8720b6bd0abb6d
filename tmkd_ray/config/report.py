"""How closely a run looks at its networks for the report."""

from pydantic import Field

from tmkd_ray.settings import Settings


class ReportConfig(Settings):
    """The report's figures that need the networks once more; on a bounded number of images."""

    num_images: int = Field(
        default=1000,
        ge=0,
        description="test images, evenly over the classes, whose logits and features are compared; 0: none, "
        "and no Grad-CAM, operations and latency either",
    )
    num_explained: int = Field(default=6, ge=0, description="validation images shown with Grad-CAM")
    max_methods: int = Field(
        default=4, ge=1, description="students looked at so, the first seed of each of the first methods"
    )
