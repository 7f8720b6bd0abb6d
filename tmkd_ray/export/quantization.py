"""int8 by ONNX Runtime: weights per channel, activations by calibration on training images (static QDQ).

Quantised is what ONNX Runtime quantises in a graph of convolutions; the input stays float32.
B. Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
CVPR 2018 (arXiv 1712.05877).
"""

import logging
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from tmkd_ray import storage
from tmkd_ray.datasets.decode import LoadedImages
from tmkd_ray.errors import UserError
from tmkd_ray.export.base import EXPORTERS, ExportedModel, Student, require_packages
from tmkd_ray.export.exporting import publish
from tmkd_ray.export.onnx_graph import INPUT_NAME
from tmkd_ray.progress import say
from tmkd_ray.teachers.pixels import Normalize

NUM_CALIBRATION_IMAGES = 256
_CALIBRATION_BATCH = 32


@dataclass(frozen=True)
class QuantizationOutcome:
    """What int8 costs: accuracies in 0..1 on the same validation images, by ONNX Runtime both.

    Attributes:
        agreement: how often both have the same first class.
        float32_bytes, int8_bytes: sizes of the files.
    """

    float32_accuracy: float
    int8_accuracy: float
    agreement: float
    num_images: int
    float32_bytes: int
    int8_bytes: int

    def __str__(self) -> str:
        return (
            f"validation accuracy, {self.num_images:,} images: float32 {100 * self.float32_accuracy:.2f} %, "
            f"int8 {100 * self.int8_accuracy:.2f} % (same first class on {100 * self.agreement:.2f} %); "
            f"{self.float32_bytes / 1e6:.2f} → {self.int8_bytes / 1e6:.2f} MB"
        )


def quantize_onnx(
    student: Student, source: str, out: str, calibration: np.ndarray, validation: LoadedImages
) -> QuantizationOutcome:
    """Quantise an exported ONNX file and measure what it costs.

    Args:
        source: the float32 file. out: the int8 file, written whole or not at all.
        calibration: uint8 [N, H, W, 3], training images.

    Raises:
        UserError: the student has no classes to measure an accuracy by, or a package is missing.
    """
    check_quantizable(student)
    onnx_format = EXPORTERS.get("onnx")()
    with tempfile.TemporaryDirectory(prefix="tmkd-") as folder, storage.local_copy(source) as local:
        original = onnx_format.read(local)
        target = os.path.join(folder, "checked", os.path.basename(out))
        os.mkdir(os.path.dirname(target))
        say(f"export: calibrating int8 on {len(calibration)} training images")
        _quantize(local, target, folder, _batches(student, calibration))
        _write_record(target, student.record.model_copy(update={"precision": "int8"}).to_metadata())
        outcome = _compare(original, onnx_format.read(target), validation, local, target)
        figures = {f"float32_{name}": value for name, value in student.record.figures.items()} | {
            "float32_validation_accuracy": outcome.float32_accuracy,
            "int8_validation_accuracy": outcome.int8_accuracy,
        }
        record = student.record.model_copy(update={"precision": "int8", "figures": figures})
        _write_record(target, record.to_metadata())
        publish(os.path.dirname(target), os.path.dirname(storage.absolute(out)))
    return outcome


def check_quantizable(student: Student) -> None:
    """Refuse what cannot be quantised, before anything is computed."""
    require_packages("--quantize", "onnx", "onnxruntime")
    if student.record.kind == "encoder":
        raise UserError(
            "--quantize int8 is for classifiers: an encoder has no accuracy that says what int8 costs"
        )


def _quantize(source: str, target: str, folder: str, batches: list[np.ndarray]) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.remaining: Iterator[np.ndarray] = iter(batches)

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.remaining, None)
            return None if batch is None else {INPUT_NAME: batch}

    prepared = os.path.join(folder, "prepared.onnx")
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it logs advice by the root logger
    try:
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            target,
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            # Unsigned activations are what ONNX Runtime is fastest with on x86; there, without VNNI, sums of
            # two products saturate unless the weights keep to seven bits.
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            reduce_range=True,
        )
    finally:
        root.setLevel(level)


def _batches(student: Student, images_NHWC: np.ndarray) -> list[np.ndarray]:
    normalize = Normalize(student.record.mean, student.record.std)
    batches = torch.split(torch.from_numpy(images_NHWC), _CALIBRATION_BATCH)
    return [normalize(batch).contiguous().numpy() for batch in batches]


def _write_record(path: str, metadata: dict[str, str]) -> None:
    import onnx

    model = onnx.load(path)
    onnx.helper.set_model_props(model, metadata)
    onnx.save(model, path)


def _compare(
    original: ExportedModel, quantized: ExportedModel, validation: LoadedImages, source: str, target: str
) -> QuantizationOutcome:
    float32_N = original(validation.images, label="export, accuracy of float32").argmax(1).numpy()
    int8_N = quantized(validation.images, label="export, accuracy of int8").argmax(1).numpy()
    return QuantizationOutcome(
        float32_accuracy=float((float32_N == validation.labels).mean()),
        int8_accuracy=float((int8_N == validation.labels).mean()),
        agreement=float((float32_N == int8_N).mean()),
        num_images=len(validation.labels),
        float32_bytes=os.path.getsize(source),
        int8_bytes=os.path.getsize(target),
    )
