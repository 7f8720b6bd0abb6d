"""A cluster without workers, whose autoscaler starts what a knowledge run asks for, and takes it back."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cluster_head import NODES_OF_A_TYPE, Head, cluster_head
from run_processes import committed, started

from tmkd_ray.models import build_model
from tmkd_ray.types import TaskSpec

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

NUM_SHARDS = 68 + 8
"""Of 270 training and 30 validation images, 4 to each."""


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with cluster_head() as head:
        yield head


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Many small shards by a teacher that needs no training; output in a folder that all nodes share."""
    torch.manual_seed(0)
    checkpoint = tmp_path_factory.mktemp("teacher") / "resnet8.pth"
    torch.save(build_model("resnet8", TaskSpec(tuple("0123456789"), 32)).state_dict(), checkpoint)
    return [
        *("dataset=digits", "dataset.limit=300", "distiller=kd", "teacher.text=null"),
        *("teacher.visual.model=resnet8", f"teacher.visual.checkpoint={checkpoint}"),
        *("knowledge.num_variants=2", "knowledge.shard_rows=4", "knowledge.visual.batch_size=64"),
        f"output={tmp_path_factory.mktemp('runs')}",
    ]


@pytest.fixture(scope="module")
def undisturbed(head: Head, options: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A store computed by nodes that the autoscaler started for it, and what the run said."""
    folder = tmp_path_factory.mktemp("grown")
    pools = [
        *("knowledge.views.num_cpus=1", f"knowledge.views.max_size={NODES_OF_A_TYPE}"),
        f"knowledge.visual.max_size={NODES_OF_A_TYPE}",
        *("cluster.autoscaling=true", f"cluster.max_gpus={NODES_OF_A_TYPE}", "cluster.node_marks=true"),
    ]
    script = Path(__file__).with_name("grow_a_cluster.py")
    arguments = [str(script), head.address, *options, *pools, f"knowledge.path={folder / 'store'}"]
    with started(arguments, folder / "log") as run:
        assert run.wait() == 0, (folder / "log").read_text()
    return folder / "store", (folder / "log").read_text()


def test_nodes_of_the_right_kinds_come_and_go(head: Head, undisturbed: tuple[Path, str]) -> None:
    store, said = undisturbed
    assert len(committed(store)) == NUM_SHARDS
    assert "nodes before: {'tmkd_views': 0, 'tmkd_teacher': 0}" in said
    counts = [ast.literal_eval(nodes) for nodes in re.findall(r"nodes after [\d.]+ s: (\{.*\})", said)]
    both = {"tmkd_views": NODES_OF_A_TYPE, "tmkd_teacher": NODES_OF_A_TYPE}
    assert both in counts
    assert counts[-1] == dict.fromkeys(both, 0), "they go back"
    log = (head.logs / "monitor.log").read_text()
    launches = re.findall(r"Adding (\d+) node\(s\) of type (\w+)", log)
    for kind in ("views", "teacher"):
        first = next(int(count) for count, name in launches if name == kind)
        assert first == NODES_OF_A_TYPE, "all of them at once"
    before = log.partition("Adding")[0]
    assert "{'CPU': 1.0}: " not in before, "the nodes came for the pools, not for tasks without a mark"
    print("".join(line for line in said.splitlines(True) if "nodes" in line))
