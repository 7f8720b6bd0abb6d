"""The frozen visual teacher."""

import torch
from torch import Tensor, nn

from tmkd_ray.models import ImageClassifier, build_model, load_checkpoint
from tmkd_ray.settings import ImageStatistics
from tmkd_ray.teachers.pixels import Normalize, weights_fingerprint
from tmkd_ray.types import ModelOutput, TaskSpec


class VisualTeacher(nn.Module):
    """A trained classifier that is only asked for its penultimate feature.

    Args:
        model: frozen by this class, set to evaluation.
        mean, std: normalisation the model was trained with.

    Raises:
        UserError: the model has no final linear layer, so features of views cannot be fused.
    """

    def __init__(self, model: ImageClassifier, mean: ImageStatistics, std: ImageStatistics) -> None:
        super().__init__()
        # The pixels come as [B, H, W, 3], so no layer has to turn them around.
        self.model = model.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.normalize = Normalize(mean, std)
        self.head_weight = model.head.weight.detach()
        bias = model.head.bias
        self.head_bias = torch.zeros(len(self.head_weight)) if bias is None else bias.detach()

    @classmethod
    def load(
        cls, name: str, task: TaskSpec, checkpoint: str, mean: ImageStatistics, std: ImageStatistics
    ) -> "VisualTeacher":
        """Build the model `name` for `task` and load its weights."""
        model = build_model(name, task)
        load_checkpoint(model, checkpoint)
        return cls(model, mean, std)

    @property
    def feature_width(self) -> int:
        return self.model.feature_width

    def fingerprint(self) -> str:
        """Return the SHA-256 of the weights."""
        return weights_fingerprint(self.model.state_dict())

    @torch.no_grad()
    def outputs(self, images_BHWC: Tensor) -> ModelOutput:
        """Return all that the model says of uint8 images."""
        output: ModelOutput = self.model(self.normalize(images_BHWC))
        return output

    def forward(self, images_BHWC: Tensor) -> Tensor:
        """Return float32 [B, D] features of uint8 images."""
        return self.outputs(images_BHWC).feature.float()
