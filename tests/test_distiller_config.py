"""DistillerConfig: presets, strategies by name, weights and their schedules, and what it says it needs."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from teaching_samples import (
    LABELS,
    config_of,
    distiller_of,
    student_output,
    teacher_output,
)

from tmkd_ray.distillers import STRATEGIES
from tmkd_ray.distillers.dkd import DKDConfig
from tmkd_ray.distillers.kd import KDConfig
from tmkd_ray.objective import (
    DistillerConfig,
    WeightSchedule,
    weight_at,
)
from tmkd_ray.types import TeacherOutput

TERMS = ("ce", "kd", "feature", "text", "contrastive")
TAUGHT = TERMS[1:]


@pytest.mark.parametrize(
    ("name", "teacher", "terms"),
    [("alone", "none", {"ce"}), ("kd", "plain", {"ce", "kd"}), ("tmkd", "fused", set(TERMS))],
)
def test_presets(name: str, teacher: str, terms: set[str]) -> None:
    config = DistillerConfig.model_validate(name)
    assert config.name == name
    assert config.teacher == teacher
    assert {term for term in TERMS if getattr(config, f"{term}_weight")} == terms
    assert config.strategy == KDConfig()
    assert config == DistillerConfig.model_validate({"name": name})
    assert DistillerConfig.model_validate(config.model_dump()) == config
    assert DistillerConfig.model_validate_json(config.model_dump_json()) == config


def test_the_objective_is_tmkd_unless_told() -> None:
    assert DistillerConfig.model_validate({}) == DistillerConfig.model_validate("tmkd")
    assert DistillerConfig.model_validate("alone").ce_weight == 1.0


def test_a_field_that_is_set_leaves_the_rest_of_the_preset() -> None:
    preset = DistillerConfig.model_validate("kd")
    config = DistillerConfig.model_validate({"name": "kd", "ce_weight": 0.5, "teacher": "fused"})
    assert (config.ce_weight, config.teacher) == (0.5, "fused")
    assert config.model_dump(exclude={"ce_weight", "teacher"}) == preset.model_dump(
        exclude={"ce_weight", "teacher"}
    )


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("dkd", DKDConfig()),
        ({"name": "dkd", "non_target_weight": 2}, DKDConfig(non_target_weight=2)),
        ({"temperature": 2}, KDConfig(temperature=2)),
        (DKDConfig(temperature=3), DKDConfig(temperature=3)),
    ],
)
def test_the_strategy_is_a_name_with_options(given: Any, expected: Any) -> None:
    config = DistillerConfig.model_validate({"name": "kd", "strategy": given})
    assert config.strategy == expected
    assert DistillerConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize("term", TAUGHT)
def test_without_a_teacher_nothing_can_be_taught(term: str) -> None:
    with pytest.raises(ValidationError, match=f"teacher is none, but {term}_weight is above zero"):
        DistillerConfig.model_validate({"name": "alone", f"{term}_weight": 0.1})


def test_every_term_that_wants_a_teacher_is_named() -> None:
    with pytest.raises(ValidationError, match="kd_weight, feature_weight, text_weight, contrastive_weight"):
        DistillerConfig.model_validate({"name": "tmkd", "teacher": "none"})


@pytest.mark.parametrize("teacher", ["none", "plain", "fused"])
def test_all_weights_zero_is_refused(teacher: str) -> None:
    with pytest.raises(ValidationError, match="every loss weight is zero"):
        config_of(teacher=teacher)


@pytest.mark.parametrize("term", TERMS)
def test_one_term_is_enough(term: str) -> None:
    teacher = "none" if term == "ce" else "plain"
    assert config_of(teacher=teacher, **{f"{term}_weight": 2.0}).teacher == teacher


def test_an_unknown_strategy_lists_the_choices() -> None:
    with pytest.raises(ValidationError, match=r"unknown distillation strategy 'kdd'.*Did you mean 'k.*dkd.*kd"):
        DistillerConfig.model_validate({"name": "kd", "strategy": "kdd"})


@pytest.mark.parametrize("option", [{"name": "kd", "heat": 4}, {"name": "kd", "temperature": -1}])
def test_wrong_options_of_the_strategy_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=list(option)[1]):
        DistillerConfig.model_validate({"name": "kd", "strategy": option})


@pytest.mark.parametrize(
    "option",
    [{f"{term}_weight": -0.1} for term in TERMS]
    + [{f"{term}_weight": True} for term in TERMS]
    + [{name: 0} for name in ("fusion_temperature", "clip_temperature", "text_temperature")]
    + [{"contrastive_temperature": 0}, {"contrastive_mode": "none"}, {"weighting": "best"}]
    + [{"name": "crd"}, {"teacher": "both"}, {"kd_wieght": 1}],
    ids=str,
)
def test_values_out_of_range_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(option))):
        DistillerConfig.model_validate(option)


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        ({"ce_weight": 1}, set()),
        ({"kd_weight": 1}, {"logits"}),
        ({"kd_weight": 1, "strategy": "feature_mse"}, {"feature"}),
        ({"feature_weight": 1}, {"feature"}),
        ({"text_weight": 1}, {"text_logits"}),
        ({"contrastive_weight": 1, "contrastive_mode": "class"}, {"text_bank"}),
        ({"contrastive_weight": 1, "contrastive_mode": "instance"}, {"clip_embedding"}),
        ({"contrastive_weight": 1, "contrastive_mode": "both"}, {"clip_embedding", "text_bank"}),
        ({"ce_weight": 1, "kd_weight": 1, "text_weight": 1}, {"logits", "text_logits"}),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else " ".join(sorted(value)),
)
def test_requires_is_what_is_read_and_the_rest_may_be_missing(
    options: dict[str, Any], fields: set[str]
) -> None:
    distiller = distiller_of(**options)
    assert distiller.config.requires == fields
    whole = distiller(student_output(), teacher_output(), LABELS)
    kept = fields | {"view_weights"}  # every teacher has weights, if only of one view
    bare = TeacherOutput(**{k: v if k in kept else None for k, v in vars(teacher_output()).items()})
    assert torch.equal(distiller(student_output(), bare, LABELS).loss, whole.loss)
    for field in fields:
        without = TeacherOutput(**{k: None if k == field else v for k, v in vars(teacher_output()).items()})
        with pytest.raises((AssertionError, AttributeError, TypeError)):
            distiller(student_output(), without, LABELS)


@pytest.mark.parametrize(
    ("options", "needed"),
    [
        ("alone", False),
        ("kd", False),
        ("tmkd", True),
        ({"name": "kd", "teacher": "fused"}, True),
        ({"name": "kd", "teacher": "fused", "weighting": "uniform"}, False),
        ({"name": "kd", "text_weight": 1}, True),
        ({"name": "kd", "contrastive_weight": 1, "contrastive_mode": "class"}, True),
        ({"name": "kd", "contrastive_weight": 1, "contrastive_mode": "instance"}, True),
        ({"name": "kd", "feature_weight": 1}, False),
        ({"name": "tmkd", "weighting": "uniform"}, True),
    ],
    ids=str,
)
def test_needs_text_teacher(options: Any, needed: bool) -> None:
    assert DistillerConfig.model_validate(options).needs_text_teacher is needed


SCHEDULE = {"start": 0.5, "end": 2.5, "epochs": 20}


@pytest.mark.parametrize("term", TERMS)
def test_a_weight_may_be_a_schedule(term: str) -> None:
    config = config_of(**{"ce_weight": 1.0, f"{term}_weight": SCHEDULE})
    weight = getattr(config, f"{term}_weight")
    assert weight == WeightSchedule(start=0.5, end=2.5, epochs=20)
    assert [weight.at(epoch) for epoch in (0, 5, 10, 20, 21, 240)] == [0.5, 1.0, 1.5, 2.5, 2.5, 2.5]
    assert weight.at(0.1) == pytest.approx(0.51)
    assert weight_at(weight, 10) == 1.5
    assert weight_at(3.0, 10) == 3.0
    assert DistillerConfig.model_validate(config.model_dump()) == config
    assert DistillerConfig.model_validate(config.model_dump(mode="json")) == config
    assert DistillerConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("weight", "text"),
    [
        (-1, "must be at least 0 \\(given: -1\\)"),
        (float("nan"), "must be at least 0 \\(given: nan\\)"),
        ("much", 'expected a number, or start, end and epochs \\(given: "much"\\)'),
        (None, "expected a number, or start, end and epochs \\(given: null\\)"),
        ([1], "expected a number, or start, end and epochs \\(given: a list\\)"),
        ({**SCHEDULE, "end": -1}, "end: must be at least 0 \\(given: -1\\)"),
        ({**SCHEDULE, "epochs": 0}, "epochs: must be above 0 \\(given: 0\\)"),
        ({**SCHEDULE, "epoch": 3}, "epoch: unknown key; did you mean 'epochs'"),
        ({"start": 0, "epochs": 3}, "end: required, but not given"),
        ({**SCHEDULE, "start": True}, "start: expected a number"),
    ],
    ids=str,
)
def test_what_is_no_weight_is_told_once_and_where(weight: Any, text: str) -> None:
    with pytest.raises(ValidationError, match=text) as caught:
        DistillerConfig.model_validate({"name": "kd", "kd_weight": weight})
    assert [error["loc"] for error in caught.value.errors()] == [("kd_weight",)]


@pytest.mark.parametrize("schedule", [{"start": 0, "end": 1}, {"start": 1, "end": 0}], ids=str)
def test_a_term_is_in_use_if_either_end_is_above_zero(schedule: dict[str, float]) -> None:
    weight = {**schedule, "epochs": 3}
    assert config_of(kd_weight=weight, strategy="feature_mse").requires == {"feature"}
    assert config_of(kd_weight=weight, strategy="at").needs_online
    assert config_of(teacher="plain", text_weight=weight).needs_text_teacher
    for term in ("ce", "kd", "text"):
        assert config_of(**{"feature_weight": 1.0, f"{term}_weight": weight}).trains_classifier
    with pytest.raises(ValidationError, match="teacher is none, but feature_weight is above zero"):
        config_of(teacher="none", ce_weight=1.0, feature_weight=weight)


def test_a_schedule_that_stays_zero_is_no_term() -> None:
    never = {"start": 0, "end": 0, "epochs": 3}
    config = config_of(ce_weight=1.0, kd_weight=never, strategy="at")
    assert not config.needs_online
    assert config.requires == frozenset()
    with pytest.raises(ValidationError, match="every loss weight is zero"):
        config_of(kd_weight=never)


@pytest.mark.parametrize("strategy", STRATEGIES.names())
def test_the_classifier_is_trained_by_what_reads_the_logits(strategy: str) -> None:
    by_strategy = STRATEGIES.get(strategy).trains_classifier
    assert config_of(kd_weight=1, strategy=strategy).trains_classifier == by_strategy
    assert by_strategy == ("logits" in STRATEGIES.get(strategy).requires or strategy == "tf_kd")
    assert config_of(kd_weight=1, ce_weight=1, strategy=strategy).trains_classifier
    assert not config_of(feature_weight=1, strategy=strategy).trains_classifier


@pytest.mark.parametrize(
    ("options", "mixes"),
    [
        ({"ce_weight": 1}, False),
        ({"kd_weight": 1}, False),
        ({"ce_weight": 1, "kd_weight": 1}, True),
        ({"ce_weight": SCHEDULE, "contrastive_weight": SCHEDULE}, True),
    ],
    ids=str,
)
def test_mixes_task_and_distillation(options: dict[str, Any], mixes: bool) -> None:
    assert config_of(**options).mixes_task_and_distillation is mixes
