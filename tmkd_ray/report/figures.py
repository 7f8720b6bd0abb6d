"""Figures as inline SVG that follows the page's light or dark theme.

Every figure is WIDTH units wide, one unit a CSS pixel, so that it reads at 100 % and still fits a telephone.
Ink, grid and page are CSS variables (`--ink`, `--grid`, `--page`); data colours are those of M. Okabe and
K. Ito, "Color Universal Design" (2008), which stay apart for colour-blind readers and show on white and on
near-black. Series also differ by marker; their legend is the page's, of `method_swatch` and `view_colour`.
"""

import base64
import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from tmkd_ray.results import EpochRecord, MethodRecord, Split, TrainingRecord, sample_std

WIDTH = 440
FONT_SIZE = 12

# Colours that no figure uses for data; inline_svg replaces them by the page's variables.
_INK, _GRID, _PAGE = "#010203", "#040506", "#070809"
_VARIABLES = {_INK: "var(--ink)", _GRID: "var(--grid)", _PAGE: "var(--page)"}

_BLUE, _VERMILLION, _GREEN, _PURPLE = "#0072b2", "#d55e00", "#009e73", "#cc79a7"
_ORANGE, _SKY, _YELLOW = "#e69f00", "#56b4e9", "#f0e442"
_METHOD_COLOURS = (_BLUE, _VERMILLION, _GREEN, _PURPLE, _ORANGE, _SKY, _INK)
_METHOD_MARKERS = "osD^vPX"
# Lighter ones first: they carry black numbers.
_VIEW_COLOURS = (_SKY, _ORANGE, _GREEN, _PURPLE, _YELLOW, _VERMILLION)

_STYLE = {
    "font.size": FONT_SIZE,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.labelsize": FONT_SIZE,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "grid.color": _GRID,
    "grid.linewidth": 1,
    "lines.linewidth": 2,
    "lines.markersize": 5,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.labelsize": FONT_SIZE,
    "ytick.labelsize": FONT_SIZE,
    # Text stays text, in the page's font; a dollar sign in a class name is no mathematics.
    "svg.fonttype": "none",
    "text.parse_math": False,
    "text.usetex": False,
    # The same results give the same bytes.
    "svg.hashsalt": "report",
}

MAX_CLASSES = 24
"""With more classes than this, only the most and the least typical are drawn."""
NUM_EXTREME_CLASSES = 10


def inline_svg(
    name: str, description: str, height: float, paint: Callable[[Axes], None], width: float = WIDTH
) -> str:
    """Draw one pair of axes.

    Args:
        name: unique in the page; prefix of the ids inside.
        description: what a screen reader says; empty for a decoration, which it skips.
        height: in CSS pixels, as `width`.
        paint: draws on the axes.

    Returns: an `<svg>` element without ids of its own kind, metadata or links to anywhere.
    """
    buffer = io.BytesIO()
    with rc_context(_STYLE), warnings.catch_warnings():
        # The browser draws the text, in a font that has the glyphs.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        # One inch is 72 units of the SVG.
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
        paint(figure.add_subplot())
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return _for_html(buffer.getvalue(), name, description)


def standalone_svg(title: str, height: float, paint: Callable[[Axes], None], width: float = WIDTH) -> str:
    """Draw one pair of axes as an SVG file, black on white; sizes as for `inline_svg`."""
    buffer = io.BytesIO()
    style = _STYLE | {
        key: {_INK: "black", _GRID: "#d0d0d0", _PAGE: "white"}[value]
        for key, value in _STYLE.items()
        if value in (_INK, _GRID, _PAGE)
    }
    style |= {"figure.facecolor": "white", "svg.fonttype": "path"}
    with rc_context(style):
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
        paint(figure.add_subplot())
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Title": title})
    return buffer.getvalue().decode()


def _for_html(svg: bytes, name: str, description: str) -> str:
    root = ElementTree.fromstring(svg)
    for parent in root.iter():
        for child in list(parent):
            # Metadata is for files; the style sheet would apply to the whole page.
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    used = set(re.findall(r"url\(#([^)]+)\)", svg.decode())) | set(re.findall(r'href="#([^"]+)"', svg.decode()))
    for node in root.iter():
        node.tag = node.tag.rpartition("}")[2]
        attributes = {key.rpartition("}")[2]: value for key, value in node.attrib.items()}
        if attributes.get("id") in used:
            attributes["id"] = f"{name}-{attributes['id']}"
        else:
            attributes.pop("id", None)
        for key, value in attributes.items():
            value = value.replace("url(#", f"url(#{name}-")
            if key == "href":
                value = value.replace("#", f"#{name}-")
            for sentinel, variable in _VARIABLES.items():
                value = value.replace(sentinel, variable)
            attributes[key] = value
        node.attrib.clear()
        node.attrib.update(attributes)
    width, height = root.attrib["viewBox"].split()[2:]
    root.attrib.update(
        {
            "width": width,
            "height": height,
            # What the style sheet said.
            "style": "stroke-linejoin: round; stroke-linecap: butt",
        }
    )
    root.attrib.update({"role": "img", "aria-label": description} if description else {"aria-hidden": "true"})
    return ElementTree.tostring(root, encoding="unicode")


def png_data_uri(image: np.ndarray, max_side: int = 192) -> str:
    """A PNG of `image` [H, W, 3] uint8 as a data URI, shrunk where a side is longer than `max_side`."""
    picture = Image.fromarray(image)
    picture.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _label(text: str, limit: int = 22) -> str:
    """A name that fits a figure and is legal XML."""
    clean = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
    return clean if len(clean) <= limit else clean[: limit - 1] + "…"


def _method_style(index: int) -> dict[str, Any]:
    lap = index // len(_METHOD_COLOURS)
    return {
        "color": _METHOD_COLOURS[index % len(_METHOD_COLOURS)],
        "marker": _METHOD_MARKERS[index % len(_METHOD_MARKERS)],
        "linestyle": ("-", "--", ":")[lap % 3],
    }


def method_swatch(index: int, name: str) -> str:
    """The line and marker of method `index`, for a legend."""

    def paint(axes: Axes) -> None:
        axes.plot([0, 0.5, 1], [0, 0, 0], markevery=[1], **_method_style(index))
        axes.set_axis_off()

    return inline_svg(name, "", height=14, width=34, paint=paint)


def view_colour(index: int) -> str:
    """The CSS colour of view `index`."""
    return _VIEW_COLOURS[index % len(_VIEW_COLOURS)]


# -- accuracy ------------------------------------------------------------------------------------------------


def accuracy_by_seed(methods: Sequence[MethodRecord], split: Split, teacher: float | None) -> str:
    """Each seed as a ring, mean and sample standard deviation as a marker with a bar, teacher as a line."""

    def paint(axes: Axes) -> None:
        for row, method in enumerate(methods):
            values = 100 * np.array(method.accuracies(split))
            style = _method_style(row)
            std = sample_std(values.tolist())
            axes.errorbar(values.mean(), row, xerr=std, color=style["color"], capsize=4, elinewidth=2, zorder=3)
            axes.plot(values.mean(), row, color=style["color"], marker=style["marker"], markersize=8, zorder=4)
            if len(values) > 1:
                axes.plot(values, [row] * len(values), "o", color=_INK, markerfacecolor="none", zorder=5)
            # Above its row, so that a long label takes no width from the data.
            axes.annotate(
                _label(method.label, 52),
                (0, row),
                xycoords=("axes fraction", "data"),
                xytext=(4, 13),
                textcoords="offset points",
                va="center",
            )
        if teacher is not None:
            axes.axvline(100 * teacher, color=_INK, linestyle="--", linewidth=1.5)
            left, right = axes.get_xlim()
            on_the_left = 100 * teacher > (left + right) / 2
            axes.annotate(
                "teacher",
                (100 * teacher, len(methods) - 0.45),
                xytext=(-4 if on_the_left else 4, 0),
                textcoords="offset points",
                ha="right" if on_the_left else "left",
                va="center",
            )
        axes.set_ylim(len(methods) - 0.2 if teacher is not None else len(methods) - 0.5, -0.75)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(f"{split.capitalize()} accuracy (%)")

    height = 60 + 48 * len(methods) + (14 if teacher is not None else 0)
    return inline_svg("seeds", f"{split} accuracy of each method and seed", height, paint)


def view_accuracy(series: Mapping[str, Mapping[str, float]], rows: Sequence[tuple[str, str]]) -> str:
    """Accuracy by view and fusion, one marker a series.

    Args:
        series: by label, the accuracy by key; at most two.
        rows: (key, label) from the top.
    """
    assert len(series) <= 2

    def paint(axes: Axes) -> None:
        for index, accuracies in enumerate(series.values()):
            style = _method_style(index)
            for row, (key, _) in enumerate(rows):
                if key not in accuracies:
                    continue
                value = 100 * accuracies[key]
                axes.plot(value, row, color=style["color"], marker=style["marker"], markersize=8)
                # The first series has its numbers above, the second below, so that they never meet.
                axes.annotate(
                    f"{value:.1f}",
                    (value, row),
                    xytext=(0, -13 if index else 13),
                    textcoords="offset points",
                    ha="center",
                    va="center",
                )
        axes.set_yticks(range(len(rows)), [_label(label) for _, label in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.margins(x=0.12)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("Validation accuracy (%)")

    return inline_svg("views", "validation accuracy by view and fusion", 60 + 48 * len(rows), paint)


# -- training curves -----------------------------------------------------------------------------------------

Curve = tuple[list[int], list[float]]
"""Epochs and values."""


def _curve(history: Sequence[EpochRecord], value: Callable[[EpochRecord], float | None]) -> Curve:
    points = [(record.epoch, value(record)) for record in history]
    known = [(epoch, number) for epoch, number in points if number is not None]
    return [epoch for epoch, _ in known], [number for _, number in known]


def _plot_seeds(axes: Axes, curves: Sequence[Curve], style: dict[str, Any]) -> None:
    """The mean over the seeds that have an epoch, and a band from the lowest to the highest."""
    by_epoch: dict[int, list[float]] = {}
    for epochs, values in curves:
        for epoch, value in zip(epochs, values, strict=True):
            by_epoch.setdefault(epoch, []).append(value)
    if not by_epoch:
        return
    epochs = sorted(by_epoch)
    means = [float(np.mean(by_epoch[epoch])) for epoch in epochs]
    axes.plot(epochs, means, markevery=max(1, len(epochs) // 8), **style)
    if len(curves) > 1:
        low, high = ([pick(by_epoch[epoch]) for epoch in epochs] for pick in (min, max))
        axes.fill_between(epochs, low, high, color=style["color"], alpha=0.2, linewidth=0)


def method_curves(
    name: str,
    methods: Sequence[MethodRecord],
    value: Callable[[EpochRecord], float | None],
    label: str,
    first_epoch: int = 1,
) -> str | None:
    """One value of the history, by method; None where no method has it.

    Args:
        name: unique in the page.
        value: of an epoch; None leaves the epoch out.
        label: of the y axis, with its unit.
        first_epoch: where the figure starts.
    """

    def curve(run: TrainingRecord) -> Curve:
        return _curve([record for record in run.history if record.epoch >= first_epoch], value)

    curves = [[curve(run) for run in method.runs] for method in methods]
    if not any(values for method in curves for _, values in method):
        return None

    def paint(axes: Axes) -> None:
        for index, seeds in enumerate(curves):
            _plot_seeds(axes, seeds, _method_style(index))
        _epoch_axis(axes, label)

    return inline_svg(name, f"{label} by epoch and method", 270, paint)


def history_curves(name: str, series: Mapping[str, Curve], label: str) -> str | None:
    """Named curves of one training; None where all are empty."""
    shown = [(title, curve) for title, curve in series.items() if curve[0]]
    if not shown:
        return None

    def paint(axes: Axes) -> None:
        for index, (title, (epochs, values)) in enumerate(shown):
            axes.plot(epochs, values, label=title, markevery=max(1, len(epochs) // 8), **_method_style(index))
        if len(shown) > 1:
            legend = axes.legend(loc="best", frameon=True, facecolor=_PAGE, edgecolor="none", framealpha=0.8)
            legend.set_zorder(10)
        _epoch_axis(axes, label)

    return inline_svg(name, f"{label} by epoch", 270, paint)


def accuracy_curve(history: Sequence[EpochRecord], split: str) -> Curve:
    """`train` or `validation` accuracy in %."""
    epochs, values = _curve(
        history, lambda record: record.train_accuracy if split == "train" else record.validation_accuracy
    )
    return epochs, [100 * value for value in values]


def loss_curve(history: Sequence[EpochRecord]) -> Curve:
    """The weighted sum."""
    return _curve(history, lambda record: record.loss)


def _epoch_axis(axes: Axes, label: str) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("Epoch")
    axes.set_ylabel(label)


# -- semantic weights ----------------------------------------------------------------------------------------


def extreme_classes(weights_CV: np.ndarray) -> tuple[list[int], list[int]]:
    """The classes whose weights are farthest from the mean over classes, and the nearest.

    The distance is the total variation, half the sum of absolute differences. Both lists hold
    NUM_EXTREME_CLASSES labels, the farthest (nearest) first.
    """
    distance = np.abs(weights_CV - weights_CV.mean(axis=0)).sum(axis=1) / 2
    order = np.argsort(-distance, kind="stable").tolist()
    return order[:NUM_EXTREME_CLASSES], order[::-1][:NUM_EXTREME_CLASSES]


def semantic_weights(
    name: str,
    *,
    weights_CV: np.ndarray,
    labels: Sequence[int],
    class_names: Sequence[str],
    views: Sequence[str],
) -> str:
    """Stacked bars: the mean over all classes, then the classes `labels`; rows of weights sum to one."""
    rows = np.concatenate([weights_CV.mean(axis=0, keepdims=True), weights_CV[list(labels)]])
    names = [f"mean of {len(class_names)}", *(_label(class_names[label], 18) for label in labels)]

    def paint(axes: Axes) -> None:
        # A gap parts the mean from the classes.
        positions = np.concatenate([[-0.4], np.arange(1, len(rows))])
        left = np.zeros(len(rows))
        for view in range(rows.shape[1]):
            width = rows[:, view]
            axes.barh(positions, width, left=left, height=0.78, color=view_colour(view), edgecolor=_PAGE)
            for position, start, value in zip(positions, left, width, strict=True):
                # A narrower bar has no room for its number.
                if value >= 0.09:
                    middle = start + value / 2
                    axes.text(middle, position, f"{value:.2f}", color="#000000", ha="center", va="center")
            left += width
        axes.set_yticks(positions, names)
        axes.set_ylim(len(rows) - 0.45, -0.95)
        axes.set_xlim(0, 1)
        axes.grid(visible=False)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("Mean semantic weight (sums to 1)")

    return inline_svg(name, f"semantic weights of {', '.join(views)} by class", 62 + 24 * len(rows), paint)
