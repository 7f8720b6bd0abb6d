"""Figures of a sweep: parallel coordinates, importances, accuracy over time, accuracy against latency."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from tmkd_ray.report.drawing import BLUE, GRID, INK, VERMILLION, inline_svg, shortened
from tmkd_ray.report.importance import Importance, is_category, is_logarithmic
from tmkd_ray.trials import Sweep, TrialRecord, short

_WIDE = 880
_MAX_LINES = 200


def parallel_coordinates(sweep: Sweep) -> str:
    """Each trial a line through its values: the better, the stronger; the best in vermillion."""
    trials = [trial for trial in sweep.ranked() if trial.status in ("finished", "stopped")][:_MAX_LINES]
    axes_of = [_Axis(sweep, path, trials) for path in sweep.record.parameters]
    accuracies = np.array([100 * (trial.accuracy or 0.0) for trial in trials])
    low, high = float(accuracies.min()), float(accuracies.max())
    places = np.array([each.places(trials) for each in axes_of]).T
    last = (accuracies - low) / (high - low) if high > low else np.full(len(trials), 0.5)
    places = np.concatenate([places, last[:, None]], axis=1)

    def paint(axes: Axes) -> None:
        columns = range(places.shape[1])
        for index in reversed(range(len(trials))):
            is_best = index == 0
            axes.plot(
                columns,
                places[index],
                color=VERMILLION if is_best else BLUE,
                linewidth=2.5 if is_best else 1.2,
                # A colour map's ends would vanish, one on a light page, the other on a dark one.
                alpha=1.0 if is_best else 0.15 + 0.75 * float(last[index]),
                marker="o" if is_best else None,
                zorder=4 if is_best else 3,
            )
        for column in columns:
            axes.axvline(column, color=INK, linewidth=1, zorder=2)
        for column, each in enumerate(axes_of):
            for place, text in each.ticks():
                _tick(axes, column, place, text)
        for part in (0.0, 0.25, 0.5, 0.75, 1.0):
            _tick(axes, len(axes_of), part, f"{low + part * (high - low):.1f}")
        names = [shortened(path.rpartition(".")[2], 20) for path in sweep.record.parameters]
        axes.set_xticks(columns, [*names, "val. acc. (%)"])
        axes.set_xlim(-0.15, len(axes_of) + 0.45)
        axes.set_ylim(-0.06, 1.06)
        axes.set_yticks([])
        axes.grid(visible=False)
        axes.tick_params(axis="x", length=0)
        for side in ("left", "bottom"):
            axes.spines[side].set_visible(False)

    return inline_svg("parallel", "each trial's values and accuracy as a line", 320, paint, width=_WIDE)


def _tick(axes: Axes, column: int, place: float, text: str) -> None:
    axes.plot([column - 0.02, column], [place, place], color=INK, linewidth=1, zorder=2)
    axes.annotate(
        text,
        (column, place),
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
        fontsize=10,
        bbox={"boxstyle": "square,pad=0.1", "facecolor": "#070809", "edgecolor": "none", "alpha": 0.75},
        zorder=6,
    )


class _Axis:
    """One parameter's values as places from 0 to 1."""

    def __init__(self, sweep: Sweep, path: str, trials: Sequence[TrialRecord]) -> None:
        self.path = path
        self.is_category = is_category(sweep, path)
        self.is_log = not self.is_category and is_logarithmic(sweep, path)
        values: list[Any] = [trial.parameters.get(path) for trial in trials]
        if self.is_category:
            self.names = sorted({short(value) for value in values})
        else:
            self.low, self.high = self._scaled(min(values)), self._scaled(max(values))

    def _scaled(self, value: float) -> float:
        return math.log(value) if self.is_log else float(value)

    def _place(self, value: Any) -> float:
        if self.is_category:
            return 0.5 if len(self.names) == 1 else self.names.index(short(value)) / (len(self.names) - 1)
        return 0.5 if self.high == self.low else (self._scaled(value) - self.low) / (self.high - self.low)

    def places(self, trials: Sequence[TrialRecord]) -> list[float]:
        return [self._place(trial.parameters.get(self.path)) for trial in trials]

    def ticks(self) -> list[tuple[float, str]]:
        if self.is_category:
            return [
                (self._place(name) if len(self.names) > 1 else 0.5, shortened(name, 16)) for name in self.names
            ]
        if self.high == self.low:
            return [(0.5, short(self._unscaled(self.low)))]
        return [
            (part, f"{self._unscaled(self.low + part * (self.high - self.low)):.3g}")
            for part in (0.0, 0.25, 0.5, 0.75, 1.0)
        ]

    def _unscaled(self, value: float) -> float:
        return math.exp(value) if self.is_log else value


def importance_bars(importance: Importance) -> str:
    """Each parameter's share as a bar."""
    rows = list(importance.shares.items())

    def paint(axes: Axes) -> None:
        positions = range(len(rows))
        axes.barh(positions, [100 * share for _, share in rows], height=0.6, color=BLUE)
        for position, (_, share) in zip(positions, rows, strict=True):
            axes.annotate(
                f"{100 * share:.0f}",
                (100 * share, position),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
            )
        axes.set_yticks(positions, [shortened(path, 30) for path, _ in rows])
        axes.invert_yaxis()
        axes.set_xlim(0, 108)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("Share of the importance (%)")

    return inline_svg("importance", "importance of each parameter", 70 + 30 * len(rows), paint)


def accuracy_over_time(sweep: Sweep) -> str:
    """Each trial at the moment it ended, and the best so far."""
    over = sorted(
        (t for t in sweep.with_status("finished", "stopped") if t.accuracy is not None), key=lambda t: t.ended
    )
    start = min(trial.started for trial in sweep.trials)
    minutes = [(trial.ended - start) / 60 for trial in over]
    accuracies = [100 * (trial.accuracy or 0.0) for trial in over]
    best = np.maximum.accumulate(accuracies)

    def paint(axes: Axes) -> None:
        axes.step(minutes, best, where="post", color=VERMILLION, label="best so far")
        for status, marker in (("finished", "o"), ("stopped", "v")):
            chosen = [i for i, trial in enumerate(over) if trial.status == status]
            if chosen:
                axes.plot(
                    [minutes[i] for i in chosen],
                    [accuracies[i] for i in chosen],
                    marker,
                    color=BLUE,
                    markerfacecolor="none" if status == "stopped" else BLUE,
                    label=f"{status} trials",
                )
        axes.legend(loc="best", frameon=True, facecolor="#070809", edgecolor="none", framealpha=0.8)
        axes.set_xlabel("Minutes since the first trial began")
        axes.set_ylabel("Validation accuracy (%)")

    return inline_svg("over-time", "validation accuracy of the trials over time", 290, paint)


def learning_curves(sweep: Sweep) -> str:
    """Each trial's validation accuracy by epoch; the best in vermillion."""
    trials = [trial for trial in sweep.ranked() if trial.history][:_MAX_LINES]

    def paint(axes: Axes) -> None:
        for index in reversed(range(len(trials))):
            history = trials[index].history
            is_best = index == 0
            axes.plot(
                [record.epoch for record in history],
                [100 * (record.validation_accuracy or 0.0) for record in history],
                color=VERMILLION if is_best else BLUE,
                linewidth=2.5 if is_best else 1,
                alpha=1.0 if is_best else 0.5,
                marker="o" if len(history) == 1 or is_best else None,
                markevery=max(1, len(history) // 8),
                zorder=4 if is_best else 3,
            )
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlabel("Epoch")
        axes.set_ylabel("Validation accuracy (%)")

    return inline_svg("curves", "validation accuracy of each trial by epoch", 290, paint)


def accuracy_against_latency(sweep: Sweep) -> str:
    """Finished trials by latency and accuracy, and the front that no other beats."""
    trials = [trial for trial in sweep.with_status("finished") if trial.latency_ms is not None]
    front = sweep.pareto_front()[::-1]

    def paint(axes: Axes) -> None:
        axes.plot(
            [trial.latency_ms or 0.0 for trial in trials],
            [100 * (trial.accuracy or 0.0) for trial in trials],
            "o",
            color=BLUE,
            label="trials",
        )
        axes.plot(
            [trial.latency_ms or 0.0 for trial in front],
            [100 * (trial.accuracy or 0.0) for trial in front],
            color=VERMILLION,
            marker="s",
            markersize=8,
            markerfacecolor="none",
            label="Pareto front",
        )
        axes.legend(loc="best", frameon=True, facecolor="#070809", edgecolor="none", framealpha=0.8)
        axes.grid(color=GRID)
        axes.set_xlabel("Latency of one image (ms)")
        axes.set_ylabel("Validation accuracy (%)")

    return inline_svg("pareto", "validation accuracy against latency", 290, paint)
