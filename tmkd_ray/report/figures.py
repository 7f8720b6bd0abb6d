"""The figures of accuracies, training curves and semantic weights."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from tmkd_ray.report.drawing import INK, PAGE, inline_svg, method_style, shortened, view_colour
from tmkd_ray.report.drawing import method_swatch as method_swatch
from tmkd_ray.results import EpochRecord, MethodRecord, Split, TrainingRecord, sample_std

MAX_CLASSES = 24
"""With more classes than this, only the most and the least typical are drawn."""
NUM_EXTREME_CLASSES = 10


# -- accuracy ------------------------------------------------------------------------------------------------


def accuracy_by_seed(
    methods: Sequence[MethodRecord], split: Split, teacher: float | None, name: str = "seeds"
) -> str:
    """Each seed as a ring, mean and sample standard deviation as a marker with a bar, teacher as a line."""

    def paint(axes: Axes) -> None:
        for row, method in enumerate(methods):
            values = 100 * np.array(method.accuracies(split))
            style = method_style(row)
            std = sample_std(values.tolist())
            axes.errorbar(values.mean(), row, xerr=std, color=style["color"], capsize=4, elinewidth=2, zorder=3)
            axes.plot(values.mean(), row, color=style["color"], marker=style["marker"], markersize=8, zorder=4)
            if len(values) > 1:
                axes.plot(values, [row] * len(values), "o", color=INK, markerfacecolor="none", zorder=5)
            # Above its row, so that a long label takes no width from the data.
            axes.annotate(
                shortened(method.label, 52),
                (0, row),
                xycoords=("axes fraction", "data"),
                xytext=(4, 13),
                textcoords="offset points",
                va="center",
            )
        if teacher is not None:
            axes.axvline(100 * teacher, color=INK, linestyle="--", linewidth=1.5)
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
    return inline_svg(name, f"{split} accuracy of each method and seed", height, paint)


def view_accuracy(
    series: Mapping[str, Mapping[str, float]], rows: Sequence[tuple[str, str]], name: str = "views"
) -> str:
    """Accuracy by view and fusion, one marker a series.

    Args:
        series: by label, the accuracy by key; at most two.
        rows: (key, label) from the top.
    """
    assert len(series) <= 2

    def paint(axes: Axes) -> None:
        for index, accuracies in enumerate(series.values()):
            style = method_style(index)
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
        axes.set_yticks(range(len(rows)), [shortened(label) for _, label in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.margins(x=0.12)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("Validation accuracy (%)")

    return inline_svg(name, "validation accuracy by view and fusion", 60 + 48 * len(rows), paint)


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
            _plot_seeds(axes, seeds, method_style(index))
        _epoch_axis(axes, label)

    return inline_svg(name, f"{label} by epoch and method", 270, paint)


def history_curves(name: str, series: Mapping[str, Curve], label: str) -> str | None:
    """Named curves of one training; None where all are empty."""
    shown = [(title, curve) for title, curve in series.items() if curve[0]]
    if not shown:
        return None

    def paint(axes: Axes) -> None:
        for index, (title, (epochs, values)) in enumerate(shown):
            axes.plot(epochs, values, label=title, markevery=max(1, len(epochs) // 8), **method_style(index))
        if len(shown) > 1:
            legend = axes.legend(loc="best", frameon=True, facecolor=PAGE, edgecolor="none", framealpha=0.8)
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
    names = [f"mean of {len(class_names)}", *(shortened(class_names[label], 18) for label in labels)]

    def paint(axes: Axes) -> None:
        # A gap parts the mean from the classes.
        positions = np.concatenate([[-0.4], np.arange(1, len(rows))])
        left = np.zeros(len(rows))
        for view in range(rows.shape[1]):
            width = rows[:, view]
            axes.barh(positions, width, left=left, height=0.78, color=view_colour(view), edgecolor=PAGE)
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
