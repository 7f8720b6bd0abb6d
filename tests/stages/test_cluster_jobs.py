"""A cluster's head with dashboard and autoscaler: jobs submitted, stopped, killed; nodes that come and go."""

import ast
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cluster_head import NODES_OF_A_TYPE, Head, cluster_head
from run_processes import committed, descendants, started, titled, wait_until

from tmkd_ray.cli import main
from tmkd_ray.models import build_model
from tmkd_ray.types import TaskSpec

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]
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


def contents(store: Path) -> dict[str, bytes]:
    return {str(file.relative_to(store)): file.read_bytes() for file in store.rglob("*") if file.is_file()}


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
    assert "waiting up to" in said
    print("".join(line for line in said.splitlines(True) if "nodes" in line))


def submit(head: Head, *arguments: str) -> int:
    return main(["submit", "--address", head.dashboard, *arguments])


def test_what_a_user_can_mend_comes_out_as_the_job_s_exit_code(
    head: Head, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The working directory is this repository: the job runs the package in its copy."""
    words = ["knowledge", "dataset=image_folder", f"dataset.path={tmp_path / 'nothing'}", f"output={tmp_path}"]
    assert submit(head, "--working-dir", str(ROOT), *words) == 2
    out, err = capfd.readouterr()
    assert re.search(r"error: .*there is no folder .*nothing", out)
    assert "Traceback" not in out
    assert re.search(r"raysubmit_\w+: FAILED", err)


def wait_for_shards(store: Path, more_than: int) -> None:
    wait_until(lambda: len(committed(store)) > more_than)


def test_a_job_stopped_then_killed_goes_on_when_submitted_again(
    head: Head,
    options: list[str],
    undisturbed: tuple[Path, str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The working directory holds no package: that goes as a module of its own."""
    store = tmp_path / "store"
    arguments = ["--working-dir", str(tmp_path), "knowledge", *options, f"knowledge.path={store}"]

    def start() -> str:
        capfd.readouterr()
        assert submit(head, "--no-follow", *arguments) == 0
        return re.search(r"job (raysubmit_\w+) at", capfd.readouterr().out)[1]

    def actors() -> list[object]:
        return titled(descendants(head.pid), "MapWorker")

    job = start()
    wait_for_shards(store, more_than=2)
    assert submit(head, "stop", job) == 0
    assert capfd.readouterr().out == "STOPPED\n"
    wait_until(lambda: not actors())
    stopped_at = len(committed(store))
    assert 2 < stopped_at < NUM_SHARDS

    job = start()
    wait_for_shards(store, more_than=stopped_at + 2)
    (driver,) = titled(descendants(head.pid), "python -m tmkd_ray knowledge")[-1:]
    driver.kill()
    killed_at = time.monotonic()
    assert submit(head, "logs", job) == 1
    assert submit(head, "status", job) == 0
    assert f"{job}: FAILED" in capfd.readouterr().out
    done = {record: record.stat().st_mtime_ns for record in committed(store)}
    assert stopped_at < len(done) < NUM_SHARDS

    assert submit(head, *arguments) == 0
    seconds = time.monotonic() - killed_at
    said = capfd.readouterr().out
    left, kept = map(int, re.search(r"in (\d+) shards \((\d+) done\)", said).groups())
    assert left + kept == NUM_SHARDS
    assert kept >= len(done)
    assert {record: record.stat().st_mtime_ns for record in done} == done, "what was finished is not done twice"
    assert contents(store) == contents(undisturbed[0])
    print(f"finished {seconds:.1f} s after the driver was killed with {len(done)} of {NUM_SHARDS} shards done")
