import json
import math
import os

import pytest
from pydantic import ValidationError

from tmkd_ray.errors import UserError
from tmkd_ray.results import DatasetRecord, EpochRecord, RunResults, SetAsideImage


def test_saving_and_loading_gives_the_same_results(make_results, tmp_path):
    results = make_results()
    path = tmp_path / "new folder" / "results.json"
    results.save(path)
    assert RunResults.load(path) == results
    # All of it: nothing a run measured may hide outside the file.
    stored = json.loads(path.read_text())
    assert set(stored) == set(RunResults.model_fields)
    assert stored["schema_version"] == 1


def test_the_file_is_sorted_and_indented(make_results, tmp_path):
    make_results().save(tmp_path / "results.json")
    text = (tmp_path / "results.json").read_text()
    assert text == json.dumps(json.loads(text), sort_keys=True, indent=2, ensure_ascii=False) + "\n"


@pytest.mark.parametrize("step", ["replace", "fsync"])
def test_a_failed_save_leaves_the_old_file_alone(make_results, tmp_path, monkeypatch, step):
    path = tmp_path / "results.json"
    make_results(name="old").save(path)
    before = path.read_bytes()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(UserError, match="disk full"):
        make_results(name="new").save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["results.json"]


def test_a_loss_that_is_not_finite_is_stored_as_null(make_results, make_method, tmp_path):
    diverged = EpochRecord(
        epoch=1,
        learning_rate=0.1,
        loss=math.nan,
        terms={"ce": math.inf, "kd": 2.0},
        validation_accuracy=0.1,
        seconds=1.0,
        images_per_second=1.0,
    )
    assert diverged.loss is None
    assert diverged.terms == {"ce": None, "kd": 2.0}
    alone = make_method("alone", [0.9])
    run = alone.runs[0].model_copy(update={"history": [diverged]})
    results = make_results(methods=[alone.model_copy(update={"runs": [run]})])
    results.save(tmp_path / "results.json")
    assert "NaN" not in (tmp_path / "results.json").read_text()
    assert RunResults.load(tmp_path / "results.json") == results


def test_results_from_before_the_calibration_was_measured_can_be_read(make_results, tmp_path):
    path = tmp_path / "results.json"
    make_results().save(path)
    content = json.loads(path.read_text())
    runs = [run for method in content["methods"] for run in method["runs"]]
    for record in (content["teacher"], *runs):
        for name in ("test_ece", "teacher_agreement", "teacher_kl", "per_class_accuracy"):
            assert record.pop(name, None) is None
    path.write_text(json.dumps(content))
    assert RunResults.load(path) == make_results()


def test_what_was_measured_on_the_test_images_is_kept(make_results, make_method, tmp_path):
    measured = {"test_ece": 0.03, "per_class_accuracy": [0.5, None, 1.0]}
    alone = make_method("alone", [0.9])
    run = alone.runs[0].model_copy(update={**measured, "teacher_agreement": 0.8, "teacher_kl": 1.5})
    results = make_results(methods=[alone.model_copy(update={"runs": [run]})])
    results.save(tmp_path / "results.json")
    loaded = RunResults.load(tmp_path / "results.json")
    assert loaded == results
    assert loaded.methods[0].runs[0].per_class_accuracy == [0.5, None, 1.0]


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.1, 1.1])
def test_an_accuracy_is_a_fraction(value):
    with pytest.raises(ValidationError, match="validation_accuracy"):
        EpochRecord(
            epoch=1, learning_rate=0.1, loss=1.0, validation_accuracy=value, seconds=1.0, images_per_second=1.0
        )


def test_an_infinite_setting_is_stored_as_text(make_results, tmp_path):
    results = make_results(config={"fusion": {"temperature": math.inf}, "grid": [1.0, -math.inf]})
    results.save(tmp_path / "results.json")
    assert RunResults.load(tmp_path / "results.json").config == {
        "fusion": {"temperature": "inf"},
        "grid": [1.0, "-inf"],
    }


def test_names_of_files_that_are_not_utf8_can_be_saved(make_results, tmp_path):
    image = os.fsdecode(b"caf\xe9.png")
    dataset = DatasetRecord(
        name="folder",
        class_names=["é", "猫", os.fsdecode(b"\xff")],
        num_train=3,
        num_validation=1,
        num_test=1,
        image_size=8,
        set_aside=[SetAsideImage(id=image, reason="no image")],
    )
    make_results(dataset=dataset).save(tmp_path / "results.json")
    loaded = RunResults.load(tmp_path / "results.json")
    assert loaded.dataset.set_aside[0].id == "caf\\udce9.png"
    assert loaded.dataset.class_names == ["é", "猫", "\\udcff"]


def test_mean_and_sample_standard_deviation(make_method):
    several = make_method("a", [0.90, 0.92, 0.94])
    assert several.split == "test"
    assert several.mean == pytest.approx(0.92)
    # ((.02)² + 0 + (.02)²) / 2 = .0004
    assert several.std == pytest.approx(0.02)
    assert several.mean_seconds == pytest.approx(20.0)
    assert make_method("b", [0.9]).std is None


def test_without_every_test_accuracy_the_validation_counts(make_results, make_method):
    read = make_method("read", [0.9, 0.92], [0.8, 0.84])
    unread = make_method("unread", [0.9, None], [0.7, 0.76])
    assert unread.split == "validation"
    assert unread.mean == pytest.approx(0.73)
    assert unread.std == pytest.approx(0.03 * math.sqrt(2))
    assert make_results(methods=[read, unread]).split == "validation"
    assert make_results(methods=[read]).split == "test"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"created": "2026-01-31T12:00:00+02:00"}, "UTC"),
        ({"created": "2026-01-31T12:00:00"}, "UTC"),
        ({"semantic_weights": [[0.5, 0.3, 0.2]]}, "expected 3 rows"),
        ({"semantic_weights": [[0.5, 0.5]] * 3}, "one column a view"),
        ({"semantic_weights": [[0.5, 0.3, 0.2], [0.5, 0.5], [1.0]]}, "equal length"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_parts_that_do_not_agree_are_refused(make_results, changes, message):
    with pytest.raises(ValidationError, match=message):
        make_results(**changes)


def test_names_and_seeds_differ(make_results, make_method):
    with pytest.raises(ValidationError, match="names must differ"):
        make_results(methods=[make_method("a", [0.9]), make_method("a", [0.8])])
    run = make_method("a", [0.9]).runs[0]
    with pytest.raises(ValidationError, match="same seed"):
        type(make_method("a", [0.9]))(name="a", label="a", student="s", runs=[run, run])


def broken(name):
    def change(content):
        if name == "old version":
            content["schema_version"] = 0
        elif name == "no version":
            del content["schema_version"]
        elif name == "missing field":
            del content["dataset"]["num_train"]
        elif name == "wrong type":
            content["methods"][1]["runs"][0]["seconds"] = "fast"
        return content

    return change


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("old version", r"schema_version 0; this version of tmkd-ray reads 1"),
        ("no version", "schema_version is missing"),
        ("missing field", r"dataset\.num_train: Field required"),
        ("wrong type", r"methods\.1\.runs\.0\.seconds"),
    ],
)
def test_a_file_that_does_not_fit_is_a_user_error(make_results, tmp_path, name, message):
    path = tmp_path / "results.json"
    make_results().save(path)
    path.write_text(json.dumps(broken(name)(json.loads(path.read_text()))))
    with pytest.raises(UserError, match=message) as error:
        RunResults.load(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{", "not valid JSON"), (b"[1]", "schema_version"), (b'{"a": NaN}', "NaN"), (b"\xff\xfe", "not valid")],
)
def test_a_file_that_is_not_json_is_a_user_error(tmp_path, content, message):
    path = tmp_path / "results.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        RunResults.load(path)


def test_a_missing_file_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        RunResults.load(tmp_path / "results.json")


def test_only_the_first_ten_problems_are_listed(make_results, tmp_path):
    path = tmp_path / "results.json"
    make_results().save(path)
    content = json.loads(path.read_text())
    for record in content["methods"][0]["runs"][0]["history"]:
        record["seconds"] = -1
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="… and 2 more"):
        RunResults.load(path)
