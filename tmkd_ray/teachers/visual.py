"""The frozen visual teacher."""

import hashlib

import torch
from torch import Tensor, nn

from tmkd_ray.models import ImageClassifier, build_model, load_checkpoint
from tmkd_ray.models.view_batch_norm import num_view_statistics, samples_of_views, use_view_statistics
from tmkd_ray.settings import ImageStatistics
from tmkd_ray.teachers.passes import count_pass
from tmkd_ray.teachers.pixels import Normalize, weights_fingerprint
from tmkd_ray.types import ModelOutput, TaskSpec


class VisualTeacher(nn.Module):
    """A trained classifier that is only asked for its penultimate feature.

    One that has batch-norm statistics for each view applies to each image those of its view. The images go
    through the views in turn, as in knowledge [B, V, …] whose first two axes are joined.

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
        self.num_view_statistics = num_view_statistics(model)

    @classmethod
    def load(
        cls,
        name: str,
        task: TaskSpec,
        checkpoint: str | None,
        mean: ImageStatistics,
        std: ImageStatistics,
        num_views: int | None = None,
    ) -> "VisualTeacher":
        """Build the model `name` for `task` and load its weights.

        Args:
            checkpoint: None for a model that has its weights when it is built.
            num_views: V, of a checkpoint with batch-norm statistics for each view.
        """
        model = build_model(name, task)
        if num_views is not None:
            use_view_statistics(model, num_views)
        if checkpoint is not None:
            load_checkpoint(model, checkpoint)
        return cls(model, mean, std)

    @property
    def feature_width(self) -> int:
        return self.model.feature_width

    def fingerprint(self) -> str:
        """Return the SHA-256 of the weights and, where the network is no model of ours, of its source."""
        weights = weights_fingerprint(self.model.state_dict())
        source = self.model.source_fingerprint()
        return weights if source is None else hashlib.sha256(f"{weights} {source}".encode()).hexdigest()

    @torch.no_grad()
    def outputs(self, images_BHWC: Tensor, first_view: int = 0) -> ModelOutput:
        """Return all that the model says of uint8 images.

        Args:
            first_view: of the first image; the next one is of the next view.
        """
        count_pass()
        views = self.num_view_statistics
        if views is None:
            output: ModelOutput = self.model(self.normalize(images_BHWC))
            return output
        # Sorted by view, so that each layer finds the images of a view side by side.
        places = [slice((view - first_view) % views, None, views) for view in range(views)]
        parts = [images_BHWC[place] for place in places]
        counts = [len(part) for part in parts]
        with samples_of_views(self.model, counts):
            output = self.model(self.normalize(torch.cat(parts)))

        def in_order(sorted_B: Tensor) -> Tensor:
            result = torch.empty_like(sorted_B)
            for place, part in zip(places, torch.split(sorted_B, counts), strict=True):
                result[place] = part
            return result

        return ModelOutput(
            in_order(output.logits),
            in_order(output.feature),
            tuple(map(in_order, output.feature_maps)),
            tuple(map(in_order, output.preactivation_maps)),
        )

    def forward(self, images_BHWC: Tensor, first_view: int = 0) -> Tensor:
        """Return float32 [B, D] features of uint8 images; `first_view` as in `outputs`."""
        return self.outputs(images_BHWC, first_view).feature.float()
