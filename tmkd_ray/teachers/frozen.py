"""Visual teacher and CLIP together, as a training worker runs them."""

import torch
from torch import Tensor

from tmkd_ray.precision import autocast
from tmkd_ray.settings import Precision
from tmkd_ray.teachers.clip import ClipTeacher
from tmkd_ray.teachers.visual import VisualTeacher
from tmkd_ray.types import Knowledge


class FrozenTeachers:
    """Says of a batch what a knowledge store would, and the feature maps, which no store holds.

    Args:
        visual_batch, clip_batch: views per forward pass.
        with_maps: also return the visual teacher's feature maps.
    """

    def __init__(
        self,
        visual: VisualTeacher,
        clip: ClipTeacher | None,
        device: torch.device,
        visual_batch: int = 256,
        clip_batch: int = 256,
        visual_precision: Precision = "float32",
        clip_precision: Precision = "float32",
        with_maps: bool = False,
    ) -> None:
        self.visual = visual.to(device)
        self.clip = None if clip is None else clip.to(device)
        self.device = device
        self.visual_batch, self.clip_batch = visual_batch, clip_batch
        self.visual_precision, self.clip_precision = visual_precision, clip_precision
        self.with_maps = with_maps

    @torch.no_grad()
    def __call__(self, pixels_BVHWC: Tensor) -> Knowledge:
        """Return the knowledge of uint8 views, in float32."""
        batch, views = pixels_BVHWC.shape[:2]
        assert self.visual.num_view_statistics in (None, views)
        flat = pixels_BVHWC.flatten(0, 1).to(self.device)

        def per_view(parts: list[Tensor]) -> Tensor:
            joined = torch.cat(parts).float()
            return joined.reshape(batch, views, *joined.shape[1:])

        with autocast(self.device, self.visual_precision):
            outputs = [
                self.visual.outputs(part, number * self.visual_batch % views)
                for number, part in enumerate(torch.split(flat, self.visual_batch))
            ]
        knowledge = Knowledge(per_view([output.feature for output in outputs]))
        if self.with_maps:
            stages = zip(*(output.feature_maps for output in outputs), strict=True)
            knowledge.feature_maps = tuple(per_view(list(parts)) for parts in stages)
            stages = zip(*(output.preactivation_maps for output in outputs), strict=True)
            knowledge.preactivation_maps = tuple(per_view(list(parts)) for parts in stages)
        if self.clip is not None:
            with autocast(self.device, self.clip_precision):
                parts = [self.clip.encode_images(part) for part in torch.split(flat, self.clip_batch)]
            knowledge.clip_embedding = per_view(parts)
        return knowledge
