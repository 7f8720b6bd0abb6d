"""`tmkd` in processes of its own, with the Ray that it starts: found and ended by process id."""

import contextlib
import functools
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ray._private import ray_constants

# Of Ray's own packages, which it puts on the path.
from psutil import NoSuchProcess, Process  # isort: skip

POLL_S = 0.02

OURS_ALONE = {
    "RAY_AUTH_MODE": "disabled",  # else a token file is written
    ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0",  # listen on loopback alone
}
"""The environment of a Ray that nobody else is to reach."""


@contextlib.contextmanager
def started(arguments: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Start `python ARGUMENTS` at the head of a session; end it and all that it started with the block."""
    with open(log, "ab") as file:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            stdout=file,
            stderr=file,
            env=os.environ | OURS_ALONE | {"PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
    try:
        yield process
    finally:
        kill_all(process.pid)
        process.wait()


@dataclass(frozen=True)
class Answer:
    """How a command ended, and what it said on stdout and stderr."""

    code: int
    out: str
    err: str


Commands = Callable[..., Answer]
"""Takes the arguments of `tmkd`."""


@contextlib.contextmanager
def commands(prepare: Callable[[], None] | None = None) -> Iterator[Commands]:
    """Run `tmkd` commands one after another on one Ray, in a process with the environment of this moment.

    Args:
        prepare: called there first; a function of a module.
    """
    with process_that_answers(functools.partial(_local_ray, prepare)) as run:
        yield run


def _local_ray(prepare: Callable[[], None] | None) -> Commands:
    from tmkd_ray.stages.session import start_local_ray

    start_local_ray(num_cpus=4)
    if prepare is not None:
        prepare()
    return run_command


def run_command(*arguments: str) -> Answer:
    """Run a command of `tmkd` in this process."""
    from tmkd_ray.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    return Answer(code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def process_that_answers(start: Callable[[], Callable[..., Any]]) -> Iterator[Callable[..., Any]]:
    """Yield a function that another process computes; it and all that it starts end with the block.

    Args:
        start: called there first, in the environment of this moment; returns the function.
    """
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(there, start))
    process.start()
    there.close()

    def ask(*arguments: Any) -> Any:
        here.send(arguments)
        answer = here.recv()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    try:
        yield ask
    finally:
        assert process.pid is not None
        kill_all(process.pid)
        process.join()


def _serve(connection: Connection, start: Callable[[], Callable[..., Any]]) -> None:
    os.setsid()
    answer = start()
    while True:
        arguments = connection.recv()
        try:
            connection.send(answer(*arguments))
        except Exception as error:
            error.add_note(traceback.format_exc())
            connection.send(error)


def kill_all(leader: int) -> None:
    """Kill the process group of this leader at once, and then all that it started."""
    offspring = descendants(leader)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)
    for process in offspring:
        with contextlib.suppress(NoSuchProcess):  # nor is it one that got its number since, which psutil knows
            process.kill()
    for process in offspring:
        with contextlib.suppress(NoSuchProcess):
            process.wait()


def descendants(pid: int) -> list[Process]:
    """Return all that a process started; none if it has ended."""
    try:
        return Process(pid).children(recursive=True)
    except NoSuchProcess:
        return []


def titled(processes: Sequence[Process], title: str) -> list[Process]:
    """Return those whose title has a part; Ray's workers are called by what they run."""
    found = []
    for process in processes:
        with contextlib.suppress(NoSuchProcess):
            if title in " ".join(process.cmdline()):
                found.append(process)
    return found


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes] | None = None) -> None:
    """Look again and again; pytest's time-out ends it. Fails if the process ends first."""
    while not condition():
        assert process is None or process.poll() is None, f"ended with {process.returncode}"
        time.sleep(POLL_S)


def committed(store: Path) -> set[Path]:
    """Return the records of the shards that are done."""
    return set(store.glob("*/[0-9]*.json"))
