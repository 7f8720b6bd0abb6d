"""What a network says of many images, and where it looks."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tmkd_ray.types import ModelOutput


@dataclass(frozen=True, eq=False)
class Responses:
    """float32 arrays: logits [N, C], feature [N, S]."""

    logits: np.ndarray
    feature: np.ndarray


@torch.inference_mode()
def responses(
    model: nn.Module,
    normalize: nn.Module,
    images_NHWC: np.ndarray,
    device: torch.device,
    batch_size: int = 128,
) -> Responses:
    """Run `model`, in evaluation mode on `device`, over uint8 images."""
    logits, features = [], []
    for start in range(0, len(images_NHWC), batch_size):
        batch = torch.from_numpy(images_NHWC[start : start + batch_size]).to(device)
        output: ModelOutput = model(normalize(batch))
        logits.append(output.logits.float().cpu())
        features.append(output.feature.float().cpu())
    return Responses(torch.cat(logits).numpy(), torch.cat(features).numpy())


def class_activation(
    model: nn.Module,
    normalize: nn.Module,
    images_NHWC: np.ndarray,
    labels_N: Tensor,
    device: torch.device,
) -> Tensor | None:
    """Return [N, h, w], the weighted sum of the last feature maps that Grad-CAM rectifies.

    Selvaraju et al. 2017 (arXiv 1610.02391), eq. 1 and 2: the weight of a channel is the mean, over places, of
    the gradient of the label's logit by that channel's map.

    Returns:
        None for a model without feature maps, or whose logits do not come from its last ones.
    """
    pixels = normalize(torch.from_numpy(images_NHWC).to(device)).requires_grad_(True)
    output: ModelOutput = model(pixels)
    if not output.feature_maps:
        return None
    maps_NChw = output.feature_maps[-1]
    # The images of a batch do not influence each other in evaluation mode: the sum has all their gradients.
    target = output.logits.gather(1, labels_N.to(device)[:, None]).sum()
    gradient_NChw: Tensor | None = torch.autograd.grad(target, maps_NChw, allow_unused=True)[0]
    if gradient_NChw is None:
        return None
    weights_NC11 = gradient_NChw.mean(dim=(2, 3), keepdim=True)
    return (weights_NC11 * maps_NChw).sum(dim=1).detach().float().cpu()


def fused_activation(activation_NVhw: Tensor, weights_NV: Tensor) -> Tensor:
    """Return [N, h, w]: the activation of a teacher that fuses the features of its views.

    Its logit is the weighted sum of the views' logits, so its gradient by a view's maps is that view's own
    times its weight.
    """
    return torch.einsum("nv,nvhw->nhw", weights_NV, activation_NVhw)


def heat_maps(activation_Nhw: Tensor, size: tuple[int, int]) -> np.ndarray:
    """Return uint8 [N, *size]: rectified, brought to the images' size, each image's largest value 255."""
    rectified = F.relu(activation_Nhw)[:, None]
    grown = F.interpolate(rectified, size=size, mode="bilinear", align_corners=False)[:, 0]
    largest_N11 = grown.amax(dim=(1, 2), keepdim=True)
    scaled = torch.where(largest_N11 > 0, grown / largest_N11.clamp(min=1e-30), torch.zeros_like(grown))
    return (255 * scaled).round().to(torch.uint8).numpy()
