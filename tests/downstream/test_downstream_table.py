"""The table for people, for spreadsheets, for programs; the configuration refuses what makes no sense."""

import csv
import io
import json

import pytest

from tmkd_ray.cli import main
from tmkd_ray.config.transfer import DetectConfig, KnnConfig, LinearConfig, SegmentConfig, ZeroShotConfig
from tmkd_ray.config_reading import resolve_as
from tmkd_ray.downstream.opened import open_transfer
from tmkd_ray.downstream.table import TransferTable
from tmkd_ray.errors import ConfigError


def test_one_table_three_ways(tmp_path):
    rows = [
        {"backbone": "student", "mIoU": 0.12345, "AP": None, "lr": 0.01, "parameters": 1234567},
        {"backbone": "random, weights", "mIoU": 0.1, "AP": 0.5, "lr": 0.1, "parameters": 2},
    ]
    table = TransferTable("segment", rows, ("mIoU", "AP"), ["a note"], {"iou": {"sky": 0.5}})
    table.save(str(tmp_path))
    assert (tmp_path / "results.md").read_text().splitlines() == [
        "| backbone | mIoU % | AP % | lr | parameters |",
        "|---|---:|---:|---:|---:|",
        "| student | 12.35 | – | 0.01 | 1,234,567 |",
        "| random, weights | 10.00 | 50.00 | 0.1 | 2 |",
        "",
        "a note",
    ]
    read = list(csv.DictReader(io.StringIO((tmp_path / "results.csv").read_text())))
    assert [row["mIoU"] for row in read] == ["0.12345", "0.1"]
    assert read[1]["backbone"] == "random, weights"
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["rows"] == rows
    assert content["iou"] == {"sky": 0.5}


@pytest.mark.parametrize(
    ("section", "fields", "problem"),
    [
        (DetectConfig, {"data": "d", "detector": "yolo"}, "detector: expected 'faster_rcnn'"),
        (
            DetectConfig,
            {"data": "d", "training": {"mixup": 0.5}},
            "training.mixup: is for training classifiers",
        ),
        (DetectConfig, {"data": "d", "training": {"optimizer": "dot"}}, "training.optimizer: dot"),
        (DetectConfig, {"data": "d", "mean": [0, 0, 0]}, "std: give mean and std together"),
        (DetectConfig, {"data": "d", "model": "resnet9"}, "resnet9"),
        (DetectConfig, {}, "data: required"),
        (DetectConfig, {"data": "d", "imge_size": 3}, "did you mean 'image_size'"),
        (SegmentConfig, {"data": "d", "min_scale": 3}, "min_scale: 3 is above max_scale 2"),
        (
            SegmentConfig,
            {"data": "d", "head": "deeplabv3", "training": {"batch_size": 2}},
            "training.batch_size: deep",
        ),
        (LinearConfig, {"dataset": "digits", "fractions": [0.1, 0.1]}, "fractions: each value once"),
        (LinearConfig, {"dataset": "digits", "fractions": [0]}, "fractions.0: must be above 0"),
        (KnnConfig, {"dataset": "digitz"}, "digits"),
        (ZeroShotConfig, {"dataset": "digits", "prompts": "a photo"}, "must have one {}"),
    ],
)
def test_what_makes_no_sense_is_refused(section, fields, problem):
    with pytest.raises(ConfigError) as caught:
        resolve_as(section, {"student": "s", **fields}, "here")
    assert problem in str(caught.value)


def test_rows_and_statistics(tmp_path):
    checkpoint = tmp_path / "model.safetensors"
    checkpoint.write_bytes(b"")
    fields = {"student": str(checkpoint), "model": "resnet8", "output": str(tmp_path)}
    opened = open_transfer(DetectConfig.model_validate({**fields, "data": "d"}))
    assert opened.weights == {"student": str(checkpoint), "random weights": None}
    assert opened.mean == (0.485, 0.456, 0.406)
    assert opened.folder == f"{tmp_path}/transfer-detect"
    more = {"baseline": "w.pth", "random_baseline": False, "mean": [0.1] * 3, "std": [0.2] * 3, "name": "x"}
    opened = open_transfer(DetectConfig.model_validate({**fields, "data": "d", **more}))
    assert list(opened.weights) == ["student", "baseline weights"]
    assert (opened.mean, opened.std, opened.folder) == ((0.1,) * 3, (0.2,) * 3, f"{tmp_path}/x")
    digits = open_transfer(KnnConfig.model_validate({**fields, "dataset": "digits"}))
    assert digits.mean == digits.config.dataset.mean


def test_the_command_names_what_is_missing(tmp_path, capsys):
    assert main(["transfer", "knn", "--student", str(tmp_path / "no"), "--data", str(tmp_path)]) == 2
    assert "no file or folder" in capsys.readouterr().err
    assert main(["transfer", "segment", "--data", str(tmp_path)]) == 2
    assert "student: required" in capsys.readouterr().err
