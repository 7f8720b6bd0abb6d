"""How actor pools ask for the cluster's resources."""

import dataclasses

import pytest

from tmkd_ray.config import PoolConfig, TeacherPoolConfig, TrainingConfig
from tmkd_ray.stages import knowledge, pipeline, training
from tmkd_ray.stages.throughput import StageTimes


@pytest.mark.parametrize(
    ("gpus", "pools", "share"),
    [
        (0, [{}, {}], 0.0),
        (1, [{}, {}], 0.5),
        (1, [{}], 1.0),
        (2, [{}, {}], 1.0),
        (8, [{}, {}], 1.0),
        (1, [{"min_size": 2, "max_size": 2}, {}], 0.33),
        (2, [{"min_size": 2, "max_size": 2}, {}], 0.5),
        (3, [{"min_size": 2, "max_size": 2}, {"min_size": 2, "max_size": 2}], 0.5),
        (2, [{"num_gpus": 1.0}, {}], 1.0),
        (1, [{"num_gpus": 0.25}, {}], 0.75),
        (1, [{"num_gpus": 1.0}, {}], 0.0),
    ],
)
def test_actors_that_do_not_say_share_what_gpus_are_left(monkeypatch, gpus, pools, share):
    monkeypatch.setattr(pipeline, "num_gpus", lambda: float(gpus))
    configs = [TeacherPoolConfig(**pool) for pool in pools]
    assert pipeline.gpu_share(configs) == pytest.approx(share)
    # All pools at their smallest find places at once, else the job would wait for ever: an actor's share lies
    # on one GPU, so actors of equal share fill each GPU with as many as fit.
    if share and all(pool.num_gpus is None for pool in configs):
        assert sum(pool.min_size for pool in configs) <= gpus * int(1 / share + 1e-9)


def test_each_pool_has_its_own_size_and_share():
    options = pipeline._pool(PoolConfig(min_size=2, max_size=5, num_cpus=3), 0.25, "teacher")
    assert (options["compute"].min_size, options["compute"].max_size) == (2, 5)
    assert (options["num_cpus"], options["num_gpus"]) == (3, 0.25)
    assert options["compute"].initial_size == 2
    assert options["resources"] is None
    assert pipeline._pool(PoolConfig(), 0.0, "views")["num_gpus"] is None


def test_large_images_make_small_shards():
    from tmkd_ray.config_reading import read_config

    small = read_config(None, ["dataset=digits", "knowledge.num_variants=1", "knowledge.shard_rows=500"])
    assert knowledge._shard_rows(small) == 500
    large = read_config(None, ["dataset=digits", "dataset.image_size=224", "knowledge.num_variants=2"])
    rows = knowledge._shard_rows(large)
    assert rows * 2 * 3 * 224 * 224 * 3 <= 64 * 2**20 < (rows + 1) * 2 * 3 * 224 * 224 * 3


def test_the_slowest_pool_holds_the_others_back():
    """A stage's rate is what its actors could do together: six variants in 3 s, two at once, are 4 a second."""
    seconds = {"views": 3.0, "feature": 2.0, "clip_embedding": 0.0, "write": 0.5}
    actors = {"views": 2, "feature": 1, "clip_embedding": 1, "write": 2}
    times = StageTimes(actors)
    for part in (seconds, {}):
        times.add({f"{stage}_seconds": second for stage, second in part.items()}, variants=3)
    assert times.throughput() == {"views": 4.0, "feature": 3.0, "write": 24.0}
    lines = times.lines()
    assert [" ".join(line.split()) for line in lines] == [
        "knowledge: views 4 variants/s (by 2, 3.0 s of work)",
        "knowledge: visual teacher 3 variants/s (by 1, 2.0 s of work) ← holds the others back",
        "knowledge: writing 24 variants/s (by 2, 0.5 s of work)",
    ]


@pytest.mark.parametrize(
    ("gpus", "workers", "of_worker", "of_teacher"),
    [
        (1, 1, 0.6, 0.2),
        (2, 1, 1.0, 0.5),
        (3, 1, 1.0, 1.0),
        (2, 2, 0.6, 0.4),
        (8, 4, 1.0, 1.0),
        (4, (1, 4), 0.6, 0.4),
    ],
)
def test_teachers_beside_the_training_leave_room_for_each_other(
    monkeypatch, gpus, workers, of_worker, of_teacher
):
    monkeypatch.setattr(pipeline, "num_gpus", lambda: float(gpus))
    monkeypatch.setattr(training, "num_gpus", lambda: float(gpus))
    beside = training.TrainingJob("k", "label", "folder", TrainingConfig(), print, beside_teachers=True)
    assert training._gpu_share(beside, workers) == of_worker
    most = workers if isinstance(workers, int) else workers[1]
    share = pipeline.gpu_share([TeacherPoolConfig(), TeacherPoolConfig()], [of_worker] * most)
    assert share == of_teacher
    # A worker a GPU, and each teacher whole on one of them.
    left = [1.0 - of_worker] * most + [1.0] * (gpus - most)
    assert sum(int(part / share + 1e-9) for part in left) >= 2
    assert training._gpu_share(dataclasses.replace(beside, beside_teachers=False), workers) == 1.0
