"""An ablation's results as Markdown, CSV and a figure: what each part was worth."""

import csv
import io
import statistics

from matplotlib.axes import Axes

from tmkd_ray.report.comparison import Difference, difference
from tmkd_ray.report.drawing import standalone_svg
from tmkd_ray.report.formatting import MISSING, of, percent_with_std
from tmkd_ray.results import MethodRecord, RunResults, sample_std

WHOLE = "full"


def _reference(results: RunResults, method: MethodRecord) -> MethodRecord | None:
    """Return the whole method of the same strategy; None for the whole method itself."""
    prefix = method.name.rpartition("-")[0]
    wanted = f"{prefix}-{WHOLE}" if prefix else WHOLE
    by_name = {candidate.name: candidate for candidate in results.methods}
    reference = by_name.get(wanted) or next(m for m in results.methods if m.name.endswith(WHOLE))
    return None if method.name.endswith(WHOLE) else reference


def _differences(results: RunResults) -> list[tuple[MethodRecord, Difference | None]]:
    rows = []
    for method in results.methods:
        reference = _reference(results, method)
        rows.append((method, None if reference is None else difference(method, reference, results.split)))
    return rows


def ablation_markdown(results: RunResults) -> str:
    """Return a table: accuracy (mean ± sample standard deviation) and the difference to the whole method."""
    lines = [
        f"# Ablation of {results.name}",
        "",
        f"| part | {results.split} accuracy, % | difference to `{WHOLE}`, points | seeds |",
        "|---|---:|---:|---:|",
    ]
    for method, found in _differences(results):
        accuracies = method.accuracies(results.split)
        mean = percent_with_std(statistics.fmean(accuracies), sample_std(accuracies))
        change = MISSING if found is None else f"{found.in_points()} ({found.verdict})"
        lines.append(f"| `{method.name}` | {mean} | {change} | {len(accuracies)} |")
    lines += [
        "",
        "Accuracy: mean ± sample standard deviation over the seeds. Difference: mean of the differences seed "
        "by seed, ± the half-width of its 95 % interval (Student's t); `within noise` where it holds zero, "
        "`noise unknown` where one seed, or differences that are all the same, give none.",
        *_which_whole(results),
        f"{of(results.dataset.num_test or 0, 'test image')}; student {results.methods[0].student}.",
    ]
    return "\n".join(lines) + "\n"


def _which_whole(results: RunResults) -> list[str]:
    if sum(method.name.endswith(WHOLE) for method in results.methods) == 1:
        return []
    return [f"Each part is compared with the `{WHOLE}` of its own strategy, `alone` with that of the first."]


def ablation_csv(results: RunResults) -> str:
    """Return one row a part: accuracies as fractions, the paired difference and its interval's half-width."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    header = ("part", "split", "seeds", "mean", "std", "difference", "half_width_95", "verdict", "accuracies")
    writer.writerow(header)
    for method, found in _differences(results):
        accuracies = method.accuracies(results.split)
        writer.writerow(
            (
                method.name,
                results.split,
                " ".join(str(run.seed) for run in method.runs),
                repr(statistics.fmean(accuracies)),
                sample_std(accuracies),
                None if found is None else repr(found.mean),
                None if found is None else found.half_width,
                None if found is None else found.verdict,
                " ".join(repr(accuracy) for accuracy in accuracies),
            )
        )
    return buffer.getvalue()


def ablation_figure(results: RunResults) -> str:
    """Return an SVG file: the difference of each part to the whole method with its 95 % interval."""
    rows = [(method.name, found) for method, found in _differences(results) if found is not None]

    def paint(axes: Axes) -> None:
        positions = range(len(rows))[::-1]
        axes.axvline(0, color="black", linewidth=1)
        for position, (_, found) in zip(positions, rows, strict=True):
            half = 0.0 if found.half_width is None else 100 * found.half_width
            axes.errorbar(100 * found.mean, position, xerr=half, fmt="o", color="#0072b2", capsize=3)
        axes.set_yticks(list(positions), [name for name, _ in rows])
        axes.set_xlabel(f"{results.split} accuracy, difference to {WHOLE} in points (95 % interval)")
        axes.grid(axis="y", visible=False)

    return standalone_svg(f"Ablation of {results.name}", 60 + 26 * len(rows), paint)
