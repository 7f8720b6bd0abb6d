"""Reading published weights, with errors that a person can mend."""

import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from tmkd_ray import storage
from tmkd_ray.errors import UserError
from tmkd_ray.models.base import ImageClassifier

_CONTAINERS = ("model", "state_dict", "model_state_dict", "net", "student")
# Left by DataParallel and DDP, by torch.compile, and by our own wrapper around another library's model.
_PREFIXES = ("module.", "_orig_mod.", "wrapped.")
_NUM_LISTED = 5


def load_checkpoint(model: ImageClassifier, path: str) -> None:
    """Load the weights in the file `path` into `model`.

    Reads what `torch.save` wrote (tensors only: nothing in the file is executed) and `.safetensors`. The state
    dict may lie under `model`, `state_dict`, `model_state_dict`, `net` or `student`, and its names may start
    with `module.`. Biases that `model` lacks before a batch norm are folded into it.
    If an error is raised, `model` may be partly overwritten.

    Raises:
        UserError: there is no such file, it cannot be read, or it is of another model or number of classes.
    """
    load_weights(model, read_weights(path), path)


def read_weights(path: str) -> Mapping[str, Tensor]:
    """Return the state dict in the file `path`, under the names it has there; see `load_checkpoint`.

    Raises:
        UserError: there is no such file, or it cannot be read or holds no state dict.
    """
    path = os.path.expanduser(path)
    return _unwrap(_read(path), path)


def bare_names(loaded: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict without the prefix (`module.` and the like) that all of its names share."""
    prefix = _common_prefix(loaded)
    return {name.removeprefix(prefix): tensor for name, tensor in loaded.items()}


def load_weights(model: ImageClassifier, loaded: Mapping[str, Tensor], path: str) -> None:
    """Load a state dict that was read from `path` into `model`; errors as in `load_checkpoint`."""
    expected = model.inner.state_dict()
    prefix = _common_prefix(loaded)
    state: OrderedDict[str, Tensor] = OrderedDict(
        model.adapt_checkpoint({name.removeprefix(prefix): tensor for name, tensor in loaded.items()})
    )
    # Modules look up their format's version here; some of torchvision's refuse to load without one.
    metadata = getattr(loaded, "_metadata", None) or expected._metadata  # type: ignore[attr-defined]
    versions = {f"{name}.".removeprefix(prefix)[:-1]: version for name, version in metadata.items()}
    state._metadata = versions  # type: ignore[attr-defined]

    shapes = {
        name: (list(tensor.shape), list(expected[name].shape))
        for name, tensor in state.items()
        if name in expected and tensor.shape != expected[name].shape
    }
    if shapes:
        missing = [name for name in expected if name not in state]
        unexpected = [name for name in state if name not in expected]
    else:
        # Only now, so that modules which rename old parameters as they load do so before names are compared.
        missing, unexpected = model.inner.load_state_dict(state, strict=False)
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]  # absent in old files
    if not shapes and not missing and not unexpected:
        return

    head = next(reversed(expected)).rpartition(".")[0]
    if (
        not missing
        and not unexpected
        and all(
            name.rpartition(".")[0] == head and theirs[1:] == ours[1:]
            for name, (theirs, ours) in shapes.items()
        )
    ):
        (theirs, ours) = next(iter(shapes.values()))
        raise UserError(
            f"checkpoint {path!r}: the checkpoint has {theirs[0]} classes, the task has {ours[0]}; "
            "the rest of the weights fits. Give a checkpoint trained on the task's classes."
        )
    problems = [
        _listing("missing in the checkpoint", missing),
        _listing("unknown to the model", unexpected),
        _listing("of another shape", [f"{n}: checkpoint {a}, model {b}" for n, (a, b) in shapes.items()]),
    ]
    raise UserError(
        f"checkpoint {path!r} does not fit the model ({type(model.inner).__name__}): is it another model's?\n"
        + "\n".join(problem for problem in problems if problem)
    )


def _read(path: str) -> Any:
    with storage.local_copy(path) as local:
        return _read_local(local, path)


def _read_local(local: str, path: str) -> Any:
    if not os.path.isfile(local):
        raise UserError(
            f"checkpoint {path!r} is not a file; give the path of a .pth, .pt, .tar or .safetensors file"
        )
    try:
        if path.endswith(".safetensors"):
            return safetensors.torch.load_file(local)
        return torch.load(local, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file makes the readers raise anything
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"cannot read checkpoint {path!r} ({type(error).__name__}: {reason}). It must be whole and hold "
            "tensors only: save the model's state_dict(), not the model."
        ) from error


def _unwrap(loaded: Any, path: str) -> Mapping[str, Tensor]:
    while isinstance(loaded, Mapping):
        nested = [loaded[key] for key in _CONTAINERS if isinstance(loaded.get(key), Mapping)]
        if not nested:
            break
        loaded = nested[0]
    if not isinstance(loaded, Mapping) or not loaded or not all(isinstance(v, Tensor) for v in loaded.values()):
        held = (
            f"the keys {', '.join(map(repr, loaded))}"
            if isinstance(loaded, Mapping)
            else f"a {type(loaded).__name__}"
        )
        raise UserError(
            f"checkpoint {path!r} holds no state dict (names to tensors), neither directly nor under "
            f"{', '.join(map(repr, _CONTAINERS))}, but {held}"
        )
    return loaded


def _common_prefix(names: Iterable[str]) -> str:
    prefix = ""
    while True:
        for extra in _PREFIXES:
            if all(name.startswith(prefix + extra) for name in names):
                prefix += extra
                break
        else:
            return prefix


def _listing(title: str, entries: list[str]) -> str:
    if not entries:
        return ""
    more = ", …" if len(entries) > _NUM_LISTED else ""
    return f"  {title} ({len(entries)}): {', '.join(entries[:_NUM_LISTED])}{more}"
