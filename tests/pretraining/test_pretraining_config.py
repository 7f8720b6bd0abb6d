"""`distiller: lgd` and its like in a configuration; and the class names of its own bank."""

from pathlib import Path
from typing import Any

import pytest

from tmkd_ray.config import ExperimentConfig, resolve_objective
from tmkd_ray.config_reading import dump_config, read_config, resolve
from tmkd_ray.errors import ConfigError, UserError
from tmkd_ray.objective import DistillerConfig
from tmkd_ray.pretraining import PRETRAINERS
from tmkd_ray.pretraining.embedding import EmbeddingConfig
from tmkd_ray.pretraining.lgd import LGDConfig, read_bank_classes


def config_of(**fields: Any) -> ExperimentConfig:
    return resolve({"dataset": "digits", **fields}, "a test")


def test_every_objective_by_its_name() -> None:
    assert set(PRETRAINERS) == {"embedding", "lgd", "seed"}
    for name in PRETRAINERS:
        config = config_of(distiller=name)
        assert type(config.distiller) is PRETRAINERS.get(name).Config
        assert config.named_methods() == {name: config.distiller}
        assert config.distiller.teacher == "plain"
        assert config.distiller.weighting == "confidence", "no label in it"


def test_both_families_in_one_run() -> None:
    methods = {"lgd": {"name": "lgd", "alpha": 0.25}, "embedding": "embedding", "alone": "alone", "kd": "kd"}
    config = config_of(methods=methods)
    assert config.methods["lgd"] == LGDConfig(alpha=0.25)
    assert config.methods["embedding"] == EmbeddingConfig()
    assert isinstance(config.methods["kd"], DistillerConfig)
    assert list(config.methods) == list(methods)


def test_it_survives_a_round_trip(tmp_path: Path) -> None:
    lgd = {"name": "lgd", "teacher": "fused", "bank_prompts": ["a {}.", "the {}."], "momentum": 0.99}
    config = config_of(methods={"lgd": lgd, "seed": {"name": "seed", "queue_size": 9}, "tmkd": "tmkd"})
    (tmp_path / "again.yaml").write_text(dump_config(config), encoding="utf-8")
    assert read_config(tmp_path / "again.yaml") == config
    assert ExperimentConfig.model_validate_json(config.model_dump_json()) == config
    assert config.model_dump()["methods"]["seed"]["queue_size"] == 9


def test_it_takes_overrides() -> None:
    config = read_config(None, ["dataset=digits", "distiller=lgd", "distiller.alpha=0.75"])
    assert config.distiller == LGDConfig(alpha=0.75)


@pytest.mark.parametrize(
    ("distiller", "error"),
    [
        ({"name": "lgd", "alpa": 1}, "distiller.alpa: unknown key; did you mean 'alpha'?"),
        ({"name": "lgd", "alpha": 1.5}, "distiller.alpha: must be at most 1 (given: 1.5)"),
        ({"name": "lgd", "alpha": "1"}, 'distiller.alpha: expected a number (given: "1")'),
        ({"name": "lgd", "momentum": 1}, "distiller.momentum: must be below 1 (given: 1)"),
        (
            {"name": "lgd", "teacher": "none"},
            "distiller.teacher: expected 'plain' or 'fused' (given: \"none\")",
        ),
        ({"name": "lgd", "kd_weight": 1}, "distiller.kd_weight: unknown key"),
        ({"name": "lgd", "views": ["egde"]}, "distiller.views: egde not among the views"),
        ({"name": "lgd", "bank_prompts": ["a cat"]}, "distiller.bank_prompts: the prompt 'a cat' must contain"),
        ({"name": "lgd", "bank_prompts": []}, "distiller.bank_prompts: give at least one prompt"),
        ({"name": "seed", "queue_size": 0}, "distiller.queue_size: must be at least 1 (given: 0)"),
        ({"name": "embedding", "loss": "l1"}, "distiller.loss: expected 'mse' or 'cosine' (given: \"l1\")"),
        (
            "ldg",
            "distiller.name: expected 'alone', 'embedding', 'kd', 'lgd', 'seed' or 'tmkd' (given: \"ldg\")",
        ),
    ],
)
def test_errors_say_where_and_what(distiller: Any, error: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of(distiller=distiller)
    assert error in str(caught.value)


def test_without_a_text_teacher_there_is_nothing_to_learn() -> None:
    with pytest.raises(ConfigError, match=r"teacher\.text: null, but distiller needs a text teacher"):
        config_of(distiller="lgd", teacher={"text": None})


def test_mixed_images_and_dot_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"training\.mixup: mixes the images"):
        config_of(distiller="lgd", training={"mixup": 0.2})
    with pytest.raises(ConfigError, match=r"training\.optimizer: dot needs"):
        config_of(distiller="lgd", training={"optimizer": "dot"})


def test_a_config_stays_itself() -> None:
    for name in ("lgd", "tmkd"):
        config = resolve_objective(name)
        assert resolve_objective(config) is config


def test_bank_classes(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_text("\ufeffgolden retriever\n\n  tench \nfünf\n", encoding="utf-8")
    assert read_bank_classes(str(path)) == ("golden retriever", "tench", "fünf")


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"cat\ndog\ncat\n", "names more than once: cat"),
        (b"cat\n", "has 1 class names"),
        (b"\xff\xfe", "cannot"),
    ],
)
def test_bank_classes_that_are_none(tmp_path: Path, content: bytes, error: str) -> None:
    path = tmp_path / "names.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"bank_classes: .*{error}"):
        read_bank_classes(str(path))


def test_a_missing_file_of_class_names_is_named_before_anything_starts(tmp_path: Path) -> None:
    from tmkd_ray.stages.experiment import check_text_teacher, open_experiment

    missing = tmp_path / "none.txt"
    methods = {"far": {"name": "lgd", "bank_classes": str(missing)}}
    experiment = open_experiment(config_of(methods=methods, output=str(tmp_path)))
    with pytest.raises(UserError, match=r"methods\.far\.bank_classes: cannot read .*none\.txt"):
        check_text_teacher(experiment)


def test_the_published_recipe() -> None:
    """LGD's: SGD at 0.03 × batch / 256, momentum 0.9, decay 1e-4, 5 of 200 epochs warm-up, cosine, MoCo v2."""
    configs = Path(__file__).parents[2] / "pipelines" / "configs" / "pretraining"
    config = read_config(configs / "lgd_cifar100_resnet18.yaml", ["dataset.path=/data"])
    training = config.training
    assert (training.optimizer, training.momentum, training.weight_decay) == ("sgd", 0.9, 1e-4)
    assert training.learning_rate == pytest.approx(0.03 * training.batch_size / 256)
    assert (training.epochs, training.warmup_epochs, training.schedule) == (200, 5, "cosine")
    assert config.augmentation.recipe == "moco_v2"
    assert config.student.model == "torchvision/resnet18"
    assert config.methods["lgd"] == LGDConfig()
    assert (LGDConfig().alpha, LGDConfig().momentum) == (0.5, 0.999)
    assert (LGDConfig().teacher_temperature, LGDConfig().student_temperature) == (0.01, 0.2)
