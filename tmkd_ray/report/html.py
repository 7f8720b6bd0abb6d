"""The report as one HTML file: no network, no scripts, light and dark; one run or several."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from tmkd_ray.analysis_record import Analysis
from tmkd_ray.progress import Rate
from tmkd_ray.report.elements import Markup, details, element, marked
from tmkd_ray.report.page import save_page
from tmkd_ray.report.sections.base import RunPage
from tmkd_ray.report.sections.classes import calibration_section, classes_section, confusion_section
from tmkd_ray.report.sections.facts import (
    dataset_section,
    environment_section,
    knowledge_section,
    times_section,
)
from tmkd_ray.report.sections.networks import correlation_section, features_section, grad_cam_section
from tmkd_ray.report.sections.outcome import results_section
from tmkd_ray.report.sections.side_by_side import side_by_side_section
from tmkd_ray.report.sections.teachers import teachers_section
from tmkd_ray.report.sections.training import training_section
from tmkd_ray.report.sections.views import gallery_section, weights_section
from tmkd_ray.results import RunResults

Section = tuple[str, str, Markup]
"""Anchor, title, content."""

Part = tuple[str, str, Callable[[], Markup | None]]
"""Anchor, title, and what draws the content; None: the run has nothing to show there."""


def write_report(path: str | Path, results: RunResults, analysis: Analysis | None = None) -> None:
    """Write the page of one run to `path`: one file that needs nothing else, whole or not at all."""
    write_page(path, [RunPage(results, analysis)])


def write_page(path: str | Path, pages: Sequence[RunPage]) -> None:
    """Write the page of one run, or of several side by side, as `write_report` does."""
    assert pages
    body = _one_run(pages[0]) if len(pages) == 1 else _several_runs(pages)
    save_page(path, f"{' · '.join(_titles(pages))} – distillation report", body)


def _one_run(page: RunPage) -> Markup:
    sections = list(_sections(page))
    return element("body", _header(page, page.results.name, sections), element("main", *_shown(sections)))


def _several_runs(pages: Sequence[RunPage]) -> Markup:
    titles = _titles(pages)
    pages = [replace(page, prefix=f"run{number}-") for number, page in enumerate(pages, 1)]
    comparison: Section = ("comparison", "Side by side", side_by_side_section(pages, titles))
    links = [(comparison[0], comparison[1])]
    links += [(page.name("run"), title) for page, title in zip(pages, titles, strict=True)]
    heading = element("header", element("h1", " · ".join(titles)), _navigation(links))
    articles = []
    for page, title in zip(pages, titles, strict=True):
        sections = list(_sections(page))
        articles.append(
            element("article", _header(page, title, sections), *_shown(sections), id=page.name("run"))
        )
    return element("body", heading, element("main", *_shown([comparison]), *articles))


def _titles(pages: Sequence[RunPage]) -> list[str]:
    """The runs' names, numbered where two have the same."""
    names = [page.results.name for page in pages]
    return [
        name if names.count(name) == 1 else f"{name} ({names[: index + 1].count(name)})"
        for index, name in enumerate(names)
    ]


def _header(page: RunPage, title: str, sections: Sequence[Section]) -> Markup:
    # Seconds are enough for a reader; results.json keeps the rest.
    created = page.results.created[:19].replace("T", " ")
    return element(
        "header",
        element("h1", title),
        element("p", f"{page.results.dataset.name} · {created} UTC", class_="note"),
        _navigation((anchor, name) for anchor, name, _ in sections),
    )


def _navigation(links: Iterable[tuple[str, str]]) -> Markup:
    return element(
        "nav", *(element("a", title, href=f"#{anchor}") for anchor, title in links), aria_label="Sections"
    )


def _shown(sections: Iterable[Section]) -> list[Markup]:
    return [element("section", element("h2", title), part, id=anchor) for anchor, title, part in sections]


def _sections(page: RunPage) -> Iterator[Section]:
    """What this run has."""
    drawn = list(_parts(page))
    for anchor, title, draw in Rate(f"report of {page.results.name}", len(drawn), "sections").over(drawn):
        part = draw()
        if part is not None:
            yield page.name(anchor), title, part


def _parts(page: RunPage) -> Iterator[Part]:
    results, analysis = page.results, page.analysis
    yield "results", "Results", lambda: results_section(page)
    if analysis is not None and analysis.gallery is not None and analysis.gallery.labels:
        yield "views", "Views", partial(gallery_section, analysis.gallery)
    yield "weights", "Semantic weights", lambda: weights_section(page)
    yield "training", "Training", lambda: training_section(page)
    yield "classes", "Classes", lambda: classes_section(page)
    if analysis is not None:
        yield from _closer_look(page, analysis)
    elif page.missing is not None:
        yield "analysis", "A closer look", partial(_missing, page.missing)
    if results.teacher is not None or results.clip is not None:
        yield "teachers", "Teachers", lambda: teachers_section(page)
    if results.knowledge is not None:
        yield "knowledge", "Knowledge store", partial(knowledge_section, results.knowledge)
    yield "data", "Data", lambda: dataset_section(results.dataset)
    if results.stage_seconds:
        yield "times", "Time by stage", lambda: times_section(results.stage_seconds)
    if results.notes:
        yield "notes", "Notes", lambda: element("ul", *(element("li", marked(note)) for note in results.notes))
    if results.config:
        yield "configuration", "Configuration", partial(_configuration, results.config)
    if results.versions or results.hardware:
        yield "environment", "Environment", lambda: environment_section(results)


def _configuration(config: dict[str, Any]) -> Markup:
    text = yaml.safe_dump(config, allow_unicode=True, sort_keys=True)
    return details("The resolved configuration", element("pre", element("code", text)))


def _closer_look(page: RunPage, analysis: Analysis) -> Iterator[Part]:
    if analysis.networks:
        yield "confusion", "Confusion", lambda: confusion_section(page, analysis.networks)
        yield "calibration", "Calibration", lambda: calibration_section(page, analysis.networks)
        yield "correlation", "Logit correlations", lambda: correlation_section(page, analysis)
        yield "features", "Features", lambda: features_section(page, analysis)
    if analysis.grad_cam is not None:
        yield "grad-cam", "Grad-CAM", partial(grad_cam_section, page, analysis.grad_cam)
    if analysis.num_images == 0:
        note = (
            "Logit correlations, features and Grad-CAM were not asked for: set `report.num_images` above 0 and "
            "give `tmkd run` again; what is trained already is kept."
        )
        yield "analysis", "A closer look", partial(_missing, note)


def _missing(text: str) -> Markup:
    what = (
        "The view gallery, the images that each view won, confusion, calibration, logit correlations, features "
        "and Grad-CAM are made from an analysis file. "
    )
    lead = what if text.startswith("Not here") else ""
    return element("p", lead, marked(text))
