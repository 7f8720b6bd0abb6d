"""The sections of plain facts: knowledge store, data, times, environment."""

from tmkd_ray.report.elements import Markup, bar, data_table, details, element, fact_list, grid, join
from tmkd_ray.report.formatting import byte_size, count, duration, of
from tmkd_ray.report.sections.base import view_title
from tmkd_ray.results import DatasetRecord, KnowledgeRecord, RunResults

_NAMES = {"memory_gib": "memory (GiB)"}
MAX_SET_ASIDE = 20
"""Set-aside images that the page names; the others are only counted."""


def knowledge_section(knowledge: KnowledgeRecord) -> Markup:
    facts = [
        ("Images × variants", f"{count(knowledge.num_images)} × {count(knowledge.num_variants)}"),
        ("Views", ", ".join(map(view_title, knowledge.views))),
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
        children += [element("h3", "Time by step, summed over actors"), times_section(knowledge.stage_seconds)]
    return join(children)


def dataset_section(dataset: DatasetRecord) -> Markup:
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


def times_section(stage_seconds: dict[str, float]) -> Markup:
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


def environment_section(results: RunResults) -> Markup:
    parts = []
    for title, facts in (("Versions", results.versions), ("Hardware", results.hardware)):
        if facts:
            pairs = [(_NAMES.get(name, name), str(facts[name])) for name in sorted(facts)]
            parts.append(element("div", element("h3", title), fact_list(pairs)))
    return grid(*parts)
