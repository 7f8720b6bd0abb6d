"""What holds for every registered view with every choice of its options: a new file is tested at once."""

import itertools
import pickle
from typing import Any, Literal, get_args, get_origin

import numpy as np
import numpy.typing as npt
import pytest
from pydantic import ValidationError

from tmkd_ray.errors import UserError
from tmkd_ray.registry import UnknownNameError
from tmkd_ray.views import VIEWS, View, ViewConfig, build_view

Images = npt.NDArray[np.uint8]


def every_choice(name: str) -> list[dict[str, Any]]:
    """All combinations of the view's named options that its config accepts."""
    config = VIEWS.get(name).Config
    options = {
        field: get_args(info.annotation)
        for field, info in config.model_fields.items()
        if get_origin(info.annotation) is Literal
    }
    accepted = []
    for values in itertools.product(*options.values()):
        choice = dict(zip(options, values, strict=True))
        try:
            config(**choice)
        except ValidationError:
            continue
        accepted.append(choice)
    for field, values in options.items():
        assert {choice[field] for choice in accepted} == set(values), f"{name}.{field} has a useless option"
    return accepted


CASES = [
    pytest.param(name, choice, id="-".join([name, *map(str, choice.values())]))
    for name in VIEWS
    for choice in every_choice(name)
]
every_case = pytest.mark.parametrize(("name", "choice"), CASES)
every_view = pytest.mark.parametrize("name", VIEWS.names())


def test_the_three_views_of_the_method_are_registered() -> None:
    assert {"original", "edge", "high_frequency"} <= set(VIEWS)
    assert len(CASES) > 20


@every_case
def test_shape_type_and_determinism(
    name: str, choice: dict[str, Any], noise: Images, digits: Images, scenes: Images
) -> None:
    view = build_view(name, choice)
    for images in (noise, digits, scenes, noise[:0]):
        result = view(images)
        assert result.shape == images.shape
        assert result.dtype == np.uint8
        np.testing.assert_array_equal(view(images), result)
        np.testing.assert_array_equal(build_view(name, choice)(images), result)


@every_case
def test_pixels_do_not_depend_on_where_arrays_lie_in_memory(
    name: str, choice: dict[str, Any], noise: Images
) -> None:
    # Vector code treats the ends of an array by its alignment; some library routines round differently there.
    # Where two rows alternate, many gradients end in exactly half a level, and the last bit decides the pixel.
    view = build_view(name, choice)
    two_rows = np.tile(noise[:, :2, :, :1], (1, 7, 2, 3))
    for original in (noise, two_rows):
        expected = view(original)
        memory = np.empty(original.nbytes + 32, np.uint8)
        kept = []
        for offset in range(32):
            images = memory[offset : offset + original.nbytes].reshape(original.shape)
            images[...] = original
            np.testing.assert_array_equal(view(images), expected)
            kept.append(np.empty(16 * (offset % 5 + 1), np.uint8))  # the next arrays will lie elsewhere


@every_case
def test_each_image_is_independent_of_its_batch(name: str, choice: dict[str, Any], noise: Images) -> None:
    view = build_view(name, choice)
    together = view(noise)
    for i in range(len(noise)):
        np.testing.assert_array_equal(view(noise[i : i + 1])[0], together[i])
    order = [3, 0, 0, 4, 1, 2]
    np.testing.assert_array_equal(view(noise[order]), together[order])


@every_case
def test_input_is_not_modified_and_any_memory_layout_is_read(
    name: str, choice: dict[str, Any], scenes: Images
) -> None:
    view = build_view(name, choice)
    images = scenes.copy()
    expected = view(images)
    np.testing.assert_array_equal(images, scenes)
    images.flags.writeable = False
    np.testing.assert_array_equal(view(images), expected)
    channels_first = np.ascontiguousarray(scenes.transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(view(channels_first.transpose(0, 2, 3, 1)), expected)
    mirrored = np.ascontiguousarray(scenes[:, :, ::-1])
    np.testing.assert_array_equal(view(mirrored[:, :, ::-1]), expected)
    np.testing.assert_array_equal(mirrored, scenes[:, :, ::-1])


@every_case
def test_pickling_keeps_config_and_pixels(name: str, choice: dict[str, Any], scenes: Images) -> None:
    view = build_view(name, choice)
    expected = view(scenes)
    copy = pickle.loads(pickle.dumps(view))
    assert copy.config == view.config
    np.testing.assert_array_equal(copy(scenes), expected)


@every_case
@pytest.mark.parametrize("size", [(1, 1), (1, 6), (5, 1), (2, 3), (37, 1)])
def test_tiny_images_work(name: str, choice: dict[str, Any], size: tuple[int, int]) -> None:
    images = np.random.default_rng(2).integers(0, 256, (3, *size, 3), dtype=np.uint8)
    view = build_view(name, choice)
    result = view(images)
    assert result.shape == images.shape
    np.testing.assert_array_equal(view(images[1:2])[0], result[1])


@every_view
@pytest.mark.parametrize(
    "images",
    [
        pytest.param(np.zeros((2, 4, 4, 3), np.float32), id="float32"),
        pytest.param(np.zeros((2, 4, 4), np.uint8), id="no channels"),
        pytest.param(np.zeros((4, 4, 3), np.uint8), id="no batch"),
        pytest.param(np.zeros((2, 3, 4, 4), np.uint8), id="channels first"),
        pytest.param(np.zeros((2, 4, 4, 4), np.uint8), id="RGBA"),
        pytest.param(np.zeros((2, 0, 4, 3), np.uint8), id="no rows"),
        pytest.param(np.zeros((2, 4, 0, 3), np.uint8), id="no columns"),
    ],
)
def test_other_arrays_are_refused(name: str, images: npt.NDArray[Any]) -> None:
    with pytest.raises(UserError, match=r"uint8 array \[batch, height, width, 3\]"):
        build_view(name, {})(images)


@every_view
def test_class_declares_config_and_version(name: str) -> None:
    view = VIEWS.get(name)
    assert issubclass(view, View)
    assert issubclass(view.Config, ViewConfig)
    assert isinstance(view.version, int)
    assert view.version >= 1
    assert view(view.Config()).config == view.Config()


@every_view
def test_default_prompts_are_several_and_the_views_own(name: str) -> None:
    prompts = VIEWS.get(name).Config().prompts
    assert len(set(prompts)) == len(prompts) >= 3
    for prompt in prompts:
        assert prompt.format("red fox") == prompt.replace("{}", "red fox")
        assert prompt.count("{}") == 1
    if name == "mirror":  # a mirrored photo is a photo, and shows no prior to be named
        assert prompts == VIEWS.get("original").Config().prompts
    for other in set(VIEWS) - {name} - ({"original", "mirror"} if name in ("original", "mirror") else set()):
        assert not set(prompts) & set(VIEWS.get(other).Config().prompts), f"{name} and {other} share a prompt"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("original", ("photo", "picture")),
        ("edge", ("edge", "contour", "outline")),
        ("high_frequency", ("texture", "detail")),
    ],
)
def test_prompts_name_the_prior(name: str, words: tuple[str, ...]) -> None:
    for prompt in VIEWS.get(name).Config().prompts:
        assert any(word in prompt for word in words), prompt


@every_view
@pytest.mark.parametrize(
    "prompts",
    [[], ["a photo"], ["a {} and a {}"], ["a {0}"], ["a {name}"], ["a {} {"], ["{} }"], ["a {}", "a {{}}"]],
    ids=str,
)
def test_bad_prompts_are_refused(name: str, prompts: list[str]) -> None:
    with pytest.raises(ValidationError, match="prompts"):
        VIEWS.get(name).Config(prompts=tuple(prompts))


@every_view
def test_unknown_fields_are_refused(name: str) -> None:
    with pytest.raises(ValidationError, match="no_such_field"):
        build_view(name, {"no_such_field": 1})


def test_build_view_takes_a_config_or_its_fields(scenes: Images) -> None:
    from_fields = build_view("edge", {"operator": "scharr", "prompts": ["the edges of a {}"]})
    from_config = build_view("edge", VIEWS.get("edge").Config(operator="scharr"))
    assert from_fields.config.prompts == ("the edges of a {}",)
    np.testing.assert_array_equal(from_fields(scenes), from_config(scenes))


def test_build_view_refuses_another_views_config() -> None:
    with pytest.raises(ValidationError):
        build_view("edge", VIEWS.get("high_frequency").Config())


def test_unknown_view_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"Did you mean 'high_frequency'"):
        build_view("high_frequencies", {})
