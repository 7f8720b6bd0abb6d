"""A folder as Hugging Face's hub holds models: weights, config.json, preprocessor_config.json, a model card.

The weights are loaded by whoever has the network's code, and the card says by whom: a `transformers/…` student
by `AutoModelForImageClassification`, a `torchvision/…` student by torchvision's own builder, the CIFAR zoo by
`tmkd_ray.export.load_exported`. All of them by the last.
"""

import json
import os
from typing import Any

import safetensors.torch

from tmkd_ray.errors import UserError
from tmkd_ray.export.base import EXPORTERS, ExportedModel, Exporter, Student, StudentNetwork, unreadable
from tmkd_ray.export.model_card import model_card
from tmkd_ray.export.record import ExportRecord, not_ours
from tmkd_ray.export.weights import own_weights, run_with_weights
from tmkd_ray.models import build_model

_RECORD_KEY = "tmkd_ray"
_TRANSFORMERS = "transformers/"
_WEIGHTS = "model.safetensors"


@EXPORTERS.register("hf")
class HuggingFace(Exporter):
    """config.json has the record under the key `tmkd_ray`."""

    description = "a folder for Hugging Face's hub, with preprocessor_config.json and a model card"
    suffix = ""

    def check(self, record: ExportRecord) -> None:
        if record.model.startswith(_TRANSFORMERS) and record.kind == "encoder":
            raise UserError(
                f"{record.model} was trained without labels, and transformers' class for it includes a "
                "classifier; export the encoder with --format onnx, pt2 or torchscript"
            )

    def write(self, student: Student, path: str) -> None:
        record = student.record
        os.makedirs(path, exist_ok=True)
        fields = record.model_dump(mode="json", exclude_none=True)
        labels = {
            "id2label": dict(enumerate(record.class_names)),
            "label2id": {name: label for label, name in enumerate(record.class_names)},
        }
        if record.model.startswith(_TRANSFORMERS):
            network: Any = student.model.inner
            network.config.update({**labels, _RECORD_KEY: fields})
            network.save_pretrained(path)
        else:
            safetensors.torch.save_file(
                own_weights(student), os.path.join(path, _WEIGHTS), {"format": "pt", **record.to_metadata()}
            )
            config = {
                "model_type": "tmkd_ray",
                "architecture": record.model,
                "image_size": record.image_size,
                "num_labels": len(record.class_names),
                **labels,
                _RECORD_KEY: fields,
            }
            _write_json(os.path.join(path, "config.json"), config)
        _write_json(os.path.join(path, "preprocessor_config.json"), preprocessor_config(record))
        with open(os.path.join(path, "README.md"), "w", encoding="utf-8") as file:
            file.write(model_card(record))

    def read(self, path: str) -> ExportedModel:
        config_path = os.path.join(path, "config.json")
        try:
            with open(config_path, encoding="utf-8") as file:
                config = json.load(file)
        except (OSError, ValueError) as error:
            raise unreadable(path, "a folder with config.json", error) from error
        if not isinstance(config, dict) or not isinstance(config.get(_RECORD_KEY), dict):
            raise not_ours(path)
        record = ExportRecord.from_fields(config[_RECORD_KEY], config_path)
        weights = os.path.join(path, _WEIGHTS)
        if not os.path.isfile(weights):
            raise UserError(f"{path}: {_WEIGHTS} is missing; no other kind of weights is read")
        if record.model.startswith(_TRANSFORMERS):
            model = build_model(_TRANSFORMERS + path, record.task())
            network = StudentNetwork(model, record.output_name).eval().requires_grad_(False)
            return ExportedModel(record, network, network=network)
        try:
            state = safetensors.torch.load_file(weights)
        except Exception as error:  # a broken file makes the reader raise anything
            raise unreadable(weights, "safetensors", error) from error
        return run_with_weights(record, state, weights)


def preprocessor_config(record: ExportRecord) -> dict[str, Any]:
    """Return transformers' description of the preprocessing.

    Crop and normalisation are the project's own; transformers scales bicubically also when shrinking, where the
    project takes means over areas, and scales before it crops. An image of the right size comes out the same.
    """
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": record.image_size},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": record.image_size, "width": record.image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(record.mean),
        "image_std": list(record.std),
    }


def _write_json(path: str, content: Any) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
