"""The mathematics that several distillation strategies share: pure functions of tensors.

All compute in float32 whatever the inputs, so that they stay finite under autocast.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def kl_divergence(teacher_logits_BC: Tensor, student_logits_BC: Tensor, temperature: float) -> Tensor:
    """Return `T² KL(softmax(z_T / T) ‖ softmax(z_S / T))`, averaged over the batch.

    The factor T² keeps the gradient's size independent of the temperature
    (Hinton et al. 2015, "Distilling the knowledge in a neural network", §2).
    """
    teacher = F.log_softmax(teacher_logits_BC.float() / temperature, dim=1)
    student = F.log_softmax(student_logits_BC.float() / temperature, dim=1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def info_nce(logits_BN: Tensor, targets_B: Tensor) -> Tensor:
    """Return InfoNCE: cross-entropy of picking each row's positive among N candidates.

    Args:
        logits_BN: similarities over the temperature.
        targets_B: column of each row's positive.

    Source: van den Oord et al. 2018, "Representation learning with contrastive predictive coding", eq. 4.
    """
    return F.cross_entropy(logits_BN.float(), targets_B)


def standardize(logits_BC: Tensor) -> Tensor:
    """Return the z-scores of each row: zero mean, unit (population) standard deviation.

    The same for logits of any scale and shift; no entry is larger than √(C-1).
    Source: Sun et al. 2024, "Logit standardization in knowledge distillation", CVPR, arXiv 2403.01427, whose
    deviation is the population's; their code divides by the sample's, 0.5 % larger at 100 classes.
    """
    # Layer normalisation is the z-score; eps only keeps the gradient of a row without any spread finite.
    return F.layer_norm(logits_BC.float(), logits_BC.shape[1:], eps=1e-6)


def gather_from_workers(tensor_B: Tensor) -> tuple[Tensor, int]:
    """Concatenate a tensor over all DDP workers, in the order of their ranks; no gradient flows back.

    Returns:
        The [world_size * B, ...] tensor, and the row at which this worker's own part begins.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return tensor_B.detach(), 0
    own = tensor_B.detach().contiguous()
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own)
    return torch.cat(parts), dist.get_rank() * len(tensor_B)


def gather_with_gradient(tensor_B: Tensor) -> Tensor:
    """Concatenate a tensor over all DDP workers, in the order of their ranks, with gradients to the own rows.

    For losses that mix the samples of the global batch: every worker computes the loss of the whole batch and
    adds the gradient by its own rows. The whole gradient is the sum of these parts, but DDP takes their mean:
    so each is multiplied by the number of workers, which then learn exactly what one would from the same batch.
    """
    gathered, start = gather_from_workers(tensor_B)
    if len(gathered) == len(tensor_B):
        return tensor_B
    own = tensor_B.detach()
    own = own + len(gathered) // len(tensor_B) * (tensor_B - own)  # the same values, the gradient multiplied
    return torch.cat([gathered[:start], own, gathered[start + len(tensor_B) :]])
