"""The three modes, and the store's commands, under a real Ray."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_road import TINY

from tmkd_ray.cli import main
from tmkd_ray.config_reading import read_config
from tmkd_ray.knowledge import KnowledgeStore
from tmkd_ray.stages import distillation
from tmkd_ray.stages.distillation import found_students
from tmkd_ray.stages.experiment import open_experiment

pytestmark = pytest.mark.ray

ONE_STUDENT = ["methods={}", "seeds=null", "training.labels_per_class=null"]


def histories(options):
    """Return what every finished student of a configuration went through."""
    return [student.outcome.history for student in found_students(open_experiment(read_config(None, options)))]


@pytest.fixture(scope="module")
def modes(tiny_copy):
    """One epoch with the same pixels in every mode, by two workers: histories by mode.

    Beside the training, either way, lies one and the same store.
    """
    found = {}
    for mode in ("cached", "streaming", "online"):
        options = [
            *TINY,
            *ONE_STUDENT,
            f"output={tiny_copy}",
            f"knowledge.mode={mode}",
            f"knowledge.path={tiny_copy / ('modes-cached' if mode == 'cached' else 'modes-beside')}",
            "knowledge.num_variants=1",
            "knowledge.dtype=float32",
            "training.epochs=1",
            "training.num_workers=2",
        ]
        assert main(["knowledge", *options]) == 0
        assert main(["distill", *options]) == 0
        (found[mode],) = histories(options)
    return found


@pytest.mark.parametrize("mode", ["streaming", "online"])
def test_the_modes_learn_the_same(modes, mode):
    (cached,), (other,) = modes["cached"], modes[mode]
    assert set(other.terms) == {"ce", "kd", "feature", "text", "contrastive"}
    assert other.terms == pytest.approx(cached.terms, rel=1e-3)
    assert other.train_accuracy == pytest.approx(cached.train_accuracy, abs=0.011)  # two images of 216


def test_beside_the_training_only_the_validation_images_are_stored(modes, tiny_copy):
    manifest = KnowledgeStore(str(tiny_copy / "modes-beside")).manifest()
    assert {shard.split for shard in manifest.shards} == {"validation"}
    assert manifest.layouts["train"].num_variants == 1


def test_a_stream_serves_several_epochs_and_few_labels(tiny_copy, capsys):
    options = [*TINY, f"output={tiny_copy}", "methods={kd: kd, alone: alone}", "seeds=null"]
    options += ["knowledge.mode=streaming", "training.epochs=3", "training.batch_size=10"]
    assert main(["run", *options]) == 0
    beside = capsys.readouterr().err.partition("training 1 of 2: kd")[2]
    assert beside.count("holds the others back") == 1, (
        "of the teachers beside the training, after its first epoch"
    )
    assert re.findall(r"knowledge: (.*\S) +[\d,]+ variants/s", beside) == ["views", "visual teacher", "CLIP"]
    kd, alone = histories(options)
    assert [record.epoch for record in kd] == [record.epoch for record in alone] == [1, 2, 3]
    assert "kd" in kd[0].terms
    results = json.loads((tiny_copy / "tiny" / "results.json").read_text())
    assert results["dataset"]["num_train"] + results["dataset"]["num_validation"] == 240
    assert results["dataset"]["num_labelled_for_students"] == 50


@pytest.mark.parametrize("images", ["lossless", "reference"])
def test_stores_without_raw_images_train_a_student(tiny_copy, tmp_path, images, capsys):
    dtype = "int8" if images == "lossless" else "float16"
    options = [*TINY, *ONE_STUDENT, f"output={tiny_copy}", f"knowledge.path={tmp_path / 'store'}"]
    options += [f"knowledge.images={images}", f"knowledge.dtype={dtype}", "training.epochs=1", "name=tiny"]
    assert main(["knowledge", *options]) == 0
    said = capsys.readouterr().err
    assert f"({dtype}, images {images})" in said
    assert said.count("holds the others back") == 1
    assert said.count("variants/s") == 4
    per_image = KnowledgeStore(str(tmp_path / "store")).manifest().bytes_per_image_and_variant() / 1024
    on_disk = f"{per_image:.2f} KB an image and variant on disk"
    estimate = re.search(r"about [\d.]+ KB an image and variant", said)
    assert estimate.start() < said.index("variants/s") < said.index(on_disk), "before the run, and after it"
    assert main(["distill", *options]) == 0
    ((record,),) = histories(options)
    assert np.isfinite(record.loss)
    assert main(["knowledge", "verify", "--store", str(tmp_path / "store")]) == 0
    assert capsys.readouterr().out.endswith("sound\n")


def test_verify_names_what_is_wrong(tiny_copy, tmp_path, capsys):
    shutil.copytree(tiny_copy / "tiny" / "knowledge", tmp_path / "store")
    options = [*TINY, f"output={tiny_copy}", f"knowledge.path={tmp_path / 'store'}"]
    shard = next((tmp_path / "store" / "train").glob("00001-*.parquet"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert main(["knowledge", "verify", *options]) == 1
    assert shard.name in capsys.readouterr().out


def test_show_says_what_is_in_a_store(tiny_copy, capsys):
    assert main(["knowledge", "show", *TINY, f"output={tiny_copy}"]) == 0
    said = capsys.readouterr().out
    for expected in ("digits", "original", "edge", "high_frequency", "resnet8", "semantic", "zero"):
        assert expected in said


def test_every_loader_gives_the_same_student(tiny_copy, tmp_path):
    """Bit for bit."""
    options = [*TINY, *ONE_STUDENT, f"output={tiny_copy}", "training.epochs=2", "training.num_workers=2"]
    weights = {}
    for loader in ("resident", "mapped", "streaming"):
        of_loader = [f"knowledge.loader={loader}", f"knowledge.node_copies={tmp_path / loader}"]
        assert main(["distill", *options, *of_loader]) == 0
        (student,) = found_students(open_experiment(read_config(None, options)))
        weights[loader] = load_file(student.path)
        for file in (tiny_copy / "tiny" / "students").glob(f"tmkd-seed0-{student.outcome.key}/outcome.json"):
            file.unlink()  # else it is not trained again
        for folder in (tiny_copy / "tiny" / "students").glob("*/checkpoints"):
            shutil.rmtree(folder)
    for loader in ("mapped", "streaming"):
        assert weights[loader].keys() == weights["resident"].keys()
        for name, value in weights["resident"].items():
            assert torch.equal(value, weights[loader][name]), (loader, name)
        assert any((tmp_path / loader).rglob("feature.npy")), loader
        # The validation images are not loaded either.
        assert any((tmp_path / loader).rglob("*-validation/images.npy")), loader


@pytest.mark.parametrize(("memory", "mapped"), [(10**12, False), (0, True)])
def test_what_does_not_fit_the_memory_is_mapped_the_validation_images_too(
    tiny_copy, tmp_path, monkeypatch, memory, mapped
):
    options = [*TINY, f"output={tiny_copy}", f"knowledge.node_copies={tmp_path}"]
    experiment = open_experiment(read_config(None, options))
    monkeypatch.setattr(distillation, "available_memory", lambda: memory)
    store = KnowledgeStore(experiment.store_path)
    arrays = distillation._validation(experiment, store, experiment.config.training, torch.device("cpu"))
    assert isinstance(arrays.images, np.memmap) == mapped
