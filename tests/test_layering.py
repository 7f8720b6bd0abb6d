"""Imports go one way: each part of the package knows only what lies below it, and Ray stays in the stages."""

import ast
from pathlib import Path

import pytest

import tmkd_ray

PACKAGE = Path(tmkd_ray.__file__).parent
PIPELINES = Path(__file__).parent.parent / "pipelines"

LAYERS: tuple[tuple[str, ...], ...] = (
    ("__init__",),
    ("errors", "progress", "types"),
    ("registry", "storage"),
    ("settings",),
    ("analysis_record", "precision", "results", "trials"),
    ("augmentation", "datasets", "losses", "models", "views"),
    ("distillers", "fusion", "teachers"),
    ("knowledge", "objective", "pretraining"),
    ("config",),
    ("config_reading", "config_reference", "planning"),
    ("search",),
    ("analysis", "export", "training"),
    ("downstream",),
    ("report",),
    ("stages",),
    ("commands",),
    ("cli",),
    ("__main__",),
)
"""The documented order, from the ground up: modules and packages directly in `tmkd_ray`.

A part may import from the layers below its own, and from its own layer so long as no circle comes of it.
"""

ONLY: dict[str, set[str]] = {
    "report": {"analysis_record", "errors", "progress", "results", "settings", "storage", "trials", "types"}
}
"""Parts that may know less than their layer allows: a report is made from results alone."""

RAY_MAY_BE_IN = "stages"

Edges = dict[tuple[str, str], list[str]]
"""(importing part, imported part) to the places, as `file:line`."""


def imported_modules(source: str, module: str, is_package: bool) -> list[tuple[str, int]]:
    """Return the dotted names that a module imports, anywhere in it, with their lines.

    Of `from a import b` both `a` and `a.b` are returned: b may be a module.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".") if is_package else module.split(".")[:-1]
                parents = parents[: len(parents) - (node.level - 1)]
                base = ".".join([*parents, base]).rstrip(".")
            found.append((base, node.lineno))
            found += [(f"{base}.{alias.name}", node.lineno) for alias in node.names]
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) in ("__import__", "importlib.import_module", "import_module")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            found.append((str(node.args[0].value), node.lineno))
    return found


def part_of(name: str, root: Path) -> str | None:
    """Return the part of the package that a dotted name lies in; None if it is no module of the package."""
    package, *rest = name.split(".")
    if package != root.name:
        return None
    if not rest:
        return "__init__"
    is_module = (root / f"{rest[0]}.py").exists() or (root / rest[0]).is_dir()
    return rest[0] if is_module else "__init__"  # `from tmkd_ray import __version__`


def read_edges(root: Path) -> tuple[Edges, list[str]]:
    """Return the edges between the parts of the package at `root`, and the places that import Ray."""
    edges: Edges = {}
    ray = []
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root)
        module = ".".join([root.name, *path.with_suffix("").parts]).removesuffix(".__init__")
        part = path.with_suffix("").parts[0]
        for name, line in imported_modules(file.read_text(), module, file.name == "__init__.py"):
            place = f"{path}:{line}"
            if name == "ray" or name.startswith("ray."):
                ray.append(place)
            target = part_of(name, root)
            # `from tmkd_ray import storage` names the package only to reach what lies in it.
            if target is not None and target != part and not (target == "__init__" and name == root.name):
                places = edges.setdefault((part, target), [])
                if place not in places:
                    places.append(place)
    return edges, sorted(set(ray))


def violations(root: Path) -> list[str]:
    """Return a line for each import that the layers forbid, each circle, and each part without a layer."""
    level = {part: number for number, layer in enumerate(LAYERS) for part in layer}
    edges, ray = read_edges(root)
    parts = {path.relative_to(root).with_suffix("").parts[0] for path in root.rglob("*.py")}
    lines = [f"{part} has no layer: give it one in LAYERS" for part in sorted(parts - set(level))]
    for place in ray:
        if not place.startswith(f"{RAY_MAY_BE_IN}/"):
            lines.append(f"{place}: imports ray, which only {RAY_MAY_BE_IN} may")
    for (part, target), places in sorted(edges.items()):
        if level.get(target, -1) > level.get(part, len(LAYERS)):
            lines += [f"{place}: {part} imports {target}, which lies above it" for place in places]
        if part in ONLY and target not in ONLY[part]:
            lines += [f"{place}: {part} may not import {target}" for place in places]
    return lines + [f"circle: {' → '.join(circle)}" for circle in circles(set(edges))]


def circles(edges: set[tuple[str, str]]) -> list[list[str]]:
    """Return one circle of imports for each group of parts that import each other, first part repeated last."""
    targets: dict[str, list[str]] = {}
    for part, target in sorted(edges):
        targets.setdefault(part, []).append(target)

    def path(start: str, goal: str) -> list[str] | None:
        """The shortest way along the edges, of at least one step."""
        ways, seen = [[start]], {start}
        while ways:
            way = ways.pop(0)
            for target in targets.get(way[-1], []):
                if target == goal:
                    return [*way, target]
                if target not in seen:
                    seen.add(target)
                    ways.append([*way, target])
        return None

    found: list[list[str]] = []
    for part in sorted(targets):
        circle = path(part, part)
        if circle is not None and not any(set(circle) <= set(other) for other in found):
            found.append(circle)
    return found


def foreign_imports(script: Path) -> list[str]:
    """Return what a script in pipelines/ imports of ours, or of Ray, besides the command line."""
    return [
        f"{script.name}:{line}: imports {name}"
        for name, line in imported_modules(script.read_text(), script.stem, is_package=False)
        if name.split(".")[0] in ("ray", PACKAGE.name) and name not in ("tmkd_ray.cli", "tmkd_ray.cli.main")
    ]


def test_imports_go_one_way():
    assert violations(PACKAGE) == []


def test_every_layer_exists():
    parts = {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in PACKAGE.rglob("*.py")}
    assert {part for layer in LAYERS for part in layer} == parts


def test_ray_is_imported_where_it_may_be():
    _, ray = read_edges(PACKAGE)
    assert ray, "the test no longer sees what it looks for"
    assert all(place.startswith("stages/") for place in ray)


def test_edges_that_are_known_to_exist_are_seen():
    edges, _ = read_edges(PACKAGE)
    assert {
        ("settings", "registry"),
        ("config", "settings"),
        ("config_reading", "config"),
        ("stages", "training"),
        ("stages", "storage"),  # from tmkd_ray import storage
        ("stages", "__init__"),  # from tmkd_ray import __version__
        ("commands", "stages"),  # within functions
        ("__main__", "cli"),
    } <= set(edges)
    assert ("stages", "cli") not in edges


@pytest.mark.parametrize("script", sorted(PIPELINES.glob("*.py")), ids=lambda script: script.name)
def test_pipelines_are_thin(script):
    assert foreign_imports(script) == []
    assert "tmkd_ray.cli" in [name for name, _ in imported_modules(script.read_text(), script.stem, False)]


def test_there_are_pipelines():
    assert len(list(PIPELINES.glob("*.py"))) >= 7


# The checker is checked on packages with a violation planted.


@pytest.fixture
def plant(tmp_path):
    """Write a small package of the same name with the files given, and return its folder."""

    def plant(**files):
        root = tmp_path / PACKAGE.name
        for name, source in {"__init__": "__version__ = '0'", **files}.items():
            path = root / (name.replace("__in__", "/") + ".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)
            if path.parent != root:
                (path.parent / "__init__.py").touch()
        return root

    return plant


def test_a_package_in_order_passes(plant):
    root = plant(
        errors="import json",
        registry="from tmkd_ray.errors import UserError\nfrom . import errors",
        views__in__base="from tmkd_ray import registry, __version__\nfrom ..errors import UserError",
        views__in__edge="from .base import View\nfrom tmkd_ray.views import VIEWS",
        stages__in__run="import ray.data\nfrom tmkd_ray.views.edge import Edge",
    )
    assert violations(root) == []
    assert set(read_edges(root)[0]) == {
        ("registry", "errors"),
        ("views", "registry"),
        ("views", "errors"),
        ("views", "__init__"),
        ("stages", "views"),
    }


@pytest.mark.parametrize(
    "source",
    [
        "import ray",
        "import ray.data as data",
        "from ray import train",
        "from ray.train import torch",
        "def f():\n    import ray",
        "if 1:\n    from ray.data import Dataset",
        "import importlib\nimportlib.import_module('ray.data')",
        "ray = __import__('ray')",
    ],
)
def test_ray_outside_the_stages_is_caught(plant, source):
    line = len(source.splitlines())
    root = plant(training__in__loop=source, errors="import rayon, xray\nfrom x import ray")
    assert violations(root) == [f"training/loop.py:{line}: imports ray, which only stages may"]


@pytest.mark.parametrize(
    "source",
    [
        "import tmkd_ray.training.loop",
        "import tmkd_ray.training as t",
        "from tmkd_ray import training",
        "from tmkd_ray.training import loop",
        "from tmkd_ray.training.loop import train",
        "from .. import training",
        "from ..training import loop",
        "from ..training.loop import train",
        "def f():\n    from tmkd_ray.training import loop",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from tmkd_ray.training.loop import train",
    ],
)
def test_an_upward_edge_is_caught(plant, source):
    line = len(source.splitlines())
    root = plant(views__in__edge=source, training__in__loop="from tmkd_ray.errors import UserError", errors="")
    assert violations(root) == [f"views/edge.py:{line}: views imports training, which lies above it"]


def test_a_circle_within_a_layer_is_caught(plant):
    root = plant(
        datasets__in__a="from tmkd_ray.models.b import x",
        models__in__b="from tmkd_ray import views",
        views__in__c="from ..datasets import a",
    )
    assert violations(root) == ["circle: datasets → models → views → datasets"]


def test_two_circles_are_both_told(plant):
    root = plant(
        datasets="import tmkd_ray.models",
        models="import tmkd_ray.datasets",
        distillers="import tmkd_ray.fusion",
        fusion="import tmkd_ray.distillers",
    )
    assert violations(root) == [
        "circle: datasets → models → datasets",
        "circle: distillers → fusion → distillers",
    ]


def test_modules_of_one_package_may_import_each_other(plant):
    root = plant(models__in__a="from tmkd_ray.models import b", models__in__b="from . import a")
    assert violations(root) == []


def test_a_report_that_looks_further_is_caught(plant):
    root = plant(
        report__in__html="from tmkd_ray.results import RunResults\nfrom tmkd_ray import config, storage",
        results="",
        config="",
        storage="",
    )
    assert violations(root) == ["report/html.py:2: report may not import config"]


def test_a_part_without_a_layer_is_caught(plant):
    root = plant(novelty="from tmkd_ray.errors import UserError", errors="")
    assert violations(root) == ["novelty has no layer: give it one in LAYERS"]


@pytest.mark.parametrize(
    "source",
    ["import ray", "from tmkd_ray.stages.run import run", "from tmkd_ray import config", "import tmkd_ray"],
)
def test_a_pipeline_that_does_more_is_caught(tmp_path, source):
    script = tmp_path / "own.py"
    script.write_text(f"import sys\nfrom tmkd_ray.cli import main\n{source}\n")
    found = foreign_imports(script)
    assert found
    assert all(line.startswith("own.py:3: imports ") for line in found)
