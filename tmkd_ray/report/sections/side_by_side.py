"""The section on several runs: one table, one figure, and where their configurations differ."""

import json
import statistics
from collections.abc import Sequence
from typing import Any

from tmkd_ray.report import figures, network_figures
from tmkd_ray.report.drawing import method_swatch
from tmkd_ray.report.elements import Markup, data_table, details, element, figure, grid, join, legend
from tmkd_ray.report.formatting import MISSING, count, of, percent, percent_with_std
from tmkd_ray.report.sections.base import RunPage
from tmkd_ray.report.table import COST_COLUMNS, cost_cells
from tmkd_ray.results import CostRecord, MethodRecord, Split, sample_std

_MAX_DRAWN = 14
"""So many methods of all runs have a colour and marker of their own."""


def side_by_side_section(pages: Sequence[RunPage], titles: Sequence[str]) -> Markup:
    """Compare runs; `titles` are what they are called."""
    split: Split = "validation" if any(page.results.split == "validation" for page in pages) else "test"
    named = [
        (f"{title}: {method.label}", method)
        for page, title in zip(pages, titles, strict=True)
        for method in page.results.methods
    ]
    children = [_table(pages, titles, split), element("p", _note(pages, split), class_="note")]
    drawn = [method.model_copy(update={"label": label}) for label, method in named[:_MAX_DRAWN]]
    if drawn:
        swatches = legend(
            (method_swatch(index, f"all-swatch-{index}"), each.label) for index, each in enumerate(drawn)
        )
        svg = figures.accuracy_by_seed(drawn, split, None, "all-seeds")
        panels = [figure(svg, "Marker and bar: mean ± sample standard deviation. Rings: the seeds.")]
        if (curves := _curves(drawn)) is not None:
            panels.append(figure(curves, "Validation accuracy, mean over the seeds."))
        children += [swatches, grid(*panels)]
    children += [element("h3", "Where the configurations differ"), _differences(pages, titles)]
    return join(children)


def _table(pages: Sequence[RunPage], titles: Sequence[str], split: Split) -> Markup:
    def costs(cost: CostRecord | None) -> tuple[str, ...]:
        return (MISSING,) * len(COST_COLUMNS) if cost is None else cost_cells(cost)

    def row(title: str, method: MethodRecord) -> tuple[str, ...]:
        accuracies = method.accuracies(split)
        mean = percent_with_std(statistics.fmean(accuracies), sample_std(accuracies))
        parameters = count(method.runs[0].parameters)
        return (
            title,
            method.label,
            mean,
            str(len(accuracies)),
            method.student,
            parameters,
            *costs(method.cost),
        )

    header = (
        "Run",
        "Method",
        f"{split.capitalize()} accuracy (%)",
        "Seeds",
        "Model",
        "Parameters",
        *COST_COLUMNS,
    )
    groups = []
    for page, title in zip(pages, titles, strict=True):
        rows = [row(title, method) for method in page.results.methods]
        teacher = page.results.teacher
        if teacher is not None:
            known = teacher.test_accuracy if split == "test" else teacher.validation_accuracy
            accuracy = MISSING if known is None else percent(known)
            facts = (teacher.model, count(teacher.parameters), *costs(teacher.cost))
            rows.append((title, "Teacher", accuracy, "", *facts))
        groups += rows
    return data_table(header, groups, words=(0, 1, 4))


def _note(pages: Sequence[RunPage], split: Split) -> str:
    sentences = ["Accuracy: mean ± sample standard deviation over the seeds."]
    if split == "validation":
        sentences.append("Not every run read its test images: accuracies are on the validation images.")
    datasets = {(page.results.dataset.name, page.results.dataset.num_test) for page in pages}
    if len(datasets) > 1:
        sentences.append("The runs are on different images: their accuracies do not compare.")
    costs = [method.cost for page in pages for method in page.results.methods if method.cost is not None]
    devices = sorted({f"{cost.device}, {of(cost.threads, 'thread')}" for cost in costs})
    if devices:
        sentences.append(f"Latency: of one image in PyTorch, median ({'; '.join(devices)}).")
    return " ".join(sentences)


def _curves(methods: Sequence[MethodRecord]) -> str | None:
    series = []
    for method in methods:
        by_epoch: dict[int, list[float]] = {}
        for record in (record for run in method.runs for record in run.history):
            if record.validation_accuracy is not None:
                by_epoch.setdefault(record.epoch, []).append(100 * record.validation_accuracy)
        epochs = sorted(by_epoch)
        series.append((method.label, epochs, [statistics.fmean(by_epoch[epoch]) for epoch in epochs]))
    if not any(epochs for _, epochs, _ in series):
        return None
    return network_figures.validation_by_run("all-validation", series)


def _differences(pages: Sequence[RunPage], titles: Sequence[str]) -> Markup:
    flat = [_flat(page.results.config) for page in pages]
    keys = sorted({key for config in flat for key in config})
    rows = []
    for key in keys:
        values = [_shown(config[key]) if key in config else MISSING for config in flat]
        if len(set(values)) > 1:
            rows.append((key, *values))
    if not rows:
        return element("p", "They do not.")
    table = data_table(("Field", *titles), rows, words=range(len(titles) + 1))
    return table if len(rows) <= 12 else details(f"{len(rows)} fields", table)


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    """By dotted path, the leaves of a tree of mappings."""
    if not isinstance(tree, dict) or not tree:
        return {path: tree} if path else {}
    return {
        key: leaf
        for name, item in tree.items()
        for key, leaf in _flat(item, f"{path}.{name}".lstrip(".")).items()
    }


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
