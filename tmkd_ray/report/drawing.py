"""How every figure is drawn: inline SVG that follows the page's light or dark theme.

Every figure is WIDTH units wide, one unit a CSS pixel, so that it reads at 100 % and still fits a telephone.
Ink, grid and page are CSS variables (`--ink`, `--grid`, `--page`); data colours are those of M. Okabe and
K. Ito, "Color Universal Design" (2008), which stay apart for colour-blind readers and show on white and on
near-black. Series also differ by marker; their legend is the page's, of `method_swatch` and `view_colour`.
Shares and other quantities are coloured by `cividis`, made for colour-blind readers (Nuñez et al. 2018).
"""

import base64
import io
import re
import warnings
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

WIDTH = 440
FONT_SIZE = 12
MAX_CRISP_SIZE = 64
"""Images up to this size, in pixels, are enlarged with hard edges, as smoothing would hide what they are."""

# Colours that no figure uses for data; inline_svg replaces them by the page's variables.
INK, GRID, PAGE = "#010203", "#040506", "#070809"
_VARIABLES = {INK: "var(--ink)", GRID: "var(--grid)", PAGE: "var(--page)"}

BLUE, VERMILLION, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#cc79a7"
ORANGE, SKY, YELLOW = "#e69f00", "#56b4e9", "#f0e442"
SERIES_COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, INK)
SERIES_MARKERS = "osD^vPX"
# Lighter ones first: they carry black numbers.
_VIEW_COLOURS = (SKY, ORANGE, GREEN, PURPLE, YELLOW, VERMILLION)

_STYLE = {
    "font.size": FONT_SIZE,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.labelsize": FONT_SIZE,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "grid.color": GRID,
    "grid.linewidth": 1,
    "lines.linewidth": 2,
    "lines.markersize": 5,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": FONT_SIZE,
    "ytick.labelsize": FONT_SIZE,
    # Text stays text, in the page's font; a dollar sign in a class name is no mathematics.
    "svg.fonttype": "none",
    "text.parse_math": False,
    "text.usetex": False,
    # The same results give the same bytes.
    "svg.hashsalt": "report",
}


def inline_svg(
    name: str, description: str, height: float, paint: Callable[[Axes], None], width: float = WIDTH
) -> str:
    """Draw one pair of axes.

    Args:
        name: unique in the page; prefix of the ids inside.
        description: what a screen reader says; empty for a decoration, which it skips.
        height: in CSS pixels, as `width`.
        paint: draws on the axes.

    Returns: an `<svg>` element without ids of its own kind, metadata or links to anywhere.
    """
    buffer = io.BytesIO()
    with rc_context(_STYLE), warnings.catch_warnings():
        # The browser draws the text, in a font that has the glyphs.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        # One inch is 72 units of the SVG.
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
        paint(figure.add_subplot())
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return _for_html(buffer.getvalue(), name, description)


def standalone_svg(title: str, height: float, paint: Callable[[Axes], None], width: float = WIDTH) -> str:
    """Draw one pair of axes as an SVG file, black on white; sizes as for `inline_svg`."""
    buffer = io.BytesIO()
    with rc_context(paper_style()):
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
        paint(figure.add_subplot())
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Title": title})
    return buffer.getvalue().decode()


def paper_style() -> dict[str, Any]:
    """Return the style of figures in files of their own: black on white."""
    colours = {
        key: {INK: "black", GRID: "#d0d0d0", PAGE: "white"}[value]
        for key, value in _STYLE.items()
        if value in (INK, GRID, PAGE)
    }
    return _STYLE | colours | {"figure.facecolor": "white", "svg.fonttype": "path"}


def _for_html(svg: bytes, name: str, description: str) -> str:
    root = ElementTree.fromstring(svg)
    for parent in root.iter():
        for child in list(parent):
            # Metadata is for files; the style sheet would apply to the whole page.
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    used = set(re.findall(r"url\(#([^)]+)\)", svg.decode())) | set(re.findall(r'href="#([^"]+)"', svg.decode()))
    for node in root.iter():
        node.tag = node.tag.rpartition("}")[2]
        attributes = {key.rpartition("}")[2]: value for key, value in node.attrib.items()}
        if attributes.get("id") in used:
            attributes["id"] = f"{name}-{attributes['id']}"
        else:
            attributes.pop("id", None)
        for key, value in attributes.items():
            value = value.replace("url(#", f"url(#{name}-")
            if key == "href":
                value = value.replace("#", f"#{name}-")
            for sentinel, variable in _VARIABLES.items():
                value = value.replace(sentinel, variable)
            attributes[key] = value
        node.attrib.clear()
        node.attrib.update(attributes)
    width, height = root.attrib["viewBox"].split()[2:]
    root.attrib.update(
        {
            "width": width,
            "height": height,
            # What the style sheet said.
            "style": "stroke-linejoin: round; stroke-linecap: butt",
        }
    )
    root.attrib.update({"role": "img", "aria-label": description} if description else {"aria-hidden": "true"})
    return ElementTree.tostring(root, encoding="unicode")


def image_data_uri(image: np.ndarray, max_side: int = 192) -> str:
    """`image` [H, W, 3] uint8 as a data URI, shrunk where a side is longer than `max_side`.

    Small images keep every pixel (PNG); large ones, of which a page would grow heavy, become JPEG.
    """
    picture = Image.fromarray(image)
    picture.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if max(picture.size) <= MAX_CRISP_SIZE:
        picture.save(buffer, "PNG", optimize=True)
        kind = "png"
    else:
        picture.save(buffer, "JPEG", quality=88)
        kind = "jpeg"
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()


def shortened(text: str, limit: int = 22) -> str:
    """A name that fits a figure and is legal XML."""
    clean = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
    return clean if len(clean) <= limit else clean[: limit - 1] + "…"


def method_style(index: int) -> dict[str, Any]:
    lap = index // len(SERIES_COLOURS)
    return {
        "color": SERIES_COLOURS[index % len(SERIES_COLOURS)],
        "marker": SERIES_MARKERS[index % len(SERIES_MARKERS)],
        "linestyle": ("-", "--", ":")[lap % 3],
    }


def method_swatch(index: int, name: str) -> str:
    """The line and marker of method `index`, for a legend."""

    def paint(axes: Axes) -> None:
        axes.plot([0, 0.5, 1], [0, 0, 0], markevery=[1], **method_style(index))
        axes.set_axis_off()

    return inline_svg(name, "", height=14, width=34, paint=paint)


def view_colour(index: int) -> str:
    """The CSS colour of view `index`."""
    return _VIEW_COLOURS[index % len(_VIEW_COLOURS)]
