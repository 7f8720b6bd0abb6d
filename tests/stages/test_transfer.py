"""`tmkd transfer` on a cluster: every task, from a student's folder to the table."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from tmkd_ray.cli import main
from tmkd_ray.datasets import build_dataset
from tmkd_ray.datasets.decode import load_images
from tmkd_ray.datasets.digits import DigitsConfig
from tmkd_ray.datasets.splits import split_train
from tmkd_ray.downstream.knn import knn_accuracy
from tmkd_ray.downstream.student import build_student
from tmkd_ray.pretraining.base import build_projector
from tmkd_ray.stages import transfer_features
from tmkd_ray.teachers import ClipTeacher
from tmkd_ray.teachers.pixels import Normalize

DATA = Path(__file__).parents[2].parent / "shared" / "data"
DIGITS = ["dataset=digits", "dataset.image_size=16", "dataset.limit=200"]
pytestmark = pytest.mark.ray


def needs(name):
    return pytest.mark.skipif(not (DATA / name).is_dir(), reason=f"needs ../shared/data/{name}")


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A folder as a label-free training leaves it: weights, and a projector into a CLIP's space."""
    folder = tmp_path_factory.mktemp("student")
    network = build_student("resnet8", 32, None, seed=3)
    safetensors.torch.save_file(network.state_dict(), folder / "model.safetensors", {"model": "resnet8"})
    torch.manual_seed(0)
    clip = ClipTeacher.new(
        [f"a photo of a {digit}." for digit in range(10)],
        image_size=16,
        patch_size=8,
        embedding_width=8,
        vision_width=16,
        vision_layers=1,
        text_width=16,
        text_layers=1,
        head_width=8,
        vocabulary_size=600,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )
    (folder / "clip").mkdir()
    clip.save(str(folder / "clip"))
    projector = build_projector(network.feature_width, 8, 12)
    metadata = {"E": "8", "clip": str(folder / "clip")}
    safetensors.torch.save_file(projector.state_dict(), folder / "projector.safetensors", metadata)
    return folder


def results(output, task):
    folder = output / f"transfer-{task}"
    assert {path.name for path in folder.iterdir()} >= {"results.md", "results.csv", "config.yaml"}
    return json.loads((folder / "results.json").read_text())


def test_frozen_features_of_every_image_once(ray_cluster, student, tmp_path, capsys, monkeypatch):
    for name in ("knn_accuracy", "probe", "zero_shot_logits", "joined"):  # workers have their own
        monkeypatch.setattr(transfer_features, name, None)  # the driver computes nothing
    options = ["--student", str(student), *DIGITS, f"output={tmp_path}"]
    assert main(["transfer", "knn", *options, "k=5"]) == 0  # by two workers
    options.append("num_workers=1")
    rows = results(tmp_path, "knn")["rows"]
    assert [row["backbone"] for row in rows] == ["student", "random weights"]
    assert capsys.readouterr().out.startswith("| backbone | top-1 % | top-5 % |")

    # The same on one process, from the images themselves.
    dataset = build_dataset(DigitsConfig(image_size=16, limit=200))
    network = build_student("resnet8", 16, str(student / "model.safetensors")).eval()
    normalize = Normalize(dataset.config.mean, dataset.config.std)
    parts = []
    for split in ("train", "test"):
        loaded = load_images(dataset, split, dataset.index(split))
        with torch.no_grad():
            feature = network(normalize(torch.from_numpy(loaded.images))).feature.numpy()
        parts += [feature, loaded.labels]
    assert (rows[0]["top-1"], rows[0]["top-5"]) == pytest.approx(knn_accuracy(*parts, 10, 5, 0.07), abs=1 / 400)

    assert main(["transfer", "linear", *options, "fractions=[0.1, 1]", "min_steps=100", "epochs=1"]) == 0
    content = results(tmp_path, "linear")
    rows = content["rows"]
    validation = split_train(dataset.index("train"), dataset.config.validation_fraction, 0)[1]
    sizes = (len(parts[3]), len(parts[1]) - len(validation), len(validation))
    said = "top-1 on {} test images; {} training images; learning rate chosen on {} validation images"
    assert content["notes"] == [said.format(*sizes)]
    assert [p["num_labelled"] for p in content["probes"]["student"]][1] == sizes[1]
    assert list(rows[0]) == ["backbone", "10 % of labels", "lr (10 %)", "100 % of labels", "lr (100 %)"]
    assert rows[0]["100 % of labels"] > 0.5 > 0.1  # of ten classes; even random convolutions see something

    given = str(student / "model.safetensors")
    assert main(["transfer", "zero-shot", *options, "prompts=a photo of a {}.", "--baseline", given]) == 0
    content = results(tmp_path, "zero-shot")
    rows = content["rows"]
    assert [row["backbone"] for row in rows] == ["student", "random weights"]
    assert "no projector" in content["notes"][1]
    clip = ClipTeacher.load(str(student / "clip"))
    bank = clip.text_bank([["a photo of a {}."]], dataset.class_names)[0].double().numpy()
    state = safetensors.torch.load_file(student / "projector.safetensors")
    w0, b0, w2, b2 = (state[name].double().numpy() for name in ("0.weight", "0.bias", "2.weight", "2.bias"))
    embedding = np.maximum(parts[2] @ w0.T + b0, 0) @ w2.T + b2
    similarity = embedding / np.linalg.norm(embedding, axis=1, keepdims=True) @ bank.T
    assert rows[0]["top-1"] == pytest.approx(np.mean(similarity.argmax(1) == parts[3]), abs=1 / 400)


@pytest.mark.data
@needs("raccoon")
def test_detection_on_the_raccoons(ray_cluster, student, tmp_path):
    options = ["image_size=64", "channels=16", "head_width=32", "num_proposals=50", "random_baseline=false"]
    options += ["training.epochs=1", "training.batch_size=16", f"output={tmp_path}"]
    command = ["transfer", "detect", "--student", str(student), "--data", str(DATA / "raccoon"), *options]
    assert main(command) == 0
    content = results(tmp_path, "detect")
    (row,) = content["rows"]
    assert 0 <= row["mAP"] <= row["AP50"] <= 1
    assert row["AP small"] is None  # there is no small raccoon among the 40
    assert "144 images; epoch kept by 16 validation images; test: 40 images" in content["notes"][0]


@pytest.mark.data
@needs("camvid")
def test_segmentation_on_camvid(ray_cluster, student, tmp_path):
    options = ["image_size=32", "training.epochs=1", "training.batch_size=32", f"output={tmp_path}"]
    command = ["transfer", "segment", "--student", str(student), "--data", str(DATA / "camvid"), *options]
    assert main([*command, "random_baseline=false"]) == 0
    content = results(tmp_path, "segment")
    (row,) = content["rows"]
    assert 0 < row["mIoU"] < row["pixel accuracy"] < 1
    assert set(content["iou"]["student"]) == set((DATA / "camvid" / "classes.txt").read_text().split())
    assert "test: 233 images" in content["notes"][0]
