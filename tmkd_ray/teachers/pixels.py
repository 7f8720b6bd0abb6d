"""From stored pixels to network input."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Normalize(nn.Module):
    """uint8 RGB, [B, H, W, 3] or [B, 3, H, W] → float32 [B, 3, H, W]; mean and std are of RGB in [0, 1].

    Attributes:
        memory_format: of the result; by default that of the pixels, which is channels-last for [B, H, W, 3].
    """

    scale: Tensor
    shift: Tensor
    memory_format = torch.preserve_format

    def __init__(self, mean: tuple[float, float, float], std: tuple[float, float, float]) -> None:
        super().__init__()
        mean_C11 = torch.tensor(mean).view(3, 1, 1)
        std_C11 = torch.tensor(std).view(3, 1, 1)
        self.register_buffer("scale", 1.0 / (255.0 * std_C11), persistent=False)
        self.register_buffer("shift", -mean_C11 / std_C11, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[-1] == 3:
            images = images.permute(0, 3, 1, 2)
        normalized = torch.addcmul(self.shift, images.float(), self.scale)
        if self.memory_format is torch.preserve_format:
            return normalized
        return normalized.contiguous(memory_format=self.memory_format)


def weights_fingerprint(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 (hex) of names, shapes, types and values of a state dict."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
