"""Accuracy over a labelled set, shared out among the workers."""

from collections.abc import Callable

import torch
from torch import Tensor

from tmkd_ray.progress import Rate
from tmkd_ray.training.context import WorkerContext

_SAY_EVERY_S = 15.0


@torch.inference_mode()
def evaluate(
    predict: Callable[[Tensor], Tensor],
    images_NHWC: Tensor,
    labels_N: Tensor,
    context: WorkerContext,
    batch_size: int,
) -> dict[str, float]:
    """Return `accuracy` (top-1), `top5_accuracy`, both 0 to 1, and `loss` (cross-entropy, nats).

    Each worker takes every world_size-th image, so each counts once.

    Args:
        predict: uint8 [B, H, W, 3] to logits [B, C].
    """
    images_NHWC = images_NHWC[context.rank :: context.world_size]
    labels_N = labels_N[context.rank :: context.world_size]
    sums = torch.tensor([0, 0, 0, len(labels_N)], dtype=torch.float64)
    starts = range(0, len(labels_N), batch_size)
    progress = Rate("validation", len(starts), "batches", _SAY_EVERY_S, context.say, quiet_if_short=True)
    for start in progress.over(starts):
        labels_B = labels_N[start : start + batch_size].to(context.device)
        logits_BC = predict(images_NHWC[start : start + batch_size].to(context.device)).float()
        top = logits_BC.topk(min(5, logits_BC.shape[1]), dim=1).indices == labels_B[:, None]
        loss = torch.nn.functional.cross_entropy(logits_BC, labels_B, reduction="sum")
        sums[:3] += torch.stack([top[:, 0].sum(), top.sum(), loss]).double().cpu()
    sums = context.reduce_sum(sums.to(context.device)).cpu()
    correct, correct5, loss_sum, count = sums.tolist()
    return {"accuracy": correct / count, "top5_accuracy": correct5 / count, "loss": loss_sum / count}
