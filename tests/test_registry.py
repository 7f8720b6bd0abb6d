"""Registries: names, refusals, and discovery of new files."""

import sys
from pathlib import Path

import pytest

from tmkd_ray.datasets import DATASETS
from tmkd_ray.distillers import STRATEGIES
from tmkd_ray.errors import UserError
from tmkd_ray.models import MODELS
from tmkd_ray.registry import Registry, UnknownNameError, import_submodules, nearest
from tmkd_ray.views import VIEWS


@pytest.fixture
def fruits() -> Registry[int]:
    registry: Registry[int] = Registry("fruit")
    for number, name in enumerate(("pear", "apple", "plum")):
        registry.register(name)(number)
    return registry


def test_entries_come_back_by_name(fruits):
    assert [fruits.get(name) for name in ("pear", "apple", "plum")] == [0, 1, 2]
    assert fruits.names() == ["apple", "pear", "plum"] == list(fruits)
    assert "apple" in fruits
    assert "fig" not in fruits


def test_the_decorator_returns_its_target():
    registry: Registry[type] = Registry("thing")

    class Thing:
        pass

    assert registry.register("thing")(Thing) is Thing


def test_a_name_given_twice_is_refused_and_the_first_one_stays(fruits):
    with pytest.raises(ValueError, match="fruit 'apple' is registered twice"):
        fruits.register("apple")(9)
    assert fruits.get("apple") == 1


def test_an_unknown_name_lists_the_choices_and_the_nearest(fruits):
    with pytest.raises(UnknownNameError) as raised:
        fruits.get("appel")
    assert str(raised.value) == "unknown fruit 'appel'. Did you mean 'apple'? Choices: apple, pear, plum"
    assert isinstance(raised.value, UserError)


def test_nothing_near_means_no_guess(fruits):
    with pytest.raises(UnknownNameError) as raised:
        fruits.get("xyz")
    assert str(raised.value) == "unknown fruit 'xyz'. Choices: apple, pear, plum"


def test_nearest():
    assert nearest("tempreature", ["temperature", "template"]) == "temperature"
    assert nearest("zzz", ["temperature"]) is None
    assert nearest("name", []) is None


@pytest.mark.parametrize(
    ("registry", "names"),
    [
        (VIEWS, {"original", "edge", "high_frequency"}),
        (DATASETS, {"cifar10", "cifar100", "digits", "image_folder", "parquet"}),
        (STRATEGIES, {"kd", "dkd", "feature_mse"}),
        (MODELS, {"resnet8", "resnet56", "resnet32x4", "wrn_40_2", "vgg13", "ShuffleV1", "MobileNetV2"}),
    ],
    ids=["views", "datasets", "strategies", "models"],
)
def test_the_packages_know_their_files(registry, names):
    assert names <= set(registry.names())


PACKAGE = """\
from tmkd_ray.registry import Registry, import_submodules

SHAPES = Registry("shape")
import_submodules(__name__, __path__)
"""
SHAPE = """\
from {package} import SHAPES

@SHAPES.register("{name}")
class Shape:
    pass
"""


def write_package(folder: Path, package: str, *names: str) -> None:
    (folder / package).mkdir()
    (folder / package / "__init__.py").write_text(PACKAGE)
    for name in names:
        (folder / package / f"{name}.py").write_text(SHAPE.format(package=package, name=name))


@pytest.fixture
def importable(tmp_path, monkeypatch):
    """A folder that Python imports from; what was imported is forgotten afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for module in set(sys.modules) - before:
        del sys.modules[module]


def test_a_file_dropped_into_a_package_is_found(importable):
    write_package(importable, "shapes_for_discovery", "square", "circle")
    (importable / "shapes_for_discovery" / "triangle.py").write_text(
        SHAPE.format(package="shapes_for_discovery", name="triangle")
    )
    package = __import__("shapes_for_discovery")
    assert package.SHAPES.names() == ["circle", "square", "triangle"]
    assert package.SHAPES.get("triangle").__module__ == "shapes_for_discovery.triangle"


def test_importing_again_registers_nothing_twice(importable):
    write_package(importable, "shapes_imported_again", "square")
    package = __import__("shapes_imported_again")
    import_submodules(package.__name__, package.__path__)
    assert package.SHAPES.names() == ["square"]


def test_two_files_of_one_name_are_refused_as_they_are_imported(importable):
    write_package(importable, "shapes_of_one_name", "square")
    (importable / "shapes_of_one_name" / "square_too.py").write_text(
        SHAPE.format(package="shapes_of_one_name", name="square")
    )
    with pytest.raises(ValueError, match="shape 'square' is registered twice"):
        __import__("shapes_of_one_name")


def test_a_defect_in_a_new_file_is_not_hidden(importable):
    write_package(importable, "shapes_with_a_defect", "square")
    (importable / "shapes_with_a_defect" / "broken.py").write_text("import a_module_that_is_not_there\n")
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        __import__("shapes_with_a_defect")
