"""Another library's classifier as an `ImageClassifier`: hooks note its head's input and its stages' outputs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tmkd_ray.errors import UserError
from tmkd_ray.models.base import ImageClassifier
from tmkd_ray.types import ModelOutput, TaskSpec


class WrappedClassifier(ImageClassifier):
    """A classifier of images, seen through hooks.

    Nothing outlives a call of `forward`, so it pickles like any module. Two threads must not run it at once.

    Args:
        wrapped: images [B, 3, H, W] to logits [B, C]; its state dict keeps its own names, see `inner`.
        head: the name of its last linear layer.
        stages: the names of the modules that put out the feature maps.
        activations: the names of the modules that a stage runs last, its ReLU, one a stage; none if unknown.
    """

    def __init__(
        self, wrapped: nn.Module, head: str, stages: Sequence[str] = (), activations: Sequence[str] = ()
    ) -> None:
        super().__init__()
        self.wrapped = wrapped
        self._head = head
        self._recorder = _Recorder()
        wrapped.get_submodule(head).register_forward_pre_hook(_RecordInput(self._recorder))
        for stage in stages:
            wrapped.get_submodule(stage).register_forward_hook(_RecordOutput(self._recorder))
        for index, name in enumerate(activations):
            activation = wrapped.get_submodule(name)
            assert isinstance(activation, nn.ReLU)
            activation.inplace = False  # else it would overwrite what is noted
            activation.register_forward_pre_hook(_RecordLastInput(self._recorder, index))

    @property
    def head(self) -> nn.Linear:
        layer = self.wrapped.get_submodule(self._head)
        assert isinstance(layer, nn.Linear)
        return layer

    @property
    def inner(self) -> nn.Module:
        return self.wrapped

    def forward(self, images_BCHW: Tensor) -> ModelOutput:
        self._recorder.start()
        logits_BC, maps = self.run_wrapped(images_BCHW)
        inputs, outputs, last_inputs = self._recorder.stop()
        assert len(inputs) == 1
        preactivations = tuple(last_inputs[index] for index in sorted(last_inputs))
        return ModelOutput(logits_BC, inputs[0], maps or tuple(outputs), preactivations)

    def run_wrapped(self, images_BCHW: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the logits [B, C], and the feature maps if the wrapped model itself returns them."""
        return self.wrapped(images_BCHW), ()


def last_linear(module: nn.Module) -> str | None:
    """Return the name of the linear layer that is registered last."""
    names = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    return names[-1] if names else None


def try_out(model: ImageClassifier, name: str, task: TaskSpec) -> ModelOutput:
    """Run `model` on one image of the task's size, in evaluation mode, and leave it in training mode.

    Raises:
        UserError: it cannot take images of this size.
    """
    size = task.image_size
    # Not noise: building a model must draw its weights from the random generator and nothing else.
    image_1CHW = torch.linspace(-1, 1, 3 * size * size).reshape(1, 3, size, size)
    model.eval()
    try:
        with torch.no_grad():
            output: ModelOutput = model(image_1CHW)
    except (AssertionError, RuntimeError, ValueError) as error:  # what the libraries' own shape checks raise
        raise UserError(f"{name} cannot take images of {size}×{size} pixels: {error}") from error
    model.train()
    return output


def probe_images(task: TaskSpec) -> Tensor:
    """Return three images [3, 3, H, W], by which a network from outside is tried; no random number is drawn."""
    count = 3 * 3 * task.image_size**2
    return (torch.arange(count).float() * 0.7).sin().reshape(3, 3, task.image_size, task.image_size)


def check_head(model: ImageClassifier, name: str, task: TaskSpec) -> None:
    """Check on a few images that `model`, in evaluation mode, is what an `ImageClassifier` must be.

    Raises:
        UserError: its logits are of other classes than the task's, or are not those of its head on its feature.
    """
    head = model.head
    with torch.no_grad():
        output: ModelOutput = model(probe_images(task))
        width, classes = head.in_features, task.num_classes
        if output.logits.shape != (3, classes):
            raise UserError(
                f"{name}: its logits are {list(output.logits.shape)}, not [3, {classes}] for 3 images"
            )
        fits = output.feature.shape == (3, width) and head.out_features == classes
        if not fits or not torch.allclose(head(output.feature), output.logits, rtol=1e-3, atol=1e-4):
            raise UserError(f"{name}: its logits are not those of its last linear layer on its feature")


class _Recorder:
    """Collects tensors between `start` and `stop`."""

    def __init__(self) -> None:
        self.active = False
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.last_inputs: dict[int, Tensor] = {}

    def start(self) -> None:
        self.active = True
        self.inputs, self.outputs, self.last_inputs = [], [], {}

    def stop(self) -> tuple[list[Tensor], list[Tensor], dict[int, Tensor]]:
        self.active = False
        found = self.inputs, self.outputs, self.last_inputs
        self.inputs, self.outputs, self.last_inputs = [], [], {}
        return found


@dataclass(eq=False)
class _RecordInput:
    recorder: _Recorder

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.recorder.active:
            self.recorder.inputs.append(args[0])


@dataclass(eq=False)
class _RecordLastInput:
    """A block may run the same ReLU several times: the last one counts."""

    recorder: _Recorder
    index: int

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.recorder.active:
            self.recorder.last_inputs[self.index] = args[0]


@dataclass(eq=False)
class _RecordOutput:
    recorder: _Recorder

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if self.recorder.active:
            self.recorder.outputs.append(output)
