"""Asking for room: marks, whole pools at once on a cluster that grows, and an end to the waiting."""

import contextlib
import os

import pytest
import ray
import ray._private  # puts psutil on the path
from psutil import CONN_LISTEN, NoSuchProcess

from tmkd_ray.config import ClusterConfig, PoolConfig, TeacherPoolConfig, TrainingConfig
from tmkd_ray.errors import UserError
from tmkd_ray.stages import evaluation, pipeline, session
from tmkd_ray.stages.room import node_mark, wait_for_room

pytestmark = pytest.mark.ray


@pytest.fixture
def cluster(ray_cluster):
    """Say what the configuration would of the cluster, for one test."""

    def use(**settings):
        session.use_cluster_settings(ClusterConfig(**settings))

    yield use
    session.use_cluster_settings(ClusterConfig())


def test_there_is_room(cluster):
    wait_for_room([("training.num_workers", {"CPU": 2.0})] * 2)
    wait_for_room([("training.num_workers", {"CPU": 4.0})])  # and what was asked for is given back


@pytest.mark.parametrize("bundle", [{"CPU": 5.0}, {"CPU": 0.5, "GPU": 0.5}, {"CPU": 1.0, "tmkd_views": 0.001}])
def test_what_the_cluster_cannot_give_is_told_after_a_bounded_wait(cluster, bundle):
    cluster(wait_s=1)
    with pytest.raises(UserError, match=r"no room for knowledge\.views: 2 × \{CPU: .*waited [12] s") as error:
        wait_for_room([("knowledge.views", bundle)] * 2)
    assert "Its nodes now: 1 × {CPU: 4}" in str(error.value)


def test_pools_beside_a_training_that_leaves_no_room_do_not_wait_for_ever(cluster):
    """What the mode `streaming` asks for when its workers hold the cluster."""
    import ray

    @ray.remote(num_cpus=4)
    class Worker:
        def holds(self):
            return True

    worker = Worker.remote()
    assert ray.get(worker.holds.remote())
    cluster(wait_s=1)
    try:
        with pytest.raises(UserError, match=r"knowledge\.visual: 1 × \{CPU: 0\.5\}"):
            pipeline.wait_for_pools([("knowledge.visual", PoolConfig(), 0.0, "teacher")])
    finally:
        ray.kill(worker)


def test_what_is_only_wanted_is_not_waited_for(cluster):
    cluster(autoscaling=True, max_gpus=8, wait_s=1)
    wait_for_room([("a", {"CPU": 1.0})], [("a", {"CPU": 1.0})] * 100)


def test_marks_are_asked_for_where_the_nodes_have_them(cluster):
    assert node_mark("views") == {}
    assert pipeline._pool(PoolConfig(), 0.0, "views")["resources"] is None
    cluster(node_marks=True)
    assert node_mark("views") == {"tmkd_views": 0.001}
    assert pipeline._pool(PoolConfig(), 0.0, "views")["resources"] == {"tmkd_views": 0.001}
    assert pipeline._pool(PoolConfig(), 1.0, "teacher")["resources"] == {"tmkd_teacher": 0.001}


def test_a_cluster_that_grows_is_asked_for_whole_pools_and_for_gpus_it_has_not_yet(cluster):
    pool = TeacherPoolConfig(min_size=1, max_size=4)
    assert session.num_gpus() == 0
    assert pipeline._pool(pool, 1.0, "teacher")["compute"].initial_size == 1
    cluster(autoscaling=True, max_gpus=4)
    assert session.num_gpus() == 4
    assert pipeline._pool(pool, 1.0, "teacher")["compute"].initial_size == 4
    assert pipeline.gpu_share([pool]) == 1.0
    assert pipeline.gpu_share([pool, pool]) == 0.5  # eight actors on four GPUs


def test_evaluation_goes_where_the_training_goes(cluster, monkeypatch):
    training = TrainingConfig(num_workers=4)
    asked = []
    monkeypatch.setattr(evaluation, "wait_for_room", lambda *bundles: asked.append(bundles))

    def pool():
        options, device = evaluation.worker_pool(training, 20, "evaluation, test")
        return options["resources"], options["num_gpus"], options["compute"].max_size, device

    assert pool() == (None, None, 4, "cpu")
    cluster(node_marks=True)
    mark = {"tmkd_train": 0.001}
    assert pool() == (mark, None, 1, "cpu"), "the CPUs of nodes without the mark are no room for it"
    monkeypatch.setattr(
        ray,
        "nodes",
        lambda: [
            {"Alive": True, "Resources": {"CPU": 3.0, "tmkd_train": 1.0}},
            {"Alive": False, "Resources": {"CPU": 3.0, "tmkd_train": 1.0}},
            {"Alive": True, "Resources": {"CPU": 8.0, "tmkd_views": 1.0}},
        ],
    )
    assert pool() == (mark, None, 3, "cpu")
    cluster(node_marks=True, autoscaling=True, max_gpus=8)
    assert pool() == (mark, 1.0, 4, "cuda"), "not the nodes there are, but those that will come"
    worker = ("evaluation, test", {"CPU": 1.0, "GPU": 1.0, **mark})
    assert asked[-1] == ([worker], [worker] * 3), "all of them at once"


@pytest.mark.parametrize("settings", [{"autoscaling": True}, {"max_gpus": 2}])
def test_max_gpus_and_autoscaling_go_together(settings):
    with pytest.raises(ValueError, match="max_gpus"):
        ClusterConfig(**settings)


def test_a_local_ray_listens_on_loopback_alone(ray_cluster):
    from ray._private.worker import global_worker
    from run_processes import descendants

    listening = set()
    for process in descendants(os.getpid()):
        with contextlib.suppress(NoSuchProcess):
            listening |= {
                connection.laddr.ip
                for connection in process.net_connections(kind="tcp")
                if connection.status == CONN_LISTEN
            }
    assert listening
    assert listening <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
    assert global_worker.node.address_info["webui_url"] in (None, ""), "no dashboard"
