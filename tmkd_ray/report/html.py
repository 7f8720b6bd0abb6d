"""The report as one HTML file: no network, no scripts, light and dark; one run or several."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import yaml

from tmkd_ray.analysis_record import Analysis
from tmkd_ray.report.elements import Markup, details, element, join
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
    results, analysis = page.results, page.analysis
    found: list[tuple[str, str, Markup | None]] = [("results", "Results", results_section(page))]
    if analysis is not None and analysis.gallery is not None and analysis.gallery.labels:
        found.append(("views", "Views", gallery_section(analysis.gallery)))
    found += [
        ("weights", "Semantic weights", weights_section(page)),
        ("training", "Training", training_section(page)),
        ("classes", "Classes", classes_section(page)),
    ]
    if analysis is not None:
        found += _closer_look(page, analysis)
    elif page.missing is not None:
        found.append(("analysis", "A closer look", _missing(page.missing)))
    if results.teacher is not None or results.clip is not None:
        found.append(("teachers", "Teachers", teachers_section(page)))
    if results.knowledge is not None:
        found.append(("knowledge", "Knowledge store", knowledge_section(results.knowledge)))
    found.append(("data", "Data", dataset_section(results.dataset)))
    if results.stage_seconds:
        found.append(("times", "Time by stage", times_section(results.stage_seconds)))
    if results.notes:
        found.append(("notes", "Notes", element("ul", *(element("li", note) for note in results.notes))))
    if results.config:
        text = yaml.safe_dump(results.config, allow_unicode=True, sort_keys=True)
        code = element("pre", element("code", text))
        found.append(("configuration", "Configuration", details("The resolved configuration", code)))
    if results.versions or results.hardware:
        found.append(("environment", "Environment", environment_section(results)))
    for anchor, title, part in found:
        if part is not None:
            yield page.name(anchor), title, part


def _closer_look(page: RunPage, analysis: Analysis) -> list[tuple[str, str, Markup | None]]:
    found: list[tuple[str, str, Markup | None]] = []
    if analysis.networks:
        found += [
            ("confusion", "Confusion", confusion_section(page, analysis.networks)),
            ("calibration", "Calibration", calibration_section(page, analysis.networks)),
            ("correlation", "Logit correlations", correlation_section(page, analysis)),
            ("features", "Features", features_section(page, analysis)),
        ]
    if analysis.grad_cam is not None:
        found.append(("grad-cam", "Grad-CAM", grad_cam_section(page, analysis.grad_cam)))
    if analysis.num_images == 0:
        note = (
            "Logit correlations, features and Grad-CAM were not asked for: set `report.num_images` above 0 and "
            "give `tmkd run` again; what is trained already is kept."
        )
        found.append(("analysis", "A closer look", _missing(note)))
    return found


def _missing(text: str) -> Markup:
    """The text, what stands between backticks as code."""
    parts = text.split("`")
    what = (
        "The view gallery, the images that each view won, confusion, calibration, logit correlations, features "
        "and Grad-CAM are made from an analysis file. "
    )
    lead = what if text.startswith("Not here") else ""
    marked = [element("code", part) if index % 2 else Markup(join([part])) for index, part in enumerate(parts)]
    return element("p", lead, *marked)
