"""How a network relates classes and images: correlations of logits, and a map of features."""

import numpy as np

PERPLEXITY = 30.0
"""Of t-SNE; a third of the images where there are fewer than 90."""

_MAX_WIDTH = 50
"""Wider features are first projected on their principal components, as van der Maaten and Hinton did."""


def logit_correlation(logits_NC: np.ndarray) -> np.ndarray:
    """Return float64 [C, C]: Pearson's correlation of each two classes' logits over the images.

    Of a class whose logit never changes all correlations, but that with itself, are zero.
    """
    centred_NC = logits_NC.astype(np.float64) - logits_NC.mean(axis=0, dtype=np.float64)
    norm_C = np.sqrt((centred_NC**2).sum(axis=0))
    unit_NC = np.divide(centred_NC, norm_C, out=np.zeros_like(centred_NC), where=norm_C > 0)
    correlation_CC: np.ndarray = np.clip(unit_NC.T @ unit_NC, -1.0, 1.0)
    np.fill_diagonal(correlation_CC, 1.0)
    return correlation_CC


def correlation_gap(student_NC: np.ndarray, teacher_NC: np.ndarray) -> np.ndarray:
    """Return float64 [C, C], 0 to 2: |difference of the two networks' logit correlations|.

    It is what the field draws to show how much of the teacher's knowledge of classes a student took over
    (Tian et al. 2020, "Contrastive representation distillation", arXiv 1910.10699, figure 2).
    """
    gap_CC: np.ndarray = np.abs(logit_correlation(student_NC) - logit_correlation(teacher_NC))
    return gap_CC


def mean_gap(gap_CC: np.ndarray) -> float:
    """Return the mean over pairs of different classes."""
    num_classes = len(gap_CC)
    return float(gap_CC.sum() / (num_classes * (num_classes - 1)))


def project(feature_NS: np.ndarray) -> np.ndarray | None:
    """Return float32 [N, 2]: t-SNE of features (van der Maaten & Hinton 2008); None for fewer than 6 images.

    From the same features comes the same map: it starts from the principal components.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    number, width = feature_NS.shape
    if number < 6:
        return None
    values = feature_NS.astype(np.float64)
    if not values.std(axis=0).any():  # all images alike: there is nothing to lay out
        return None
    if width > _MAX_WIDTH:
        components = min(_MAX_WIDTH, number)
        values = PCA(components, svd_solver="full", random_state=0).fit_transform(values)
    perplexity = min(PERPLEXITY, (number - 1) / 3)
    start = "pca" if values.shape[1] >= 2 else "random"
    places = TSNE(2, perplexity=perplexity, init=start, random_state=0).fit_transform(values)
    return np.asarray(places, dtype=np.float32)
