"""Weighted nearest neighbours on frozen features.

Source: Wu et al. 2018, "Unsupervised feature learning via non-parametric instance discrimination", arXiv
1805.01978, section 3.4; the same protocol in Caron et al. 2021 (DINO), arXiv 2104.14294.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tmkd_ray.progress import Rate

_CHUNK_VALUES = 1 << 25
"""Similarities that are held at once."""


def knn_votes(
    bank_NS: Tensor, labels_N: Tensor, queries_MS: Tensor, num_classes: int, k: int, temperature: float
) -> Tensor:
    """Return the votes [M, C] of each query's k nearest by cosine: each votes for its label by exp(cosine / T).

    The votes of a query are divided by that of its nearest, which changes no order and keeps them finite. A
    bank of fewer than k votes as a whole.

    Args:
        bank_NS: features of the training images. labels_N: int64.
        queries_MS: features of the images to classify.
    """
    bank_NS = F.normalize(bank_NS.float(), dim=1)
    queries_MS = F.normalize(queries_MS.float(), dim=1)
    k = min(k, len(bank_NS))
    chunk = max(1, _CHUNK_VALUES // len(bank_NS))
    votes = []
    starts = range(0, len(queries_MS), chunk)
    for start in Rate("nearest neighbours", len(starts), "chunks", quiet_if_short=True).over(starts):
        part_BS = queries_MS[start : start + chunk]
        cosine_BK, nearest_BK = (part_BS @ bank_NS.T).topk(k, dim=1)
        weight_BK = ((cosine_BK - cosine_BK[:, :1]) / temperature).exp()
        votes_BC = weight_BK.new_zeros(len(part_BS), num_classes)
        votes.append(votes_BC.scatter_add_(1, labels_N[nearest_BK], weight_BK))
    return torch.cat(votes)


def knn_accuracy(
    bank: np.ndarray,
    bank_labels: np.ndarray,
    queries: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    k: int,
    temperature: float,
    device: str = "cpu",
) -> tuple[float, float]:
    """Return top-1 and top-5 accuracy, 0 to 1; arrays as in `knn_votes`."""
    votes_MC = knn_votes(
        torch.tensor(bank, device=device),
        torch.tensor(bank_labels, device=device),
        torch.tensor(queries, device=device),
        num_classes,
        k,
        temperature,
    )
    return top_accuracies(votes_MC, torch.tensor(labels, device=device))


def top_accuracies(scores_MC: Tensor, labels_M: Tensor) -> tuple[float, float]:
    """Return top-1 and top-5 accuracy of scores, 0 to 1; with fewer than five classes the latter is 1."""
    best = scores_MC.topk(min(5, scores_MC.shape[1]), dim=1).indices == labels_M[:, None]
    return float(best[:, 0].double().mean()), float(best.any(dim=1).double().mean())
