"""A training by two workers on two nodes, all on this machine, one of which is lost on the way.

python lose_a_trainer.py FOLDER
"""

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ray
import test_train_survives as line
from ray.cluster_utils import Cluster
from run_processes import wait_until

from tmkd_ray.stages.training import TrainingJob, run_jobs

IMPATIENT = {
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 3,
}
STEP_S = 0.3


def build(device: object) -> line.LineTask:
    return line.LineTask(lambda epoch, step, context: time.sleep(STEP_S))


def run(folder: Path) -> None:
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": IMPATIENT}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    ray.init(address=cluster.address, logging_level="error", log_to_driver=False)
    for module in (line, sys.modules[__name__]):
        ray.cloudpickle.register_pickle_by_value(module)
    job = TrainingJob("k", "line", str(folder / "job"), line.config(num_workers=2, max_failures=3), build)
    # Nodes are added by the main thread alone, so the training is another's.
    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(run_jobs, [job], str(folder))
        wait_until(lambda: training.done() or (folder / "checkpoints" / "checkpoint_00000004").exists())
        lost_at = time.monotonic()
        cluster.remove_node(nodes[0], allow_graceful=False)
        cluster.add_node(num_cpus=1)  # as an autoscaler would
        training.result()
    print(f"finished {time.monotonic() - lost_at:.1f} s after a training node was lost", flush=True)
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    run(Path(sys.argv[1]))
