"""The section on the teachers: what they are, how well they see each view, how they were fitted."""

from tmkd_ray.report import figures
from tmkd_ray.report.drawing import method_swatch
from tmkd_ray.report.elements import Markup, element, fact_list, figure, grid, join, legend
from tmkd_ray.report.formatting import count, duration, percent
from tmkd_ray.report.sections.base import RunPage, view_title
from tmkd_ray.report.table import FUSION_LABELS, FUSIONS
from tmkd_ray.results import ClipRecord, TeacherRecord


def teachers_section(page: RunPage) -> Markup:
    results = page.results
    children = [_view_accuracy(page)]
    if teacher := results.teacher:
        facts = [
            ("Model", teacher.model),
            ("Parameters", count(teacher.parameters)),
            ("Source", teacher.source),
            ("Validation accuracy", f"{percent(teacher.validation_accuracy)} %"),
        ]
        if teacher.test_accuracy is not None:
            facts.append(("Test accuracy", f"{percent(teacher.test_accuracy)} %"))
        if teacher.seconds is not None:
            facts.append(("Fitting time", duration(teacher.seconds)))
        children += [element("h3", "Visual teacher"), fact_list(facts), _fitting(page.name("teacher"), teacher)]
    if clip := results.clip:
        facts = [
            ("Source", clip.source),
            ("Parameters", count(clip.parameters)),
            ("Embedding width", count(clip.embedding_width)),
        ]
        if clip.seconds is not None:
            facts.append(("Fitting time", duration(clip.seconds)))
        children += [element("h3", "Text teacher (CLIP)"), fact_list(facts), _fitting(page.name("clip"), clip)]
    return join(children)


def _view_accuracy(page: RunPage) -> Markup:
    teacher, clip, views = page.results.teacher, page.results.clip, page.views
    fusion_titles = {f"fused {name}": FUSION_LABELS[name] for name in FUSIONS} | {"fused": "CLIP, views fused"}
    series: dict[str, dict[str, float]] = {}
    if teacher is not None:
        fused = {f"fused {name}": value for name, value in teacher.fused_validation_accuracy.items()}
        series["Visual teacher"] = teacher.view_validation_accuracy | fused
    if clip is not None:
        series["CLIP zero-shot"] = clip.zero_shot_validation_accuracy
    series = {name: accuracies for name, accuracies in series.items() if accuracies}
    if not series:
        return Markup()
    known = {key for accuracies in series.values() for key in accuracies}
    # The views in their own order, any others by name, then what is fused from them.
    order = [*views, *sorted(known - set(views) - set(fusion_titles)), *fusion_titles]
    rows = [(key, fusion_titles.get(key, view_title(key))) for key in order if key in known]
    caption = "Validation accuracy of each view alone, then of the views together."
    if "fused oracle" in known:
        caption += " The oracle is right where any view is: the limit of choosing one view an image."
    swatches = legend(
        (method_swatch(index, page.name(f"series-{index}")), name) for index, name in enumerate(series)
    )
    return join([swatches, grid(figure(figures.view_accuracy(series, rows, page.name("views")), caption))])


def _fitting(name: str, record: TeacherRecord | ClipRecord) -> Markup:
    accuracy = {split: figures.accuracy_curve(record.history, split) for split in ("train", "validation")}
    panels = (
        (figures.history_curves(f"{name}-accuracy", accuracy, "Accuracy (%)"), "Accuracy while fitting."),
        (
            figures.history_curves(f"{name}-loss", {"loss": figures.loss_curve(record.history)}, "Loss"),
            "Training loss while fitting.",
        ),
    )
    shown = [figure(svg, caption) for svg, caption in panels if svg is not None]
    return grid(*shown) if shown else Markup()
