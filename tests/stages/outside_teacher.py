"""A visual teacher as a user would give it: `python:tests.stages.outside_teacher:linear`."""

import torch
from torch import Tensor, nn

from tmkd_ray.types import TaskSpec


class MeanColour(nn.Module):
    """A linear classifier of an image's mean colour."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(3, num_classes)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        logits_BC: Tensor = self.fc(images_BCHW.mean((2, 3)))
        return logits_BC


def linear(task: TaskSpec) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MeanColour(task.num_classes)
