"""Lines of progress from the cluster's workers to the terminal, or the job's log, of the one who waits."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tmkd_ray.progress import Rate as Rate
from tmkd_ray.progress import lines_to as lines_to
from tmkd_ray.progress import say as say


@ray.remote(num_cpus=0)
class _Channel:
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.refusal: str | None = None

    def refuse(self, message: str) -> None:
        """Note what the user has to mend: a worker's UserError, which no restart would cure."""
        self.refusal = message

    def refused(self) -> str | None:
        return self.refusal

    def put(self, line: str) -> None:
        self.lines.append(line)

    def drain(self) -> list[str]:
        lines, self.lines = self.lines, []
        return lines


@contextlib.contextmanager
def progress_channel() -> Iterator[Any]:
    """Yield an actor handle; what workers `put` there is printed here until the block ends."""
    # On the node of the one who waits: were it lost with another node, every restarted worker would fail.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    channel = _Channel.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
    done = threading.Event()

    def show() -> None:
        while not done.wait(0.5):
            for line in ray.get(channel.drain.remote()):
                say(line)

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield channel
    finally:
        done.set()
        thread.join()
        for line in ray.get(channel.drain.remote()):
            say(line)
        ray.kill(channel)
