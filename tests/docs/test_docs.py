"""The documents: links lead somewhere, commands are commands, the reference is the code's."""

import re
import shlex
from pathlib import Path

import pytest

from tmkd_ray.cli import _parser
from tmkd_ray.config.transfer import TRANSFERS
from tmkd_ray.config_reading import read_config, read_tree, resolve_as
from tmkd_ray.config_reference import config_reference

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "benchmarks").rglob("*.md")),
]
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Return what headings are called in links: lower case, no signs, hyphens for blanks."""
    headings = re.findall(r"^#+ +(.+)$", BLOCK.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_pages_are_there() -> None:
    assert len(PAGES) >= 7
    assert {"index.md", "method.md", "tutorial.md", "configuration.md", "cluster.md"} <= {
        page.name for page in PAGES
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    dead = []
    for target in LINK.findall(BLOCK.sub("", page.read_text())):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            dead.append(target)
    assert not dead, f"{page.name}: {dead}"


def test_every_page_of_docs_is_in_the_index() -> None:
    linked = set(LINK.findall((ROOT / "docs" / "index.md").read_text()))
    assert {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"} <= linked


def commands() -> list[tuple[Path, str]]:
    """Return each line of a shell block that calls `tmkd`, without comments; its continuations joined."""
    found = []
    for page in PAGES:
        for language, block in BLOCK.findall(page.read_text()):
            if language != "sh":
                continue
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words and Path(words[0]).name == "tmkd":
                    found.append((page, shlex.join(words[1:])))
    return found


@pytest.mark.parametrize(("page", "command"), commands(), ids=lambda value: str(getattr(value, "name", value)))
def test_commands_of_the_documents_are_understood(
    page: Path, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They parse, and the configuration that they name, given on the same page, is a legal one."""
    options, rest = _parser().parse_known_args(shlex.split(command))
    assert not [word for word in rest if word.startswith("-")]
    overrides = [*getattr(options, "overrides", []), *rest]
    config = getattr(options, "config", None)
    if config is None:
        return
    for language, block in BLOCK.findall(page.read_text()):
        first = block.splitlines()[0]
        if language == "yaml" and first.startswith("# ") and first.endswith(".yaml"):
            (tmp_path / first[2:]).write_text(block)
    path = tmp_path / config if (tmp_path / config).exists() else ROOT / config
    overrides = [override for override in overrides if "=" in override]
    if hasattr(options, "task"):  # of `tmkd transfer`
        tree, source = read_tree(path, overrides)
        given = {"student": options.student, "data": options.data}
        resolve_as(TRANSFERS.get(options.task), tree | given, source)
    else:
        read_config(path, overrides)


def test_the_reference_is_that_of_the_code() -> None:
    page = ROOT / "docs" / "configuration.md"
    assert page.read_text() == config_reference(), "run: tmkd config reference > docs/configuration.md"
