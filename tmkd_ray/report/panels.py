"""Images side by side as a PNG file, in the style of the report's figures."""

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from tmkd_ray.report.drawing import FONT_SIZE, MAX_CRISP_SIZE, paper_style, shortened

_PANEL = 160
_TITLE_LINE = 1.35 * FONT_SIZE
_GAP = 10
_MARGIN = 30
"""Pixels at 72 dots an inch: side of an image, a line of its title, what parts two images, room for labels."""

_DPI = 108
_TITLE_CHARACTERS = 26


@dataclass(frozen=True)
class Panel:
    """One image.

    Attributes:
        title: above it, lines parted by newlines.
        image: uint8 [H, W, 3].
    """

    title: str
    image: np.ndarray


@dataclass(frozen=True)
class PanelRow:
    """Images in a row, and what they have in common, at its left."""

    label: str
    panels: Sequence[Panel]


def panels_png(rows: Sequence[PanelRow]) -> bytes:
    """Draw rows of images; titles that repeat those of the row above are left out."""
    columns = max(len(row.panels) for row in rows)
    titles = [[panel.title for panel in row.panels] for row in rows]
    titled = [index == 0 or titles[index] != titles[index - 1] for index in range(len(rows))]
    headers = [
        max(title.count("\n") + 1 for title in titles[index]) * _TITLE_LINE if titled[index] else 0.0
        for index in range(len(rows))
    ]
    width = _MARGIN + columns * (_PANEL + _GAP)
    height = sum(headers) + len(rows) * (_PANEL + _GAP) + _GAP
    with rc_context(paper_style()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=(width / 72, height / 72))
        top = height - _GAP
        for index, row in enumerate(rows):
            top -= headers[index]
            for column, panel in enumerate(row.panels):
                left = _MARGIN + column * (_PANEL + _GAP)
                axes = figure.add_axes((left / width, (top - _PANEL) / height, _PANEL / width, _PANEL / height))
                crisp = max(panel.image.shape[:2]) <= MAX_CRISP_SIZE
                axes.imshow(panel.image, interpolation="nearest" if crisp else "antialiased")
                axes.set_xticks([])
                axes.set_yticks([])
                axes.grid(visible=False)
                axes.spines[:].set_visible(False)
                if column == 0:
                    axes.set_ylabel(shortened(row.label, 24))
                if titled[index]:
                    lines = (shortened(line, _TITLE_CHARACTERS) for line in panel.title.split("\n"))
                    axes.set_title("\n".join(lines), fontsize=FONT_SIZE, pad=4)
            top -= _PANEL + _GAP
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()
