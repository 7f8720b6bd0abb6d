"""The configuration tree: what it accepts, refuses, and defaults to."""

import json
import math

import pytest
from pydantic import ValidationError

from tmkd_ray.config import (
    DEFAULT_VIEWS,
    ClipTrainingConfig,
    ExperimentConfig,
    PoolConfig,
    TrainingConfig,
    VisualTeacherConfig,
)
from tmkd_ray.config_reading import resolve
from tmkd_ray.datasets import DATASETS
from tmkd_ray.distillers import STRATEGIES
from tmkd_ray.errors import ConfigError
from tmkd_ray.views import VIEWS


def config_of(**sections):
    return resolve({"dataset": "digits", **sections}, "a test")


def problems(**sections):
    """The lines of the error that these sections give, by path."""
    with pytest.raises(ConfigError) as raised:
        config_of(**sections)
    first, *lines = str(raised.value).splitlines()
    count = "1 error" if len(lines) == 1 else f"{len(lines)} errors"
    assert first == f"{count} in the configuration from a test:"
    assert all(line.startswith("  ") for line in lines)
    return [line.strip() for line in lines]


def test_a_dataset_is_all_that_must_be_given():
    config = config_of()
    assert config.dataset == DATASETS.get("digits").Config()
    assert tuple(config.views) == DEFAULT_VIEWS
    assert all(config.views[name] == VIEWS.get(name).Config() for name in DEFAULT_VIEWS)
    assert config.distiller.name == "tmkd"
    assert problems(dataset=None) == ["dataset: expected a name, or a mapping with `name` (given: null)"]
    with pytest.raises(ConfigError, match="dataset: required, but not given"):
        resolve({}, "a test")


def test_polymorphic_sections_have_the_class_that_their_name_chooses():
    config = config_of(
        dataset={"name": "image_folder", "path": "/x", "test_fraction": 0.5},
        views={"edge": {"strength": 0.5}, "original": {}},
        distiller={"name": "kd", "strategy": {"name": "dkd", "non_target_weight": 2}},
        methods={"a": {"strategy": "feature_mse"}, "b": "alone"},
    )
    assert type(config.dataset) is DATASETS.get("image_folder").Config
    assert list(config.views) == ["edge", "original"]
    assert type(config.views["edge"]) is VIEWS.get("edge").Config
    assert type(config.distiller.strategy) is STRATEGIES.get("dkd").Config
    assert type(config.methods["a"].strategy) is STRATEGIES.get("feature_mse").Config
    dumped = config.model_dump(mode="json")
    assert dumped["dataset"]["test_fraction"] == 0.5
    assert dumped["views"]["edge"]["strength"] == 0.5
    assert dumped["distiller"]["strategy"]["non_target_weight"] == 2


def test_unknown_keys_anywhere_are_all_told_at_once():
    found = problems(
        dataset={"name": "digits", "imagesize": 3},
        views={"edge": {"strenght": 0.2}, "original": {}},
        teacher={"text": {"modl": "x", "architecture": {"patchsize": 3}, "fit": {"epoch": 3}}, "visul": {}},
        knowledge={"visual": {"batchsize": 3}, "views": {"maxsize": 3}},
        distiller={"strategy": {"name": "kd", "temprature": 3}},
        methods={
            "a": {"name": "kd", "kd_wieght": 3, "strategy": {"name": "dkd", "temperatur": 3}},
            "b": "alone",
        },
        trainin={},
        augmentation={"recip": "cifar"},
        cluster={"adress": "auto"},
    )
    assert set(found) == {
        "dataset.imagesize: unknown key; did you mean 'image_size'?",
        "views.edge.strenght: unknown key; did you mean 'strength'?",
        "teacher.text.modl: unknown key; did you mean 'model'?",
        "teacher.text.architecture.patchsize: unknown key; did you mean 'patch_size'?",
        "teacher.text.fit.epoch: unknown key; did you mean 'epochs'?",
        "teacher.visul: unknown key; did you mean 'visual'?",
        "knowledge.visual.batchsize: unknown key; did you mean 'batch_size'?",
        "knowledge.views.maxsize: unknown key; did you mean 'max_size'?",
        "distiller.strategy.temprature: unknown key; did you mean 'temperature'?",
        "methods.a.kd_wieght: unknown key; did you mean 'kd_weight'?",
        "methods.a.strategy.temperatur: unknown key; did you mean 'temperature'?",
        "trainin: unknown key; did you mean 'training'?",
        "augmentation.recip: unknown key; did you mean 'recipe'?",
        "cluster.adress: unknown key; did you mean 'address'?",
    }
    assert len(found) == 14


def test_a_key_like_no_other_lists_the_valid_ones():
    assert problems(student={"zzz": 1}) == ["student.zzz: unknown key; valid keys: model"]
    assert problems(teacher={"zzz": 1}) == ["teacher.zzz: unknown key; valid keys: text, visual"]


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"training": {"epochs": True}}, "training.epochs: expected a number (given: true)"),
        ({"training": {"epochs": 0}}, "training.epochs: must be at least 1 (given: 0)"),
        ({"training": {"epochs": 2.5}}, "training.epochs: expected a whole number (given: 2.5)"),
        ({"training": {"learning_rate": 0}}, "training.learning_rate: must be above 0 (given: 0)"),
        (
            {"training": {"learning_rate": math.nan}},
            "training.learning_rate: expected a finite number (given: nan)",
        ),
        (
            {"training": {"weight_decay": math.inf}},
            "training.weight_decay: expected a finite number (given: inf)",
        ),
        ({"training": {"momentum": 1}}, "training.momentum: must be below 1 (given: 1)"),
        ({"training": {"nesterov": True, "momentum": 0}}, "training.nesterov: needs a momentum above zero"),
        (
            {"training": {"optimizer": "adam"}},
            "training.optimizer: expected 'sgd', 'adamw' or 'dot' (given: \"adam\")",
        ),
        ({"training": {"milestones": [True]}}, "training.milestones: expected a number (given: true)"),
        (
            {"training": {"milestones": [0.5, 150]}},
            "training.milestones: are parts of the training, between 0 and 1",
        ),
        ({"training": {"seed": 2**32}}, "training.seed: must be below 4294967296 (given: 4294967296)"),
        ({"training": 7}, "training: expected a mapping (given: 7)"),
        (
            {"training": {"batch_size": 50, "num_workers": 3}},
            "training.batch_size: 50 is not divisible by num_workers 3",
        ),
        (
            {"training": {"epochs": 5, "warmup_epochs": 5}},
            "training.warmup_epochs: 5 leaves nothing of the 5 epochs",
        ),
        (
            {"teacher": {"text": {"fit": {"epochs": 2, "warmup_epochs": 2.5}}}},
            "teacher.text.fit.warmup_epochs: 2.5 leaves nothing of the 2 epochs",
        ),
        (
            {"teacher": {"text": {"fit": {"labels_per_class": 5}}}},
            "teacher.text.fit.labels_per_class: only students are trained on few labels; leave it null",
        ),
        (
            {"teacher": {"visual": {"fit": {"labels_per_class": 5}}}},
            "teacher.visual.fit.labels_per_class: only students are trained on few labels; leave it null",
        ),
        ({"teacher": {"visual": {"mean": [0.1, 0.2]}}}, "teacher.visual.mean: has too few values"),
        (
            {"teacher": {"visual": {"std": [0.1, 0, 0.2]}}},
            "teacher.visual.std: a standard deviation is above zero",
        ),
        ({"dataset": {"name": "digits", "std": [0, 1, 1]}}, "dataset.std: a standard deviation is above zero"),
        (
            {"dataset": {"name": "digits", "mean": [0, math.nan, 1]}},
            "dataset.mean.1: expected a finite number (given: nan)",
        ),
        (
            {"dataset": {"name": "digits", "validation_fraction": 1}},
            "dataset.validation_fraction: must be below 1 (given: 1)",
        ),
        ({"dataset": {"name": "parquet"}}, "dataset.path: required, but not given"),
        (
            {"dataset": {"path": "/x"}},
            "dataset: `name` is missing. Choices: cifar10, cifar100, digits, image_folder, parquet",
        ),
        (
            {"teacher": {"text": {"architecture": {"vision_width": 48}}}},
            "teacher.text.architecture.vision_width: 48 is not a multiple of head_width 32",
        ),
        (
            {"teacher": {"text": {"architecture": {"patch_size": 5}}}},
            "teacher.text.architecture.patch_size: the image size, 32, is not a multiple of 5",
        ),
        (
            {"teacher": {"text": {"architecture": {"patch_size": 5, "image_size": 24}}}},
            "teacher.text.architecture.patch_size: the image size, 24, is not a multiple of 5",
        ),
        (
            {"knowledge": {"visual": {"min_size": 3, "max_size": 2}}},
            "knowledge.visual.max_size: 2 is below min_size 3",
        ),
        ({"knowledge": {"views": {"min_size": 5}}}, "knowledge.views.max_size: 2 is below min_size 5"),
        ({"knowledge": {"text": {"num_gpus": -1}}}, "knowledge.text.num_gpus: must be at least 0 (given: -1)"),
        (
            {"knowledge": {"views": {"num_cpus": math.inf}}},
            "knowledge.views.num_cpus: expected a finite number (given: inf)",
        ),
        ({"seeds": []}, "seeds: give at least one seed, each once"),
        ({"seeds": [1, 2, 1]}, "seeds: give at least one seed, each once"),
        ({"seeds": [1, -2]}, "seeds.1: must be at least 0 (given: -2)"),
        ({"seeds": [0, True]}, "seeds: expected a number (given: true)"),
        ({"seeds": 3}, "seeds: expected a list (given: 3)"),
        ({"views": []}, "views: at least one view is needed"),
        ({"views": {"edge": None}}, "views: at least one view is needed"),
        ({"views": ["edge", "edge"]}, "views: given twice: edge"),
        ({"views": 3}, "views: expected a list of names, or names with options (given: 3)"),
        ({"views": {"edge": {"kernel_size": True}}}, "views.edge.kernel_size: expected a number (given: true)"),
        (
            {"views": {"edge": {"prompts": []}}},
            "views.edge.prompts: give at least one prompt, such as 'a photo of a {}.'",
        ),
        ({"methods": ["kd"]}, "methods: expected a mapping (given: a list)"),
        ({"methods": {"a": None}}, "methods.a: expected a mapping (given: null)"),
        (
            {"methods": {"a": "tmdk"}},
            "methods.a.name: expected 'alone', 'embedding', 'kd', 'lgd', 'seed' or 'tmkd' (given: \"tmdk\")",
        ),
        ({"methods": {"a": {"kd_weight": -1}}}, "methods.a.kd_weight: must be at least 0 (given: -1)"),
        (
            {"methods": {"a": {"name": "alone", "kd_weight": 1}}},
            "methods.a: teacher is none, but kd_weight is above zero",
        ),
        (
            {"methods": {"a": {"strategy": {"temperature": 0}}}},
            "methods.a.strategy.temperature: must be above 0 (given: 0)",
        ),
        (
            {"methods": {"a": {"strategy": "osmosis"}}},
            "methods.a.strategy: unknown distillation strategy 'osmosis'. "
            f"Choices: {', '.join(STRATEGIES.names())}",
        ),
        ({"name": 3}, "name: expected text (given: 3); write it in quotes"),
        (
            {"distiller": {"views": ["hue"]}},
            "distiller.views: hue not among the views of this config (original, edge, high_frequency)",
        ),
        ({"distiller": {"views": []}}, "distiller.views: give at least one view, each once; null for all"),
        (
            {"distiller": {"views": ["edge", "edge"]}},
            "distiller.views: give at least one view, each once; null for all",
        ),
    ],
)
def test_one_mistake_one_line(sections, expected):
    assert problems(**sections) == [expected]


@pytest.mark.parametrize("name", ["", ".", "..", "../up", "a/b", "a b", "-a", "ä", "a\n", "a:b"])
def test_names_that_become_folders_cannot_lead_elsewhere(name):
    (line,) = problems(name=name)
    assert line.startswith(f"name: {name!r} cannot name a folder")
    with pytest.raises(ConfigError) as raised:
        config_of(methods={"kd": "kd", name: "alone"})
    assert f"  methods.{name}: {name!r} cannot name a folder" in str(raised.value)


def test_names_that_become_folders():
    config = config_of(name="A-1_b.c", methods={"kd_t.5": "kd", "7": "alone"})
    assert config.name == "A-1_b.c"
    assert list(config.methods) == ["kd_t.5", "7"]


@pytest.mark.parametrize("path", ["student.model", "teacher.visual.model"])
def test_an_unknown_model_comes_with_the_nearest(path):
    first, *rest, last = path.split(".")
    section = {last: "resnt8"}
    for key in rest:
        section = {key: section}
    (line,) = problems(**{first: section})
    assert line.startswith(f"{path}: unknown model 'resnt8'. Did you mean 'resnet8'? Choices: ")


def test_an_unknown_torchvision_model_comes_with_the_nearest():
    (line,) = problems(student={"model": "torchvision/resnet19"})
    assert line.startswith("student.model: unknown torchvision model 'resnet19'. Did you mean 'resnet18'?")


def test_several_mistakes_in_one_training_are_told_together():
    found = problems(training={"batch_size": 5, "epochs": 2, "warmup_epochs": 3, "milestones": [7]})
    assert [line.split(":")[0] for line in found] == [
        "training.batch_size",
        "training.warmup_epochs",
        "training.milestones",
    ]


def test_mistakes_of_every_kind_are_told_together():
    found = problems(
        dataset="digit",
        training={"batch_size": 5},
        views={"edge": {"strength": 3}, "hue": {}},
        seeds=[1, 1],
        student={"model": "resnt8"},
        methods={"a": "b", "c/d": "kd"},
        nme="x",
    )
    assert sorted(line.split(":")[0] for line in found) == [
        "dataset",
        "methods.a.name",
        "methods.c/d",
        "nme",
        "seeds",
        "student.model",
        "training.batch_size",
        "views.edge.strength",
        "views.hue",
    ]


def test_methods_that_need_clip_without_a_text_teacher():
    assert problems(teacher={"text": None}) == [
        "teacher.text: null, but distiller needs a text teacher; have one, or choose another method"
    ]
    methods = {
        "alone": "alone",
        "kd": "kd",
        "tmkd": "tmkd",
        "contrast": {"name": "kd", "contrastive_weight": 0.1},
        "text": {"name": "kd", "text_weight": 0.1},
        "fused": {"name": "kd", "teacher": "fused"},
        "uniform": {"name": "kd", "teacher": "fused", "weighting": "uniform"},
    }
    found = problems(teacher={"text": None}, methods=methods)
    assert [line.split("but ")[1].split(" ")[0] for line in found] == [
        "methods.tmkd",
        "methods.contrast",
        "methods.text",
        "methods.fused",
    ]
    for name in ("tmkd", "contrast", "text", "fused"):
        del methods[name]
    config = config_of(teacher={"text": None}, methods=methods)
    assert config.teacher.text is None
    assert config_of(teacher={"text": None}, distiller="kd").named_methods()["kd"].teacher == "plain"


def test_views_of_a_method_must_be_among_those_of_the_config():
    assert problems(
        views=["original", "edge"],
        distiller={"views": ["high_frequency"]},
        methods={"a": {"views": ["original", "high_frequency", "hue"]}, "b": {"views": ["edge"]}},
    ) == [
        "distiller.views: high_frequency not among the views of this config (original, edge)",
        "methods.a.views: high_frequency, hue not among the views of this config (original, edge)",
    ]


def test_taught_views():
    config = config_of(views=["edge", "original"], methods={"plain": "kd", "some": {"views": ["original"]}})
    assert config.taught_views(config.distiller) == ("edge", "original")
    assert config.taught_views(config.methods["plain"]) == ("edge",)
    assert config.taught_views(config.methods["some"]) == ("original",)


def test_named_methods():
    assert list(config_of(distiller="kd").named_methods()) == ["kd"]
    config = config_of(distiller="kd", methods={"b": "tmkd", "a": "alone"})
    assert list(config.named_methods()) == ["b", "a"]


def test_a_part_of_a_section_leaves_the_rest_at_its_defaults():
    whole = config_of()
    part = config_of(
        teacher={"text": {"fit": {"epochs": 7}}},
        knowledge={"views": {"num_cpus": 2}, "visual": {"batch_size": 8}},
    )
    assert part.teacher.text is not None
    assert whole.teacher.text is not None
    # CLIP has defaults of its own: they must not give way to the student's when one of them is set.
    assert part.teacher.text.fit == whole.teacher.text.fit.model_copy(update={"epochs": 7})
    assert part.teacher.text.fit.optimizer == "adamw"
    assert part.knowledge.views == whole.knowledge.views.model_copy(update={"num_cpus": 2})
    assert part.knowledge.views.max_size == 2
    assert part.knowledge.visual == whole.knowledge.visual.model_copy(update={"batch_size": 8})


def test_clip_is_fitted_by_other_defaults_only():
    assert set(ClipTrainingConfig.model_fields) == set(TrainingConfig.model_fields)


def test_frozen_at_every_depth():
    config = config_of(methods={"a": "kd"})
    for section, key in (
        (config, "name"),
        (config.dataset, "limit"),
        (config.views["edge"], "strength"),
        (config.teacher.visual.fit, "epochs"),
        (config.methods["a"], "kd_weight"),
        (config.methods["a"].strategy, "temperature"),
        (config.knowledge.visual, "batch_size"),
    ):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, key, 1)


def test_json_round_trip():
    config = config_of(
        dataset={"name": "parquet", "path": "/x", "limit": 5, "class_names": "names.txt"},
        views={"edge": {"strength": 0.5}, "original": {"prompts": ["ein Bild, {}"]}},
        teacher={"visual": {"mean": [0.1, 0.2, 0.3]}, "text": {"model": "somebody/clip"}},
        distiller={"fusion_temperature": math.inf, "strategy": {"name": "dkd", "temperature": 2}},
        methods={"a": {"name": "kd", "strategy": "feature_mse"}, "b": "alone"},
        seeds=[3, 1],
    )
    assert ExperimentConfig.model_validate_json(config.model_dump_json()) == config
    assert ExperimentConfig.model_validate(config.model_dump(mode="json")) == config
    through_json = json.loads(json.dumps(config.model_dump(mode="json")))
    assert ExperimentConfig.model_validate(through_json) == config
    assert ExperimentConfig.model_validate(config) == config


def test_sections_can_be_made_by_themselves():
    with pytest.raises(ValidationError, match="50 is not divisible"):
        TrainingConfig(batch_size=50, num_workers=4)
    with pytest.raises(ValidationError, match="1 is below min_size 2"):
        PoolConfig(min_size=2)
    assert VisualTeacherConfig(std=(0.1, 0.2, 0.3)).std == (0.1, 0.2, 0.3)
