"""Formats of weights alone: they need the network's code, ours or torchvision's, to run."""

import os
from collections import OrderedDict
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from tmkd_ray.errors import UserError
from tmkd_ray.export.base import EXPORTERS, ExportedModel, Exporter, Student, StudentNetwork, unreadable
from tmkd_ray.export.record import ExportRecord, not_ours
from tmkd_ray.models import ImageClassifier, build_model

_TORCHVISION = "torchvision/"


def own_weights(student: Student) -> dict[str, Tensor]:
    """Return a copy of the state dict under the published names (see `ImageClassifier.inner`).

    Of an encoder the classifier is left out: it was never trained.
    """
    state = student.model.inner.state_dict()
    unused = head_names(student.model) if student.record.kind == "encoder" else set()
    return {name: tensor.clone().contiguous() for name, tensor in state.items() if name not in unused}


def head_names(model: ImageClassifier) -> set[str]:
    """Return the names of the classifier's weight and bias in the inner state dict."""
    own = {id(parameter) for parameter in model.head.parameters()}
    return {name for name, parameter in model.inner.named_parameters() if id(parameter) in own}


def run_with_weights(record: ExportRecord, state: dict[str, Tensor], path: str) -> ExportedModel:
    """Build the record's model and give it the weights.

    Raises:
        UserError: they are not its own.
    """
    model = build_model(record.model, record.task())
    unused = head_names(model) if record.kind == "encoder" else set()
    own = model.inner.state_dict()
    fitting = {
        name: tensor
        for name, tensor in state.items()
        if name not in unused and name in own and tensor.shape == own[name].shape
    }
    lacking = sorted(own.keys() - unused - fitting.keys())
    surplus = sorted(state.keys() - unused - own.keys())
    if lacking or surplus:
        raise UserError(
            f"{path}: the weights are not those of {record.model}: {len(lacking)} missing or of another shape, "
            f"{len(surplus)} unknown ({', '.join((lacking + surplus)[:3])} …). Export it again"
        )
    named: OrderedDict[str, Tensor] = OrderedDict(fitting)
    # Modules look up their format's version here; some of torchvision's refuse to load without one.
    named._metadata = own._metadata  # type: ignore[attr-defined]
    model.inner.load_state_dict(named, strict=False)
    network = StudentNetwork(model, record.output_name).eval().requires_grad_(False)
    return ExportedModel(record, network, network=network)


@EXPORTERS.register("safetensors")
class Safetensors(Exporter):
    """The weights under their published names, the record as the file's metadata."""

    description = "weights with metadata, read without running code; the network is built by tmkd_ray"
    suffix = ".safetensors"

    def check(self, record: ExportRecord) -> None:
        if record.model.startswith("transformers/"):
            raise UserError(
                f"{record.model} is not built from a name alone but from its own config.json; export it with "
                "--format hf"
            )

    def write(self, student: Student, path: str) -> None:
        metadata = {"format": "pt", **student.record.to_metadata()}
        safetensors.torch.save_file(own_weights(student), path, metadata)

    def read(self, path: str) -> ExportedModel:
        record = read_safetensors_record(path)
        if record is None:
            raise not_ours(path)
        return run_with_weights(record, safetensors.torch.load_file(path), path)


def read_safetensors_record(path: str) -> ExportRecord | None:
    """Return the record in a local safetensors file; None if it has none.

    Raises:
        UserError: it is no safetensors file, or the record is damaged.
    """
    try:
        with safetensors.safe_open(path, "pt") as opened:
            metadata: dict[str, str] = opened.metadata() or {}
    except (safetensors.SafetensorError, OSError) as error:
        raise unreadable(path, "safetensors", error) from error
    return ExportRecord.from_metadata(metadata, path) if "format_version" in metadata else None


@EXPORTERS.register("torchvision")
class Torchvision(Exporter):
    """A `.pth` that torchvision's own builder loads, and the record beside it as `.json`.

    A classifier: `torchvision.models.NAME(num_classes=C).load_state_dict(torch.load(FILE, weights_only=True))`.
    An encoder, trained without labels: the same without `num_classes`; its classifier, of torchvision's usual
    1000 classes, is all zeros, to be replaced by the downstream task's own.
    """

    description = "a .pth in torchvision's own state-dict names, for students torchvision/NAME"
    suffix = ".pth"

    def check(self, record: ExportRecord) -> None:
        if not record.model.startswith(_TORCHVISION):
            raise UserError(
                f"torchvision has no model {record.model}: --format torchvision is for students "
                "torchvision/NAME. Use safetensors, onnx, pt2 or hf"
            )

    def write(self, student: Student, path: str) -> None:
        state: dict[str, Any] = own_weights(student)
        if student.record.kind == "encoder":
            state = _with_blank_head(student, state)
        torch.save(state, path)
        with open(record_path(path), "w", encoding="utf-8") as file:
            file.write(student.record.model_dump_json(indent=2, exclude_none=True) + "\n")

    def read(self, path: str) -> ExportedModel:
        beside = record_path(path)
        if not os.path.isfile(beside):
            raise UserError(
                f"{path}: {os.path.basename(beside)} is missing beside it, which says what its classes and "
                "normalisation are; `tmkd export --format torchvision` writes both"
            )
        with open(beside, encoding="utf-8") as file:
            record = ExportRecord.from_json(file.read(), beside)
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a broken file makes the reader raise anything
            raise unreadable(path, "a state dict", error) from error
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            raise UserError(f"{path} holds no state dict (names to tensors)")
        return run_with_weights(record, state, path)


def record_path(path: str) -> str:
    """Return where the record of a `.pth` lies."""
    return os.path.splitext(path)[0] + ".json"


def _with_blank_head(student: Student, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add a classifier of zeros in the shape that torchvision's builder gives it by default."""
    from torchvision.models import get_model

    name = student.record.model.removeprefix(_TORCHVISION)
    usual: dict[str, Tensor] = get_model(name, weights=None).state_dict()
    head = head_names(student.model)
    return {
        key: torch.zeros_like(usual[key]) if key in head else state[key]
        for key in usual
        if key in state or key in head
    }
