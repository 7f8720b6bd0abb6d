"""`tmkd knowledge` on a cluster of three nodes, all on this machine, one of which is lost on the way.

python lose_a_node.py STORE OVERRIDE …
"""

import sys
import threading
from pathlib import Path

import ray
from ray._private import ray_constants
from ray.cluster_utils import Cluster
from run_processes import committed, descendants, titled, wait_until

from tmkd_ray.cli import main


def run(store: Path, overrides: list[str]) -> int:
    impatient = {
        "health_check_period_ms": 500,
        "health_check_timeout_ms": 2000,
        "health_check_failure_threshold": 3,
    }
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": impatient}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = [cluster.add_node(num_cpus=2) for _ in range(2)]
    ray.init(address=cluster.address, logging_level="error", log_to_driver=False)

    def lose_a_node() -> None:
        wait_until(lambda: len(committed(store)) > 2)
        actors = {node: titled(descendants(_raylet(node)), "MapWorker") for node in nodes}
        node = max(nodes, key=lambda node: len(actors[node]))
        titles = [" ".join(actor.cmdline()) for actor in actors[node]]
        cluster.remove_node(node, allow_graceful=False)
        print(f"lost a node that ran {titles} after {len(committed(store))} shards", flush=True)

    losing = threading.Thread(target=lose_a_node)
    losing.start()
    code = main(["knowledge", *overrides])
    losing.join()
    ray.shutdown()
    cluster.shutdown()
    return code


def _raylet(node: "ray._private.node.Node") -> int:
    (started,) = node.all_processes[ray_constants.PROCESS_TYPE_RAYLET]
    return int(started.process.pid)


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1]), sys.argv[2:]))
