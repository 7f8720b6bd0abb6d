"""Every configuration that this repository holds can be read, and survives a round trip."""

from pathlib import Path

import pytest

import tmkd_ray
from tmkd_ray.config import ExperimentConfig
from tmkd_ray.config_reading import dump_config, parse_yaml, read_config

PACKAGE = Path(tmkd_ray.__file__).parent
REPOSITORY = Path(__file__).parent.parent
CONFIGS = sorted([*PACKAGE.rglob("*.yaml"), *(REPOSITORY / "pipelines" / "configs").glob("*.yaml")])
NEEDS_PATH = ("parquet", "image_folder", "cifar10", "cifar100")


def overrides_for(path: Path) -> list[str]:
    """What a configuration leaves to the user: where the data lies."""
    dataset = parse_yaml(path.read_text(), path.name)["dataset"]
    given = dataset if isinstance(dataset, dict) else {"name": dataset}
    return ["dataset.path=/data"] if given["name"] in NEEDS_PATH and "path" not in given else []


def test_they_are_found():
    names = {path.name for path in CONFIGS}
    assert {"demo.yaml", "cifar100_resnet56_resnet8.yaml"} <= names


@pytest.fixture(params=CONFIGS, ids=lambda path: path.name)
def path(request):
    return request.param


def test_it_can_be_read(path):
    config = read_config(path, overrides_for(path))
    assert config.name == path.stem, "runs are found by the name of their configuration's file"


def test_it_survives_a_round_trip(path, tmp_path):
    config = read_config(path, overrides_for(path))
    (tmp_path / "again.yaml").write_text(dump_config(config), encoding="utf-8")
    again = read_config(tmp_path / "again.yaml")
    assert again == config
    assert list(again.views) == list(config.views)
    assert list(again.methods) == list(config.methods)
    assert ExperimentConfig.model_validate_json(config.model_dump_json()) == config


def test_it_takes_overrides(path):
    config = read_config(
        path, [*overrides_for(path), "training.epochs=3", "views.edge.strength=0.25", "seeds=[7]"]
    )
    assert config.training.epochs == 3
    assert config.views["edge"].model_dump()["strength"] == 0.25
    assert config.seeds == (7,)
