"""What every student and visual teacher is."""

from abc import ABC, abstractmethod
from typing import Protocol

from torch import Tensor, nn

from tmkd_ray.types import ModelOutput, TaskSpec


class ImageClassifier(nn.Module, ABC):
    """A network whose logits are a linear function, `head`, of its penultimate feature.

    In evaluation mode `head(output.feature) == output.logits`.

    A feature map is what a stage hands to the next one: after the stage's last ReLU where it ends in one; the
    bare sum in pre-activation networks (WRN) and linear bottlenecks (MobileNetV2). The stem is not a stage.
    """

    @abstractmethod
    def forward(self, images_BCHW: Tensor) -> ModelOutput:
        """Classify normalised float images [B, 3, H, W]."""

    @property
    @abstractmethod
    def head(self) -> nn.Linear:
        """The final linear layer, feature [B, S] to logits [B, C].

        Raises:
            UserError: this model's classifier is not linear, so it cannot be a visual teacher.
        """

    @property
    def feature_width(self) -> int:
        """S, the width of the penultimate feature."""
        return self.head.in_features

    @property
    def inner(self) -> nn.Module:
        """The module whose state dict has the published names: self, or the other library's that this wraps."""
        return self

    def adapt_checkpoint(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a published state dict in the names of `inner`'s own, where the two differ."""
        return state


class ModelSource(Protocol):
    """Another library's models, known as `SOURCE/NAME`."""

    def names(self) -> list[str]:
        """Return the names; none if there is no list of them."""

    def check(self, name: str) -> None:
        """Raise UserError if `name` cannot be a model of this source; neither build it nor use the network."""

    def build(self, name: str, task: TaskSpec) -> ImageClassifier:
        """Return the model called `name`.

        Raises:
            UserError: it cannot be had, or does not suit the task.
        """
