"""How accurate the teachers are on a split of a store: each view, and their fusion."""

from dataclasses import dataclass

import torch

from tmkd_ray.fusion import TeacherConstants, TeachingSignal, Weighting
from tmkd_ray.knowledge.store import KnowledgeArrays


@dataclass(frozen=True)
class TeacherQuality:
    """Top-1 accuracies (0 to 1) over the first variant of each image.

    Attributes:
        views: of each view alone.
        fused: `uniform` and `semantic` weights, and `oracle`: any view is right.
        zero_shot: of CLIP on each view, and `fused` over them with uniform weights; empty without CLIP.
        weights_per_class: [C][V], mean semantic weight of each view over the images of a class.

    With the weightings `label` and `margin` the semantic weights look at the label, as they do when the
    student is taught, so `semantic` flatters the teacher on images without one.
    """

    views: dict[str, float]
    fused: dict[str, float]
    zero_shot: dict[str, float]
    weights_per_class: list[list[float]]


@torch.inference_mode()
def measure_quality(
    arrays: KnowledgeArrays,
    constants: TeacherConstants,
    weighting: Weighting,
    fusion_temperature: float,
    clip_temperature: float | None,
    fused_views: tuple[str, ...] | None = None,
) -> TeacherQuality:
    """Measure the teachers on the first variant of every image of `arrays`.

    Args:
        fused_views: those that are fused; None for all.
    """
    names = constants.view_names
    fused_views = fused_views or names
    labels_N = torch.from_numpy(arrays.labels.copy())
    knowledge = arrays.knowledge(slice(None))

    def accuracy(logits_NC: torch.Tensor) -> float:
        return (logits_NC.argmax(1) == labels_N).float().mean().item()

    def signal(views: tuple[str, ...], mode: Weighting) -> TeachingSignal:
        return TeachingSignal(constants, views, mode, fusion_temperature, clip_temperature)

    views, zero_shot = {}, {}
    right_N = torch.zeros(len(labels_N), dtype=torch.bool)
    for name in names:
        output = signal((name,), "uniform")(knowledge, labels_N)
        views[name] = accuracy(output.logits)
        right_N |= output.logits.argmax(1) == labels_N
        if output.text_logits is not None:
            zero_shot[name] = accuracy(output.text_logits)
    output = signal(fused_views, "uniform")(knowledge, labels_N)
    fused = {"uniform": accuracy(output.logits)}
    if output.text_logits is not None:
        zero_shot["fused"] = accuracy(output.text_logits)
        output = signal(fused_views, weighting)(knowledge, labels_N)
        fused["semantic"] = accuracy(output.logits)
    weights_NV = torch.zeros(len(labels_N), len(names))
    weights_NV[:, [names.index(view) for view in fused_views]] = output.view_weights
    fused["oracle"] = right_N.float().mean().item()

    num_classes = len(constants.head_weight)
    counts_C = torch.bincount(labels_N, minlength=num_classes).clamp(min=1)
    sums_CV = torch.zeros(num_classes, len(names)).index_add_(0, labels_N, weights_NV)
    return TeacherQuality(views, fused, zero_shot, (sums_CV / counts_C[:, None]).tolist())
