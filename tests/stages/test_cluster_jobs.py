"""A real head: its autoscaler starts what a run asks for and takes it back; jobs are stopped and lose it."""

import ast
import concurrent.futures
import contextlib
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from cluster_head import NODES_OF_A_TYPE, Head, cluster_head
from run_processes import committed, descendants, kill_all, started, titled, wait_until

from tmkd_ray.cli import main
from tmkd_ray.models import build_model
from tmkd_ray.types import TaskSpec

# Of Ray's own packages, which it puts on the path.
from psutil import Process  # isort: skip

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]

NUM_SHARDS = 34 + 4
"""Of 270 training and 30 validation images, 8 to each."""


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
        *("knowledge.num_variants=2", "knowledge.shard_rows=8", "knowledge.visual.batch_size=64"),
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


@contextlib.contextmanager
def submitted(head: Head, log: Path, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """Submit a command with a copy of the repository, and follow it."""
    arguments = ["-m", "tmkd_ray", "submit", "--address", head.dashboard, "--working-dir", str(ROOT), *words]
    with started(arguments, log) as follower:
        yield follower


def held_driver(head: Head) -> Process:
    """Return the process of the running job, which starts no further shard: else all could be done too soon."""
    drivers = [
        process
        for process in titled(descendants(head.pid), "-m tmkd_ray knowledge")
        if "python" in process.name()  # its shell is called so too
    ]
    (driver,) = drivers
    driver.suspend()
    return driver


def is_pending(number: signal.Signals, process: Process) -> bool:
    """Return whether a signal waits for a process to go on (proc(5), ShdPnd)."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    (mask,) = re.findall(r"ShdPnd:\s*(\w+)", status)
    return bool(int(mask, 16) >> (number - 1) & 1)


def of_jobs(head: Head) -> list[str]:
    """Return what runs on the head for its jobs."""
    processes = descendants(head.pid)
    names = ("-m tmkd_ray", "MapWorker", "JobSupervisor", "RayTrain", "ray::MapBatches")
    return [" ".join(process.cmdline()) for name in names for process in titled(processes, name)]


@pytest.mark.timeout(600)
def test_a_job_is_stopped_and_loses_its_head(
    head: Head,
    options: list[str],
    undisturbed: tuple[Path, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each time the same command goes on; in the end the store is that of the run that nothing happened to."""
    store = tmp_path / "store"
    words = ["knowledge", *options, f"knowledge.path={store}"]

    log = tmp_path / "stopped"
    with submitted(head, log, *words) as follower:
        wait_until(lambda: len(committed(store)) > 2, follower)
        driver = held_driver(head)
        (job,) = re.findall(r"tmkd submit stop (\w+)", log.read_text())
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            stopping = pool.submit(main, ["submit", "--address", head.dashboard, "stop", job])
            wait_until(lambda: is_pending(signal.SIGTERM, driver))
            driver.send_signal(signal.SIGCONT)
            assert stopping.result() == 0
        assert capsys.readouterr().out == "STOPPED\n"
        assert follower.wait() == 130
    said = log.read_text()
    assert f"in {NUM_SHARDS} shards (0 done)" in said
    assert "Traceback" not in said
    assert "pid=" not in said, "lines of the job alone"
    assert "packaging.py" not in said, "nor the client's own"
    wait_until(lambda: not of_jobs(head))
    assert not (store / "writer.json").exists(), "it gave the store back"
    assert not (store / "manifest.json").exists()
    assert not [path for path in store.rglob(".*") if path.is_file()], "nothing half-written"
    stopped_at = check_shards(store)

    log = tmp_path / "lost"
    with submitted(head, log, *words) as follower:
        wait_until(lambda: len(committed(store)) > stopped_at + 2, follower)
        held_driver(head)
        kill_all(head.pid)
    assert f"({stopped_at} done)" in log.read_text()
    lost_at = check_shards(store)
    assert not (store / "manifest.json").exists()

    log = tmp_path / "finished"
    with cluster_head() as another, submitted(another, log, *words) as follower:
        assert follower.wait() == 0, log.read_text()
    assert f"({lost_at} done)" in log.read_text()
    assert files(store) == files(undisturbed[0])
    assert stopped_at < lost_at < NUM_SHARDS


def check_shards(store: Path) -> int:
    """Check that the shards that are there are whole, and return their number."""
    done = committed(store)
    for record in done:
        (shard,) = record.parent.glob(f"{record.stem}*.parquet")
        assert pq.read_table(shard).num_rows > 0
    return len(done)


def files(store: Path) -> dict[str, bytes]:
    return {str(file.relative_to(store)): file.read_bytes() for file in store.rglob("*") if file.is_file()}
