"""`tmkd predict`: from each format the same classes, and from bad files a clear word."""

import json

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from tmkd_ray.cli import main
from tmkd_ray.datasets.decode import resize_to_square
from tmkd_ray.export import EXPORTERS
from tmkd_ray.export.exporting import export_student
from tmkd_ray.export.images import list_images, read_images
from tmkd_ray.export.student import find_student

FORMATS = ("hf", "onnx", "pt2", "safetensors", "torchscript")


@pytest.fixture(scope="module")
def files(run_folder, tmp_path_factory):
    """The student of the run in a format."""
    folder = tmp_path_factory.mktemp("predict")
    student = find_student(str(run_folder)).student
    images = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)
    paths = {}
    for name in FORMATS:
        exporter = EXPORTERS.get(name)()
        paths[name] = str(folder / f"student{exporter.suffix}")
        export_student(student, exporter, paths[name], images)
    return paths


@pytest.fixture
def expected(run_folder, digit_files):
    """The student's own probabilities [12, 10], computed in NumPy from its logits."""
    student = find_student(str(run_folder)).student
    pixels = [resize_to_square(np.asarray(Image.open(path)), 32) for path in sorted(digit_files.iterdir())]
    inputs = (np.stack(pixels).transpose(0, 3, 1, 2) / 255.0 - 0.309) / 0.349
    with torch.no_grad():
        logits = student.model(torch.from_numpy(inputs.astype(np.float32))).logits.double().numpy()
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_predicts_as_the_student(files, digit_files, expected, capsys, monkeypatch, name):
    monkeypatch.setattr("tmkd_ray.commands.export.PREDICTED_AT_ONCE", 5)  # of 12
    assert main(["predict", files[name], str(digit_files), "--json", "--top", "3"]) == 0
    out, err = capsys.readouterr()
    predictions = json.loads(out)
    assert [entry["image"] for entry in predictions] == [str(path) for path in sorted(digit_files.iterdir())]
    names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    for entry, row in zip(predictions, expected, strict=True):
        assert [each["label"] for each in entry["predictions"]] == np.argsort(-row)[:3].tolist()
        for each in entry["predictions"]:
            assert each["class"] == names[each["label"]]
            assert each["probability"] == pytest.approx(row[each["label"]], abs=1e-4)
    assert ("holds a program" in err) == (name in ("pt2", "torchscript"))


def test_plain_output_and_more_classes_than_there_are(files, digit_files, expected, capsys):
    image = sorted(digit_files.iterdir())[0]
    assert main(["predict", files["safetensors"], str(image), "--top", "99"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{image}: ")
    assert line.count("%") == 10
    assert f" {100 * expected[0].max():.1f} %, " in line


def test_what_cannot_be_decoded_is_told_and_the_rest_predicted(files, digit_files, tmp_path, capsys):
    broken = tmp_path / "broken.png"
    broken.write_bytes(sorted(digit_files.iterdir())[0].read_bytes()[:60])
    arguments = ["predict", files["safetensors"], str(broken), str(digit_files)]
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 12
    assert f"{broken}: cannot be decoded: " in err
    assert main([*arguments, "--json"]) == 1
    entries = json.loads(capsys.readouterr().out)
    assert [entry["image"] for entry in entries if "error" in entry] == [str(broken)]
    assert main(["predict", files["safetensors"], str(broken)]) == 2
    assert "none of the 1 files can be decoded" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.onnx", "{digits}"], "there is no file or folder"),
        (["{model}", "nowhere.png"], "there is no file or folder nowhere.png"),
        (["{model}", "{empty}"], "the folder holds no image"),
        (["{model}", "{digits}", "--top", "0"], "--top is at least 1, not 0"),
    ],
)
def test_wrong_arguments(files, digit_files, tmp_path, capsys, arguments, message):
    (tmp_path / "notes.txt").write_text("no image")
    places = {"model": files["safetensors"], "digits": digit_files, "empty": tmp_path}
    assert main(["predict", *(argument.format(**places) for argument in arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err


def test_an_encoder_prints_features_as_json_only(run_folder, digit_files, tmp_path, capsys):
    student = find_student(str(run_folder)).student
    record = student.record.model_copy(update={"kind": "encoder", "class_names": ()})
    path = str(tmp_path / "encoder.safetensors")
    files = list_images([str(digit_files)])
    images = read_images(files, 32).images
    export_student(type(student)(student.model, record), EXPORTERS.get("safetensors")(), path, images)
    assert main(["predict", path, str(digit_files)]) == 2
    assert "knows no classes. --json prints its features" in capsys.readouterr().err
    assert main(["predict", path, str(digit_files), "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert [len(entry["feature"]) for entry in entries] == [64] * 12


def test_nan_is_no_prediction(run_folder, digit_files, tmp_path, capsys):
    student = find_student(str(run_folder)).student
    state = {name: tensor.clone() for name, tensor in student.model.state_dict().items()}
    state["fc.bias"][3] = float("nan")
    safetensors.torch.save_file(state, tmp_path / "nan.safetensors", student.record.to_metadata())
    assert main(["predict", str(tmp_path / "nan.safetensors"), str(digit_files)]) == 2
    assert "returned NaN or infinite values" in capsys.readouterr().err
