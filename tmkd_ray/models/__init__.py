"""Everything a student or a visual teacher can be.

- Bare names (`resnet8x4`, `wrn_40_2`, `ShuffleV1` …) are the networks the distillation field compares on CIFAR,
  under the names, and with the parameter names, of its reference implementations (RepDistiller, mdistiller).
- `torchvision/NAME` is any of torchvision's image classifiers, randomly initialised.
- `transformers/NAME_OR_FOLDER` is any `AutoModelForImageClassification` with its trained weights.
- `python:package.module:function` is what a function returns, `program:PATH.pt2` an exported program: networks
  from outside, with their weights. See `python_models` and `program_models` for what they must do.
"""

from collections.abc import Callable

from torch import nn

from tmkd_ray.models.base import ImageClassifier, ModelSource
from tmkd_ray.models.checkpoint import load_checkpoint
from tmkd_ray.registry import Registry, UnknownNameError, import_submodules
from tmkd_ray.types import TaskSpec

MODELS: Registry[Callable[[TaskSpec], ImageClassifier]] = Registry("model")
SOURCES: Registry[ModelSource] = Registry("model source")
"""Other libraries' models, by the part of the name before the first slash."""
GIVEN: Registry[ModelSource] = Registry("kind of given model")
"""Networks from outside, by the part of the name before the first colon."""


def build_model(name: str, task: TaskSpec) -> ImageClassifier:
    """Return the model called `name`, in training mode, on the default device.

    Raises:
        UnknownNameError: there is no such model.
        UserError: the model cannot be had, or does not suit the task (its image size, its number of classes).
    """
    check_model_name(name)
    kind, colon, rest = name.partition(":")
    if colon and kind in GIVEN:
        return GIVEN.get(kind).build(rest, task)
    source, slash, rest = name.partition("/")
    return SOURCES.get(source).build(rest, task) if slash else MODELS.get(name)(task)


def check_model_name(name: str) -> None:
    """Check that `name` names a model, without building it or asking the network for it.

    Raises:
        UnknownNameError: it does not; the message has the nearest name.
        UserError: it cannot be a transformers model.
    """
    kind, colon, rest = name.partition(":")
    if colon and kind in GIVEN:
        GIVEN.get(kind).check(rest)
        return
    source, slash, rest = name.partition("/")
    if slash and source in SOURCES:
        SOURCES.get(source).check(rest)
    elif name not in MODELS:
        short_name = name.rpartition("/")[2].lower()
        namesakes = [known for known in model_names() if known.rpartition("/")[2].lower() == short_name]
        if namesakes:
            raise UnknownNameError(f"unknown model {name!r}. Did you mean {' or '.join(map(repr, namesakes))}?")
        try:
            MODELS.get(name)
        except UnknownNameError as error:
            others = [*(f"{other}/NAME" for other in SOURCES), *(f"{other}:…" for other in GIVEN)]
            raise UnknownNameError(", ".join([str(error), *others])) from None


def model_names() -> list[str]:
    """Return the names of all models but those of `transformers/`, which has no list."""
    return MODELS.names() + [f"{source}/{name}" for source in SOURCES for name in SOURCES.get(source).names()]


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters, trainable or not; buffers such as batch-norm statistics do not count."""
    return sum(parameter.numel() for parameter in model.parameters())


import_submodules(__name__, __path__)

__all__ = [
    "GIVEN",
    "MODELS",
    "SOURCES",
    "ImageClassifier",
    "build_model",
    "check_model_name",
    "count_parameters",
    "load_checkpoint",
    "model_names",
]
