"""`tmkd export` and `tmkd predict`: a trained student as a file for others, and such a file at work."""

import argparse
import json
import os
import sys
from typing import TYPE_CHECKING, Any

from tmkd_ray.commands.base import COMMANDS, Command
from tmkd_ray.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from tmkd_ray.datasets.decode import SetAside
    from tmkd_ray.export import ExportedModel
    from tmkd_ray.export.images import ReadImages
    from tmkd_ray.export.student import FoundStudent

FORMATS = {
    "hf": "a folder for Hugging Face's hub, with preprocessor_config.json and a model card",
    "onnx": "a graph for ONNX Runtime and others, with a dynamic batch and metadata",
    "pt2": "a program for torch.export.load, with a dynamic batch",
    "safetensors": "weights with metadata, read without running code; the network is built by tmkd_ray",
    "torchscript": "a traced program for torch.jit.load (deprecated by PyTorch; for C++ and mobile)",
    "torchvision": "a .pth in torchvision's own state-dict names, for students torchvision/NAME",
}
"""What `EXPORTERS` holds, which takes a second to import; a test compares them."""

NUM_PARITY_IMAGES = 64
PREDICTED_AT_ONCE = 256
"""Images that are held decoded; a folder may hold any number."""


@COMMANDS.register("export")
class Export(Command):
    description = "write a trained student as a file that other programs run, checked against the student"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "run", metavar="RUN_OR_STUDENT", help="a run's folder, or a student's model.safetensors"
        )
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        listing = "\n".join(f"  {name:12} {description}" for name, description in FORMATS.items())
        parser.epilog = f"formats:\n{listing}"
        parser.add_argument("--format", required=True, choices=FORMATS, help="see below")
        parser.add_argument("--out", metavar="PATH", help="default: in the folder exports of the run")
        parser.add_argument("--method", help="of the run; default: that of the config's `distiller`")
        parser.add_argument("--seed", type=int, help="of the run; default: the lowest")
        parser.add_argument(
            "--images",
            nargs="+",
            metavar="PATH",
            help="images or folders to compare student and file on; default: the run's validation images",
        )
        parser.add_argument(
            "--tolerance", type=float, help="largest difference of a logit that is right; default: the format's"
        )
        parser.add_argument(
            "--quantize",
            choices=("int8",),
            help="with --format onnx: an int8 file beside it, its validation accuracy measured",
        )

    def __call__(self, options: argparse.Namespace) -> int:
        from tmkd_ray import storage
        from tmkd_ray.export import EXPORTERS
        from tmkd_ray.export.exporting import export_student
        from tmkd_ray.export.quantization import check_quantizable
        from tmkd_ray.export.student import find_student

        if options.quantize is not None and options.format != "onnx":
            raise UserError("--quantize int8 is ONNX Runtime's: give it with --format onnx")
        if options.tolerance is not None and not options.tolerance >= 0:
            raise UserError("--tolerance is a difference of logits, at least 0")
        found = find_student(options.run, options.method, options.seed)
        exporter = EXPORTERS.get(options.format)()
        exporter.check(found.student.record)
        if options.quantize is not None:
            check_quantizable(found.student)
            if found.config is None:
                raise UserError("--quantize measures on the run's validation images: give the run's folder")
        out = options.out or default_path(found, exporter.suffix or "-hf")
        if exporter.suffix and not out.endswith(exporter.suffix):
            raise UserError(f"--out {out}: a file of the format {options.format} ends in {exporter.suffix}")
        out = storage.absolute(out)
        images = _parity_images(found, options.images)
        parity = export_student(found.student, exporter, out, images, options.tolerance)
        record = found.student.record
        what = "encoder (trained without labels: no classifier)" if record.kind == "encoder" else "student"
        print(f"{out}: {what} {record.model}, {record.parameters:,} parameters\n{parity}")
        if options.quantize is not None:
            _quantize(found, out)
        return 0


def default_path(found: "FoundStudent", suffix: str) -> str:
    """Return where an export goes: into the run's folder, or beside the exported file."""
    from tmkd_ray import storage

    if found.folder is not None:
        return storage.join(found.folder, "exports", found.name + suffix)
    return storage.join(os.path.dirname(found.path), found.name + suffix)


def _parity_images(found: "FoundStudent", paths: list[str] | None) -> "np.ndarray":
    from tmkd_ray.export.images import dataset_images, list_images, read_images

    if paths is not None:
        files = list_images(paths)[:NUM_PARITY_IMAGES]
        return read_images(files, found.student.record.image_size).images
    if found.config is None:
        raise UserError(
            "an exported file does not say where its data lies: give --images, real ones to compare on"
        )
    return dataset_images(found.config, "validation", NUM_PARITY_IMAGES).images


def _quantize(found: "FoundStudent", source: str) -> None:
    from tmkd_ray.export.images import dataset_images
    from tmkd_ray.export.quantization import NUM_CALIBRATION_IMAGES, quantize_onnx

    assert found.config is not None
    out = source.removesuffix(".onnx") + "-int8.onnx"
    calibration = dataset_images(found.config, "train", NUM_CALIBRATION_IMAGES).images
    validation = dataset_images(found.config, "validation")
    outcome = quantize_onnx(found.student, source, out, calibration, validation)
    print(f"{out}: int8 (static, calibrated on {len(calibration)} training images)\n{outcome}")


@COMMANDS.register("predict")
class Predict(Command):
    description = "classify images with an exported file; needs neither the run nor its data"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "model",
            metavar="MODEL",
            help="what `tmkd export` wrote; .pt and .pt2 files hold programs: open only those that you trust",
        )
        parser.add_argument("images", nargs="+", metavar="IMAGE_OR_FOLDER")
        parser.add_argument(
            "--top", type=int, default=5, help="classes to tell, most probable first; default: 5"
        )
        parser.add_argument("--json", action="store_true", help="print JSON; an encoder's features, too")

    def __call__(self, options: argparse.Namespace) -> int:
        from tmkd_ray import storage
        from tmkd_ray.export.images import decode_files, list_images, none_decoded
        from tmkd_ray.export.reading import format_of, load_exported
        from tmkd_ray.progress import Rate

        if options.top < 1:
            raise UserError(f"--top is at least 1, not {options.top}")
        files = list_images(options.images)
        if format_of(storage.absolute(options.model)).runs_code:
            print(f"note: {options.model} holds a program; open only files that you trust", file=sys.stderr)
        model = load_exported(options.model)
        if model.record.kind == "encoder" and not options.json:
            raise UserError(
                f"{options.model} is an encoder, trained without labels: it knows no classes. --json prints "
                "its features"
            )
        predictions: list[dict[str, Any]] = []
        set_aside: list[SetAside] = []
        progress = Rate("predict", len(files), "images", quiet_if_short=True)
        for start in range(0, len(files), PREDICTED_AT_ONCE):
            read = decode_files(files[start : start + PREDICTED_AT_ONCE], model.record.image_size)
            set_aside += read.set_aside
            new = _predictions(model, read, options.top) if read.paths else []
            if options.json:
                predictions += new
            else:
                _print_predictions(new)
            progress.advance(len(read.paths) + len(read.set_aside))
        if len(set_aside) == len(files):
            raise none_decoded(set_aside)
        if options.json:
            unread = [{"image": entry.id, "error": entry.reason} for entry in set_aside]
            print(json.dumps(predictions + unread, indent=1, ensure_ascii=False))
        for entry in set_aside:
            print(f"{entry.id}: cannot be decoded: {entry.reason}", file=sys.stderr)
        return 1 if set_aside else 0


def _print_predictions(predictions: list[dict[str, Any]]) -> None:
    for prediction in predictions:
        classes = prediction["predictions"]
        told = ", ".join(f"{each['class']} {100 * each['probability']:.1f} %" for each in classes)
        print(f"{prediction['image']}: {told}")


def _predictions(model: "ExportedModel", read: "ReadImages", top: int) -> list[dict[str, Any]]:
    outputs = model(read.images)
    if not outputs.isfinite().all():
        raise UserError("the model returned NaN or infinite values; is the file damaged?")
    if model.record.kind == "encoder":
        return [
            {"image": path, "feature": feature.tolist()}
            for path, feature in zip(read.paths, outputs, strict=True)
        ]
    names = model.record.class_names
    probabilities, labels = outputs.softmax(1).topk(min(top, len(names)))
    return [
        {
            "image": path,
            "predictions": [
                {"class": names[label], "label": label, "probability": round(probability, 6)}
                for label, probability in zip(label_K, probability_K, strict=True)
            ],
        }
        for path, label_K, probability_K in zip(
            read.paths, labels.tolist(), probabilities.tolist(), strict=True
        )
    ]
