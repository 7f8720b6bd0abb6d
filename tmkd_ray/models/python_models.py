"""`python:package.module:function`: a network that a function of yours returns.

The configuration names the function and no more; its module is imported, from Python's path or the folder that
the program is started in, and the function called with the `TaskSpec` (class names, image size). On a cluster
the module must be there too: installed, or in the working directory that goes with the job. The function
returns an `nn.Module` with its weights, which takes normalised float images [B, 3, H, W] of any B and
returns, in evaluation mode,

- the logits [B, C], where the last linear layer that it registers makes them: its input is the feature; or
- a `ModelOutput` (an `ImageClassifier` is one that does, and names its head itself).

Either way `head(feature)` must be the logits: features of views are fused before the head. That is tried on a
few images when the network is loaded, and refused otherwise.
"""

import hashlib
import importlib
import inspect
import os
import re
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from tmkd_ray.errors import UserError
from tmkd_ray.models import GIVEN
from tmkd_ray.models.base import ImageClassifier
from tmkd_ray.models.wrapped import WrappedClassifier, check_head, last_linear, probe_images
from tmkd_ray.registry import nearest
from tmkd_ray.types import ModelOutput, TaskSpec


class PythonClassifier(WrappedClassifier):
    """A network from outside that returns logits; `inner` is the network itself."""

    def __init__(self, wrapped: nn.Module, head: str, source: str) -> None:
        super().__init__(wrapped, head)
        self._source = source

    @torch.no_grad()
    def num_head_calls(self, images_BCHW: Tensor) -> int:
        """Return how often the head takes part in a forward pass; `forward` asks for once."""
        self._recorder.start()
        self.wrapped(images_BCHW)
        return len(self._recorder.stop()[0])

    def source_fingerprint(self) -> str:
        return self._source


class PythonOutputClassifier(ImageClassifier):
    """A network from outside that returns a `ModelOutput`; `inner` is the network itself."""

    def __init__(self, wrapped: nn.Module, head: str, source: str) -> None:
        super().__init__()
        self.wrapped = wrapped
        self._head = head
        self._source = source

    @property
    def head(self) -> nn.Linear:
        layer = self.wrapped.get_submodule(self._head)
        assert isinstance(layer, nn.Linear)
        return layer

    @property
    def inner(self) -> nn.Module:
        return self.wrapped.inner if isinstance(self.wrapped, ImageClassifier) else self.wrapped

    def adapt_checkpoint(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.wrapped.adapt_checkpoint(state) if isinstance(self.wrapped, ImageClassifier) else state

    def source_fingerprint(self) -> str:
        return self._source

    def forward(self, images_BCHW: Tensor) -> ModelOutput:
        output: ModelOutput = self.wrapped(images_BCHW)
        return output


class PythonSource:
    """Functions on Python's path."""

    def names(self) -> list[str]:
        return []

    def check(self, name: str) -> None:
        """Nothing is imported for this: a configuration may be read where the module is not."""
        if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", name):
            raise UserError(f"python:{name} is not of the form python:package.module:function")

    def build(self, name: str, task: TaskSpec) -> ImageClassifier:
        full_name = f"python:{name}"
        module_name, _, function_name = name.partition(":")
        if os.getcwd() not in sys.path:  # Ray's workers have it there; a console script has not
            sys.path.append(os.getcwd())
        try:
            module = importlib.import_module(module_name)
        except Exception as error:  # whatever the module does as it is imported
            raise UserError(
                f"{full_name}: cannot import {module_name} ({type(error).__name__}: {error}). "
                "It must be installed, or lie in the folder that the program is started in"
            ) from error
        function = getattr(module, function_name, None)
        if not callable(function):
            guess = nearest(function_name, [n for n, value in vars(module).items() if callable(value)])
            hint = f". Did you mean {guess!r}?" if guess else ""
            raise UserError(f"{full_name}: {module_name} has no function {function_name}{hint}")
        try:
            network = function(task)
        except Exception as error:  # likewise
            raise UserError(f"{full_name}: the function failed ({type(error).__name__}: {error})") from error
        if not isinstance(network, nn.Module):
            raise UserError(
                f"{full_name}: the function returned a {type(network).__name__}, not an nn.Module; "
                "it is called with the task, and returns the network"
            )
        return _wrap(full_name, network, _source(module_name, network), task)


def _wrap(name: str, network: nn.Module, source: str, task: TaskSpec) -> ImageClassifier:
    network.eval()
    try:
        with torch.no_grad():
            output = network(probe_images(task))
    except Exception as error:
        size = task.image_size
        raise UserError(
            f"{name}: the network failed on images [3, 3, {size}, {size}] ({type(error).__name__}: {error})"
        ) from error
    if not isinstance(output, Tensor | ModelOutput):
        raise UserError(
            f"{name}: the network returned a {type(output).__name__}; it must return the logits, a tensor "
            "[B, C], or a ModelOutput"
        )
    if isinstance(network, ImageClassifier):
        own_head = network.head
        head = next((key for key, layer in network.named_modules() if layer is own_head), None)
    else:
        head = last_linear(network)
    if head is None:
        raise UserError(f"{name}: the network has no linear layer to be its classifier")
    model: ImageClassifier
    if isinstance(output, ModelOutput):
        model = PythonOutputClassifier(network, head, source)
    else:
        model = PythonClassifier(network, head, source)
        if model.num_head_calls(probe_images(task)) != 1:
            raise UserError(f"{name}: its last linear layer, {head!r}, does not make the logits")
    check_head(model, name, task)
    return model.train()


def _source(module_name: str, network: nn.Module) -> str:
    """Return the SHA-256 of the code files of the function's module and of the network's class."""
    digest = hashlib.sha256()
    for name in sorted({module_name, type(network).__module__}):
        file = inspect.getsourcefile(importlib.import_module(name))
        digest.update(name.encode() + (Path(file).read_bytes() if file else b""))
    return digest.hexdigest()


GIVEN.register("python")(PythonSource())
