"""A given teacher adapted to the views, under a real Ray: once, saved, and what the store is made of."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tmkd_ray.cli import main
from tmkd_ray.config_reading import read_config
from tmkd_ray.knowledge import KnowledgeStore
from tmkd_ray.models import build_model
from tmkd_ray.stages.experiment import open_experiment
from tmkd_ray.stages.fitting import found_teacher, load_teacher
from tmkd_ray.types import TaskSpec

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("adapted")
    torch.manual_seed(0)
    model = build_model("resnet8", TaskSpec(tuple("0123456789"), 32))
    model(torch.randn(32, 3, 32, 32))
    torch.save(model.state_dict(), folder / "given.pth")
    return [
        "dataset=digits",
        "dataset.limit=60",
        f"output={folder}",
        "teacher.text=null",
        "teacher.visual.model=resnet8",
        f"teacher.visual.checkpoint={folder / 'given.pth'}",
        "teacher.visual.fit.epochs=1",
        "teacher.visual.fit.batch_size=20",
        "teacher.visual.fit.num_workers=1",
        "knowledge.num_variants=2",
        "knowledge.views.max_size=1",
        "knowledge.dtype=float32",
        "distiller=kd",
    ]


def features(options: list[str], *more: str) -> np.ndarray:
    """Compute the store and return the training features [N, K, V, D]."""
    assert main(["knowledge", *options, *more]) == 0
    experiment = open_experiment(read_config(None, [*options, *more]))
    return KnowledgeStore(experiment.store_path).read("train").feature


def test_statistics_change_all_views_but_the_original(
    ray_cluster: object, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    given = features(options, "name=given")
    adapted = ["name=statistics", "teacher.visual.adapt=statistics", "teacher.visual.adapt_images=40"]
    found = features(options, *adapted)
    np.testing.assert_allclose(found[:, :, 0], given[:, :, 0], rtol=1e-5, atol=1e-6)
    for view in (1, 2):
        assert not np.allclose(found[:, :, view], given[:, :, view], rtol=1e-2)
    experiment = open_experiment(read_config(None, [*options, *adapted]))
    teacher = found_teacher(experiment)
    assert teacher is not None
    assert teacher.source == "given.pth, adapted to the views here"
    assert load_teacher(experiment, teacher).num_view_statistics == 3
    capsys.readouterr()
    assert main(["fit-teacher", *options, *adapted]) == 0
    assert "done before, kept" in capsys.readouterr().err
    other = open_experiment(read_config(None, [*options, *adapted, "views=[original, high_frequency, edge]"]))
    assert found_teacher(other) is None, "the statistics lie in the order of the views"


def test_fitting_goes_on_from_what_is_given(ray_cluster: object, options: list[str]) -> None:
    """With a learning rate next to nothing the weights stay; the statistics of the views do not."""
    more = ["name=fit", "teacher.visual.adapt=fit", "teacher.visual.view_batch_norm=per_view"]
    more += ["teacher.visual.fit.learning_rate=1e-9", "teacher.visual.fit.weight_decay=0"]
    assert main(["fit-teacher", *options, *more]) == 0
    experiment = open_experiment(read_config(None, [*options, *more]))
    fitted = found_teacher(experiment)
    assert fitted is not None
    assert Path(fitted.path).parent.name.startswith("teacher-")
    teacher = load_teacher(experiment, fitted)
    given = torch.load(str(experiment.config.teacher.visual.checkpoint), weights_only=True)
    for name, value in teacher.model.state_dict().items():
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(value, given[name], rtol=1e-5, atol=1e-6)
    means = teacher.model.state_dict()["bn1.running_mean"]
    assert means.shape == (3, 16)
    assert len({tuple(row) for row in means.tolist()}) == 3


def test_a_teacher_without_batch_norm_is_refused(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["teacher.visual.model=python:tests.stages.outside_teacher:linear", "teacher.visual.checkpoint=null"]
    more += ["teacher.visual.adapt=statistics"]
    assert main(["fit-teacher", *options, *more]) == 2
    assert "teacher.visual: the model has no batch normalisation" in capsys.readouterr().err


def test_a_python_teacher_and_a_store(ray_cluster: object, options: list[str]) -> None:
    more = [
        "name=python",
        "teacher.visual.model=python:tests.stages.outside_teacher:linear",
        "teacher.visual.checkpoint=null",
    ]
    found = features(options, *more)
    assert found.shape[2:] == (3, 3)
    assert np.isfinite(found).all()
    assert found.std(axis=0).min() > 0
