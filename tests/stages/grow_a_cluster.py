"""`tmkd knowledge` on a cluster that has no workers yet; says which nodes came, and that they went.

python grow_a_cluster.py ADDRESS OVERRIDE …
"""

import sys
import threading
import time

import ray

from tmkd_ray.cli import main
from tmkd_ray.stages import pipeline

POLL_S = 0.2


def workers() -> dict[str, int]:
    """Return how many nodes of each mark are there."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return {mark: sum(mark in node for node in nodes) for mark in ("tmkd_views", "tmkd_teacher")}


def run(address: str, overrides: list[str]) -> int:
    pipeline._device = lambda gpus: "cpu"  # the nodes' GPUs are made up
    ray.init(address=address, logging_level="error", log_to_driver=False)
    done = threading.Event()
    started = time.monotonic()

    def watch() -> None:
        seen = {}
        while not done.is_set() or any(seen.values()):
            if (now := workers()) != seen:
                seen = now
                print(f"nodes after {time.monotonic() - started:.1f} s: {seen}", flush=True)
            time.sleep(POLL_S)

    print(f"nodes before: {workers()}", flush=True)
    watching = threading.Thread(target=watch)
    watching.start()
    code = main(["knowledge", *overrides])
    print(f"exit code {code} after {time.monotonic() - started:.1f} s", flush=True)
    done.set()
    watching.join()  # until the nodes have gone
    ray.shutdown()
    return code


if __name__ == "__main__":
    sys.exit(run(sys.argv[1], sys.argv[2:]))
