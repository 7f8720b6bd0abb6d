"""What every page has around its content: one file that needs nothing else."""

from pathlib import Path

from tmkd_ray import storage
from tmkd_ray.report.elements import Markup, element
from tmkd_ray.report.stylesheet import STYLE_SHEET


def save_page(path: str | Path, title: str, body: Markup) -> None:
    """Write a page, whole or not at all.

    Args:
        body: the `body` element.
    """
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        # An empty icon, so that no browser asks a server for one.
        element("link", rel="icon", href="data:,"),
        element("title", title),
        element("style", Markup(STYLE_SHEET)),
    )
    content = f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"
    storage.write_bytes(str(path), content.encode(errors="backslashreplace"))
