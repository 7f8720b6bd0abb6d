"""docs/scaling.md and the constants of `tmkd plan` that the package brings."""

from pathlib import Path

import pytest
from benchmark_runs import load

ROOT = Path(__file__).parents[2]


def test_the_page_is_that_of_the_packaged_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables and worked plans; `plan_constants.py --page` writes them anew."""
    monkeypatch.chdir(ROOT)
    script = load(monkeypatch, "plan_constants")
    sections = script.page_sections(script.packaged_constants())
    page = (ROOT / "docs" / "scaling.md").read_text()
    assert all(f"<!-- {name} -->\n{section}\n<!-- end -->" in page for name, section in sections.items())
    assert page.count("<!-- end -->") == len(sections)
    changed = page.replace("30% of it", "99% of it")
    assert changed != page
    assert script.fill_page(changed, sections) == page
