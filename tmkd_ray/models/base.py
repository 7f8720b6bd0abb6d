"""What every student and visual teacher is."""

from abc import ABC, abstractmethod
from typing import Protocol

import torch
from torch import Tensor, nn

from tmkd_ray.types import ModelOutput, TaskSpec


class ImageClassifier(nn.Module, ABC):
    """A network whose logits are a linear function, `head`, of its penultimate feature.

    In evaluation mode `head(output.feature) == output.logits`.

    A feature map is what a stage hands to the next one: after the stage's last ReLU where it ends in one; the
    bare sum in pre-activation networks (WRN) and linear bottlenecks (MobileNetV2). The stem is not a stage.

    A pre-activation map has the shape of the feature map. It is what the stage's last ReLU is given; in
    pre-activation networks what the next ReLU is given, the normalised sum; in linear bottlenecks the map
    itself.
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

    @torch.no_grad()
    def map_shapes(self, image_size: int) -> tuple[tuple[int, int, int], ...]:
        """Return (channels, height, width) of each feature map of an image; none for models without maps."""
        mode = self.training
        device = next(self.parameters()).device
        output: ModelOutput = self.eval()(torch.zeros(1, 3, image_size, image_size, device=device))
        self.train(mode)
        return tuple((m.shape[1], m.shape[2], m.shape[3]) for m in output.feature_maps)

    @property
    def inner(self) -> nn.Module:
        """The module whose state dict has the published names: self, or the other library's that this wraps."""
        return self

    def source_fingerprint(self) -> str | None:
        """Return what tells the code of a network that is given from outside; None where its name does."""
        return None

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
