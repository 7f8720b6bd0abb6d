"""A Ray head with dashboard on loopback, whose autoscaler starts made-up nodes on this machine."""

import contextlib
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml
from run_processes import started, wait_until

NODE_TYPES = {
    "views": {"CPU": 1, "tmkd_views": 1},
    "teacher": {"CPU": 1, "GPU": 1, "tmkd_teacher": 1},
}
NODES_OF_A_TYPE = 2
HEAD_CPUS = 3


@dataclass(frozen=True)
class Head:
    """A running head: its process, addresses, and folder of logs."""

    pid: int
    address: str
    dashboard: str
    logs: Path


@contextlib.contextmanager
def cluster_head() -> Iterator[Head]:
    """Start one, and end it with all that it started."""
    gcs, dashboard, client = free_ports(3)
    folder = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))  # short: Ray's sockets lie in it
    settings = folder / "autoscaling.yaml"
    settings.write_text(yaml.safe_dump(autoscaling(gcs)))
    arguments = [
        *("-m", "ray.scripts.scripts", "start", "--head", "--block", "--node-ip-address=127.0.0.1"),
        *(f"--port={gcs}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"),
        *("--dashboard-host=127.0.0.1", "--dashboard-agent-listen-port=0", "--include-dashboard=true"),
        *("--min-worker-port=0", "--max-worker-port=0", f"--num-cpus={HEAD_CPUS}", "--num-gpus=0"),
        *("--object-store-memory=200000000", f"--temp-dir={folder}", f"--autoscaling-config={settings}"),
        "--disable-usage-stats",
    ]
    environment = {
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # jobs call `python`
    }
    log = folder / "start.log"
    old = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        with started(arguments, log) as process:
            wait_until(lambda: answers(dashboard) and "Ray runtime started" in log.read_text(), process)
            address = f"127.0.0.1:{gcs}"
            yield Head(
                process.pid, address, f"http://127.0.0.1:{dashboard}", folder / "session_latest" / "logs"
            )
    finally:
        for name, value in old.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        shutil.rmtree(folder, ignore_errors=True)


def autoscaling(gcs: int) -> dict[str, object]:
    """Return the autoscaler's configuration: no worker at first, up to two of each type."""
    types: dict[str, object] = {
        name: {
            "resources": {**resources, "object_store_memory": 80_000_000},
            "node_config": {},
            "min_workers": 0,
            "max_workers": NODES_OF_A_TYPE,
        }
        for name, resources in NODE_TYPES.items()
    }
    types["ray.head.default"] = {"resources": {"CPU": HEAD_CPUS}, "node_config": {}, "max_workers": 0}
    return {
        "cluster_name": "made-up",
        "max_workers": 2 * NODES_OF_A_TYPE,
        "upscaling_speed": 10,
        "idle_timeout_minutes": 0.2,
        "provider": {
            "type": "fake_multinode",
            "gcs_address": f"127.0.0.1:{gcs}",
            "launch_multiple": True,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "available_node_types": types,
        "head_node_type": "ray.head.default",
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "initialization_commands": [],
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
        "auth": {},
    }


def free_ports(count: int) -> list[int]:
    """Return ports of loopback that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def answers(port: int) -> bool:
    """Return whether somebody listens on a port of loopback."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
