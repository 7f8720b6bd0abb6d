"""The sections on what networks learnt: correlations of logits, features, and where they look."""

from collections.abc import Sequence

import numpy as np

from tmkd_ray.analysis_record import Analysis, GradCam, NetworkFindings
from tmkd_ray.report import network_figures
from tmkd_ray.report.drawing import image_data_uri
from tmkd_ray.report.elements import Markup, element, figure, grid, join, legend
from tmkd_ray.report.formatting import count
from tmkd_ray.report.sections.base import RunPage
from tmkd_ray.report.sections.views import scaling


def correlation_section(page: RunPage, analysis: Analysis) -> Markup | None:
    """How far each student's logit correlations are from the teacher's; None without a teacher."""
    compared = [(each, each.correlation_gap) for each in analysis.networks if each.correlation_gap is not None]
    if not compared:
        return None
    assert analysis.correlated_classes is not None
    all_names = page.results.dataset.class_names
    names = [all_names[label] for label in analysis.correlated_classes]
    largest = max(float(gap.max()) for _, gap in compared)
    explanation = (
        "Two classes' logits rise and fall together where a network finds the classes alike. Shown is how much "
        "the correlation of each two classes' logits differs between student and teacher, over "
        f"{count(analysis.num_images)} test images (first seed): the darker, the more of the teacher's idea of "
        "the classes was taken over. The figures share one scale."
    )
    if len(names) < len(all_names):
        explanation += f" {len(names)} of the {len(all_names)} classes are drawn; the means are over all."
    panels = [
        figure(
            network_figures.correlation_gap(page.name(f"correlation-{index}"), gap, largest, names),
            f"{page.label(each.key)}: mean difference {each.mean_correlation_gap:.3f}.",
        )
        for index, (each, gap) in enumerate(compared)
    ]
    return join([element("p", explanation), grid(*panels)])


def features_section(page: RunPage, analysis: Analysis) -> Markup | None:
    """t-SNE of each network's penultimate features; None where there is none."""
    projected = [(each, each.projection) for each in analysis.networks if each.projection is not None]
    if not projected or analysis.projected_labels is None:
        return None
    labels_N = analysis.projected_labels
    names = page.results.dataset.class_names
    classes = np.unique(labels_N).tolist()
    which = "" if len(classes) == len(names) else f" of {len(classes)} of the {len(names)} classes"
    explanation = (
        "t-SNE (van der Maaten & Hinton 2008) of the penultimate features of "
        f"{count(len(labels_N))} test images{which} (first seed). What lies together is alike to the network; "
        "distances between groups, and the directions, mean little."
    )

    def panel(index: int, each: NetworkFindings, places: np.ndarray) -> Markup:
        drawing = network_figures.projection(page.name(f"features-{index}"), places, labels_N, classes, names)
        return figure(drawing, f"{page.label(each.key)}.")

    panels = [panel(index, each, places) for index, (each, places) in enumerate(projected)]
    swatches = legend(
        (network_figures.class_swatch(index, page.name(f"class-mark-{index}")), names[label])
        for index, label in enumerate(classes)
    )
    return join([element("p", explanation), swatches, grid(*panels)])


def grad_cam_section(page: RunPage, grad_cam: GradCam) -> Markup:
    """The same images explained for every network."""
    explanation = (
        "Grad-CAM (Selvaraju et al. 2017): where each network finds evidence for the label's class, from none "
        "(the image, a little darker) to most (bright); each picture has its own scale. The number is the "
        "probability the network gives that class. Validation images; students of the first seed."
    )
    kind = scaling(grad_cam.images.shape[1], grad_cam.images.shape[2])

    def shown(picture: np.ndarray, label: str, captions: Sequence[str]) -> Markup:
        source = image_data_uri(picture)
        lines = (element("span", line) for line in captions)
        alt = f"{label}: {captions[-1]}"
        return element(
            "figure", element("img", src=source, alt=alt, class_=kind), element("figcaption", *lines)
        )

    def card(row: int) -> Markup:
        label, image = grad_cam.labels[row], grad_cam.images[row]
        pictures = [shown(image, label, ["\u00a0", "image"])]
        for each in grad_cam.explanations:
            overlay = network_figures.heat_overlay(image, each.maps[row])
            pictures.append(shown(overlay, label, [f"{each.probabilities[row]:.2f}", page.label(each.key)]))
        return element("li", element("h4", label), element("div", *pictures, class_="views"))

    cards = element("ul", *map(card, range(len(grad_cam.labels))), class_="gallery wide")
    return join([element("p", explanation), cards])
