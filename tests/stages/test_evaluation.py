"""Evaluation over a pool of actors: the figures of a plain loop, however many actors there are."""

import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import reference_formulas as reference
import torch
from PIL import Image
from tiny_road import TINY

from tmkd_ray.cli import main
from tmkd_ray.config import TrainingConfig
from tmkd_ray.config_reading import read_config
from tmkd_ray.datasets.decode import load_images
from tmkd_ray.errors import UserError
from tmkd_ray.models import build_model
from tmkd_ray.results import RunResults
from tmkd_ray.stages import evaluation
from tmkd_ray.stages.distillation import TrainedStudent
from tmkd_ray.stages.evaluation import Networks, clip_networks, measure, student_network, teacher_network
from tmkd_ray.stages.experiment import open_experiment
from tmkd_ray.stages.fitting import Fitted
from tmkd_ray.stages.training import Outcome
from tmkd_ray.teachers import ClipTeacher
from tmkd_ray.types import TaskSpec

pytestmark = pytest.mark.ray

DIGITS = (
    *("dataset=digits", "dataset.limit=300", "teacher.visual.model=resnet8", "student.model=resnet8"),
    "training.num_workers=1",
)
OUTCOME = Outcome(
    key="k",
    best_epoch=1,
    validation_accuracy=0.1,
    parameters=1,
    seconds=1.0,
    num_workers=1,
    device="cpu",
    history=[],
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A folder of untrained networks."""
    folder = tmp_path_factory.mktemp("weights")
    for seed in range(3):
        torch.manual_seed(seed)
        model = build_model("resnet8", TaskSpec(tuple("0123456789"), 32))
        with torch.no_grad():
            model.head.weight.mul_(20)  # so that they differ in what they say
        torch.save(model.state_dict(), folder / f"{seed}.pth")
    clip = ClipTeacher.new(
        ["a photo of a zero"],
        image_size=32,
        patch_size=16,
        embedding_width=8,
        vision_width=8,
        vision_layers=1,
        text_width=8,
        text_layers=1,
        head_width=4,
        vocabulary_size=600,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )
    clip.save(str(folder / "clip"))
    return folder


def opened(tmp_path, *overrides):
    return open_experiment(read_config(None, [*DIGITS, f"output={tmp_path}", *overrides]))


def all_networks(experiment, weights):
    students = [TrainedStudent("kd", seed, str(weights / f"{seed}.pth"), OUTCOME) for seed in (1, 2)]
    return Networks(
        teacher_network(experiment, Fitted(str(weights / "0.pth"), None)),
        (
            *clip_networks(experiment, Fitted(str(weights / "clip"), None)),
            *(student_network(experiment, student) for student in students),
        ),
    )


@torch.inference_mode()
def plain_logits(experiment, weights, images):
    """What each network says of all images at once, written out."""
    pixels = torch.from_numpy(images)
    mean, std = (torch.tensor(v) for v in (experiment.config.dataset.mean, experiment.config.dataset.std))
    inputs = ((pixels / 255 - mean) / std).permute(0, 3, 1, 2)
    logits = []
    for seed in range(3):
        model = build_model("resnet8", experiment.task).eval()
        model.load_state_dict(torch.load(weights / f"{seed}.pth"))
        logits.append(model(inputs).logits)
    clip = ClipTeacher.load(str(weights / "clip"))
    zero_shot = []
    for name, view in experiment.views().items():
        (text,) = clip.text_bank([experiment.prompts()[name]], experiment.task.class_names)
        seen = clip.encode_images(torch.from_numpy(view(images)))
        zero_shot.append(seen @ text.T * clip.model.logit_scale.exp())
    return [values.double().numpy() for values in (logits[0], *zero_shot, *logits[1:])]


def test_one_pass_over_all_workers_gives_the_figures_of_a_plain_loop(ray_cluster, tmp_path, weights, capsys):
    experiment = opened(tmp_path)
    images = load_images(experiment.dataset, "test", experiment.dataset.index("test"))
    expected = plain_logits(experiment, weights, images.images)
    found = {}
    for workers in (1, 2):
        experiment = opened(tmp_path, "training.evaluation_batch_size=40", f"training.num_workers={workers}")
        found[workers] = measure(experiment, all_networks(experiment, weights), "test", chunk_images=100)
    assert found[1] == found[2]  # to the last bit
    result = found[2]
    assert (result.split, result.num_images, result.set_aside) == ("test", len(images.labels), [])
    assert result.teacher is not None
    names = [measured.name for measured in (result.teacher, *result.others)]
    assert names == [
        "visual teacher resnet8",
        *(f"CLIP zero-shot, {view}" for view in experiment.views()),
        "kd seed 1: resnet8",
        "kd seed 2: resnet8",
    ]
    labels = images.labels
    for measured, logits in zip((result.teacher, *result.others), expected, strict=True):
        metrics = measured.metrics
        predicted = logits.argmax(axis=1)
        above = (logits > logits[np.arange(len(labels)), labels][:, None]).sum(axis=1)
        assert metrics.accuracy == (predicted == labels).mean()
        assert metrics.top5_accuracy == (above < 5).mean()
        assert metrics.loss == pytest.approx(reference.cross_entropy(logits, labels), rel=1e-4)
        classes = [(predicted[labels == label] == label).mean() for label in range(10)]
        assert metrics.per_class_accuracy == pytest.approx(classes)
        if measured is result.teacher:
            assert (metrics.agreement, metrics.teacher_kl) == (None, None)
        else:
            assert metrics.agreement == (expected[0].argmax(axis=1) == predicted).mean()
            divergence = reference.kl_divergence(expected[0], logits, 1.0)
            assert metrics.teacher_kl == pytest.approx(divergence, rel=1e-3)
    assert f"evaluation, test: {len(labels)}/{len(labels)} images" in capsys.readouterr().err


class _Dying(torch.nn.Module):
    """Its actor is killed while it has the third batch in hand, once; else the red mean decides."""

    def __init__(self, flag):
        super().__init__()
        self.flag = flag
        self.batches = 0

    def forward(self, images_BHWC):
        self.batches += 1
        if self.batches == 3 and not os.path.exists(self.flag):
            open(self.flag, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.stack([images_BHWC[:, 8 + i].double().mean(dim=(1, 2)) for i in range(10)], dim=1)


def test_what_a_killed_actor_had_in_hand_is_counted_once(ray_cluster, tmp_path):
    ray_cluster.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # actors cannot import a test
    experiment = opened(tmp_path, "training.evaluation_batch_size=32")
    flag = tmp_path / "died"
    networks = Networks(None, (evaluation.Network("dying", _Dying(str(flag)), 0),))
    result = measure(experiment, networks, "test", chunk_images=64)
    assert flag.exists()
    again = measure(experiment, networks, "test", chunk_images=64)
    index = experiment.dataset.index("test")
    assert result.num_images == len(index)
    assert result.teacher is None
    assert result == again
    images = load_images(experiment.dataset, "test", index).images
    rows = images[:, 8:18].astype(np.float64).mean(axis=(2, 3))
    (measured,) = result.others
    assert measured.metrics.accuracy == (rows.argmax(axis=1) == index.labels).mean()


def test_a_network_that_returns_nan_is_an_error_for_people(ray_cluster, tmp_path, weights, capsys):
    state = torch.load(weights / "0.pth")
    state["bn1.weight"].fill_(float("nan"))
    torch.save(state, tmp_path / "nan.pth")
    given = [f"teacher.visual.checkpoint={tmp_path / 'nan.pth'}", "teacher.text=null", "distiller=kd"]
    assert main(["evaluate", *DIGITS, f"output={tmp_path}", *given]) == 2
    said = capsys.readouterr().err
    assert "error: visual teacher resnet8 returned NaN or infinite logits for the image digits/" in said
    assert "Traceback" not in said


def test_evaluate_measures_a_checkpoint(ray_cluster, tmp_path, weights, capsys):
    given = [f"teacher.visual.checkpoint={weights / '0.pth'}", "teacher.text=null", "distiller=kd"]
    assert main(["evaluate", *DIGITS, f"output={tmp_path}", *given, "--split", "validation"]) == 0
    lines = capsys.readouterr().out.splitlines()
    experiment = opened(tmp_path)
    assert lines[0] == f"validation split, {len(experiment.validation)} images"
    assert lines[2].startswith("visual teacher resnet8 ")
    images = load_images(experiment.dataset, "train", experiment.validation)
    logits = plain_logits(experiment, weights, images.images)[0]
    assert lines[2].split()[4] == f"{100 * (logits.argmax(axis=1) == images.labels).mean():.2f}"
    assert lines[2].split()[-2:] == ["–", "–"]


@pytest.fixture
def folder_of_images(tmp_path):
    """An image folder with twelve images a class and split."""
    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        for split in ("train", "test"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(12):
                pixels = generator.integers(0, 255, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path / "images"


def test_unreadable_images_are_set_aside_listed_and_not_counted(
    ray_cluster, tmp_path, folder_of_images, capsys
):
    for name in ("dog/3", "cat/7", "cat/1"):
        (folder_of_images / "test" / f"{name}.png").write_bytes(b"no image")
    overrides = ["dataset=image_folder", f"dataset.path={folder_of_images}", f"output={tmp_path}"]
    config = read_config(None, [*overrides, "student.model=resnet8", "training.num_workers=1"])
    experiment = open_experiment(config)
    model = build_model("resnet8", experiment.task)
    torch.save(model.state_dict(), tmp_path / "student.pth")
    student = TrainedStudent("kd", 0, str(tmp_path / "student.pth"), OUTCOME)
    networks = Networks(None, (student_network(experiment, student),))
    result = measure(experiment, networks, "test", chunk_images=2)  # some chunks are empty, perhaps
    ids = experiment.dataset.index("test").ids
    broken = [str(sample) for sample in ids if str(sample)[5:-4] in ("dog/3", "cat/7", "cat/1")]
    assert len(broken) == 3
    assert [entry.id for entry in result.set_aside] == broken
    assert result.num_images == 21
    said = capsys.readouterr().err
    assert "test: 3 unreadable images were set aside:" in said
    assert all(f"  {sample}: " in said for sample in broken)

    for path in (folder_of_images / "test").glob("*/*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(
        UserError, match="test split: none of the 24 images can be decoded; the first, test/cat"
    ):
        measure(experiment, networks, "test", chunk_images=12)


@pytest.mark.parametrize(
    ("training", "cluster", "num_chunks", "size"),
    [
        ({}, {"CPU": 4.0}, 20, (2, 0.0)),
        ({}, {"CPU": 4.0}, 1, (1, 0.0)),
        ({"num_workers": 8}, {"CPU": 4.0}, 20, (4, 0.0)),
        ({"num_workers": 8, "num_cpus_per_worker": 3}, {"CPU": 4.0}, 20, (1, 0.0)),
        ({"num_cpus_per_worker": 8}, {"CPU": 4.0}, 20, (1, 0.0)),
        ({"num_workers": 4}, {"CPU": 16.0, "GPU": 8.0}, 20, (4, 1.0)),
        ({"num_workers": 4}, {"CPU": 16.0, "GPU": 1.0}, 20, (1, 1.0)),
        ({"num_workers": 4, "use_gpu": False}, {"CPU": 16.0, "GPU": 8.0}, 20, (4, 0.0)),
        ({"num_workers": 2, "use_gpu": True}, {"CPU": 16.0}, 20, (2, 0.0)),
    ],
)
def test_the_pool_has_as_many_actors_as_there_is_work_and_room_for(
    monkeypatch, training, cluster, num_chunks, size
):
    monkeypatch.setattr(evaluation.ray, "cluster_resources", lambda: cluster)
    monkeypatch.setattr(evaluation.ray, "nodes", lambda: [{"Alive": True, "Resources": cluster}])
    assert evaluation.pool_size(TrainingConfig(batch_size=64, **training), num_chunks) == size


def test_a_run_says_what_evaluate_says(tiny_run, capsys):
    results = RunResults.load(tiny_run / "tiny" / "results.json")
    assert main(["evaluate", *TINY, f"output={tiny_run}"]) == 0
    out = capsys.readouterr().out
    assert f"test split, {results.dataset.num_test:,} images" in out
    rows = {line.rsplit(maxsplit=6)[0]: line.rsplit(maxsplit=6)[1:] for line in out.splitlines()[2:]}
    assert len(rows) == 1 + 3 + 6
    assert sum(name.startswith("CLIP zero-shot") for name in rows) == 3
    teacher = results.teacher
    assert teacher is not None
    assert teacher.test_accuracy is not None
    assert teacher.test_ece is not None
    row = rows["visual teacher resnet8"]
    assert row[1] == f"{100 * teacher.test_accuracy:.2f}"
    assert row[3:] == [f"{100 * teacher.test_ece:.2f}", "–", "–"]
    for method in results.methods:
        for run in method.runs:
            assert rows[f"{method.name} seed {run.seed}: resnet8"] == [
                f"{run.parameters:,}",
                f"{100 * run.test_accuracy:.2f}",
                f"{100 * run.test_top5_accuracy:.2f}",
                f"{100 * run.test_ece:.2f}",
                f"{100 * run.teacher_agreement:.2f}",
                f"{run.teacher_kl:.4f}",
            ]
            assert run.per_class_accuracy is not None
            assert len(run.per_class_accuracy) == 10
