"""int8: accuracy measured on real images, beside float32's, and kept in the file."""

import json
import shutil

import onnx
import onnxruntime
import pytest
import safetensors.torch
import torch

from tmkd_ray.cli import main
from tmkd_ray.export import load_exported
from tmkd_ray.export.images import dataset_images
from tmkd_ray.export.student import find_student


@pytest.fixture(scope="module")
def quantized(run_folder, tmp_path_factory):
    """Folder with student.onnx and student-int8.onnx, and what the command printed."""
    folder = tmp_path_factory.mktemp("int8")
    capture = pytest.MonkeyPatch()
    printed: list[str] = []
    capture.setattr("builtins.print", lambda *values, **_: printed.append(" ".join(map(str, values))))
    code = main(
        ["export", str(run_folder), "--format", "onnx", "--quantize", "int8", "--out", f"{folder}/a.onnx"]
    )
    capture.undo()
    assert code == 0
    return folder, "\n".join(printed)


def test_the_figures_are_those_of_the_files(quantized, run_folder):
    folder, printed = quantized
    config = find_student(str(run_folder)).config
    assert config is not None
    validation = dataset_images(config, "validation")
    right = {}
    for name in ("a", "a-int8"):
        session = onnxruntime.InferenceSession(str(folder / f"{name}.onnx"))
        pixels = (validation.images.transpose(0, 3, 1, 2) / 255.0 - 0.309) / 0.349
        (logits,) = session.run(None, {"images": pixels.astype("float32")})
        right[name] = float((logits.argmax(1) == validation.labels).mean())
    assert right["a"] > 0.6, "a student that knows nothing would lose nothing"
    # These features are random, and their classifier's weights large: int8 costs them more than trained ones.
    assert right["a-int8"] > right["a"] - 0.15
    figures = load_exported(str(folder / "a-int8.onnx")).record.figures
    measured = figures["float32_validation_accuracy"], figures["int8_validation_accuracy"]
    # The normalisation here rounds otherwise in the last bit, which may turn a pixel's quantised value.
    few = 2.5 / len(validation.labels)
    assert measured == pytest.approx((right["a"], right["a-int8"]), abs=few)
    assert f"float32 {100 * measured[0]:.2f} %, int8 {100 * measured[1]:.2f} %" in printed
    assert "calibrated on 256 training images" in printed
    assert figures["float32_test_accuracy"] == 0.8125
    assert "test_accuracy" not in figures, "nobody measured int8 on the test images"


def test_the_record_says_int8_and_its_own_accuracy(quantized):
    folder, _ = quantized
    record = load_exported(str(folder / "a-int8.onnx")).record
    assert record.precision == "int8"
    assert record.accuracy() == (record.figures["int8_validation_accuracy"], "validation")
    assert load_exported(str(folder / "a.onnx")).record.precision == "float32"


def test_weights_are_int8_and_the_batch_stays_dynamic(quantized):
    folder, _ = quantized
    model = onnx.load(folder / "a-int8.onnx")
    types = [tensor.data_type for tensor in model.graph.initializer if len(tensor.dims) == 4]
    assert types
    assert set(types) == {onnx.TensorProto.INT8}
    session = onnxruntime.InferenceSession(str(folder / "a-int8.onnx"))
    assert isinstance(session.get_inputs()[0].shape[0], str)
    assert (folder / "a-int8.onnx").stat().st_size < 0.6 * (folder / "a.onnx").stat().st_size


def test_what_cannot_be_quantised(run_folder, tmp_path, digit_files, capsys):
    copy = shutil.copytree(run_folder, tmp_path / "digits-run")
    assert main(["export", str(copy), "--format", "safetensors"]) == 0
    alone = str(copy / "exports" / "tmkd-seed0.safetensors")
    arguments = ["--format", "onnx", "--quantize", "int8", "--images", str(digit_files)]
    assert main(["export", alone, *arguments]) == 2
    assert "give the run's folder" in capsys.readouterr().err
    folder = next(copy.glob("students/tmkd-seed0-*"))
    safetensors.torch.save_file({"0.weight": torch.zeros(1)}, folder / "projector.safetensors")
    assert main(["export", str(copy), *arguments]) == 2
    assert "an encoder has no accuracy" in capsys.readouterr().err
    assert not list(copy.glob("exports/*.onnx"))


def test_metadata_survives_quantisation(quantized):
    folder, _ = quantized
    props = {entry.key: entry.value for entry in onnx.load(folder / "a-int8.onnx").metadata_props}
    assert json.loads(props["class_names"])[3] == "three"
