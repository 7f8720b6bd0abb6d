"""`transformers/NAME_OR_FOLDER`: any `AutoModelForImageClassification`, with its trained weights."""

import os
import re
from typing import Any

import torch
from torch import Tensor, nn

from tmkd_ray.errors import UserError
from tmkd_ray.models import SOURCES
from tmkd_ray.models.base import ImageClassifier
from tmkd_ray.models.wrapped import WrappedClassifier, last_linear, try_out
from tmkd_ray.types import TaskSpec


class TransformersClassifier(WrappedClassifier):
    """A transformers model; `inner` is the model itself.

    Feature maps: the last spatial hidden state at each resolution; none for a plain vision transformer.
    """

    def __init__(self, wrapped: nn.Module, head: str) -> None:
        super().__init__(wrapped, head)
        self.has_feature_maps = True

    def __getstate__(self) -> dict[str, Any]:
        # To collect hidden states, transformers hooks closures onto a running model; pickle takes no closures.
        # It hooks them on again when they are missing.
        for module in self.wrapped.modules():
            module.__dict__.pop("_output_capturing_hooks_installed", None)
            for key, hook in list(module._forward_hooks.items()):
                if getattr(hook, "__module__", None) == "transformers.utils.output_capturing":
                    del module._forward_hooks[key]
        return self.__dict__.copy()

    def run_wrapped(self, images_BCHW: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        output: Any = self.wrapped(
            pixel_values=images_BCHW, output_hidden_states=self.has_feature_maps, return_dict=True
        )
        if not self.has_feature_maps:
            return output.logits, ()
        # Swin and its like hand out tokens, and beside them the same with spatial axes.
        hidden_states = output.get("reshaped_hidden_states") or output.hidden_states or ()
        last_of_size = {state.shape[2:]: state for state in hidden_states if state.ndim == 4}
        return output.logits, tuple(last_of_size.values())


class TransformersSource:
    """The image classifiers that the installed transformers can load."""

    def names(self) -> list[str]:
        return []

    def check(self, name: str) -> None:
        path = os.path.expanduser(name)
        if os.path.isdir(path):
            if not os.path.isfile(os.path.join(path, "config.json")):
                raise UserError(
                    f"transformers/{name}: the folder {path!r} has no config.json; give one by save_pretrained"
                )
        elif not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
            raise UserError(
                f"transformers/{name}: there is no folder {path!r}, and it is no hub name (OWNER/NAME) either"
            )

    def build(self, name: str, task: TaskSpec) -> ImageClassifier:
        # Imported here, because it takes seconds and most runs do without.
        from transformers import AutoConfig, AutoModelForImageClassification

        full_name, path = f"transformers/{name}", os.path.expanduser(name)
        try:
            config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise UserError(_unavailable(full_name, error)) from error
        _check_classes(full_name, config, task)
        try:
            network, loading = AutoModelForImageClassification.from_pretrained(
                path,
                config=config,
                dtype=torch.float32,
                ignore_mismatched_sizes=False,
                output_loading_info=True,
            )
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(_unavailable(full_name, error)) from error
        if loading["missing_keys"]:
            raise UserError(
                f"{full_name} has no weights for {', '.join(sorted(loading['missing_keys'])[:5])}: "
                "it was saved without its classifier; choose a model that is trained to classify"
            )
        return _wrap(full_name, network, task)


def _unavailable(name: str, error: Exception) -> str:
    return (
        f"cannot load {name}: {str(error).partition(chr(10))[0]} (A hub name needs internet or an earlier "
        "download; else give a folder that save_pretrained wrote.)"
    )


def _check_classes(name: str, config: Any, task: TaskSpec) -> None:
    if config.num_labels != task.num_classes:
        raise UserError(f"{name} tells {config.num_labels} classes apart, the task has {task.num_classes}")
    labels = [config.id2label[index] for index in range(task.num_classes)]
    if sorted(labels) == sorted(task.class_names) and labels != list(task.class_names):
        index = next(i for i in range(task.num_classes) if labels[i] != task.class_names[i])
        raise UserError(
            f"{name} numbers the same classes in another order: label {index} is {labels[index]!r} to it, "
            f"{task.class_names[index]!r} in the task"
        )


def _wrap(name: str, network: nn.Module, task: TaskSpec) -> ImageClassifier:
    head = last_linear(network)
    if head is None or network.get_submodule(head).out_features != task.num_classes:
        raise UserError(
            f"{name}: its classifier is not a linear layer, which a student or visual teacher must have"
        )
    model = TransformersClassifier(network, head)
    output = try_out(model, name, task)
    if not torch.allclose(model.head(output.feature), output.logits, rtol=1e-3, atol=1e-4):
        raise UserError(f"{name}: its logits are not those of its last linear layer {head!r} alone")
    model.has_feature_maps = bool(output.feature_maps)
    return model


SOURCES.register("transformers")(TransformersSource())
