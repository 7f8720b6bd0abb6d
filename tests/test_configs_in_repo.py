"""Every configuration that this repository holds can be read, and is what its name says."""

from pathlib import Path

import pytest

import tmkd_ray
from tmkd_ray.config import ExperimentConfig, TrainingConfig
from tmkd_ray.config_reading import dump_config, read_config, read_tree
from tmkd_ray.training.optimization import learning_rate

PACKAGE = Path(tmkd_ray.__file__).parent
REPOSITORY = Path(__file__).parent.parent
PIPELINE_CONFIGS = REPOSITORY / "pipelines" / "configs"
CONFIGS = sorted([*PACKAGE.rglob("*.yaml"), *PIPELINE_CONFIGS.glob("*.yaml")])
RECIPES = sorted((PIPELINE_CONFIGS / "recipes").glob("*.yaml"))
NEEDS_PATH = ("parquet", "image_folder", "cifar10", "cifar100")

PAIRS = {
    "cifar100": [
        ("resnet32x4", "resnet8x4"),
        ("resnet56", "resnet20"),
        ("wrn_40_2", "wrn_16_2"),
        ("wrn_40_2", "wrn_40_1"),
        ("vgg13", "vgg8"),
        ("resnet32x4", "ShuffleV2"),
        ("ResNet50", "MobileNetV2"),
    ],
    "imagenet": [("resnet34", "resnet18"), ("resnet50", "MobileNetV1")],
}
"""Those of which the field has published tables."""

BETA_OF_DKD = {"resnet20": 2, "wrn_16_2": 6, "wrn_40_1": 6, "vgg8": 6, "MobileNetV1": 2, "resnet18": 0.5}
"""By student; 8 for the others. From the configurations of DKD's authors."""

STANDARDIZED = {"vgg8": (3, 9), "MobileNetV2": (3, 1)}
"""By student: temperature and weight of KD of z-scores; 2 and 9 for the others. From its authors' logs."""


def overrides_for(path: Path) -> list[str]:
    """What a configuration leaves to the user: where the data lies."""
    dataset = read_tree(path)[0]["dataset"]
    given = dataset if isinstance(dataset, dict) else {"name": dataset}
    return ["dataset.path=/data"] if given["name"] in NEEDS_PATH and "path" not in given else []


def test_they_are_found():
    names = {path.name for path in CONFIGS}
    assert {"demo.yaml", "cifar100_resnet56_resnet8.yaml"} <= names
    assert {path.stem for path in RECIPES} == {"cifar100", "imagenet"}


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


@pytest.mark.parametrize("path", sorted(PIPELINE_CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_it_is_named_after_dataset_teacher_and_student(path):
    config = read_config(path, overrides_for(path))
    names = (config.teacher.visual.model, config.student.model)
    teacher, student = (name.removeprefix("torchvision/") for name in names)
    dataset = path.stem.partition("_")[0]
    assert path.stem == f"{dataset}_{teacher}_{student}"
    size, mean = (32, 0.507) if dataset == "cifar100" else (224, 0.485)
    assert config.dataset.image_size == size
    assert config.dataset.mean[0] == pytest.approx(mean, abs=1e-3)


@pytest.mark.parametrize("pair", PAIRS["cifar100"], ids="→".join)
def test_the_cifar100_pairs_are_trained_by_the_fields_recipe(pair):
    teacher, student = pair
    config = read_config(PIPELINE_CONFIGS / f"cifar100_{teacher}_{student}.yaml", ["dataset.path=/data"])
    assert (config.teacher.visual.model, config.student.model) == pair
    light = student.startswith(("Shuffle", "Mobile"))
    check_recipe(config.training, 240, 64, 0.01 if light else 0.05, 5e-4, (150, 180, 210))
    check_recipe(config.teacher.visual.fit, 240, 64, 0.05, 5e-4, (150, 180, 210))
    assert config.augmentation.recipe == "cifar"
    assert config.seeds == (0, 1, 2)
    check_methods(config, student, temperature=4.0)
    of_z_scores = config.methods["kd_standardized"]
    assert (of_z_scores.strategy.temperature, of_z_scores.kd_weight) == STANDARDIZED.get(student, (2, 9))
    assert (of_z_scores.strategy.standardize_logits, of_z_scores.ce_weight) == (True, 0.1)


@pytest.mark.parametrize("pair", PAIRS["imagenet"], ids="→".join)
def test_the_imagenet_pairs_are_trained_by_the_fields_recipe(pair):
    teacher, student = pair
    config = read_config(PIPELINE_CONFIGS / f"imagenet_{teacher}_{student}.yaml", ["dataset.path=/data"])
    check_recipe(config.training, 100, 512, 0.2, 1e-4, (30, 60, 90))
    check_recipe(config.teacher.visual.fit, 100, 512, 0.2, 1e-4, (30, 60, 90))
    assert config.augmentation.recipe == "imagenet"
    check_methods(config, student, temperature=1.0)


def check_recipe(
    training: TrainingConfig,
    epochs: int,
    batch_size: int,
    rate: float,
    weight_decay: float,
    drops: tuple[int, ...],
) -> None:
    assert (training.epochs, training.batch_size) == (epochs, batch_size)
    assert (training.optimizer, training.momentum, training.nesterov) == ("sgd", 0.9, False)
    assert training.weight_decay == weight_decay
    expected = [rate * 0.1 ** sum(epoch >= drop for drop in drops) for epoch in range(epochs)]
    assert [learning_rate(training, epoch) for epoch in range(epochs)] == pytest.approx(expected)


def check_methods(config: ExperimentConfig, student: str, temperature: float) -> None:
    """Every strategy is there on the plain and on the fused teacher, the same but for the teacher."""
    methods = config.methods
    assert {"alone", "tmkd"} < set(methods)
    strategies = [name for name in methods if f"{name}_fused" in methods]
    assert {"kd", "dkd"} <= set(strategies)
    assert set(methods) == {"alone", "tmkd", *strategies, *(f"{name}_fused" for name in strategies)}
    for name in strategies:
        plain, fused = methods[name], methods[f"{name}_fused"]
        assert (plain.teacher, fused.teacher) == ("plain", "fused")
        assert fused == plain.model_copy(update={"teacher": "fused"})
    assert methods["kd"].strategy.temperature == methods["dkd"].strategy.temperature == temperature
    assert methods["dkd"].strategy.non_target_weight == BETA_OF_DKD.get(student, 8)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_a_configuration_itself(path):
    config = read_config(path, overrides_for(path))
    assert config.training == config.teacher.visual.fit
    assert config.methods
