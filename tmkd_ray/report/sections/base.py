"""What every section is made from."""

from dataclasses import dataclass

from tmkd_ray.analysis_record import Analysis
from tmkd_ray.report.drawing import method_swatch
from tmkd_ray.report.elements import Markup, legend
from tmkd_ray.results import RunResults


@dataclass(frozen=True)
class RunPage:
    """One run on the page.

    Attributes:
        results: what it measured.
        analysis: what a closer look found; None where there was none.
        missing: why not, and which command would make it; None: nobody asked.
        prefix: of every id, so that several runs fit on one page.
    """

    results: RunResults
    analysis: Analysis | None = None
    missing: str | None = None
    prefix: str = ""

    def name(self, suffix: str) -> str:
        """An id that no other run of the page has."""
        return f"{self.prefix}{suffix}"

    @property
    def views(self) -> tuple[str, ...]:
        """The views' names, none if they are not known."""
        if self.results.knowledge is not None:
            return self.results.knowledge.views
        if self.analysis is not None and self.analysis.gallery is not None:
            return self.analysis.gallery.view_names
        return ()

    def label(self, key: str) -> str:
        """What people call a network of the analysis, as a caption begins."""
        fixed = {"teacher": "Teacher", "fused teacher": "Teacher, views fused"}
        label = next((each.label for each in self.results.methods if each.name == key), fixed.get(key, key))
        return label[:1].upper() + label[1:]

    def legend_of_methods(self, name: str) -> Markup:
        """Which line and marker is which method."""
        return legend(
            (method_swatch(index, self.name(f"{name}-{index}")), method.label)
            for index, method in enumerate(self.results.methods)
        )


def view_title(name: str) -> str:
    """A view's name for people."""
    return name.replace("_", " ")
