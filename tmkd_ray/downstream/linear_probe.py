"""A linear classifier on frozen features, its learning rate chosen on a validation part of train."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tmkd_ray.config.transfer import LinearConfig
from tmkd_ray.datasets.splits import stratified_part
from tmkd_ray.downstream.features import FeatureTable
from tmkd_ray.downstream.knn import top_accuracies
from tmkd_ray.progress import Rate
from tmkd_ray.training.loader import epoch_order


@dataclass(frozen=True)
class ProbeResult:
    """One linear probe.

    Attributes:
        fraction: of each class's labels. num_labelled: training images.
        learning_rate: the one chosen. validation_accuracy: by which it was chosen.
        accuracy, top5_accuracy: on test, 0 to 1.
    """

    fraction: float
    num_labelled: int
    learning_rate: float
    validation_accuracy: float
    accuracy: float
    top5_accuracy: float


def fit_probes(
    features_NS: Tensor,
    labels_N: Tensor,
    num_classes: int,
    learning_rates: Sequence[float],
    config: LinearConfig,
    label: str = "linear probe",
) -> tuple[Tensor, Tensor]:
    """Fit one softmax regression for each learning rate, side by side on the same batches.

    SGD with momentum on the mean cross-entropy, from zero weights, the rate falling as a cosine; weight decay
    on the weights, not on the biases.

    Args:
        label: for progress lines.

    Returns:
        Weights [L, C, S] and biases [L, C].
    """
    batch_size = min(config.probe_batch_size, len(features_NS))
    per_epoch = len(features_NS) // batch_size
    num_steps = max(config.min_steps, config.epochs * per_epoch)
    rates_L = features_NS.new_tensor(learning_rates)
    weights_LCS = features_NS.new_zeros(len(learning_rates), num_classes, features_NS.shape[1])
    biases_LC = features_NS.new_zeros(len(learning_rates), num_classes)
    moved_weights, moved_biases = torch.zeros_like(weights_LCS), torch.zeros_like(biases_LC)
    targets_NC = F.one_hot(labels_N, num_classes).to(features_NS.dtype)
    progress = Rate(label, num_steps, "steps", quiet_if_short=True)
    for step in progress.over(range(num_steps)):
        if step % per_epoch == 0:
            order_N = epoch_order(len(features_NS), config.seed, step // per_epoch).to(features_NS.device)
        start = step % per_epoch * batch_size
        chosen_B = order_N[start : start + batch_size]
        batch_BS = features_NS[chosen_B]
        logits_LBC = torch.einsum("bs,lcs->lbc", batch_BS, weights_LCS) + biases_LC[:, None]
        gradient_LBC = (logits_LBC.softmax(dim=2) - targets_NC[chosen_B]) / batch_size
        gradient_LCS = torch.einsum("lbc,bs->lcs", gradient_LBC, batch_BS)
        moved_weights.mul_(config.momentum).add_(gradient_LCS + config.weight_decay * weights_LCS)
        moved_biases.mul_(config.momentum).add_(gradient_LBC.sum(dim=1))
        rate_L = rates_L * 0.5 * (1.0 + math.cos(math.pi * step / num_steps))
        weights_LCS -= rate_L[:, None, None] * moved_weights
        biases_LC -= rate_L[:, None] * moved_biases
    return weights_LCS, biases_LC


def probe(
    train: FeatureTable,
    validation: FeatureTable,
    test: FeatureTable,
    name: str,
    num_classes: int,
    fraction: float,
    config: LinearConfig,
    device: str = "cpu",
) -> ProbeResult:
    """Fit and measure a linear probe on a network's features for a part of the labels.

    Features are brought to mean 0 and variance 1 by the statistics of the labelled images. Of learning rates
    that do equally well on validation the smallest is taken.

    Args:
        name: of the network. fraction: of each class's labels.
    """
    rows = labelled_rows(train.ids, train.labels, fraction, config.seed)
    features = torch.tensor(train.features[name][rows], device=device)
    mean_S, std_S = features.mean(dim=0), features.std(dim=0, correction=0)
    std_S = torch.where(std_S > 1e-6 * std_S.max(), std_S, torch.inf)  # what never varies says nothing

    def standardised(table: FeatureTable) -> tuple[Tensor, Tensor]:
        features_NS = torch.tensor(table.features[name], device=device)
        return (features_NS - mean_S) / std_S, torch.tensor(table.labels, device=device)

    rates = sorted(config.learning_rates)
    labels = torch.tensor(train.labels[rows], device=device)
    label = f"linear probe, {name}, {100 * fraction:g} % of labels"
    weights_LCS, biases_LC = fit_probes((features - mean_S) / std_S, labels, num_classes, rates, config, label)
    validation_MS, validation_labels = standardised(validation)
    accuracies = [
        top_accuracies(validation_MS @ weights_CS.T + biases_C, validation_labels)[0]
        for weights_CS, biases_C in zip(weights_LCS, biases_LC, strict=True)
    ]
    best = int(np.argmax(accuracies))
    test_MS, test_labels = standardised(test)
    accuracy, top5_accuracy = top_accuracies(test_MS @ weights_LCS[best].T + biases_LC[best], test_labels)
    return ProbeResult(fraction, len(rows), rates[best], accuracies[best], accuracy, top5_accuracy)


def labelled_rows(ids: np.ndarray, labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Return the rows of a fraction of each class's images, at least one of each class."""
    if fraction == 1.0:
        return np.arange(len(ids))
    chosen = stratified_part(ids, labels, fraction, seed, "linear probe")
    lone = np.bincount(labels)[labels] == 1  # a class of one image: the stratified choice leaves it out
    return np.flatnonzero(chosen | lone)
