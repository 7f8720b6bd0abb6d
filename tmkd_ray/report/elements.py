"""HTML elements, which escape every text they are given."""

from collections.abc import Container, Iterable, Sequence
from html import escape

_VOID = ("meta", "img", "link")


class Markup(str):
    """Text that is HTML already; any other text is escaped where it is used."""


def element(tag: str, *children: str, **attributes: str) -> Markup:
    """`<tag attributes>children</tag>`; `class_` gives class, `aria_label` gives aria-label."""
    opening = tag + "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(value)}"' for name, value in attributes.items()
    )
    return Markup(f"<{opening}>") if tag in _VOID else Markup(f"<{opening}>{join(children)}</{tag}>")


def join(children: Iterable[str]) -> Markup:
    """The children one after the other."""
    return Markup("".join(child if isinstance(child, Markup) else escape(child) for child in children))


def marked(text: str) -> Markup:
    """The text, what stands between backticks as code."""
    parts = enumerate(text.split("`"))
    return join(element("code", part) if index % 2 else part for index, part in parts)


def data_table(header: Sequence[str], *groups: Iterable[Sequence[str]], words: Container[int] = (0,)) -> Markup:
    """A table that scrolls sideways where the page is too narrow.

    Args:
        header: the column titles.
        groups: rows; later groups are set back.
        words: the columns that hold words, the others hold numbers; the first cell is the title of its row.
    """

    def cell(text: str, column: int, in_head: bool = False) -> Markup:
        kind = "word" if column in words else "number"
        if in_head:
            return element("th", text, scope="col", class_=kind)
        if column == 0:
            return element("th", text, scope="row", class_=kind)
        return element("td", text, class_=kind)

    head = element("tr", *(cell(text, column, in_head=True) for column, text in enumerate(header)))
    bodies = [
        element("tbody", *(element("tr", *(cell(text, i) for i, text in enumerate(row))) for row in rows))
        for rows in groups
    ]
    return element("div", element("table", element("thead", head), *bodies), class_="scroll")


def fact_list(facts: Iterable[tuple[str, str]]) -> Markup:
    """(name, value) pairs."""
    return element("dl", *(element("div", element("dt", name), element("dd", value)) for name, value in facts))


def figure(svg: str, caption: str) -> Markup:
    """An inline SVG with its caption."""
    return element("figure", Markup(svg), element("figcaption", caption))


def legend(entries: Iterable[tuple[str, str]]) -> Markup:
    """(swatch, which is HTML, and name) pairs."""
    return element("ul", *(element("li", Markup(swatch), name) for swatch, name in entries), class_="legend")


def grid(*children: str) -> Markup:
    """Side by side where there is room."""
    return element("div", *children, class_="grid")


def details(title: str, *children: str) -> Markup:
    """Folded until the reader opens it."""
    return element("details", element("summary", title), *children)


def bar(fraction: float, colour: str) -> Markup:
    """A horizontal bar filled to `fraction`; decoration, as the number stands beside it."""
    filled = element("span", style=f"width: {100 * fraction:.1f}%; background: {colour}")
    return element("span", filled, class_="bar", aria_hidden="true")
