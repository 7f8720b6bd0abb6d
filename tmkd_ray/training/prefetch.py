"""Prepare batches in a thread while the step before runs."""

import contextlib
import queue
import threading
from collections.abc import Iterator
from typing import TypeVar

T = TypeVar("T")


def prefetched(items: Iterator[T], ahead: int = 4) -> Iterator[T]:
    """Yield what `items` yields, up to `ahead` of it prepared by a thread.

    It pays where preparing lets go of the interpreter's lock, as OpenCV, NumPy and torch do. An exception of
    the thread is raised here; a consumer that leaves early ends the thread.
    """
    ready: queue.Queue[tuple[T] | BaseException | None] = queue.Queue(maxsize=ahead)
    done = threading.Event()

    def offer(item: tuple[T] | BaseException | None) -> None:
        while not done.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return

    def prepare() -> None:
        try:
            for item in items:
                if done.is_set():
                    return
                offer((item,))
            offer(None)
        except BaseException as error:  # handed to the consumer, which raises it
            offer(error)

    thread = threading.Thread(target=prepare, daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item[0]
    finally:
        done.set()
        thread.join()
