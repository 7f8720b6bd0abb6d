"""Which student of a run is taken, and what is refused."""

import json
import shutil

import pytest
import safetensors.torch
import torch

from tmkd_ray.cli import main
from tmkd_ray.config_reading import dump_config, read_config
from tmkd_ray.errors import UserError
from tmkd_ray.export import EXPORTERS
from tmkd_ray.export.exporting import export_student
from tmkd_ray.export.student import find_student
from tmkd_ray.export.teacher import find_teacher
from tmkd_ray.models.view_batch_norm import use_view_statistics


@pytest.fixture
def run_copy(run_folder, tmp_path):
    """A run's folder to change; it may be moved, for it does not hold its own path where that is read."""
    return shutil.copytree(run_folder, tmp_path / "digits-run")


def first_weight(found) -> torch.Tensor:
    return found.student.model.state_dict()["conv1.weight"]


def test_seed_method_folder_and_file_name_a_student(run_folder):
    zero, one = find_student(str(run_folder)), find_student(str(run_folder), seed=1)
    assert (zero.student.record.seed, one.student.record.seed) == (0, 1)
    assert (zero.name, one.name) == ("tmkd-seed0", "tmkd-seed1")
    assert not torch.equal(first_weight(zero), first_weight(one))
    folder = next(run_folder.glob("students/tmkd-seed1-*"))
    for path in (folder, folder / "model.safetensors"):
        again = find_student(str(path))
        assert torch.equal(first_weight(again), first_weight(one))
        assert again.student.record == one.student.record


def test_an_exported_file_is_a_student_too(run_folder, tmp_path, digit_images):
    original = find_student(str(run_folder)).student
    path = str(tmp_path / "a.safetensors")
    export_student(original, EXPORTERS.get("safetensors")(), path, digit_images)
    found = find_student(path)
    assert found.student.record == original.record
    assert (found.config, found.folder, found.name) == (None, None, "tmkd-seed0")
    assert torch.equal(found.student.model.state_dict()["fc.bias"], original.model.state_dict()["fc.bias"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "kd"}, "no student of the method 'kd'; there are: tmkd"),
        ({"seed": 7}, "no student of tmkd with seed 7; seeds: 0, 1"),
    ],
)
def test_students_that_are_not_there(run_folder, arguments, message):
    with pytest.raises(UserError, match=message):
        find_student(str(run_folder), **arguments)


def test_places_that_are_no_run(tmp_path):
    with pytest.raises(UserError, match="neither a run's folder nor a student's weights"):
        find_student(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"is no run's folder: it holds no config\.yaml"):
        find_student(str(tmp_path))
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "alone.safetensors")
    with pytest.raises(UserError, match="holds weights alone, and lies in no run's folder"):
        find_student(str(tmp_path / "alone.safetensors"))


def test_a_run_without_finished_students(run_copy):
    for path in run_copy.glob("students/*/outcome.json"):
        path.unlink()
    with pytest.raises(UserError, match="holds no finished student"):
        find_student(str(run_copy))


def test_several_methods_and_none_is_the_configurations_own(run_copy):
    folder = next(run_copy.glob("students/tmkd-seed1-*"))
    folder.rename(folder.with_name("kd-seed1-000000000001"))
    next(run_copy.glob("students/tmkd-seed0-*")).rename(run_copy / "students" / "alone-seed0-000000000000")
    with pytest.raises(UserError, match="several students; say --method alone or kd"):
        find_student(str(run_copy))
    found = find_student(str(run_copy), "kd")
    assert (found.student.record.method, found.student.record.seed) == ("kd", 1)
    # The results are of tmkd: of this one only its own outcome is known.
    assert set(found.student.record.figures) == {"validation_accuracy"}


def test_of_two_trainings_of_one_seed_the_measured_one_is_taken(run_copy):
    measured = next(run_copy.glob("students/tmkd-seed0-*"))
    other = shutil.copytree(measured, measured.with_name("tmkd-seed0-ffffffffffff"))
    with pytest.raises(UserError, match="several students of tmkd seed 0; give the folder of one"):
        find_student(str(run_copy))
    outcome = json.loads((other / "outcome.json").read_text())
    (other / "outcome.json").write_text(json.dumps(outcome | {"seconds": 99.0}))
    assert find_student(str(run_copy)).path == str(measured / "model.safetensors")


def test_a_student_trained_without_labels_is_an_encoder(run_copy):
    folder = next(run_copy.glob("students/tmkd-seed0-*"))
    safetensors.torch.save_file({"0.weight": torch.zeros(1)}, folder / "projector.safetensors")
    record = find_student(str(run_copy)).student.record
    assert (record.kind, record.class_names, record.output_name, record.output_width) == (
        "encoder",
        (),
        "feature",
        64,
    )
    assert record.parameters == 78_042 - 650, "without the classifier, 64 × 10 + 10"
    accuracy = json.loads((folder / "outcome.json").read_text())["validation_accuracy"]
    assert record.figures == {"zero_shot_validation_accuracy": accuracy}
    assert record.accuracy() is None


def test_damaged_outcome_and_results(run_copy):
    folder = next(run_copy.glob("students/tmkd-seed0-*"))
    (folder / "outcome.json").write_text("{")
    with pytest.raises(UserError, match=r"outcome\.json is damaged"):
        find_student(str(run_copy))


def test_the_teacher_of_a_run(run_folder, run_copy):
    teacher = find_teacher(str(run_folder))
    assert (teacher.record.model, teacher.record.accuracy()) == ("resnet14", (0.9375, "test"))
    shutil.rmtree(run_copy / "teacher-0123456789ab")
    with pytest.raises(UserError, match="0 fitted visual teachers are there"):
        find_teacher(str(run_copy))
    with pytest.raises(UserError, match="no run's folder"):
        find_teacher(str(run_copy / "students"))


def test_an_adapted_teacher_is_the_adapted_one(run_folder, run_copy, digit_images):
    """Not the checkpoint that the configuration gives: the one that lies in the run's folder."""
    plain = find_teacher(str(run_folder)).model
    file = run_copy / "teacher-0123456789ab" / "model.safetensors"
    given = run_copy / "given.safetensors"
    shutil.copy(file, given)
    text = (run_copy / "config.yaml").read_text()
    config = read_config(run_copy / "config.yaml")
    visual = config.teacher.visual.model_copy(update={"checkpoint": str(given), "adapt": "statistics"})
    teacher = config.teacher.model_copy(update={"visual": visual})
    (run_copy / "config.yaml").write_text(dump_config(config.model_copy(update={"teacher": teacher})))
    assert (run_copy / "config.yaml").read_text() != text
    use_view_statistics(plain.inner, len(config.views))
    weights = plain.inner.state_dict()
    for name in weights:
        if "running_mean" in name:
            weights[name] = weights[name] + 1.0
    safetensors.torch.save_file(weights, file)
    plain.inner.load_state_dict(weights)
    adapted = find_teacher(str(run_copy)).model
    images = torch.from_numpy(digit_images[:4]).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        assert torch.equal(adapted(images).logits, plain(images).logits)


# tmkd export


def test_the_command_writes_into_the_runs_folder(run_copy, capsys):
    assert main(["export", str(run_copy), "--format", "safetensors", "--seed", "1"]) == 0
    out = capsys.readouterr().out
    path = run_copy / "exports" / "tmkd-seed1.safetensors"
    assert path.exists()
    assert f"{path}: student resnet8, 78,042 parameters\n" in out
    assert "largest difference to the student 0 (outputs up to " in out
    assert "64 images)" in out
    # And on, from the file alone: with images that are given.
    assert main(["export", str(path), "--format", "torchscript"]) == 2
    assert "give --images" in capsys.readouterr().err


def test_the_command_converts_a_file_with_images_of_ones_own(run_copy, digit_files, capsys):
    source = str(run_copy / "exports" / "tmkd-seed0.safetensors")
    assert main(["export", str(run_copy), "--format", "safetensors"]) == 0
    assert main(["export", source, "--format", "torchscript", "--images", str(digit_files)]) == 0
    assert "12 images)" in capsys.readouterr().out
    assert (run_copy / "exports" / "tmkd-seed0.pt").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--format", "pt2", "--quantize", "int8"],
            "--quantize int8 is ONNX Runtime's: give it with --format onnx",
        ),
        (["--format", "onnx", "--out", "x.bin"], "--out x.bin: a file of the format onnx ends in .onnx"),
        (["--format", "torchvision"], "torchvision has no model resnet8"),
        (["--format", "safetensors", "--tolerance", "-1"], "--tolerance is a difference"),
        (["--format", "safetensors", "--images", "nowhere"], "there is no file or folder nowhere"),
    ],
)
def test_the_command_refuses(run_folder, capsys, arguments, message):
    assert main(["export", str(run_folder), *arguments]) == 2
    assert message in capsys.readouterr().err
