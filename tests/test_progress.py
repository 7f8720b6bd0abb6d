"""Lines of progress in a log and in a terminal."""

import io
import sys

import pytest

from tmkd_ray import progress
from tmkd_ray.progress import Rate, lines_to, say, time_left


@pytest.fixture
def clock(monkeypatch):
    """A clock that tests set."""

    class Clock:
        now = 100.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_log_has_whole_lines_ever_rarer(clock, capsys):
    rate = Rate("knowledge", 1000, "images")
    for _ in range(20):
        clock.now += 1
        rate.advance(50)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "knowledge: 100/1,000 images  50 images/s  18 s left",
        "knowledge: 300/1,000 images  50 images/s  14 s left",
        "knowledge: 700/1,000 images  50 images/s  6 s left",
        "knowledge: 1,000/1,000 images  50 images/s  in 20 s",
    ]


def test_a_terminal_has_one_line_that_is_written_over(clock, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    rate = Rate("x", 3, "steps")
    for _ in range(2):
        clock.now += 1
        rate.advance(1)
    say("something else")
    clock.now += 1
    rate.advance(1)
    say("after")
    assert terminal.getvalue() == (
        "x: 1/3 steps  1 steps/s  2 s left"
        "\r\x1b[Kx: 2/3 steps  1 steps/s  1 s left"
        "\r\x1b[Ksomething else\n"
        "x: 3/3 steps  1 steps/s  in 3 s\n"
        "after\n"
    )


def test_another_may_print_the_lines_and_a_short_stage_says_nothing(clock):
    said = []
    asked = []
    rate = Rate(
        "epoch", 4, "steps", 15, said.append, says_end=False, detail=lambda: asked.append(1) or "loss 0.5"
    )
    for _ in range(4):
        clock.now += 5
        rate.advance(1)
    assert said == ["epoch: 3/4 steps  0.2 steps/s  5 s left  loss 0.5"]
    assert asked == [1], "only when there is a line"
    short = Rate("epoch", 2, "steps", interval_s=15, say=said.append, says_end=False)
    short.advance(2)
    assert len(said) == 1


def test_lines_come_at_least_once_a_minute(clock):
    said = []
    rate = Rate("x", 10_000, "steps", say=said.append)
    for _ in range(600):
        clock.now += 1
        rate.advance(1)
    assert 10 <= len(said) <= 16


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (60, "1 min 00 s"),
        (3599, "59 min 59 s"),
        (7500, "2 h 05 min"),
        (200_000, "2 d 7 h"),
    ],
)
def test_time_left(seconds, text):
    assert time_left(seconds) == text


def test_a_short_stage_may_keep_quiet_and_a_long_one_says_its_end(clock):
    said = []
    short = Rate("short", 2, "files", interval_s=5, say=said.append, quiet_if_short=True)
    for _ in short.over(range(2)):
        clock.now += 1
    assert said == []
    long = Rate("long", 2, "files", interval_s=5, say=said.append, quiet_if_short=True)
    assert [item for item in long.over("ab") if setattr(clock, "now", clock.now + 10) is None] == ["a", "b"]
    assert said == ["long: 1/2 files  0.1 files/s  10 s left", "long: 2/2 files  0.1 files/s  in 20 s"]


def test_a_workers_lines_go_to_the_one_who_waits(clock, capsys):
    said = []
    with lines_to(said.append):
        say("one")
        Rate("two", 1, "files").advance(1)
    say("three")
    assert said[0] == "one"
    assert said[1].startswith("two: 1/1 files")
    assert capsys.readouterr().err == "three\n"
