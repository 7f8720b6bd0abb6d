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
