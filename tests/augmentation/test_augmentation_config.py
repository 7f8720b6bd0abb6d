"""The configuration of augmentation."""

from typing import Any

import pytest
from augmentation_samples import CIFAR, IMAGENET, MOCO, RECIPES
from pydantic import ValidationError

from tmkd_ray.augmentation import AugmentationConfig
from tmkd_ray.settings import explain


def test_each_recipe_has_its_own_values() -> None:
    def given(config: AugmentationConfig) -> dict[str, Any]:
        return config.model_dump(exclude_none=True)

    jitter = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "probability": 0.8}
    assert given(AugmentationConfig(recipe="none")) == {"recipe": "none"}
    assert given(CIFAR) == {"recipe": "cifar", "padding": 4, "flip": True}
    assert given(IMAGENET) == {"recipe": "imagenet", "flip": True, "min_scale": 0.08}
    assert given(MOCO) == {
        "recipe": "moco_v2",
        "flip": True,
        "min_scale": 0.2,
        "color_jitter": jitter,
        "grayscale_probability": 0.2,
        "blur_probability": 0.5,
    }
    switched_on = AugmentationConfig.model_validate({"recipe": "imagenet", "color_jitter": {}})
    assert given(switched_on)["color_jitter"] == jitter
    assert given(AugmentationConfig.model_validate({"recipe": "cifar", "padding": 2, "flip": False})) == {
        "recipe": "cifar",
        "padding": 2,
        "flip": False,
    }


@pytest.mark.parametrize("config", [*RECIPES.values(), AugmentationConfig(recipe="none")])
def test_a_saved_config_can_be_read_again(config: AugmentationConfig) -> None:
    assert AugmentationConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("recipe", "field", "value"),
    [
        ("none", "padding", 4),
        ("none", "flip", False),
        ("none", "color_jitter", {}),
        ("cifar", "min_scale", 0.2),
        ("cifar", "color_jitter", {}),
        ("cifar", "grayscale_probability", 0.0),
        ("imagenet", "padding", 0),
        ("imagenet", "grayscale_probability", 0.2),
        ("imagenet", "blur_probability", 0.5),
        ("moco_v2", "padding", 4),
    ],
)
def test_a_field_that_the_recipe_does_not_use(recipe: str, field: str, value: Any) -> None:
    with pytest.raises(ValidationError) as refusal:
        AugmentationConfig.model_validate({"recipe": recipe, field: value})
    ((path, text),) = explain(refusal.value, AugmentationConfig)
    assert path == (field,)
    assert f"the recipe '{recipe}' does not use it; leave it out" in text
    assert AugmentationConfig.model_validate({"recipe": recipe, field: None}).recipe == recipe


def test_all_that_is_wrong_is_said_at_once() -> None:
    wrong = {"recipe": "imagenet", "padding": 4, "color_jitter": {"hue": 0.7, "tint": 1}, "min_scal": 0.1}
    with pytest.raises(ValidationError) as refusal:
        AugmentationConfig.model_validate(wrong)
    paths = {path for path, _ in explain(refusal.value, AugmentationConfig)}
    assert paths == {("padding",), ("color_jitter", "hue"), ("color_jitter", "tint"), ("min_scal",)}


@pytest.mark.parametrize(
    ("field", "option"),
    [
        ("padding", {"padding": -1}),
        ("padding", {"padding": 33}),
        ("padding", {"padding": True}),
        ("recipe", {"recipe": "moco"}),
        ("flip", {"flip": "maybe"}),
        ("min_scale", {"recipe": "imagenet", "min_scale": 0.0}),
        ("min_scale", {"recipe": "imagenet", "min_scale": 1.1}),
        ("min_scale", {"recipe": "imagenet", "min_scale": float("nan")}),
        ("grayscale_probability", {"recipe": "moco_v2", "grayscale_probability": 1.5}),
        ("blur_probability", {"recipe": "moco_v2", "blur_probability": -0.1}),
        ("color_jitter.brightness", {"recipe": "moco_v2", "color_jitter": {"brightness": 1.5}}),
        ("color_jitter.contrast", {"recipe": "moco_v2", "color_jitter": {"contrast": -0.1}}),
        ("color_jitter.saturation", {"recipe": "moco_v2", "color_jitter": {"saturation": "much"}}),
        ("color_jitter.hue", {"recipe": "moco_v2", "color_jitter": {"hue": 0.6}}),
        ("color_jitter.probability", {"recipe": "moco_v2", "color_jitter": {"probability": 2}}),
    ],
)
def test_options_out_of_range(field: str, option: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as refusal:
        AugmentationConfig.model_validate(option)
    assert [".".join(path) for path, _ in explain(refusal.value, AugmentationConfig)] == [field]
