"""`extends: other.yaml`: one file takes over another's values and says what differs."""

from pathlib import Path

import pytest

from tmkd_ray.config_reading import dump_config, merged, read_config
from tmkd_ray.errors import ConfigError

BASE = """
dataset: {name: digits, image_size: 32, limit: 100}
views: [original, edge]
teacher: {visual: {model: resnet20, fit: {epochs: 7, milestones: [0.5, 0.75]}}}
training: {epochs: 9, learning_rate: 3e-4}
methods:
  kd: {name: kd, kd_weight: {start: 0, end: 1, epochs: 5}, strategy: dkd}
  alone: alone
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "recipes" / "base.yaml"
    path.parent.mkdir()
    path.write_text(BASE)
    return path


def child(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "child.yaml"
    path.write_text(text)
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as raised:
        read_config(path, overrides)
    return str(raised.value)


def test_what_is_not_said_is_taken_over(base: Path, tmp_path: Path) -> None:
    own = (
        "extends: recipes/base.yaml\nname: child\ntraining: {epochs: 2}\nteacher: {visual: {fit: {decay: 0.2}}}"
    )
    config = read_config(child(tmp_path, own), ["training.batch_size=16"])
    parent = read_config(base)
    assert config.name == "child"
    assert config.training == parent.training.model_copy(update={"epochs": 2, "batch_size": 16})
    assert config.teacher.visual.fit == parent.teacher.visual.fit.model_copy(update={"decay": 0.2})
    assert (config.dataset, config.views, config.methods) == (parent.dataset, parent.views, parent.methods)


def test_the_resolved_configuration_stands_alone(base: Path, tmp_path: Path) -> None:
    config = read_config(child(tmp_path, "extends: recipes/base.yaml\nname: child"))
    resolved = dump_config(config)
    assert "extends" not in resolved
    alone = tmp_path / "elsewhere.yaml"
    alone.write_text(resolved)
    base.unlink()
    assert read_config(alone) == config


def test_short_and_long_forms_meet(base: Path, tmp_path: Path) -> None:
    own = """
extends: recipes/base.yaml
views: {edge: {strength: 0.5}}
methods: {alone: {ce_weight: 2}, kd: {strategy: {non_target_weight: 2}}}
"""
    config = read_config(child(tmp_path, own))
    assert list(config.views) == ["original", "edge"]
    assert config.views["edge"].model_dump()["strength"] == 0.5
    assert config.methods["alone"].ce_weight == 2
    strategy = config.methods["kd"].strategy.model_dump()
    assert (strategy["name"], strategy["non_target_weight"], strategy["target_weight"]) == ("dkd", 2, 1)
    assert list(config.methods) == ["kd", "alone"]


def test_lists_and_what_is_called_otherwise_are_replaced(base: Path, tmp_path: Path) -> None:
    own = """
extends: recipes/base.yaml
dataset: {name: image_folder, path: /data}
views: [original]
teacher: {visual: {fit: {milestones: [0.9]}}, text: null}
methods: {kd: {name: alone, ce_weight: 1}, alone: {name: kd, weighting: uniform, teacher: plain}}
"""
    config = read_config(child(tmp_path, own))
    assert config.dataset.limit is None, "a folder is not the digits with another name"
    assert list(config.views) == ["original"]
    assert config.teacher.visual.fit.milestones == (0.9,)
    assert config.teacher.text is None
    assert config.methods["kd"].kd_weight == 0


def test_merging_leaves_its_arguments_alone() -> None:
    inherited = {"training": {"epochs": 1}, "views": ["edge"]}
    own = {"training": {"seed": 2}}
    result = merged(inherited, own)
    assert result == {"training": {"epochs": 1, "seed": 2}, "views": ["edge"]}
    assert (inherited, own) == ({"training": {"epochs": 1}, "views": ["edge"]}, {"training": {"seed": 2}})


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ("extends: recipes/bass.yaml", ["child.yaml: extends: there is no file", "recipes/bass.yaml"]),
        (
            "extends: [recipes/base.yaml]",
            ["child.yaml: extends: expected the path of one file (given: a list)"],
        ),
        ("extends: recipes", ["child.yaml: extends: cannot read", "directory"]),
        ("extends: ''", ["child.yaml: extends: cannot read"]),
        ("extends: child.yaml", ["child.yaml extends a file itself, which is one level too many"]),
        (
            "extends: recipes/base.yaml\ntraining: {epoch: 1}",
            ["child.yaml (which extends ", "base.yaml)", "training.epoch: unknown key; did you mean 'epochs'?"],
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wrong_is_said(base: Path, tmp_path: Path, own: str, said: list[str]) -> None:
    text = refusal(child(tmp_path, own))
    for words in said:
        assert words in text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("- 1", "base.yaml: expected a mapping of sections at the top, not a list"),
        ("a: [", "base.yaml is not valid YAML: line 1"),
        ("views: [edge, edge]", "views: given twice: edge"),
        ("extends: other.yaml", "base.yaml extends a file itself"),
    ],
)
def test_what_is_wrong_in_the_other_file_is_said(base: Path, tmp_path: Path, content: str, said: str) -> None:
    base.write_text(content)
    assert said in refusal(child(tmp_path, "extends: recipes/base.yaml\nviews: {edge: {strength: 0.5}}"))


def test_it_is_no_override(base: Path) -> None:
    assert "override extends=…: a file names the one it extends" in refusal(base, "extends=other.yaml")
