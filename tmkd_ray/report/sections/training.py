"""The section of training curves: accuracy, loss, and every term of it."""

from functools import partial

from tmkd_ray.report import figures
from tmkd_ray.report.drawing import method_swatch
from tmkd_ray.report.elements import Markup, element, figure, grid, join, legend
from tmkd_ray.report.sections.base import RunPage
from tmkd_ray.results import EpochRecord

_TERMS = {
    "ce": "cross-entropy with the labels",
    "kd": "the distillation strategy",
    "feature": "distance to the teacher's feature",
    "text": "divergence from CLIP's zero-shot distribution",
    "contrastive": "vision-language contrast",
}


def _validation_percent(record: EpochRecord) -> float | None:
    return None if record.validation_accuracy is None else 100 * record.validation_accuracy


def _loss(record: EpochRecord) -> float | None:
    return record.loss


def _term(name: str, record: EpochRecord) -> float | None:
    return record.terms.get(name)


def training_section(page: RunPage) -> Markup | None:
    """None where there is no history."""
    methods = page.results.methods
    records = [record for method in methods for run in method.runs for record in run.history]
    if not records:
        return None
    accuracy = "Validation accuracy (%)"
    panels = [
        (
            figures.method_curves(page.name("validation"), methods, _validation_percent, accuracy),
            "Validation accuracy.",
        )
    ]
    num_epochs = max(record.epoch for record in records)
    # The start of a training hides the differences at its end.
    if num_epochs >= 10:
        half = num_epochs // 2 + 1
        svg = figures.method_curves(
            page.name("validation-late"), methods, _validation_percent, accuracy, first_epoch=half
        )
        panels.append((svg, f"Validation accuracy from epoch {half}."))
    svg = figures.method_curves(page.name("loss"), methods, _loss, "Training loss")
    panels.append((svg, "Training loss: the weighted sum, of terms and weights that differ between methods."))
    for index, term in enumerate(sorted({term for record in records for term in record.terms})):
        svg = figures.method_curves(
            page.name(f"term-{index}"), methods, partial(_term, term), f"Loss term {term}"
        )
        meaning = f": {_TERMS[term]}" if term in _TERMS else ""
        panels.append((svg, f"Loss term {term}{meaning}, without its weight."))
    explanation = "One seed a method."
    if any(len(method.runs) > 1 for method in methods):
        explanation = "Lines are means over the seeds; bands reach from the lowest to the highest seed."
    diverged = [
        f"{method.label}, seed {run.seed}, from epoch {min(epochs)}"
        for method in methods
        for run in method.runs
        if (epochs := [record.epoch for record in run.history if record.loss is None])
    ]
    if diverged:
        explanation += f" The loss was not finite: {'; '.join(diverged)}."
    swatches = legend(
        (method_swatch(index, page.name(f"swatch-{index}")), method.label)
        for index, method in enumerate(methods)
    )
    shown = [figure(svg, caption) for svg, caption in panels if svg is not None]
    return join([element("p", explanation), swatches, grid(*shown)])
