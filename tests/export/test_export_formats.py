"""Every format: what is in the file, that it computes what the student computes, and that it says so."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors
import torch
import torchvision
import transformers

from tmkd_ray.commands.export import FORMATS
from tmkd_ray.errors import UserError
from tmkd_ray.export import EXPORTERS, ExportRecord, load_exported
from tmkd_ray.export.base import ExportedModel, Student
from tmkd_ray.export.exporting import export_student, measure_parity
from tmkd_ray.export.student import find_student
from tmkd_ray.teachers.pixels import Normalize

TAKES_CIFAR_ZOO = ("hf", "onnx", "pt2", "safetensors", "torchscript")


@pytest.fixture(scope="module")
def student(run_folder) -> Student:
    return find_student(str(run_folder)).student


@pytest.fixture(scope="module")
def vision_student(torchvision_run) -> Student:
    return find_student(str(torchvision_run)).student


@pytest.fixture(scope="module")
def exported(student, tmp_path_factory):
    """Export once in a format; return the path."""
    folder = tmp_path_factory.mktemp("exported")
    images = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)
    done: dict[str, str] = {}

    def exported(name):
        if name not in done:
            exporter = EXPORTERS.get(name)()
            done[name] = str(folder / f"student{exporter.suffix}")
            export_student(student, exporter, done[name], images)
        return done[name]

    return exported


def own_logits(student: Student, images_NHWC: np.ndarray) -> np.ndarray:
    """The student's logits, the normalisation written out in NumPy."""
    record = student.record
    pixels = (images_NHWC / 255.0 - np.array(record.mean)) / np.array(record.std)
    inputs = torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(np.float32))
    with torch.no_grad():
        return student.model(inputs).logits.numpy()


def test_the_command_line_knows_every_format():
    assert {name: EXPORTERS.get(name).description for name in EXPORTERS} == FORMATS


def test_no_two_formats_share_a_suffix():
    suffixes = [EXPORTERS.get(name).suffix for name in EXPORTERS]
    assert len(set(suffixes)) == len(suffixes)


@pytest.mark.parametrize("name", TAKES_CIFAR_ZOO)
def test_a_file_computes_what_the_student_computes(exported, student, digit_images, name):
    model = load_exported(exported(name))
    expected = own_logits(student, digit_images)
    # Batches of several sizes, the last one cut short.
    for batch_size in (1, 6, 64):
        np.testing.assert_allclose(model(digit_images, batch_size).numpy(), expected, atol=1e-4)
    assert np.ptp(expected) > 1, "the logits must differ for this to say anything"


@pytest.mark.parametrize("name", TAKES_CIFAR_ZOO)
def test_the_record_comes_back_whole(exported, student, name):
    assert load_exported(exported(name)).record == student.record


def test_the_record_of_a_run(student, run_folder):
    record = student.record
    assert record.class_names[3] == "three"
    assert (record.model, record.kind, record.image_size) == ("resnet8", "classifier", 32)
    assert (record.run, record.method, record.seed, record.best_epoch) == ("digits-run", "tmkd", 0, 3)
    assert record.mean == (0.309, 0.309, 0.309)
    assert record.figures["test_accuracy"] == 0.8125
    assert record.figures["test_top5_accuracy"] == 0.96875
    outcome = json.loads(next(run_folder.glob("students/tmkd-seed0-*/outcome.json")).read_text())
    assert record.figures["validation_accuracy"] == outcome["validation_accuracy"] > 0.5
    assert record.accuracy() == (0.8125, "test")
    assert record.versions["torch"] == torch.__version__
    assert record.parameters == 78_042


# What other programs read, without a line of this project's code


def test_safetensors_holds_the_published_names_and_the_metadata(exported, student):
    with safetensors.safe_open(exported("safetensors"), "pt") as opened:
        metadata = opened.metadata()
        assert set(opened.keys()) == set(student.model.state_dict())
    assert json.loads(metadata["class_names"]) == list(student.record.class_names)
    assert json.loads(metadata["mean"]) == [0.309, 0.309, 0.309]
    assert json.loads(metadata["figures"])["test_accuracy"] == 0.8125
    assert metadata["model"] == "resnet8"
    assert "centred square" in metadata["preprocessing"]


def test_onnx_is_valid_and_says_what_it_takes(exported, student, digit_images):
    onnx.checker.check_model(exported("onnx"), full_check=True)
    session = onnxruntime.InferenceSession(exported("onnx"))
    (given,), (put_out,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.shape[1:], given.type) == ("images", [3, 32, 32], "tensor(float)")
    assert isinstance(given.shape[0], str), "the batch is dynamic"
    assert put_out.name == "logits"
    props = session.get_modelmeta().custom_metadata_map
    assert json.loads(props["class_names"])[9] == "nine"
    assert json.loads(props["image_size"]) == 32
    assert json.loads(props["std"]) == [0.349, 0.349, 0.349]


def test_programs_run_by_torch_alone(exported, tmp_path):
    code = f"""
import json, sys, torch
def scripted(extra):
    return torch.jit.load({exported("torchscript")!r}, _extra_files=extra)
def program(extra):
    return torch.export.load({exported("pt2")!r}, extra_files=extra).module()
for load in (scripted, program):
    extra = {{"tmkd.json": ""}}
    network = load(extra)
    assert network(torch.zeros(5, 3, 32, 32)).shape == (5, 10)
    assert json.loads(extra["tmkd.json"])["class_names"][0] == "zero"
assert not [name for name in sys.modules if name.startswith("tmkd_ray")]
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=tmp_path, timeout=200)


def card_code(folder) -> list[str]:
    """The Python in a model card."""
    with open(f"{folder}/README.md", encoding="utf-8") as file:
        return re.findall(r"```python\n(.*?)```", file.read(), re.DOTALL)


def test_the_hugging_face_folder(exported, student, digit_images, monkeypatch):
    folder = exported("hf")
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    pixels = processor(images=list(digit_images), return_tensors="np")["pixel_values"]
    expected = (digit_images.transpose(0, 3, 1, 2) / 255.0 - 0.309) / 0.349
    np.testing.assert_allclose(pixels, expected, atol=1e-5)

    with open(f"{folder}/config.json", encoding="utf-8") as file:
        config = json.load(file)
    assert config["id2label"]["4"] == "four"
    with open(f"{folder}/README.md", encoding="utf-8") as file:
        card = file.read()
    assert "81.25 %" in card
    assert "96.88 %" in card
    assert "resnet8 on digits" in card
    (code,) = card_code(folder)
    monkeypatch.chdir(folder)
    variables = {"images": digit_images}
    exec(code, variables)
    np.testing.assert_allclose(variables["outputs"].numpy(), own_logits(student, digit_images), atol=1e-4)


def test_the_card_of_a_torchvision_student_runs(vision_student, tmp_path, digit_images, monkeypatch):
    export_student(vision_student, EXPORTERS.get("hf")(), str(tmp_path / "card"), digit_images)
    monkeypatch.chdir(tmp_path / "card")
    theirs, ours = card_code(tmp_path / "card")
    inputs = torch.randn(3, 3, 32, 32)
    variables = {"pixel_values": inputs}
    exec(theirs, variables)
    with torch.no_grad():
        torch.testing.assert_close(variables["outputs"], vision_student.model(inputs).logits)
    variables = {"images": digit_images}
    exec(ours, variables)
    np.testing.assert_allclose(
        variables["outputs"].numpy(), own_logits(vision_student, digit_images), atol=1e-3
    )


def test_a_transformers_student(tmp_path, digit_images, monkeypatch):
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32,
        patch_size=8, num_labels=10, id2label={i: f"class {i}" for i in range(10)},
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "given")
    from tmkd_ray.models import build_model, count_parameters
    from tmkd_ray.types import TaskSpec

    name = f"transformers/{tmp_path}/given"
    names = tuple(f"class {i}" for i in range(10))
    model = build_model(name, TaskSpec(names, 32)).eval()
    record = ExportRecord(
        model=name, class_names=names, feature_width=32, image_size=32, mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5), parameters=count_parameters(model),
    )  # fmt: skip
    student = Student(model, record)
    with pytest.raises(UserError, match="--format hf"):
        export_student(student, EXPORTERS.get("safetensors")(), str(tmp_path / "x.safetensors"), digit_images)
    export_student(student, EXPORTERS.get("hf")(), str(tmp_path / "exported"), digit_images)
    export_student(student, EXPORTERS.get("onnx")(), str(tmp_path / "vit.onnx"), digit_images)
    monkeypatch.chdir(tmp_path / "exported")
    inputs = torch.randn(3, 3, 32, 32)
    variables = {"pixel_values": inputs}
    theirs, _ = card_code(".")
    exec(theirs, variables)
    with torch.no_grad():
        torch.testing.assert_close(variables["logits"], model(inputs).logits)
    # The folder it was trained from may be gone.
    (tmp_path / "given").rename(tmp_path / "gone")
    read = load_exported(str(tmp_path / "exported"))
    np.testing.assert_allclose(read(digit_images).numpy(), own_logits(student, digit_images), atol=1e-5)


# torchvision's names


def test_torchvision_takes_a_classifier(vision_student, tmp_path, digit_images):
    path = str(tmp_path / "student.pth")
    export_student(vision_student, EXPORTERS.get("torchvision")(), path, digit_images)
    network = torchvision.models.resnet18(num_classes=10)
    network.load_state_dict(torch.load(path, weights_only=True))  # strict
    inputs = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(inputs), vision_student.model(inputs).logits)
    read = load_exported(path)
    assert read.record == vision_student.record
    np.testing.assert_allclose(read(digit_images).numpy(), own_logits(vision_student, digit_images), atol=1e-3)
    (tmp_path / "student.json").unlink()
    with pytest.raises(UserError, match=r"student\.json is missing beside it"):
        load_exported(path)


def test_torchvision_has_no_cifar_zoo(student, tmp_path, digit_images):
    with pytest.raises(UserError, match="torchvision has no model resnet8"):
        export_student(student, EXPORTERS.get("torchvision")(), str(tmp_path / "x.pth"), digit_images)


@pytest.fixture(scope="module")
def encoder(vision_student) -> Student:
    record = vision_student.record.model_copy(update={"kind": "encoder", "class_names": (), "figures": {}})
    return Student(vision_student.model, record)


def test_torchvision_takes_an_encoder(encoder, tmp_path, digit_images):
    path = str(tmp_path / "encoder.pth")
    parity = export_student(encoder, EXPORTERS.get("torchvision")(), path, digit_images)
    assert parity.max_output > 0
    network = torchvision.models.resnet18()
    network.load_state_dict(torch.load(path, weights_only=True))  # strict
    assert network.fc.weight.shape == (1000, 512)
    assert not network.fc.weight.any()
    network.fc = torch.nn.Identity()
    inputs = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(inputs), encoder.model(inputs).feature)


@pytest.mark.parametrize("name", TAKES_CIFAR_ZOO)
def test_an_encoder_puts_out_its_feature(student, tmp_path, digit_images, name):
    record = student.record.model_copy(update={"kind": "encoder", "class_names": (), "figures": {}})
    exporter = EXPORTERS.get(name)()
    path = str(tmp_path / f"encoder{exporter.suffix}")
    export_student(Student(student.model, record), exporter, path, digit_images)
    model = load_exported(path)
    inputs = Normalize(record.mean, record.std)(torch.from_numpy(digit_images))
    with torch.no_grad():
        torch.testing.assert_close(model(digit_images), student.model(inputs).feature, atol=1e-4, rtol=0)
    assert model.record.output_name == "feature"
    if name == "safetensors":
        with safetensors.safe_open(path, "pt") as opened:
            assert not [key for key in opened.keys() if key.startswith("fc.")]  # noqa: SIM118 (no iterator)


# Parity


class Wrong(EXPORTERS.get("safetensors")):
    """Writes the student, and reads back one that adds `error` to its first logit on batches above `above`."""

    error = 0.01
    above = 0

    def read(self, path):
        right = super().read(path)

        def run(images):
            output = right.run(images).clone()
            output[0, 0] += self.error if len(images) > self.above else 0
            return output

        return ExportedModel(right.record, run)


@pytest.mark.parametrize("above", [0, 10])
def test_a_file_that_differs_is_refused_and_not_left(student, tmp_path, digit_images, above):
    exporter = Wrong()
    exporter.above = above
    with pytest.raises(
        UserError, match=r"not exported: largest difference to the student 0\.01 .*tolerance 1e-05"
    ):
        export_student(student, exporter, str(tmp_path / "x.safetensors"), digit_images)
    assert list(tmp_path.iterdir()) == []
    parity = export_student(student, exporter, str(tmp_path / "x.safetensors"), digit_images, tolerance=0.02)
    assert parity.max_difference == pytest.approx(0.01, abs=1e-5)
    assert (tmp_path / "x.safetensors").exists()


def test_nan_is_above_every_tolerance(student, tmp_path, digit_images):
    exporter = Wrong()
    exporter.error = float("nan")
    with pytest.raises(UserError, match="not exported: largest difference to the student inf"):
        export_student(student, exporter, str(tmp_path / "x.safetensors"), digit_images, tolerance=1e9)


def test_an_output_of_another_shape_is_refused(student, digit_images):
    wrong = ExportedModel(student.record, lambda images: torch.zeros(1, 10))
    with pytest.raises(UserError, match=r"puts out \[1, 10\] for 7 images, the student \[7, 10\]"):
        measure_parity(student, wrong, digit_images)


# Files that cannot be read


@pytest.mark.parametrize("name", TAKES_CIFAR_ZOO)
def test_a_damaged_file(exported, tmp_path, name):
    path = tmp_path / f"damaged{EXPORTERS.get(name).suffix}"
    if name == "hf":
        path.mkdir()
        for file in ("config.json", "model.safetensors"):
            content = Path(exported(name), file).read_bytes()
            (path / file).write_bytes(content if file == "config.json" else content[:5000])
    else:
        path.write_bytes(Path(exported(name)).read_bytes()[:5000])
    with pytest.raises(UserError, match=r"cannot read .*damaged.* as "):
        load_exported(str(path))


def test_files_of_others(tmp_path, student):
    torch.save({"a": torch.zeros(1)}, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match=r"cannot read .*checkpoint\.pt as TorchScript"):
        load_exported(str(tmp_path / "checkpoint.pt"))
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "plain.safetensors")
    with pytest.raises(UserError, match=r"plain\.safetensors does not say which classes"):
        load_exported(str(tmp_path / "plain.safetensors"))
    save_file({"a": torch.zeros(1)}, tmp_path / "lying.safetensors", student.record.to_metadata())
    with pytest.raises(
        UserError, match=r"lying\.safetensors: the weights are not those of resnet8: \d+ missing"
    ):
        load_exported(str(tmp_path / "lying.safetensors"))
    newer = student.record.to_metadata() | {"format_version": "2"}
    save_file({"a": torch.zeros(1)}, tmp_path / "newer.safetensors", newer)
    with pytest.raises(UserError, match=r"newer\.safetensors has format_version 2; this tmkd-ray reads 1"):
        load_exported(str(tmp_path / "newer.safetensors"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(UserError, match="folder does not say which classes"):
        load_exported(str(tmp_path / "folder"))
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"notes\.txt: unknown kind of model file; known: \.onnx \(onnx\)"):
        load_exported(str(tmp_path / "notes.txt"))
    with pytest.raises(UserError, match="there is no file or folder"):
        load_exported(str(tmp_path / "nowhere.onnx"))


def test_pickled_code_is_not_run(tmp_path, vision_student):
    class Harmful:
        def __reduce__(self):
            return (open, (str(tmp_path / "harm"), "w"))

    torch.save({"conv1.weight": Harmful()}, tmp_path / "harmful.pth")
    (tmp_path / "harmful.json").write_text(vision_student.record.model_dump_json())
    with pytest.raises(UserError, match=r"cannot read .*harmful\.pth"):
        load_exported(str(tmp_path / "harmful.pth"))
    assert not (tmp_path / "harm").exists()


def test_a_missing_extra_is_named(student, tmp_path, digit_images, monkeypatch):
    find_spec = __import__("importlib.util").util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "onnxscript" else find_spec(name)
    )
    with pytest.raises(UserError, match=r"needs the package onnxscript: pip install 'tmkd-ray\[export\]'"):
        export_student(student, EXPORTERS.get("onnx")(), str(tmp_path / "x.onnx"), digit_images)
