"""The formulas of the method and of the papers it cites, written out in float64 NumPy.

Plain loops over plain sums, none of the package's code: what the tests hold the package against.
Shape suffixes are those of `tmkd_ray.types`.
"""

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


def log_sum_exp(values: Array) -> float:
    top = values.max()
    return float(top + np.log(np.exp(values - top).sum()))


def log_softmax(logits_BC: Array) -> Array:
    return np.stack([row - log_sum_exp(row) for row in logits_BC])


def softmax(logits_BC: Array) -> Array:
    return np.exp(log_softmax(logits_BC))


def normalize(vectors: Array) -> Array:
    length: Array = np.sqrt((vectors**2).sum(axis=-1, keepdims=True))
    return vectors / length


def cross_entropy(logits_BC: Array, labels_B: Labels, smoothing: float = 0.0) -> float:
    """Szegedy et al. 2016, "Rethinking the Inception architecture", §7: the target mixed with the uniform."""
    total = 0.0
    for logits_C, label in zip(logits_BC, labels_B, strict=True):
        target_C = np.full(len(logits_C), smoothing / len(logits_C))
        target_C[label] += 1.0 - smoothing
        total -= target_C @ (logits_C - log_sum_exp(logits_C))
    return total / len(labels_B)


def kl_divergence(teacher_BC: Array, student_BC: Array, temperature: float) -> float:
    """Hinton et al. 2015, §2: T² Σ p_T (log p_T - log p_S), both at temperature T; the mean over the batch."""
    total = 0.0
    for teacher_C, student_C in zip(teacher_BC / temperature, student_BC / temperature, strict=True):
        log_p_C = teacher_C - log_sum_exp(teacher_C)
        log_q_C = student_C - log_sum_exp(student_C)
        total += float(np.exp(log_p_C) @ (log_p_C - log_q_C))
    return temperature**2 * total / len(teacher_BC)


def decoupled_kl(
    teacher_BC: Array, student_BC: Array, labels_B: Labels, temperature: float
) -> tuple[Array, Array]:
    """Zhao et al. 2022, eq. 3 and 7: (TCKD, NCKD) of each sample, times T²; both [B]."""
    tckd, nckd = [], []
    for teacher_C, student_C, label in zip(
        teacher_BC / temperature, student_BC / temperature, labels_B, strict=True
    ):
        others = np.arange(len(teacher_C)) != label

        def binary(logits_C: Array, label: int = label, others: npt.NDArray[np.bool_] = others) -> Array:
            """Log-probabilities of (target, all others)."""
            return np.array([logits_C[label], log_sum_exp(logits_C[others])]) - log_sum_exp(logits_C)

        log_b_T, log_b_S = binary(teacher_C), binary(student_C)
        tckd.append(np.exp(log_b_T) @ (log_b_T - log_b_S))
        log_p_T = teacher_C[others] - log_sum_exp(teacher_C[others])
        log_p_S = student_C[others] - log_sum_exp(student_C[others])
        nckd.append(np.exp(log_p_T) @ (log_p_T - log_p_S))
    return temperature**2 * np.array(tckd), temperature**2 * np.array(nckd)


def linear(inputs_BS: Array, weight_DS: Array, bias_D: Array) -> Array:
    return np.stack([weight_DS @ row + bias_D for row in inputs_BS])


def mean_squared_error(a_BD: Array, b_BD: Array) -> float:
    return float(((a_BD - b_BD) ** 2).sum() / a_BD.size)


def info_nce(logits_BN: Array, positives_B: Labels) -> float:
    """van den Oord et al. 2018, eq. 4: mean of -log(exp(positive) / Σ exp(candidate))."""
    return -float(np.mean([row[n] - log_sum_exp(row) for row, n in zip(logits_BN, positives_B, strict=True)]))


def class_contrast(
    embedding_BE: Array, text_VCE: Array, weights_BV: Array, labels_B: Labels, temperature: float
) -> float:
    """InfoNCE against the class texts; the text of each view counts by its weight."""
    logits_BC = np.zeros((len(embedding_BE), text_VCE.shape[1]))
    for b, embedding_E in enumerate(embedding_BE):
        for weight, text_CE in zip(weights_BV[b], text_VCE, strict=True):
            logits_BC[b] += weight * (text_CE @ embedding_E)
    return info_nce(logits_BC / temperature, labels_B)


def instance_contrast(embedding_BE: Array, clip_BE: Array, temperature: float) -> float:
    """InfoNCE against the batch's CLIP image embeddings; the positive is the image's own."""
    logits_BB = np.array([[g @ e for e in clip_BE] for g in embedding_BE]) / temperature
    return info_nce(logits_BB, np.arange(len(clip_BE)))


def text_term(text_logits_BC: Array, student_BC: Array, temperature: float) -> float:
    """τ² KL(q ‖ p_S); q is at CLIP's own temperature already, p_S at τ."""
    return temperature**2 * kl_divergence(text_logits_BC, student_BC / temperature, 1.0)


def view_similarities(clip_BVE: Array, text_VCE: Array) -> Array:
    batch, views, _ = clip_BVE.shape
    similarity_BVC = np.zeros((batch, views, text_VCE.shape[1]))
    for b in range(batch):
        for v in range(views):
            for c in range(text_VCE.shape[1]):
                similarity_BVC[b, v, c] = clip_BVE[b, v] @ text_VCE[v, c]
    return similarity_BVC


def view_scores(
    similarity_BVC: Array, labels_B: Labels, weighting: str, clip_temperature: float = 1.0
) -> Array:
    score_BV = np.zeros(similarity_BVC.shape[:2])
    for b, label in enumerate(labels_B):
        for v, similarity_C in enumerate(similarity_BVC[b]):
            probability_C = softmax(similarity_C[None] / clip_temperature)[0]
            score_BV[b, v] = {
                "label": similarity_C[label],
                "margin": similarity_C[label] - max(np.delete(similarity_C, label)),
                "confidence": max(probability_C),
                "entropy": (probability_C * np.log(probability_C)).sum(),
                "uniform": 0.0,
            }[weighting]
    return score_BV


def fuse(values_BVD: Array, weights_BV: Array) -> Array:
    fused_BD = np.zeros((values_BVD.shape[0], values_BVD.shape[2]))
    for b, v in np.ndindex(weights_BV.shape):
        fused_BD[b] += weights_BV[b, v] * values_BVD[b, v]
    return fused_BD


def contrastive_loss(similarity_BM: Array, caption_B: Labels) -> float:
    """Yang et al. 2022, eq. 2-4, with each caption once: image → its caption, caption → its images evenly."""
    images = log_softmax(similarity_BM)
    image_to_text = -np.mean([images[b, m] for b, m in enumerate(caption_B)])
    texts = log_softmax(similarity_BM.T)
    text_to_image = -np.mean([texts[m, caption_B == m].mean() for m in range(similarity_BM.shape[1])])
    return float(image_to_text + text_to_image) / 2


def clip_loss(similarity_BB: Array) -> float:
    """Radford et al. 2021, fig. 3: mean of the cross-entropies along both axes, positives on the diagonal."""
    diagonal = np.arange(len(similarity_BB))
    return (cross_entropy(similarity_BB, diagonal) + cross_entropy(similarity_BB.T, diagonal)) / 2


def crop(image_HWC: npt.NDArray[np.uint8], parameters: Sequence[int]) -> npt.NDArray[np.uint8]:
    """Read a crop pixel by pixel: black outside the image, mirrored left to right if the flip is set."""
    top, left, _, _, flip = (int(value) for value in parameters)
    height, width, _ = image_HWC.shape
    result = np.zeros_like(image_HWC)
    for y in range(height):
        for x in range(width):
            source_y, source_x = top + y, left + (width - 1 - x if flip else x)
            if 0 <= source_y < height and 0 <= source_x < width:
                result[y, x] = image_HWC[source_y, source_x]
    return result


_MASK = 2**64 - 1


def splitmix64(value: int) -> int:
    """The finaliser of Steele et al. 2014, "Fast splittable pseudorandom number generators"."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def sample_key(sample_id: object, seed: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{sample_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def crop_parameters(key: int, variant: int, image_size: int, padding: int, flip: bool) -> list[int]:
    """Top, left, height, width, flip of one variant of one image."""

    def draw(number: int) -> float:
        counter = (16 * variant + number + 1) * 0x9E3779B97F4A7C15
        return (splitmix64((key + counter) & _MASK) >> 11) / 2**53

    span = 2 * padding + 1
    top, left = int(draw(0) * span) - padding, int(draw(1) * span) - padding
    return [top, left, image_size, image_size, int(flip and draw(2) < 0.5)]


def central_difference(formula: Callable[[Array], float], at: Array, step: float = 1e-5) -> Array:
    """Return the gradient of a scalar formula, one coordinate at a time."""
    gradient = np.zeros_like(at)
    for index in np.ndindex(at.shape):
        shifted = np.zeros_like(at)
        shifted[index] = step
        gradient[index] = (formula(at + shifted) - formula(at - shifted)) / (2 * step)
    return gradient
