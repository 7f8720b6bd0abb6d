"""The first section: what came out."""

from collections.abc import Sequence

from tmkd_ray.report import figures
from tmkd_ray.report.elements import Markup, data_table, details, element, figure, grid, join
from tmkd_ray.report.formatting import MISSING, count, percent
from tmkd_ray.report.sections.base import RunPage
from tmkd_ray.report.summary import summarise
from tmkd_ray.report.table import WORD_COLUMNS, result_table
from tmkd_ray.results import MethodRecord, TrainingRecord


def results_section(page: RunPage) -> Markup:
    results = page.results
    # A line never ends between a number and its unit or uncertainty.
    summary = (
        summarise(results)
        .replace(" %", "\u00a0%")
        .replace(" ± ", "\u00a0±\u00a0")
        .replace(" points", "\u00a0points")
    )
    children = [element("p", summary, class_="summary")]
    table = result_table(results)
    groups = [rows for rows in (table.methods, table.teachers) if rows]
    if groups:
        children.append(data_table(table.header, *groups, words=WORD_COLUMNS))
        children.append(element("p", table.note, class_="note"))
    if results.methods:
        children.append(grid(_seeds(page)))
        children.append(details("Every run", _every_run(results.methods)))
    return join(children)


def _seeds(page: RunPage) -> Markup:
    results = page.results
    teacher = None
    if results.teacher is not None:
        on_test = results.split == "test"
        teacher = results.teacher.test_accuracy if on_test else results.teacher.validation_accuracy
    if all(len(method.runs) == 1 for method in results.methods):
        caption = "One seed a method."
    else:
        caption = "Marker and bar: mean ± sample standard deviation. Rings: the seeds."
    if teacher is not None:
        caption += " Dashed: the teacher on the plain images."
    drawing = figures.accuracy_by_seed(results.methods, results.split, teacher, page.name("seeds"))
    return figure(drawing, caption)


def _every_run(methods: Sequence[MethodRecord]) -> Markup:
    def accuracy(value: float | None) -> str:
        return MISSING if value is None else percent(value)

    def row(method: MethodRecord, run: TrainingRecord) -> tuple[str, ...]:
        return (
            method.label,
            run.device,
            count(run.num_workers),
            str(run.seed),
            str(run.best_epoch),
            percent(run.validation_accuracy),
            accuracy(run.test_accuracy),
            accuracy(run.test_top5_accuracy),
            f"{run.seconds:.1f}",
            # Of the last epoch: the first includes starting up.
            f"{run.history[-1].images_per_second:,.0f}" if run.history else MISSING,
        )

    header = (
        "Method",
        "Device",
        "Workers",
        "Seed",
        "Kept epoch",
        "Validation (%)",
        "Test (%)",
        "Test top-5 (%)",
        "Seconds",
        "Images/s, last epoch",
    )
    return data_table(header, (row(method, run) for method in methods for run in method.runs), words=(0, 1))
