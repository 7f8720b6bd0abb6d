"""The sections on the views: what each prior shows, how much each counts, and where it won."""

from collections.abc import Sequence
from functools import partial

import numpy as np

from tmkd_ray.analysis_record import ViewGallery, ViewWins
from tmkd_ray.report import figures
from tmkd_ray.report.drawing import MAX_CRISP_SIZE, image_data_uri, view_colour
from tmkd_ray.report.elements import Markup, bar, data_table, details, element, figure, grid, join, legend
from tmkd_ray.report.formatting import count
from tmkd_ray.report.sections.base import RunPage, view_title


def gallery_section(gallery: ViewGallery) -> Markup:
    """A few images through every view."""
    explanation = "Images as the teachers see them."
    if gallery.weights is not None:
        explanation += (
            " The number is the semantic weight of the view for this image; an image's weights sum to 1."
        )
    return join([element("p", explanation), _cards(gallery)])


def scaling(height: int, width: int) -> str:
    """The class of images of this size: small ones are enlarged with hard edges."""
    return "crisp" if max(height, width) <= MAX_CRISP_SIZE else "smooth"


def _cards(gallery: ViewGallery) -> Markup:
    kind = scaling(gallery.images.shape[2], gallery.images.shape[3])

    def shown(index: int, view: int) -> Markup:
        label, name = gallery.labels[index], gallery.view_names[view]
        source = image_data_uri(gallery.images[index, view])
        caption = [element("span", view_title(name))]
        if gallery.weights is not None:
            weight = float(gallery.weights[index, view])
            # The name last: it may take two lines, and the bars of an image should stand level.
            caption[:0] = [bar(weight, view_colour(view)), element("span", f"{weight:.2f}")]
        picture = element("img", src=source, alt=f"{label}, {name}", class_=kind)
        return element("figure", picture, element("figcaption", *caption))

    def card(index: int) -> Markup:
        views = (shown(index, view) for view in range(len(gallery.view_names)))
        return element("li", element("h4", gallery.labels[index]), element("div", *views, class_="views"))

    return element("ul", *map(card, range(len(gallery.labels))), class_="gallery")


def weights_section(page: RunPage) -> Markup | None:
    """Semantic weights by class, and the images that each view won; None where there are neither."""
    children = []
    if page.results.semantic_weights is not None:
        weights_CV = np.array(page.results.semantic_weights)
        num_views = weights_CV.shape[1]
        numbered = tuple(f"view {number}" for number in range(1, num_views + 1))
        names = page.views if len(page.views) == num_views else numbered
        children.append(_class_weights(page, weights_CV, names))
    if page.analysis is not None and page.analysis.view_wins is not None:
        children.append(_wins(page, page.analysis.view_wins))
    return join(children) if children else None


def _wins(page: RunPage, wins: ViewWins) -> Markup:
    names = page.results.dataset.class_names
    total = int(wins.counts.sum())
    explanation = (
        f"Of {count(total)} validation images, how many gave each view its largest weight; below, the images "
        "that a view won by the largest lead, one a class first."
    )
    totals = wins.counts.sum(axis=0)
    titles = [view_title(name) for name in wins.view_names]
    header = ("Class", *titles, "Images")
    overall = ("all classes", *map(count, totals.tolist()), count(total))
    rows = [
        (name, *map(count, row.tolist()), count(int(row.sum())))
        for name, row in zip(names, wins.counts, strict=True)
        if row.sum()
    ]
    children = [
        element("h3", "Which view won"),
        element("p", explanation),
        data_table(header, [overall]),
        details("By class", data_table(header, rows)),
    ]
    for title, number, gallery in zip(titles, totals.tolist(), wins.won_by, strict=True):
        if gallery.labels:
            heading = f"Won by {title}: {count(number)} of {count(total)}"
            children += [element("h3", heading), _cards(gallery)]
    return join(children)


def _class_weights(page: RunPage, weights_CV: np.ndarray, views: Sequence[str]) -> Markup:
    class_names = page.results.dataset.class_names
    swatches = legend(
        (
            element("span", class_="square", style=f"background: {view_colour(view)}"),
            f"{view_title(name)} (mean {weights_CV[:, view].mean():.2f})",
        )
        for view, name in enumerate(views)
    )
    explanation = "How much each view counts in the fused teacher, averaged over the images of a class."
    draw = partial(figures.semantic_weights, weights_CV=weights_CV, class_names=class_names, views=views)
    if len(class_names) <= figures.MAX_CLASSES:
        svg = draw(page.name("weights"), labels=range(len(class_names)))
        return join(
            [element("p", explanation), swatches, grid(figure(svg, "Every class; on top, their mean."))]
        )
    farthest, nearest = figures.extreme_classes(weights_CV)
    explanation += (
        f" Only {len(farthest) + len(nearest)} of the {len(class_names)} classes are shown: those whose "
        "weights differ most from the mean over all classes, and those that differ least."
    )
    pictures = [
        figure(
            draw(page.name(f"weights-{which}"), labels=labels),
            f"The {len(labels)} classes that differ {which} from the mean, which is on top.",
        )
        for which, labels in (("most", farthest), ("least", nearest))
    ]
    return join([element("p", explanation), swatches, grid(*pictures)])
