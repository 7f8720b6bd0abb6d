"""Lines of progress from the cluster's workers to the terminal, or the job's log, of the one who waits."""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


def say(line: str) -> None:
    """Print a line of progress; results go to stdout, progress to stderr."""
    print(line, file=sys.stderr, flush=True)


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


class Rate:
    """Says how far a stage is: done of total, rate, time left; at most every `interval_s` seconds."""

    def __init__(self, label: str, total: int, unit: str, interval_s: float = 2.0) -> None:
        self.label, self.total, self.unit, self.interval_s = label, total, unit, interval_s
        self.done = 0
        self.started = self.said = time.monotonic()

    def advance(self, count: int) -> None:
        """Count what is done, and say so if it is time or all is done."""
        self.done += count
        now = time.monotonic()
        if self.done < self.total and now - self.said < self.interval_s:
            return
        self.said = now
        rate = self.done / max(now - self.started, 1e-9)
        left = (self.total - self.done) / rate if rate > 0 else 0.0
        say(
            f"{self.label}: {self.done:,}/{self.total:,} {self.unit}  {rate:,.0f} {self.unit}/s  "
            f"{left:.0f} s left"
        )
