"""The report as one HTML file: no network, no scripts, light and dark."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import yaml

from tmkd_ray import storage
from tmkd_ray.report import figures
from tmkd_ray.report.elements import (
    Markup,
    bar,
    data_table,
    details,
    element,
    fact_list,
    figure,
    grid,
    join,
    legend,
)
from tmkd_ray.report.formatting import MISSING, byte_size, count, duration, of, percent
from tmkd_ray.report.stylesheet import STYLE_SHEET
from tmkd_ray.report.summary import summarise
from tmkd_ray.report.table import FUSION_LABELS, FUSIONS, WORD_COLUMNS, result_table
from tmkd_ray.results import (
    ClipRecord,
    DatasetRecord,
    EpochRecord,
    KnowledgeRecord,
    MethodRecord,
    RunResults,
    TeacherRecord,
    TrainingRecord,
)

MAX_SET_ASIDE = 20
"""Set-aside images that the page names; the others are only counted."""
_MAX_CRISP_SIZE = 64
"""Images up to this size, in pixels, are enlarged with hard edges, as smoothing would hide what they are."""


@dataclass(frozen=True)
class ViewGallery:
    """A few images in every view.

    Attributes:
        images: [N, V, H, W, 3] uint8.
        view_names: V names.
        labels: N class names.
        weights: [N, V] semantic weights, rows sum to one; None without a text teacher.
    """

    images: np.ndarray
    view_names: tuple[str, ...]
    labels: tuple[str, ...]
    weights: np.ndarray | None = None

    def __post_init__(self) -> None:
        assert self.images.dtype == np.uint8
        assert self.images.ndim == 5
        assert self.images.shape[-1] == 3
        assert self.images.shape[:2] == (len(self.labels), len(self.view_names))
        assert self.weights is None or self.weights.shape == self.images.shape[:2]


def write_report(path: str | Path, results: RunResults, gallery: ViewGallery | None = None) -> None:
    """Write the page to `path`: one file that needs nothing else, whole or not at all."""
    sections = list(_sections(results, gallery))
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", f"{results.name} – distillation report"),
        element("style", Markup(STYLE_SHEET)),
    )
    # Seconds are enough for a reader; results.json keeps the rest.
    created = results.created[:19].replace("T", " ")
    links = (element("a", title, href=f"#{anchor}") for anchor, title, _ in sections)
    header = element(
        "header",
        element("h1", results.name),
        element("p", f"{results.dataset.name} · {created} UTC", class_="note"),
        element("nav", *links, aria_label="Sections"),
    )
    parts = (element("section", element("h2", title), part, id=anchor) for anchor, title, part in sections)
    body = element("body", header, element("main", *parts))
    page = f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"
    storage.write_bytes(str(path), page.encode(errors="backslashreplace"))


def _sections(results: RunResults, gallery: ViewGallery | None) -> Iterator[tuple[str, str, Markup]]:
    """(anchor, title, content) of what this run has."""
    yield "results", "Results", _results(results)
    if gallery is not None and gallery.labels:
        yield "views", "Views", _gallery(gallery)
    views: tuple[str, ...] = ()
    if results.knowledge is not None:
        views = results.knowledge.views
    elif gallery is not None:
        views = gallery.view_names
    if results.semantic_weights is not None:
        weights_CV = np.array(results.semantic_weights)
        num_views = weights_CV.shape[1]
        names = views if len(views) == num_views else [f"view {number}" for number in range(1, num_views + 1)]
        yield "weights", "Semantic weights", _semantic_weights(weights_CV, results.dataset.class_names, names)
    if (curves := _curves(results.methods)) is not None:
        yield "training", "Training", curves
    if results.teacher is not None or results.clip is not None:
        yield "teachers", "Teachers", _teachers(results, views)
    if results.knowledge is not None:
        yield "knowledge", "Knowledge store", _knowledge(results.knowledge)
    yield "data", "Data", _dataset(results.dataset)
    if results.stage_seconds:
        yield "times", "Time by stage", _times(results.stage_seconds)
    if results.notes:
        yield "notes", "Notes", element("ul", *(element("li", note) for note in results.notes))
    if results.config:
        text = yaml.safe_dump(results.config, allow_unicode=True, sort_keys=True)
        code = element("pre", element("code", text))
        yield "configuration", "Configuration", details("The resolved configuration", code)
    if results.versions or results.hardware:
        yield "environment", "Environment", _environment(results)


# -- results -------------------------------------------------------------------------------------------------


def _results(results: RunResults) -> Markup:
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
        children.append(grid(_seeds(results)))
        children.append(details("Every run", _every_run(results.methods)))
    return join(children)


def _seeds(results: RunResults) -> Markup:
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
    return figure(figures.accuracy_by_seed(results.methods, results.split, teacher), caption)


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


# -- views ---------------------------------------------------------------------------------------------------


def _view_title(name: str) -> str:
    return name.replace("_", " ")


def _gallery(gallery: ViewGallery) -> Markup:
    scaling = "crisp" if max(gallery.images.shape[2:4]) <= _MAX_CRISP_SIZE else "smooth"

    def shown(index: int, view: int) -> Markup:
        label, name = gallery.labels[index], gallery.view_names[view]
        source = figures.png_data_uri(gallery.images[index, view])
        caption = [element("span", _view_title(name))]
        if gallery.weights is not None:
            weight = float(gallery.weights[index, view])
            # The name last: it may take two lines, and the bars of an image should stand level.
            caption[:0] = [bar(weight, figures.view_colour(view)), element("span", f"{weight:.2f}")]
        picture = element("img", src=source, alt=f"{label}, {name}", class_=scaling)
        return element("figure", picture, element("figcaption", *caption))

    def card(index: int) -> Markup:
        views = (shown(index, view) for view in range(len(gallery.view_names)))
        return element("li", element("h3", gallery.labels[index]), element("div", *views, class_="views"))

    explanation = "Images as the teachers see them."
    if gallery.weights is not None:
        explanation += (
            " The number is the semantic weight of the view for this image; an image's weights sum to 1."
        )
    cards = element("ul", *map(card, range(len(gallery.labels))), class_="gallery")
    return join([element("p", explanation), cards])


def _semantic_weights(weights_CV: np.ndarray, class_names: Sequence[str], views: Sequence[str]) -> Markup:
    swatches = legend(
        (
            element("span", class_="square", style=f"background: {figures.view_colour(view)}"),
            f"{_view_title(name)} (mean {weights_CV[:, view].mean():.2f})",
        )
        for view, name in enumerate(views)
    )
    explanation = "How much each view counts in the fused teacher, averaged over the images of a class."
    draw = partial(figures.semantic_weights, weights_CV=weights_CV, class_names=class_names, views=views)
    if len(class_names) <= figures.MAX_CLASSES:
        svg = draw("weights", labels=range(len(class_names)))
        return join(
            [element("p", explanation), swatches, grid(figure(svg, "Every class; on top, their mean."))]
        )
    farthest, nearest = figures.extreme_classes(weights_CV)
    explanation += (
        f" Only {len(farthest) + len(nearest)} of the {len(class_names)} classes are shown: those whose "
        "weights differ most from the mean over all classes, and those that differ least."
    )
    pictures = [
        figure(
            draw(f"weights-{which}", labels=labels),
            f"The {len(labels)} classes that differ {which} from the mean, which is on top.",
        )
        for which, labels in (("most", farthest), ("least", nearest))
    ]
    return join([element("p", explanation), swatches, grid(*pictures)])


# -- training ------------------------------------------------------------------------------------------------


def _validation_percent(record: EpochRecord) -> float | None:
    return None if record.validation_accuracy is None else 100 * record.validation_accuracy


def _loss(record: EpochRecord) -> float | None:
    return record.loss


def _term(name: str, record: EpochRecord) -> float | None:
    return record.terms.get(name)


def _curves(methods: Sequence[MethodRecord]) -> Markup | None:
    """None where there is no history."""
    records = [record for method in methods for run in method.runs for record in run.history]
    if not records:
        return None
    accuracy = "Validation accuracy (%)"
    panels = [
        (figures.method_curves("validation", methods, _validation_percent, accuracy), "Validation accuracy.")
    ]
    num_epochs = max(record.epoch for record in records)
    # The start of a training hides the differences at its end.
    if num_epochs >= 10:
        half = num_epochs // 2 + 1
        svg = figures.method_curves("validation-late", methods, _validation_percent, accuracy, first_epoch=half)
        panels.append((svg, f"Validation accuracy from epoch {half}."))
    svg = figures.method_curves("loss", methods, _loss, "Training loss")
    panels.append((svg, "Training loss: the weighted sum, of terms and weights that differ between methods."))
    for index, term in enumerate(sorted({term for record in records for term in record.terms})):
        svg = figures.method_curves(f"term-{index}", methods, partial(_term, term), f"Loss term {term}")
        panels.append((svg, f"Loss term {term}, without its weight."))
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
        (figures.method_swatch(index, f"swatch-{index}"), method.label) for index, method in enumerate(methods)
    )
    shown = [figure(svg, caption) for svg, caption in panels if svg is not None]
    return join([element("p", explanation), swatches, grid(*shown)])


# -- teachers ------------------------------------------------------------------------------------------------


def _teachers(results: RunResults, views: Sequence[str]) -> Markup:
    children = [_view_accuracy(results.teacher, results.clip, views)]
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
        children += [element("h3", "Visual teacher"), fact_list(facts), _fitting("teacher", teacher)]
    if clip := results.clip:
        facts = [
            ("Source", clip.source),
            ("Parameters", count(clip.parameters)),
            ("Embedding width", count(clip.embedding_width)),
        ]
        if clip.seconds is not None:
            facts.append(("Fitting time", duration(clip.seconds)))
        children += [element("h3", "Text teacher (CLIP)"), fact_list(facts), _fitting("clip", clip)]
    return join(children)


def _view_accuracy(teacher: TeacherRecord | None, clip: ClipRecord | None, views: Sequence[str]) -> Markup:
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
    rows = [(key, fusion_titles.get(key, _view_title(key))) for key in order if key in known]
    caption = "Validation accuracy of each view alone, then of the views together."
    if "fused oracle" in known:
        caption += " The oracle is right where any view is: the limit of choosing one view an image."
    swatches = legend(
        (figures.method_swatch(index, f"series-{index}"), name) for index, name in enumerate(series)
    )
    return join([swatches, grid(figure(figures.view_accuracy(series, rows), caption))])


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


# -- facts ---------------------------------------------------------------------------------------------------


def _knowledge(knowledge: KnowledgeRecord) -> Markup:
    facts = [
        ("Images × variants", f"{count(knowledge.num_images)} × {count(knowledge.num_variants)}"),
        ("Views", ", ".join(map(_view_title, knowledge.views))),
        ("Size", byte_size(knowledge.total_bytes)),
        ("Per image and variant", byte_size(knowledge.bytes_per_image_and_variant)),
    ]
    if knowledge.reused:
        facts.append(("Computed", "before: this run read the store"))
    else:
        facts.append(("Computed in", duration(knowledge.seconds)))
        facts.append(("Speed", f"{knowledge.images_per_second:,.0f} image variants/s"))
    children = [fact_list(facts)]
    if knowledge.stage_seconds:
        children += [element("h3", "Time by step, summed over actors"), _times(knowledge.stage_seconds)]
    return join(children)


def _dataset(dataset: DatasetRecord) -> Markup:
    facts = [
        ("Dataset", dataset.name),
        ("Classes", count(len(dataset.class_names))),
        ("Image size", f"{dataset.image_size} × {dataset.image_size} pixels"),
        ("Training images", count(dataset.num_train)),
        ("Validation images", count(dataset.num_validation)),
        ("Test images", count(dataset.num_test)),
    ]
    if dataset.num_labelled_for_students is not None:
        facts.append(("Training images with a label for students", count(dataset.num_labelled_for_students)))
    if dataset.set_aside:
        facts.append(("Images set aside", count(len(dataset.set_aside))))
    children = [fact_list(facts), details("Class names", element("p", ", ".join(dataset.class_names)))]
    if dataset.set_aside:
        total, first = len(dataset.set_aside), dataset.set_aside[:MAX_SET_ASIDE]
        which = f"; the first {len(first)}:" if len(first) < total else ":"
        rows = [(image.id, image.reason) for image in first]
        children += [
            element("h3", "Images set aside"),
            element("p", f"{of(total, 'image')} could not be used{which}"),
            data_table(("Image", "Reason"), rows, words=(0, 1)),
        ]
    return join(children)


def _times(stage_seconds: dict[str, float]) -> Markup:
    """Longest first, each with a bar relative to the longest."""
    longest = max(stage_seconds.values())
    lines = [
        element(
            "tr",
            element("th", stage, scope="row", class_="word"),
            element("td", duration(seconds), class_="number"),
            element("td", bar(seconds / longest if longest else 0.0, "var(--accent)"), class_="wide"),
        )
        for stage, seconds in sorted(stage_seconds.items(), key=lambda item: (-item[1], item[0]))
    ]
    return element("div", element("table", element("tbody", *lines), class_="times"), class_="scroll")


def _environment(results: RunResults) -> Markup:
    parts = []
    for title, facts in (("Versions", results.versions), ("Hardware", results.hardware)):
        if facts:
            pairs = [(name, str(facts[name])) for name in sorted(facts)]
            parts.append(element("div", element("h3", title), fact_list(pairs)))
    return grid(*parts)
