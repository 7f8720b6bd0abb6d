"""The road end to end under a real Ray, on a few digits."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_road import TINY

from tmkd_ray.analysis_record import Analysis
from tmkd_ray.cli import main
from tmkd_ray.knowledge import KnowledgeStore
from tmkd_ray.knowledge.compute import ClipStage, ShardWriter, ViewStage, VisualStage
from tmkd_ray.models import build_model
from tmkd_ray.results import RunResults
from tmkd_ray.types import TaskSpec

pytestmark = pytest.mark.ray


def test_a_run_leaves_results_report_and_config(tiny_run):
    folder = tiny_run / "tiny"
    results = RunResults.load(folder / "results.json")
    assert [method.name for method in results.methods] == ["alone", "kd", "tmkd"]
    assert all([run.seed for run in method.runs] == [0, 1] for method in results.methods)
    assert all(run.test_accuracy is not None for method in results.methods for run in method.runs)
    tmkd = results.methods[2].runs[0].history
    assert [record.epoch for record in tmkd] == [1, 2, 3]
    assert set(tmkd[0].terms) == {"ce", "kd", "feature", "text", "contrastive"}
    assert set(results.methods[0].runs[0].history[0].terms) == {"ce"}
    assert results.methods[0].runs[0].num_workers == 2
    assert results.dataset.num_train + results.dataset.num_validation == 240
    assert results.dataset.num_labelled_for_students == 50
    assert results.teacher is not None
    assert set(results.teacher.view_validation_accuracy) == {"original", "edge", "high_frequency"}
    assert results.semantic_weights is not None
    np.testing.assert_allclose(np.sum(results.semantic_weights, axis=1), 1.0, atol=1e-5)
    analysis = Analysis.load(str(folder / "results-analysis.npz"))
    assert analysis.created == results.created
    assert [(each.key, each.seeds) for each in analysis.networks] == [
        *(("teacher", 1), ("alone", 2), ("kd", 2), ("tmkd", 2))
    ]
    for method, each in zip(results.methods, analysis.networks[1:], strict=True):
        matrix = each.confusion_matrix(10)
        assert matrix.sum() == 2 * results.dataset.num_test
        mean = np.mean([run.test_accuracy for run in method.runs])
        assert np.trace(matrix) / matrix.sum() == pytest.approx(mean)
        assert method.cost is not None
        assert method.cost.flops == 25_003_264
    assert analysis.num_images == 60
    assert analysis.grad_cam is not None
    assert [each.key for each in analysis.grad_cam.explanations] == [
        *("teacher", "fused teacher", "alone", "kd", "tmkd")
    ]
    assert analysis.view_wins is not None
    assert analysis.view_wins.counts.sum() == results.dataset.num_validation
    report = (folder / "report.html").read_text()
    assert all(f'id="{name}"' in report for name in ("confusion", "calibration", "features", "grad-cam"))
    assert (folder / "config.yaml").exists()


def test_a_second_run_computes_nothing_and_says_the_same(tiny_run, capsys):
    before = RunResults.load(tiny_run / "tiny" / "results.json")
    assert main(["run", *TINY, f"output={tiny_run}"]) == 0
    said = capsys.readouterr().err
    assert "is whole and matches, reused" in said
    assert said.count("done before, kept") == 2 + 6  # teacher, CLIP, three methods × two seeds
    after = RunResults.load(tiny_run / "tiny" / "results.json")

    def measured_once(results: RunResults) -> list[object]:  # all but the latency, which is measured again
        return [method.model_copy(update={"cost": None}) for method in results.methods]

    assert measured_once(after) == measured_once(before)
    assert after.knowledge is not None
    assert after.knowledge.reused


def test_a_store_of_another_configuration_is_refused_by_name(tiny_run, capsys):
    assert main(["knowledge", *TINY, f"output={tiny_run}", "views.edge.strength=0.5"]) == 2
    said = capsys.readouterr().err
    assert "epoch" not in said, "a teacher was fitted before the store was looked at"
    assert "another configuration" in said
    assert "views.edge.strength: store 0.15, config 0.5" in said


def test_students_are_not_trained_on_a_store_of_another_configuration(tiny_run, capsys):
    assert main(["distill", *TINY, f"output={tiny_run}", "knowledge.num_variants=3"]) == 2
    assert "augmentation.num_variants: store 2, config 3" in capsys.readouterr().err


def test_the_store_is_that_of_a_plain_loop_byte_for_byte(tiny_run, tmp_path):
    from tmkd_ray.config_reading import read_config
    from tmkd_ray.knowledge.compute import plan_shards
    from tmkd_ray.stages.experiment import open_experiment
    from tmkd_ray.stages.fitting import found_clip, found_teacher, load_teacher
    from tmkd_ray.teachers import ClipTeacher

    experiment = open_experiment(read_config(None, [*TINY, f"output={tiny_run}"]))
    config = experiment.config
    written = KnowledgeStore(experiment.store_path)
    layouts = written.manifest().layouts
    plain = KnowledgeStore(str(tmp_path / "plain"))
    visual, clip = found_teacher(experiment), found_clip(experiment)
    assert visual is not None
    assert clip is not None
    stages = [
        ViewStage(experiment.dataset, experiment.views(), layouts, config.augmentation, config.knowledge.seed),
        VisualStage(load_teacher(experiment, visual), layouts, "cpu", 64),
        ClipStage(ClipTeacher.load(clip.path), layouts, "cpu", 64),
        ShardWriter(plain, layouts),
    ]
    plans = plan_shards("train", experiment.train, 64, 2) + plan_shards(
        "validation", experiment.validation, 64, 1
    )
    for plan in reversed(plans):
        table = plan.to_table()
        for stage in stages:
            table = stage(table)
    expected = {(r.split, r.number): r.sha256 for r in written.manifest().shards}
    assert {key: record.sha256 for key, record in plain.committed().items()} == expected


def test_lost_shards_are_computed_again_and_only_they(tiny_run, tmp_path, capsys):
    store = Path(shutil.copytree(tiny_run / "tiny" / "knowledge", tmp_path / "store"))
    options = [*TINY, f"output={tiny_run}", f"knowledge.path={store}"]
    before = {path.name: path.read_bytes() for path in (store / "train").iterdir()}
    (kept,) = (store / "train").glob("00000-*.parquet")
    kept_time = kept.stat().st_mtime_ns
    (store / "manifest.json").unlink()
    (store / "train" / "00001.json").unlink()  # killed after the shard was written, before it was committed
    assert main(["knowledge", *options]) == 0
    assert "in 1 shards" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (store / "train").iterdir()} == before
    assert kept.stat().st_mtime_ns == kept_time
    # As the message on a damaged classifier says; no teacher looks at an image for it.
    head = (store / "head.safetensors").read_bytes()
    (store / "head.safetensors").unlink()
    assert main(["knowledge", *options]) == 0
    assert "to compute" not in capsys.readouterr().err
    assert (store / "head.safetensors").read_bytes() == head


def test_unreadable_images_are_set_aside_and_listed(ray_cluster, tmp_path, capsys):
    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        for split in ("train", "test"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(12):
                pixels = generator.integers(0, 255, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    broken = tmp_path / "images" / "train" / "dog" / "99.png"
    broken.write_bytes((tmp_path / "images" / "train" / "dog" / "0.png").read_bytes()[:60])
    options = [
        *[item for item in TINY if not item.startswith(("dataset", "methods", "seeds", "training.labels"))],
        "dataset=image_folder",
        f"dataset.path={tmp_path / 'images'}",
        "dataset.validation_fraction=0.3",
        "training.batch_size=8",
        "distiller=kd",
        "teacher.text=null",
        f"output={tmp_path / 'runs'}",
    ]
    assert main(["run", *options]) == 0
    captured = capsys.readouterr()
    assert "train/dog/99.png" in captured.err
    results = RunResults.load(tmp_path / "runs" / "tiny" / "results.json")
    assert [entry.id for entry in results.dataset.set_aside] == ["train/dog/99.png"]
    assert results.dataset.num_train + results.dataset.num_validation == 24
    assert results.clip is None

    names = tmp_path / "names.json"
    names.write_text('{"cat": "kitten", "dog": "puppy"}')
    assert main(["knowledge", *options, f"dataset.class_names={names}"]) == 0
    store = KnowledgeStore(str(tmp_path / "runs" / "tiny" / "knowledge"))
    assert store.manifest().class_names == ("kitten", "puppy")


def test_a_diverged_training_is_an_error_for_people(tiny_run, capsys):
    options = [*TINY, "training.num_workers=2", f"output={tiny_run}"]
    options += ["methods={}", "seeds=null", "distiller=alone"]
    assert main(["distill", *options, "training.learning_rate=1e30"]) == 2
    assert "training diverged in epoch" in capsys.readouterr().err


def test_the_student_of_a_run_loads_into_a_plain_model(tiny_run):
    from safetensors.torch import load_file

    (path,) = (tiny_run / "tiny" / "students").glob("tmkd-seed0-*/model.safetensors")
    model = build_model("resnet8", TaskSpec(tuple("0123456789"), 32))
    model.load_state_dict(load_file(path))
