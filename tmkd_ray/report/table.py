"""The results of a run as one plain table."""

import statistics
import textwrap
from dataclasses import dataclass

from tmkd_ray.report.comparison import difference
from tmkd_ray.report.formatting import MISSING, count, of, operations, percent, percent_with_std
from tmkd_ray.results import CostRecord, RunResults, Split, sample_std

WORD_COLUMNS = (0, 4)
"""The method and the model; the accuracy stands between them, next to the name, for narrow screens."""

COST_COLUMNS = ("FLOPs", "Latency (ms)")
"""What one image costs; only where it was measured."""

FUSIONS = ("uniform", "semantic", "oracle")
"""The order in which fused accuracies are shown."""

FUSION_LABELS = {
    "uniform": "uniform fusion",
    "semantic": "semantic fusion",
    "oracle": "oracle of views",
}


@dataclass(frozen=True)
class ResultTable:
    """Cells as text; the columns WORD_COLUMNS hold words, the others numbers.

    Attributes:
        header: the column titles.
        methods: a row a method.
        teachers: rows of the teachers, may be empty.
        note: how to read the numbers.
    """

    header: tuple[str, ...]
    methods: list[tuple[str, ...]]
    teachers: list[tuple[str, ...]]
    note: str


def result_table(results: RunResults) -> ResultTable:
    """The rows that the text table, the Markdown table and the page share."""
    split = results.split
    header = (
        "Method",
        f"{split.capitalize()} accuracy (%)",
        "Difference (points)",
        "Seeds",
        "Model",
        "Parameters",
        *(COST_COLUMNS if _has_costs(results) else ()),
        "Seconds",
    )
    rows: list[tuple[str, ...]] = []
    for index, method in enumerate(results.methods):
        accuracies = method.accuracies(split)
        rows.append(
            (
                method.label,
                percent_with_std(statistics.fmean(accuracies), sample_std(accuracies)),
                MISSING if index == 0 else difference(method, results.methods[0], split).in_points(),
                str(len(accuracies)),
                method.student,
                count(method.runs[0].parameters),
                *_costs(results, method.cost),
                f"{method.mean_seconds:.1f}",
            )
        )
    return ResultTable(header, rows, _teacher_rows(results, split), _note(results, split))


def cost_cells(cost: CostRecord) -> tuple[str, str]:
    """The cells of COST_COLUMNS."""
    return operations(cost.flops), f"{1000 * cost.latency_seconds:.3g}"


def _has_costs(results: RunResults) -> bool:
    of_teacher = results.teacher is not None and results.teacher.cost is not None
    return of_teacher or any(method.cost is not None for method in results.methods)


def _costs(results: RunResults, cost: CostRecord | None) -> tuple[str, ...]:
    if not _has_costs(results):
        return ()
    return ("",) * len(COST_COLUMNS) if cost is None else cost_cells(cost)


def _teacher_rows(results: RunResults, split: Split) -> list[tuple[str, ...]]:
    def row(
        title: str,
        model: str,
        parameters: str,
        accuracy: float,
        seconds: float | None = None,
        cost: CostRecord | None = None,
    ) -> None:
        time = "" if seconds is None else f"{seconds:.1f}"
        rows.append((title, percent(accuracy), "", "", model, parameters, *_costs(results, cost), time))

    rows: list[tuple[str, ...]] = []
    # A number of another split than the column's says so in its title.
    elsewhere = " (validation)" if split == "test" else ""
    if teacher := results.teacher:
        if split == "test" and teacher.test_accuracy is not None:
            title, accuracy = "Teacher", teacher.test_accuracy
        else:
            title, accuracy = f"Teacher{elsewhere}", teacher.validation_accuracy
        row(title, teacher.model, count(teacher.parameters), accuracy, teacher.seconds, teacher.cost)
        for fusion in FUSIONS:
            if fusion in teacher.fused_validation_accuracy:
                accuracy = teacher.fused_validation_accuracy[fusion]
                row(f"Teacher, {FUSION_LABELS[fusion]}{elsewhere}", "", "", accuracy)
    if (clip := results.clip) and "fused" in clip.zero_shot_validation_accuracy:
        accuracy = clip.zero_shot_validation_accuracy["fused"]
        title = f"Text teacher, zero-shot, views fused{elsewhere}"
        row(title, "CLIP", count(clip.parameters), accuracy, clip.seconds)
    return rows


def _note(results: RunResults, split: Split) -> str:
    sentences = []
    if results.methods:
        several = any(len(method.runs) > 1 for method in results.methods)
        if several:
            sentences.append("Accuracy: mean ± sample standard deviation over the seeds.")
        if len(results.methods) > 1:
            interval = (
                ", ± the half-width of its 95 % interval, paired by seed where seeds agree" if several else ""
            )
            sentences.append(f"Difference: to {results.methods[0].label}{interval}.")
        if any(method.measured_by == "zero-shot" for method in results.methods):
            sentences.append(
                "Zero-shot: no classifier was trained; the student's embedding is compared with the class "
                "names' text embeddings."
            )
        sentences.append("Seconds: of one training" + (", mean over the seeds." if several else "."))
        costs = [method.cost for method in results.methods if method.cost is not None]
        if costs:
            threads = "" if costs[0].device != "cpu" else f", {of(costs[0].threads, 'thread')}"
            sentences.append(
                "FLOPs: of one image, a multiplication and an addition being two. Latency: of one image by "
                f"itself in PyTorch, median ({costs[0].device}{threads})."
            )
        if split == "validation":
            sentences.append("The test images were not read: accuracies are on the validation images.")
        elif results.dataset.num_test:
            sentences.append(
                f"One of the {of(results.dataset.num_test, 'test image')} is {_one_image(results)}."
            )
    return " ".join(sentences)


def _one_image(results: RunResults) -> str:
    points = 100 / results.dataset.num_test
    return f"{points:.2f} points" if points >= 0.005 else "less than 0.01 points"


def format_table(results: RunResults) -> str:
    """One monospace table: the methods, then the teachers, then how to read it."""
    table = result_table(results)
    rows = [table.header, *table.methods, *table.teachers]
    widths = [max(len(row[column]) for row in rows) for column in range(len(table.header))]

    def line(row: tuple[str, ...]) -> str:
        cells = [
            cell.ljust(width) if column in WORD_COLUMNS else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    rule = "─" * (sum(widths) + 2 * (len(widths) - 1))
    lines = [f"{results.name}: {results.dataset.name}", rule, line(table.header), rule]
    for rows_of_group in (table.methods, table.teachers):
        if rows_of_group:
            lines += [*map(line, rows_of_group), rule]
    lines += textwrap.wrap(table.note, max(len(rule), 60))
    return "\n".join(lines) + "\n"


def markdown_table(results: RunResults) -> str:
    """The same table for a Markdown file."""
    table = result_table(results)

    def line(row: tuple[str, ...]) -> str:
        return "| " + " | ".join(_markdown_text(cell) for cell in row) + " |"

    rules = ["---" if column in WORD_COLUMNS else "---:" for column in range(len(table.header))]
    alignment = "| " + " | ".join(rules) + " |"
    lines = [line(table.header), alignment, *map(line, table.methods), *map(line, table.teachers)]
    return "\n".join([*lines, "", _markdown_text(table.note)]).rstrip() + "\n"


def _markdown_text(text: str) -> str:
    for character in "\\`*_[]|":
        text = text.replace(character, "\\" + character)
    return " ".join(text.replace("&", "&amp;").replace("<", "&lt;").split())
