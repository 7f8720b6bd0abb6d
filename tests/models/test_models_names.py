"""Names of models: which there are, and what a wrong one is told."""

import subprocess
import sys

import pytest

from tmkd_ray.errors import UserError
from tmkd_ray.models import MODELS, build_model, check_model_name, model_names
from tmkd_ray.registry import UnknownNameError
from tmkd_ray.types import TaskSpec


def test_every_name_is_known() -> None:
    names = model_names()
    assert {"resnet8x4", "torchvision/resnet18"} <= set(names)
    assert set(MODELS) <= set(names)
    for name in names:
        check_model_name(name)


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("resnet8x5", "'resnet8x4'"),
        ("wrn_40-2", "'wrn_40_2'"),
        ("resnet50", "'ResNet50' or 'torchvision/resnet50'"),
        ("shufflev1", "'ShuffleV1'"),
        ("torchvision/resnet19", "'resnet1"),
        ("torchvison/resnet18", "'ResNet18' or 'torchvision/resnet18'"),
        ("perceptron", "wrn_40_2, torchvision/NAME, transformers/NAME"),
    ],
)
def test_unknown_name(name: str, suggestion: str) -> None:
    with pytest.raises(UnknownNameError) as caught:
        check_model_name(name)
    assert repr(name.removeprefix("torchvision/")) in str(caught.value)
    assert suggestion in str(caught.value)
    with pytest.raises(UnknownNameError):
        build_model(name, TaskSpec(("a", "b"), 32))


@pytest.mark.parametrize("name", ["google/vit", "vit", "./folder", "transformers/", "a/b/c", "/no/such/folder"])
def test_transformers_name(name: str) -> None:
    full_name = f"transformers/{name}"
    if name in ("google/vit", "vit"):
        check_model_name(full_name)
    else:
        with pytest.raises(UserError, match="there is no folder"):
            check_model_name(full_name)


def test_checking_a_name_imports_only_what_it_must() -> None:
    program = (
        "import sys; from tmkd_ray.models import check_model_name; check_model_name('resnet20');"
        "check_model_name('transformers/a/b'); print(*{'torchvision', 'transformers'} & set(sys.modules))"
    )
    assert (
        subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
        == "\n"
    )
