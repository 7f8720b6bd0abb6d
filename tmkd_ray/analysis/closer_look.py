"""Look closely at a run's networks: what they cost, how they relate classes and images, where they look."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from tmkd_ray.analysis.cost import count_flops, measure_latency
from tmkd_ray.analysis.features import Responses, class_activation, fused_activation, heat_maps, responses
from tmkd_ray.analysis.relations import correlation_gap, mean_gap, project
from tmkd_ray.analysis.samples import balanced_rows, rows_of_classes, spread_classes
from tmkd_ray.analysis_record import Explanation, GradCam
from tmkd_ray.datasets.base import ImageDataset
from tmkd_ray.datasets.decode import load_images
from tmkd_ray.progress import Rate, say
from tmkd_ray.results import CostRecord

TEACHER = "teacher"
FUSED = "fused teacher"

_PROJECTED_CLASSES = 10
"""More are not told apart by colour and marker."""
_MAX_CORRELATED = 256
"""Of more classes, so many are compared, evenly spread: the figure has no more pixels."""


@dataclass(frozen=True)
class Subject:
    """A network to look at: the visual teacher, or the first seed of a method.

    Attributes:
        model: returns a `ModelOutput`. normalize: uint8 [B, H, W, 3] to the model's input.
    """

    key: str
    role: Literal["teacher", "student"]
    model: nn.Module
    normalize: nn.Module

    def responses(self, images_NHWC: np.ndarray, device: torch.device, batch_size: int = 128) -> Responses:
        return responses(self.model, self.normalize, images_NHWC, device, batch_size)


@dataclass(frozen=True, eq=False)
class Explained:
    """Images to explain.

    Attributes:
        images: uint8 [N, H, W, 3]. labels: int64 [N]. label_names: of the classes.
        views: uint8 [N, V, H, W, 3], those that are fused, and weights [N, V]; None without a fused teacher.
    """

    images: np.ndarray
    labels: np.ndarray
    label_names: tuple[str, ...]
    views: np.ndarray | None
    weights: np.ndarray | None


@dataclass(frozen=True)
class CloserLook:
    """What was found.

    Attributes:
        shared: fields of `Analysis`. networks: by key, fields of `NetworkFindings`.
        costs: by role.
    """

    shared: dict[str, Any]
    networks: dict[str, dict[str, Any]]
    costs: dict[str, CostRecord]


def look_closely(
    subjects: list[Subject],
    dataset: ImageDataset,
    explained: Explained,
    num_images: int,
    batch_size: int,
    device: torch.device,
    device_name: str,
) -> CloserLook:
    """Compare the networks on test images, and explain others.

    Args:
        subjects: the students' gaps are to the one whose role is `teacher`, if there is one.
        num_images: test images whose logits are compared, evenly over the classes.
    """
    for subject in subjects:
        subject.model.eval().to(device)
        subject.normalize.to(device)
    index = dataset.index("test")
    classes = spread_classes(index.labels, _PROJECTED_CLASSES)
    compared = balanced_rows(index.labels, num_images)
    projected = rows_of_classes(index.labels, classes, max(1, num_images // (2 * len(classes))))
    loaded = load_images(dataset, "test", index.take(np.union1d(compared, projected)))
    is_compared = np.isin(loaded.ids, index.ids[compared])
    is_projected = np.isin(loaded.ids, index.ids[projected])
    say(f"{len(subjects)} networks on {len(loaded.labels):,} test images ({device_name})")
    progress = Rate("features", len(subjects), "networks")
    said = {
        subject.key: subject.responses(loaded.images, device, batch_size) for subject in progress.over(subjects)
    }
    shown = spread_classes(np.arange(len(dataset.class_names)), _MAX_CORRELATED)
    networks: dict[str, dict[str, Any]] = {}
    say(f"t-SNE of {is_projected.sum():,} features of each network")
    for subject in Rate("t-SNE", len(subjects), "networks").over(subjects):
        networks[subject.key] = _relations(said, subject, is_compared, is_projected, shown)
    shared = {
        "num_images": int(is_compared.sum()),
        "projected_labels": loaded.labels[is_projected],
        "correlated_classes": shown,
        "grad_cam": _grad_cam(subjects, explained, device) if len(explained.labels) else None,
    }
    say("operations and latency")
    return CloserLook(shared, networks, _costs(subjects, loaded.images[:1], device, device_name))


def _relations(
    said: dict[str, Responses],
    subject: Subject,
    is_compared: np.ndarray,
    is_projected: np.ndarray,
    shown: np.ndarray,
) -> dict[str, Any]:
    found: dict[str, Any] = {"projection": project(said[subject.key].feature[is_projected])}
    if subject.role == "student" and TEACHER in said:
        logits, taught = (said[key].logits[is_compared] for key in (subject.key, TEACHER))
        gap_CC = correlation_gap(logits, taught)
        found["correlation_gap"] = gap_CC[np.ix_(shown, shown)].astype(np.float16)
        found["mean_correlation_gap"] = mean_gap(gap_CC)
    return found


def _grad_cam(subjects: list[Subject], explained: Explained, device: torch.device) -> GradCam | None:
    """Explain the images for every network that has feature maps, and for the teacher of fused views."""
    labels = torch.from_numpy(explained.labels)
    size = (explained.images.shape[1], explained.images.shape[2])
    explanations: list[Explanation] = []

    def activation(subject: Subject, images_NHWC: np.ndarray) -> Tensor | None:
        return class_activation(subject.model, subject.normalize, images_NHWC, labels, device)

    def add(key: str, activation_Nhw: Tensor, logits_NC: np.ndarray) -> None:
        p_N = torch.from_numpy(logits_NC).softmax(dim=1).gather(1, labels[:, None])[:, 0]
        maps = heat_maps(activation_Nhw, size)
        explanations.append(Explanation(key=key, maps=maps, probabilities=p_N.numpy()))

    for subject in Rate("Grad-CAM", len(subjects), "networks").over(subjects):
        plain = activation(subject, explained.images)
        if plain is None:
            continue
        add(subject.key, plain, subject.responses(explained.images, device).logits)
        if subject.role == "teacher" and explained.views is not None and explained.weights is not None:
            views = [np.ascontiguousarray(explained.views[:, view]) for view in range(explained.views.shape[1])]
            maps = [found for view in views if (found := activation(subject, view)) is not None]
            logits_NVC = np.stack([subject.responses(view, device).logits for view in views], axis=1)
            weights_NV = explained.weights.astype(np.float32)
            fused = fused_activation(torch.stack(maps, dim=1), torch.from_numpy(weights_NV))
            # The classifier is linear: the logits of fused features are the fused logits.
            add(FUSED, fused, np.einsum("nv,nvc->nc", weights_NV, logits_NVC))
    if not explanations:
        return None
    return GradCam(images=explained.images, labels=explained.label_names, explanations=tuple(explanations))


class _Whole(nn.Module):
    """Pixels to logits."""

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        self.model, self.normalize = subject.model, subject.normalize

    def forward(self, images_BHWC: Tensor) -> Tensor:
        logits_BC: Tensor = self.model(self.normalize(images_BHWC)).logits
        return logits_BC


def _costs(
    subjects: list[Subject], image_1HWC: np.ndarray, device: torch.device, device_name: str
) -> dict[str, CostRecord]:
    """Measure the teacher and one student: the others are the same network."""
    pixels = torch.from_numpy(image_1HWC).to(device)
    costs = {}
    for role in ("teacher", "student"):
        subject = next((each for each in subjects if each.role == role), None)
        if subject is not None:
            network = _Whole(subject)
            costs[role] = CostRecord(
                flops=count_flops(network, pixels),
                latency_seconds=measure_latency(network, pixels),
                device=device_name,
                threads=torch.get_num_threads(),
            )
    return costs
