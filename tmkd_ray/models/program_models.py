"""`program:PATH.pt2`: a network as `torch.export.save` wrote it, from whatever code; for teachers alone.

The program takes normalised float images [B, 3, H, W] of the task's size, for any B (export it with a dynamic
first dimension), and returns (logits [B, C], feature [B, D]). The logits must be a linear function of the
feature whose weight [C, D], and bias [C] if any, are parameters of the program: features of views are fused
before that layer, so it is looked for among the parameters, and the equality tried on a few images. A program
that returns logits alone is refused. Export it in evaluation mode, on a CPU:

    program = torch.export.export(network.eval(), (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, "teacher.pt2")

A program is code, and reading one may execute what is in it: load those that you trust, as you would a script.
"""

import hashlib
import io
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.passes import move_to_device_pass

from tmkd_ray import storage
from tmkd_ray.errors import UserError
from tmkd_ray.models import GIVEN
from tmkd_ray.models.base import ImageClassifier
from tmkd_ray.models.wrapped import check_head, probe_images
from tmkd_ray.types import ModelOutput, TaskSpec


class ProgramClassifier(ImageClassifier):
    """An exported program.

    It pickles as the file it was read from, and is moved to another device by rewriting the program, in which
    devices are written down. Its memory format is its own.

    Args:
        content: of the file.

    Attributes:
        program: images to (logits, feature).
    """

    def __init__(self, content: bytes) -> None:
        super().__init__()
        self.content = content
        self.device = torch.device("cpu")
        self._head_names: tuple[str, str | None] | None = None
        self._load()

    def _load(self) -> None:
        program = torch.export.load(io.BytesIO(self.content))
        if self.device.type != "cpu":
            program = move_to_device_pass(program, self.device)
        self.program: nn.Module = program.module().requires_grad_(False)
        if self._head_names is not None:
            self.name_head(*self._head_names)

    def name_head(self, weight: str, bias: str | None) -> None:
        """Say which parameters of the program are those of its last linear layer."""
        self._head_names = (weight, bias)
        parameters = dict(self.program.named_parameters())
        outputs, inputs = parameters[weight].shape
        self.linear = nn.Linear(inputs, outputs, bias=bias is not None, device="meta")
        self.linear.weight = parameters[weight]
        if bias is not None:
            self.linear.bias = parameters[bias]

    @property
    def head(self) -> nn.Linear:
        return self.linear

    def source_fingerprint(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    def forward(self, images_BCHW: Tensor) -> ModelOutput:
        logits_BC, feature_BD = self.program(images_BCHW.contiguous())
        return ModelOutput(logits_BC, feature_BD)

    def train(self, mode: bool = True) -> "ProgramClassifier":
        """Nothing: a program is in the mode in which it was exported."""
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ProgramClassifier":
        # What `to` does to a module: of all that, devices alone concern a program.
        device = fn(torch.zeros(1, device=self.device)).device
        if device != self.device:
            self.device = device
            self._load()
        return self

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["_modules"] = {}  # they are made of the content again
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._load()


class ProgramSource:
    """Files that `torch.export.save` wrote."""

    def names(self) -> list[str]:
        return []

    def check(self, name: str) -> None:
        if not name.endswith(".pt2"):
            raise UserError(f"program:{name} is not of the form program:PATH.pt2")
        storage.refuse_credentials(name)

    def build(self, name: str, task: TaskSpec) -> ImageClassifier:
        full_name, path = f"program:{name}", os.path.expanduser(name)
        if not storage.exists(path):
            raise UserError(f"{full_name}: there is no such file")
        try:
            model = ProgramClassifier(storage.read_bytes(path))
        except UserError:
            raise
        except Exception as error:  # a broken file makes the reader raise anything
            reason = str(error).partition("\n")[0]
            raise UserError(
                f"{full_name}: cannot be read as an exported program ({type(error).__name__}: {reason}); "
                "it must be whole, and of torch.export.save"
            ) from error
        output = _try_out(model, full_name, task)
        model.name_head(*_head_among(model.program, output, full_name))
        check_head(model, full_name, task)
        return model


def _try_out(model: ProgramClassifier, name: str, task: TaskSpec) -> ModelOutput:
    images_BCHW = probe_images(task)
    size = task.image_size
    try:
        with torch.no_grad():
            outputs = model.program(images_BCHW)
            model.program(images_BCHW[:2])
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{name}: it cannot take images [3, 3, {size}, {size}] and [2, 3, {size}, {size}] "
            f"({type(error).__name__}: {reason}); export it for this size, with a dynamic number of images"
        ) from error
    is_pair = isinstance(outputs, tuple | list) and len(outputs) == 2
    if not is_pair or not all(isinstance(value, Tensor) and value.ndim == 2 for value in outputs):
        held = _described(outputs)
        raise UserError(
            f"{name}: it returned {held}; it must return (logits [B, C], feature [B, D]), so that the features "
            "of views can be fused before the classifier"
        )
    return ModelOutput(*outputs)


def _head_among(program: nn.Module, output: ModelOutput, name: str) -> tuple[str, str | None]:
    """Return the names of weight and bias of the last linear layer, by trying those that fit."""
    shape = (output.logits.shape[1], output.feature.shape[1])
    parameters = dict(program.named_parameters())
    biases = [None, *(key for key, value in parameters.items() if value.shape == shape[:1])]
    for weight in (key for key, value in parameters.items() if value.shape == shape):
        for bias in biases:
            added = None if bias is None else parameters[bias]
            logits_BC = nn.functional.linear(output.feature, parameters[weight], added)
            if torch.allclose(logits_BC, output.logits, rtol=1e-3, atol=1e-4):
                return weight, bias
    raise UserError(
        f"{name}: no parameters of the program, a weight {list(shape)} with or without a bias, make its logits "
        "from its feature; the feature that it returns must be the input of its last linear layer"
    )


def _described(outputs: object) -> str:
    if isinstance(outputs, Tensor):
        return f"one tensor {list(outputs.shape)}"
    if isinstance(outputs, tuple | list):
        return "(" + ", ".join(_described(value) for value in outputs) + ")"
    return f"a {type(outputs).__name__}"


GIVEN.register("program")(ProgramSource())
