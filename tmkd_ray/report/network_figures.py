"""The figures of a closer look at networks: classes, confusion, calibration, features, explanations."""

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.ticker import MaxNLocator

from tmkd_ray.report.drawing import (
    BLUE,
    FONT_SIZE,
    GRID,
    INK,
    PAGE,
    SERIES_COLOURS,
    SERIES_MARKERS,
    WIDTH,
    inline_svg,
    method_style,
    shortened,
)

_COLOUR_MAP = "cividis"
FEW_IMAGES = 10
"""Where fewer images have a confidence, their accuracy says little."""
_MAX_NUMBERED = 16
"""With more classes than this a matrix has no room for numbers or for every name."""


def class_accuracy(
    name: str,
    teacher_C: Sequence[float | None] | None,
    methods: Sequence[tuple[int, Sequence[float | None]]],
    class_names: Sequence[str],
    labels: Sequence[int],
) -> str:
    """Accuracy of each class: a marker a method, a bar across for the teacher.

    Args:
        methods: (place among the run's methods, accuracy by class, 0 to 1; None without images).
        labels: the classes to draw, from the top.
    """

    def paint(axes: Axes) -> None:
        for row, label in enumerate(labels):
            taught = None if teacher_C is None else teacher_C[label]
            if taught is not None:
                axes.plot([100 * taught] * 2, [row - 0.38, row + 0.38], color=INK, linewidth=2.5)
        _class_rows(axes, methods, labels)
        axes.set_yticks(range(len(labels)), [shortened(class_names[label], 18) for label in labels])
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("Accuracy (%)")

    return inline_svg(name, "accuracy of teacher and students by class", 62 + 22 * len(labels), paint)


def class_difference(
    name: str,
    methods: Sequence[tuple[int, Sequence[float | None]]],
    class_names: Sequence[str],
    labels: Sequence[int],
) -> str:
    """Student minus teacher by class, in points; arguments as for `class_accuracy`, of differences."""

    def paint(axes: Axes) -> None:
        axes.axvline(0, color=INK, linewidth=1.5)
        _class_rows(axes, methods, labels)
        axes.set_yticks(range(len(labels)), [shortened(class_names[label], 18) for label in labels])
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("Student minus teacher (points)")

    return inline_svg(name, "students minus teacher by class", 62 + 22 * len(labels), paint)


def _class_rows(
    axes: Axes, methods: Sequence[tuple[int, Sequence[float | None]]], labels: Sequence[int]
) -> None:
    offsets = np.linspace(-0.2, 0.2, len(methods)) if len(methods) > 1 else np.zeros(1)
    for offset, (index, values) in zip(offsets, methods, strict=True):
        points = [
            (100 * value, row + offset) for row, k in enumerate(labels) if (value := values[k]) is not None
        ]
        style = method_style(index)
        if points:
            axes.plot(
                *zip(*points, strict=True), color=style["color"], marker=style["marker"], linestyle="none"
            )


def confusion(name: str, matrix_CC: np.ndarray, class_names: Sequence[str]) -> str:
    """Share of each label's images by predicted class, rows sum to 100 %; small shares are lifted."""
    images_C1 = matrix_CC.sum(axis=1, keepdims=True)
    share_CC = 100 * matrix_CC / np.maximum(images_C1, 1)
    return _matrix(
        name,
        "confusion matrix",
        share_CC,
        PowerNorm(0.4, 0, 100),
        "Share of the label's images (%)",
        class_names,
        ("Predicted class", "Label"),
        ticks=[0, 1, 5, 20, 50, 100],
        digits=0,
    )


def correlation_gap(name: str, gap_KK: np.ndarray, largest: float, class_names: Sequence[str]) -> str:
    """|difference of logit correlations| of each two classes; `largest` ends the scale of all figures."""
    return _matrix(
        name,
        "difference of the logits' correlations from the teacher's",
        gap_KK,
        Normalize(0, max(largest, 1e-6)),
        "|difference of correlations|",
        class_names,
        ("Class", "Class"),
        digits=2,
    )


def _matrix(
    name: str,
    description: str,
    values: np.ndarray,
    scale: Normalize,
    unit: str,
    class_names: Sequence[str],
    axis_labels: tuple[str, str],
    ticks: Sequence[float] | None = None,
    digits: int = 0,
) -> str:
    number = len(values)
    numbered = number <= _MAX_NUMBERED
    colours = matplotlib.colormaps[_COLOUR_MAP]

    def paint(axes: Axes) -> None:
        image = axes.imshow(values, cmap=colours, norm=scale, interpolation="nearest", aspect="equal")
        axes.grid(visible=False)
        places = np.arange(number) if numbered else np.linspace(0, number - 1, 6).round().astype(int)
        names = [shortened(class_names[place], 12) for place in places]
        turned = max(map(len, names)) > 2
        axes.set_xticks(places, names, rotation=45 if turned else 0, ha="right" if turned else "center")
        axes.set_yticks(places, names)
        axes.tick_params(length=0 if numbered else 3)
        axes.set_xlabel(axis_labels[0])
        axes.set_ylabel(axis_labels[1])
        for spine in axes.spines.values():
            spine.set_visible(False)
        if numbered and digits == 0:
            for row, column in np.argwhere(values >= 0.5):
                value = values[row, column]
                # cividis grows lighter with the value: black is read on its upper half.
                ink = "#000000" if scale(value) > 0.5 else "#ffffff"
                axes.text(column, row, f"{value:.{digits}f}", color=ink, ha="center", va="center", fontsize=10)
        bar = axes.figure.colorbar(image, ax=axes, shrink=0.8, ticks=ticks)
        bar.outline.set_visible(False)
        bar.set_label(unit)

    return inline_svg(name, description, 360, paint)


def reliability(name: str, counts: np.ndarray, hits: np.ndarray, confidences: np.ndarray) -> str:
    """Accuracy by confidence (Guo et al. 2017, figure 1), and below how many images have each confidence."""
    number = len(counts)
    known = counts > 0
    edges = np.arange(number) / number * 100
    width = 100 / number

    def paint(axes: Axes) -> None:
        share = 100 * counts / max(counts.sum(), 1)
        axes.bar(edges, share, width, align="edge", color=GRID)
        axes.plot([0, 100], [0, 100], color=INK, linestyle="--", linewidth=1.5)
        confidence, accuracy = 100 * confidences[known] / counts[known], 100 * hits[known] / counts[known]
        few = counts[known] < FEW_IMAGES
        # No line through what a handful of images gave: it would draw the eye to noise.
        axes.plot(confidence[~few], accuracy[~few], "o-", color=BLUE)
        axes.plot(confidence[few], accuracy[few], "o", color=BLUE, markerfacecolor=PAGE)
        axes.set_xlim(0, 100)
        axes.set_ylim(0, 102)
        axes.set_xlabel("Confidence (%)")
        axes.set_ylabel("Accuracy, share (%)")

    return inline_svg(name, "accuracy by confidence", 270, paint, width=WIDTH)


def projection(
    name: str, places_N2: np.ndarray, labels_N: np.ndarray, classes: Sequence[int], class_names: Sequence[str]
) -> str:
    """Features laid out in the plane, a colour and marker a class, its name above most of its images."""

    def paint(axes: Axes) -> None:
        for index, label in enumerate(classes):
            places = places_N2[labels_N == label]
            style = class_style(index)
            axes.plot(*places.T, linestyle="none", markersize=4, alpha=0.75, markeredgewidth=0, **style)
        axes.margins(0.06, 0.1)
        _name_classes(axes, [(class_names[k], places_N2[labels_N == k]) for k in classes])
        axes.set_xticks([])
        axes.set_yticks([])
        axes.grid(visible=False)
        for spine in axes.spines.values():
            spine.set_visible(True)
            spine.set_color(GRID)

    return inline_svg(name, "t-SNE of features, coloured by class", 330, paint)


def _name_classes(axes: Axes, named: Sequence[tuple[str, np.ndarray]]) -> None:
    """Write each class's name above most of its images, and above other names that would lie in its way."""
    taken: list[tuple[float, float, float]] = []
    anchors = []
    for name, places in named:
        # On the images it would hide a class that lies close together; strays would draw it away from them.
        middle = np.median(places, axis=0)
        distances = np.linalg.norm(places - middle, axis=1)
        core = places[distances <= np.quantile(distances, 0.6)]
        anchors.append((shortened(name, 14), float(middle[0]), float(core[:, 1].max())))
    axes.get_ylim()  # settles the limits, which the places below hang on
    units = 72 / axes.figure.dpi
    for name, x, y in sorted(anchors, key=lambda anchor: anchor[2]):
        across, up = (units * value for value in axes.transData.transform((x, y)))
        half_width, lift = 0.3 * FONT_SIZE * len(name), 5.0
        while any(
            abs(across - x_taken) < half_width + half_taken and abs(up + lift - y_taken) < FONT_SIZE + 2
            for x_taken, y_taken, half_taken in taken
        ):
            lift += 2.0
        taken.append((across, up + lift, half_width))
        text = axes.annotate(
            name,
            (x, y),
            xytext=(0, lift),
            textcoords="offset points",
            ha="center",
            va="bottom",
            weight="bold",
        )
        text.set_bbox({"facecolor": PAGE, "edgecolor": "none", "alpha": 0.75, "pad": 1})


def class_swatch(index: int, name: str) -> str:
    """The marker of the `index`-th class shown, for a legend."""

    def paint(axes: Axes) -> None:
        axes.plot([0], [0], linestyle="none", markersize=7, markeredgewidth=0, **class_style(index))
        axes.set_axis_off()

    return inline_svg(name, "", height=14, width=14, paint=paint)


def class_style(index: int) -> dict[str, Any]:
    """Colour and marker of the `index`-th class shown; colours and markers go round at different paces."""
    colour = SERIES_COLOURS[index % len(SERIES_COLOURS)]
    return {
        "color": colour,
        "marker": SERIES_MARKERS[(index + index // len(SERIES_COLOURS)) % len(SERIES_MARKERS)],
    }


def validation_by_run(name: str, series: Sequence[tuple[str, Sequence[int], Sequence[float]]]) -> str:
    """Named curves of validation accuracy (%), one a run and method; the page has the legend."""

    def paint(axes: Axes) -> None:
        for index, (_, epochs, values) in enumerate(series):
            axes.plot(epochs, values, markevery=max(1, len(epochs) // 8), **method_style(index))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlabel("Epoch")
        axes.set_ylabel("Validation accuracy (%)")

    return inline_svg(name, "validation accuracy by epoch, run and method", 270, paint)


def heat_overlay(image_HWC: np.ndarray, map_HW: np.ndarray) -> np.ndarray:
    """Lay an explanation (uint8, 255 the strongest) over its image: the stronger, the more opaque and light."""
    heat = map_HW.astype(np.float32) / 255
    colour = matplotlib.colormaps["inferno"](heat)[..., :3] * 255
    opacity = (0.75 * heat**0.7)[..., None]
    # A little darker where there is no evidence, so that the bright parts stand out on white images too.
    blended = 0.85 * image_HWC * (1 - opacity) + colour * opacity
    return np.clip(blended.round(), 0, 255).astype(np.uint8)
