"""Lines of progress: what is being done, how much of it is done, how fast, and how long it will take.

Results go to stdout, progress to stderr. In a terminal the line of a stage is written over itself; in a
job's log there are whole lines, the rarer the longer the stage takes.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

_TERMINAL_INTERVAL_S = 0.5
_MAX_INTERVAL_S = 60.0

_lock = threading.Lock()
_is_line_open = False
"""Whether the terminal's last line is one that the next may be written over."""

_sink: Callable[[str], None] | None = None
"""Where this process's lines go instead of its stderr."""


@contextlib.contextmanager
def lines_to(sink: Callable[[str], None]) -> Iterator[None]:
    """Hand this process's lines to `sink` within the block: those of a worker, whose stderr nobody sees."""
    global _sink
    earlier, _sink = _sink, sink
    try:
        yield
    finally:
        _sink = earlier


def say(line: str) -> None:
    """Print a line of progress."""
    if _sink is not None:
        _sink(line)
    else:
        _write(line, stays=True)


def _write(line: str, stays: bool) -> None:
    global _is_line_open
    with _lock:
        start = "\r\x1b[K" if _is_line_open else ""
        _is_line_open = not stays
        print(f"{start}{line}", end="\n" if stays else "", file=sys.stderr, flush=True)


def time_left(seconds: float) -> str:
    """`8 s`, `3 min 20 s`, `2 h 05 min`, `3 d 4 h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


class Rate:
    """Says how far a stage is: done of total, rate, time left.

    Args:
        interval_s: between the first two lines; in a log it doubles after each, up to a minute.
        say: what prints a line; None: this process's stderr, which may be a terminal, or where `lines_to` says.
        says_end: whether the last line, when all is done, is due whatever the interval.
        detail: what to add to a line; asked only when one is said.
        quiet_if_short: whether nothing at all is said of a stage that ends before its first line is due.
    """

    def __init__(
        self,
        label: str,
        total: int,
        unit: str,
        interval_s: float = 2.0,
        say: Callable[[str], None] | None = None,
        says_end: bool = True,
        detail: Callable[[], str] | None = None,
        quiet_if_short: bool = False,
    ) -> None:
        self.label, self.total, self.unit = label, total, unit
        say = say or _sink
        self.in_terminal = say is None and sys.stderr.isatty()
        self.interval_s = _TERMINAL_INTERVAL_S if self.in_terminal else interval_s
        self._say, self._says_end, self._quiet_if_short = say, says_end, quiet_if_short
        self._detail = detail
        self.done = 0
        self.started = self.said = time.monotonic()

    def over(self, items: Iterable[T]) -> Iterator[T]:
        """Yield the items, each of which is done when the next is asked for."""
        for item in items:
            yield item
            self.advance(1)

    def advance(self, count: int) -> None:
        """Count what is done, and say so if it is time or all is done."""
        self.done += count
        now = time.monotonic()
        is_end = self.done >= self.total
        is_short = self._quiet_if_short and self.said == self.started
        if is_end and (not self._says_end or is_short):
            return
        if not is_end and now - self.said < self.interval_s:
            return
        self.said = now
        if not self.in_terminal:
            self.interval_s = min(2 * self.interval_s, max(_MAX_INTERVAL_S, self.interval_s))
        line = self.line(now - self.started)
        if self._detail is not None:
            line += f"  {self._detail()}"
        if self._say is not None:
            self._say(line)
        else:
            _write(line, stays=is_end or not self.in_terminal)

    def line(self, seconds: float) -> str:
        """Return what is to be said after so many seconds."""
        rate = self.done / max(seconds, 1e-9)
        text = f"{self.label}: {self.done:,}/{self.total:,} {self.unit}  {_shown(rate)} {self.unit}/s"
        if self.done >= self.total:
            return f"{text}  in {time_left(seconds)}"
        left = time_left((self.total - self.done) / rate) if rate > 0 else "unknown"
        return f"{text}  {left} left"


def _shown(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
